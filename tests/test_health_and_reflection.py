"""What tools ask for besides calls: health and reflection, by grpcurl and by grpcio."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import zstandard
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpclib.health.v1 import health_pb2
from grpclib.reflection.v1 import reflection_pb2 as reflection_v1
from grpclib.reflection.v1alpha import reflection_pb2 as reflection_v1alpha

from tests.conftest import Serve, Served, left_in, require
from tests.stranger import (
    RPCS,
    Mark,
    compressed,
    first_message,
    open_channel,
    reply_of,
    served_for_the_module,
    start,
)

Code = grpc.StatusCode
HEALTHY = (
    "",
    "ai.AI",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "liveness",
    "readiness",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served_for_the_module("Stranger", tmp_path_factory.mktemp("stranger"))


# ---- grpcurl


@pytest.fixture(scope="module")
def grpcurl(server: Served) -> Callable[..., str]:
    program = require("grpcurl")

    def call(*arguments: str, code: int = 0) -> str:
        """grpcurl's output; options come before the address, commands after it."""
        options = [argument for argument in arguments if argument.startswith(("-", "{", "x-"))]
        command = [program, "-plaintext", *options, server.address]
        command += [argument for argument in arguments if argument not in options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout or done.stderr

    return call


def test_grpcurl_asks_for_health(grpcurl: Callable[..., str]) -> None:
    assert json.loads(grpcurl("grpc.health.v1.Health.Check")) == {"status": "SERVING"}
    for service in HEALTHY:
        assert json.loads(grpcurl("-d", json.dumps({"service": service}), "grpc.health.v1.Health/Check")) == {
            "status": "SERVING"
        }
    # 64 + the status code, says its help.
    assert "NotFound" in grpcurl("-d", '{"service": "nope"}', "grpc.health.v1.Health/Check", code=64 + 5)


def test_grpcurl_sees_the_schema(grpcurl: Callable[..., str]) -> None:
    assert set(grpcurl("list").split()) >= {"ai.AI", "grpc.health.v1.Health"}
    assert set(grpcurl("list", "ai.AI").split()) == {f"ai.AI.{rpc}" for rpc in RPCS}
    described = grpcurl("describe", "ai.AI")
    assert "rpc chaos ( stream .ai.Raw ) returns ( stream .ai.Raw );" in described
    for rpc in ("train", "predict", "log"):
        assert f"rpc {rpc} ( stream .ai.StreamInput ) returns ( stream .ai.Raw );" in described
    assert "bytes kwargs_json = 1;" in grpcurl("describe", "ai.StreamInput")
    assert "PHASE_DONE = 4;" in grpcurl("describe", "ai.Phase")


def test_grpcurl_calls_a_method(grpcurl: Callable[..., str]) -> None:
    data = base64.b64encode(compressed({"length": 10})).decode()
    said = grpcurl("-H", "x-func-name: text", "-d", json.dumps({"data": data}), "ai.AI/chaos")
    messages = [base64.b64decode(json.loads(part + "}")["data"]) for part in said.split("}") if part.strip()]
    assert messages[0] == b"PONG"
    assert len(json.loads(zstandard.decompress(messages[-1], max_output_size=100))) == 10


# ---- health and reflection, from grpcio

Serving = health_pb2.HealthCheckResponse


def health_stub(channel: grpc.Channel, method: str) -> Any:
    kind = channel.unary_unary if method == "Check" else channel.unary_stream
    return kind(
        f"/grpc.health.v1.Health/{method}",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=Serving.FromString,
    )


def test_health_knows_its_names(server: Served) -> None:
    with open_channel(server.address) as channel:
        check = health_stub(channel, "Check")
        for service in HEALTHY:
            assert check(health_pb2.HealthCheckRequest(service=service), timeout=10).status == Serving.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(health_pb2.HealthCheckRequest(service="nope"), timeout=10)
        assert caught.value.code() is Code.NOT_FOUND


def test_watch_tells_of_a_drain(serve: Serve, tmp_path: Path) -> None:
    """An unknown service is SERVICE_UNKNOWN, without an end (the protocol says so); liveness outlives readiness."""
    served = serve("tests.models_strangers:Stranger", "--drain", "20")
    mark = Mark(tmp_path / "mark")
    with open_channel(served.address) as channel:
        watch = health_stub(channel, "Watch")
        watches = {
            service: watch(health_pb2.HealthCheckRequest(service=service), timeout=30) for service in (*HEALTHY, "nope")
        }
        first = {service: next(call).status for service, call in watches.items()}
        assert first == {**dict.fromkeys(HEALTHY, Serving.SERVING), "nope": Serving.SERVICE_UNKNOWN}
        requests = iter([first_message("chaos", mark.kwargs)])
        job = start(channel, "chaos", requests, metadata=[("x-func-name", "watch")])
        mark.wait("started")
        served.process.terminate()
        for service in HEALTHY:
            if service != "liveness":
                assert next(watches[service]).status == Serving.NOT_SERVING
        check = health_stub(channel, "Check")
        assert check(health_pb2.HealthCheckRequest(service="liveness"), timeout=10).status == Serving.SERVING
        assert check(health_pb2.HealthCheckRequest(service="readiness"), timeout=10).status == Serving.NOT_SERVING
        refused = reply_of(start(channel, "predict", iter([first_message("predict", {})])))
        assert (refused.code, refused.info.reason) == (Code.UNAVAILABLE, "DRAINING")
        job.cancel()
        mark.wait("cancelled")
    served.process.communicate(timeout=20)
    assert served.process.returncode == 0
    assert left_in(served.spool) == []


@pytest.mark.parametrize("package", [reflection_v1, reflection_v1alpha])
def test_both_reflections_describe_the_service(server: Served, package: Any) -> None:
    version = package.DESCRIPTOR.package
    Request, Response = package.ServerReflectionRequest, package.ServerReflectionResponse
    with open_channel(server.address) as channel:
        stub = channel.stream_stream(
            f"/{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=Request.SerializeToString,
            response_deserializer=Response.FromString,
        )
        asked = [
            Request(list_services=""),
            Request(file_containing_symbol="ai.AI"),
            Request(file_by_filename="ai.proto"),
            Request(file_containing_symbol="ai.Nope"),
        ]
        listed, by_symbol, by_name, unknown = stub(iter(asked), timeout=10)
    assert {service.name for service in listed.list_services_response.service} >= {"ai.AI", "grpc.health.v1.Health"}
    assert unknown.error_response.error_code == Code.NOT_FOUND.value[0]
    for answer in (by_symbol, by_name):
        (raw,) = answer.file_descriptor_response.file_descriptor_proto
        file = FileDescriptorProto.FromString(raw)
        assert [method.name for method in file.service[0].method] == list(RPCS)
