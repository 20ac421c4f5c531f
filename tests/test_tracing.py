"""One trace from the caller through upload, queue, run and download, as an OTLP collector receives it."""

from __future__ import annotations

import asyncio
import dataclasses
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

import aipod
from tests import stranger
from tests.conftest import ROOT, Served, free_port, run, wait_until

MODEL = "tests.models_traced:Traced"
CALLER, JOB = 3, 2  # opentelemetry.proto.trace.v1.Span.SpanKind: CLIENT, SERVER
REMOTE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclasses.dataclass(frozen=True)
class Span:
    service: str
    name: str
    trace: str
    id: str
    parent: str
    kind: int
    error: str
    attributes: dict[str, str | int]


class Collector:
    """Takes OTLP over HTTP, as any collector does."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.raw = b""
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector._take(body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "50",  # ms
        }

    def _take(self, body: bytes) -> None:
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {item.key: item.value.string_value for item in resource.resource.attributes}
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                self.spans.append(
                    Span(
                        named["service.name"],
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.kind,
                        span.status.message,
                        {
                            item.key.removeprefix("aipod."): item.value.string_value or item.value.int_value
                            for item in span.attributes
                        },
                    )
                )

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def below(self, parent: Span) -> list[str]:
        """The names of a span's children, in the order in which they ended."""
        return [span.name for span in self.spans if span.parent == parent.id and span.kind not in (CALLER, JOB)]

    def wait(self, name: str, count: int = 1) -> Span:
        """The last of `count` spans of this name, once they are here."""
        wait_until(lambda: len(self.named(name)) >= count)
        return self.named(name)[-1]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    for name, value in collector.environment.items():
        monkeypatch.setenv(name, value)
    yield collector
    collector.close()


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "aipod", *arguments]
    return subprocess.run(
        program, cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def serve(directory: Path, *options: str, bind: str = "127.0.0.1:0") -> Served:
    return Served(MODEL, directory, options, bind)


def test_one_trace_from_the_caller_through_all_phases(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = tmp_path / "payload"
    payload.write_bytes(os.urandom(3_000_000))
    with monkeypatch.context() as patch:
        patch.setenv("OTEL_SERVICE_NAME", "model")
        served = serve(tmp_path)
    done = command("call", "predict", str(payload), "--to", served.address, AIPOD_TOKEN="a-very-secret-token")
    assert done.returncode == 0, done.stderr
    caller, job = collector.wait("predict"), collector.wait("job predict")
    collector.wait("download", 2)
    assert (caller.kind, caller.parent, caller.service, caller.error) == (CALLER, "", "aipod", "")
    assert (job.kind, job.parent, job.service, job.error) == (JOB, caller.id, "model", "")
    assert {span.trace for span in collector.spans} == {caller.trace}
    assert collector.below(caller) == ["connect", "upload", "queue", "run", "download"]
    assert collector.below(job) == ["upload", "queue", "run"]
    assert [(span.parent, span.service) for span in collector.named("download") if span.kind == JOB] == [
        (caller.id, "model")
    ]
    assert job.attributes["job_id"] == caller.attributes["job_id"] != ""
    assert (job.attributes["runs"], job.attributes["payload_size"]) == (1, 3_000_000)
    # What the model traces belongs to its run.
    ran = next(span for span in collector.named("run") if span.service == "model")
    assert done.stdout.startswith(f'"00-{ran.trace}-{ran.id}-')
    assert b"a-very-secret-token" not in collector.raw
    assert served.stop() == 0, served.log_text()


def test_a_failure_has_its_reason_and_no_text_of_the_models(collector: Collector, tmp_path: Path) -> None:
    served = serve(tmp_path)
    done = command("call", "fail", "--to", served.address)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("aipod: MODEL_ERROR: ValueError: a-secret-in-a-message (")
    assert [collector.wait(name).error for name in ("fail", "job fail")] == ["MODEL_ERROR"] * 2
    assert b"a-secret-in-a-message" not in collector.raw
    assert served.stop() == 0, served.log_text()


def test_a_stock_client_brings_its_trace(collector: Collector, tmp_path: Path) -> None:
    served = serve(tmp_path)
    reply = stranger.ask(served.address, "predict", {}, metadata=[("traceparent", REMOTE)])
    job = collector.wait("job predict")
    assert (job.trace, job.parent) == (REMOTE.split("-")[1], REMOTE.split("-")[2])
    assert job.trace in reply.json()
    # One that makes no sense is none.
    stranger.ask(served.address, "predict", {}, metadata=[("traceparent", "00-zz-" + "1" * 200)])
    other = collector.wait("job predict", 2)
    assert other.parent == ""
    assert served.stop() == 0, served.log_text()


def test_baggage_is_the_models_and_not_looked_at(collector: Collector, tmp_path: Path) -> None:
    served = serve(tmp_path)
    bad = ",".join(["bad"] * 100)  # one warning each
    for baggage in (bad, "a=1" + " " * 8000 + "b", "k=v"):
        stranger.ask(served.address, "predict", {}, metadata=[("traceparent", REMOTE), ("baggage", baggage)])
    assert collector.wait("job predict", 3).parent == REMOTE.split("-")[2]
    assert served.stop() == 0, served.log_text()
    assert "aggage" not in served.log_text()


def test_a_job_that_another_server_goes_on_with_stays_in_its_trace(collector: Collector, tmp_path: Path) -> None:
    mark, gate, address = tmp_path / "mark", tmp_path / "gate", f"127.0.0.1:{free_port()}"
    first = serve(tmp_path, bind=address)

    async def main() -> str:
        async with aipod.Client(address) as client:
            job = await client.submit(
                "wait", metadata=[("traceparent", REMOTE)], kwargs={"mark": str(mark), "gate": str(gate)}
            )
            await asyncio.to_thread(wait_until, mark.exists)
            first.process.kill()
            await asyncio.to_thread(first.process.communicate)
            mark.unlink()
            second.append(await asyncio.to_thread(serve, tmp_path, bind=address))
            await asyncio.to_thread(wait_until, mark.exists)
            gate.touch()
            answer: str = await job.wait()
            return answer

    second: list[Served] = []
    assert run(main) == "done"
    job = collector.wait("job wait")  # the first server's is gone with it
    assert (job.trace, job.parent) == (REMOTE.split("-")[1], REMOTE.split("-")[2])
    assert collector.below(job) == ["queue", "run"]
    assert job.attributes["runs"] == 2
    assert second[0].stop() == 0, second[0].log_text()


def test_a_collector_that_is_away_costs_seconds_and_not_the_last_line(tmp_path: Path) -> None:
    served = serve(tmp_path)
    dead = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    failed = command("call", "fail", "--to", served.address, **dead)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("aipod: MODEL_ERROR: ")  # not what the exporter says
    assert served.stop() == 0, served.log_text()


def test_without_opentelemetry_nothing_is_traced_and_a_wish_for_it_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "opentelemetry"
    missing.mkdir(parents=True)
    (missing / "__init__.py").write_text("raise ImportError('there is none')\n")
    path = {"PYTHONPATH": str(missing.parent)}
    served = serve(tmp_path)
    done = command("call", "predict", "--to", served.address, "--meta", f"traceparent={REMOTE}", **path)
    assert (done.returncode, done.stdout) == (0, f'"{REMOTE}"\n')  # the server, which traces nothing, hands it on
    wish = {**path, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    refused = command("call", "predict", "--to", served.address, **wish)
    assert refused.returncode == 2
    assert "pip install 'aipod[traces]'" in refused.stderr
    assert command("health", "--to", served.address, **wish).returncode == 0, "it makes no spans"
    assert command("call", "predict", "--to", served.address, "--meta", f"traceparent={REMOTE}", **wish,
                   OTEL_TRACES_EXPORTER="none").returncode == 0  # fmt: skip
    assert served.stop() == 0, served.log_text()
