"""What tools ask for besides calls: health and reflection, by grpcurl and by grpcio."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import zstandard
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpclib.const import Cardinality
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.health.v1 import health_pb2
from grpclib.reflection.v1 import reflection_pb2 as reflection_v1
from grpclib.reflection.v1alpha import reflection_pb2 as reflection_v1alpha

from aipod.config import KIB, Config
from aipod.service.schema import health_message
from aipod.transport.channel import Channel
from tests.conftest import ROOT, Serve, Served, left_in, peak_memory, require, run, wait_until
from tests.phases import open_files
from tests.stranger import (
    RPCS,
    Mark,
    compressed,
    first_message,
    open_channel,
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
    assert json.loads(grpcurl("grpc.health.v1.Health/List")) == {
        "statuses": {service: {"status": "SERVING"} for service in HEALTHY}
    }


def test_grpcurl_sees_the_schema(grpcurl: Callable[..., str]) -> None:
    assert set(grpcurl("list").split()) >= {"ai.AI", "grpc.health.v1.Health"}
    assert set(grpcurl("list", "ai.AI").split()) == {f"ai.AI.{rpc}" for rpc in RPCS}
    described = grpcurl("describe", "ai.AI")
    assert "rpc chaos ( stream .ai.Raw ) returns ( stream .ai.Raw );" in described
    for rpc in ("train", "predict", "log"):
        assert f"rpc {rpc} ( stream .ai.StreamInput ) returns ( stream .ai.Raw );" in described
    assert "bytes kwargs_json = 1;" in grpcurl("describe", "ai.StreamInput")
    assert "PHASE_DONE = 4;" in grpcurl("describe", "ai.Phase")
    assert "rpc List ( .grpc.health.v1.HealthListRequest )" in grpcurl("describe", "grpc.health.v1.Health")


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
        listed = channel.unary_unary(
            "/grpc.health.v1.Health/List", response_deserializer=health_message("HealthListResponse").FromString
        )(b"", timeout=10)
        assert {name: one.status for name, one in listed.statuses.items()} == dict.fromkeys(HEALTHY, Serving.SERVING)
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
        job.cancel()
        mark.wait("cancelled")
        for call in watches.values():
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert caught.value.details() == "the server is shutting down", "an end, and no lost connection"
    served.process.communicate(timeout=20)
    assert served.process.returncode == 0
    assert left_in(served.spool) == []


def sockets(served: Served) -> int:
    """Not all descriptors: what else a server has open comes and goes."""
    return sum(name.startswith("socket:") for name in open_files(served))


def test_a_thousand_watches(serve: Serve) -> None:
    """Each is told of the drain; they cost little memory; nothing is left of those whose peers have gone.

    Mutants seen: no word of the change; the end before the word; the request's stream is not closed for more.
    """
    served = serve("tests.models_strangers:Stranger")
    own = sockets(served)
    before = peak_memory(served.process.pid)
    told = {"nope": [Serving.SERVICE_UNKNOWN], "liveness": [Serving.SERVING]}
    kinds = health_message("HealthCheckRequest"), health_message("HealthCheckResponse")

    async def main() -> None:
        channels = [Channel(served.address, Config()) for _ in range(64)]

        async def watch(number: int, watching: asyncio.Event) -> None:
            service, said = (*HEALTHY, "nope")[number % 8], []
            hostile = number % 4 == 0  # what no honest client sends behind the one message is not kept
            path = "/grpc.health.v1.Health/Watch"
            with contextlib.suppress(StreamTerminatedError, GRPCError, ProtocolError):
                async with channels[number // 16].request(path, Cardinality.STREAM_STREAM, *kinds) as stream:
                    await stream.send_message(kinds[0](service=service), end=not hostile)
                    while (message := await stream.recv_message()) is not None:
                        said.append(message.status)
                        if hostile and not watching.is_set():
                            await stream._stream.send_data(bytes(200 * KIB))
                        watching.set()
            if number >= 16:
                assert said == told.get(service, [Serving.SERVING, Serving.NOT_SERVING])

        events = [asyncio.Event() for _ in range(1008)]
        watches = [asyncio.create_task(watch(number, event)) for number, event in enumerate(events)]
        await asyncio.gather(*(event.wait() for event in events))
        assert peak_memory(served.process.pid) - before < 40
        channels[0].close()
        await asyncio.gather(*watches[:16])
        await asyncio.to_thread(wait_until, lambda: sockets(served) == own + 62)
        served.process.terminate()
        await asyncio.gather(*watches)
        for channel in channels:
            await channel.aclose()

    run(main)
    served.process.communicate(timeout=30)
    assert served.process.returncode == 0
    assert " ERROR " not in served.log_text()


def test_what_anybody_may_ask_is_short(server: Served) -> None:
    """Mutant seen: as long as a call's messages."""
    with open_channel(server.address) as channel:
        check = health_stub(channel, "Check")
        for length, code in ((4000, Code.NOT_FOUND), (5000, Code.RESOURCE_EXHAUSTED)):
            with pytest.raises(grpc.RpcError) as caught:
                check(health_pb2.HealthCheckRequest(service="x" * length), timeout=10)
            assert caught.value.code() is code


def test_reflection_can_be_switched_off(serve: Serve) -> None:
    served = serve("tests.models_strangers:Stranger", "--no-reflection")
    done = subprocess.run([require("grpcurl"), "-plaintext", served.address, "list"], capture_output=True, text=True)
    assert (done.returncode, "does not support the reflection API" in done.stderr) == (1, True)
    command = [sys.executable, "-m", "aipod", "health", "--to", served.address]
    listed = subprocess.run([*command, "--all"], cwd=ROOT, capture_output=True, text=True)
    assert listed.stdout.splitlines() == [
        f"SERVING      {name or '(the whole server)'}" for name in sorted(HEALTHY) if "reflection" not in name
    ]
    unknown = subprocess.run([*command, HEALTHY[3]], cwd=ROOT, capture_output=True, text=True)
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("aipod: NOT_FOUND: the server knows no service 'grpc.reflection.v1")


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
