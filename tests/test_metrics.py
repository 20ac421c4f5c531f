"""What a server counts, told to Prometheus: exact numbers after real jobs, and a page that nobody can hold up."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
import trio
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from trio.testing import MockClock

import aipod
from aipod.metrics import LAG, SECONDS, Histogram, Metrics, Now
from aipod.prometheus.families import families
from aipod.prometheus.page import AGAIN, AT_ONCE, FRESH, MAX_REQUEST, PATIENCE, Page, serve_page
from tests import scrape, stranger, wire
from tests.conftest import ROOT, Serve, Served, children, free_port, require, run, wait_until
from tests.pairs import MODEL as RESUME
from tests.pairs import Work, begun, running, work_in
from tests.scrape import Scrape, metrics_of, until
from tests.test_identity import (
    Tokens,
    tokens,  # noqa: F401 - a fixture
)

work = pytest.fixture(work_in)
ON = ("--metrics", "127.0.0.1:0")
PAYLOAD = os.urandom(3_000_000)
NOW = Now({}, 0, {}, 0, False, None, None)


# --- numbers


def test_a_value_is_in_the_first_bucket_that_it_does_not_exceed() -> None:
    """Mutants seen: `bisect_right`; buckets that do not count those below."""
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.1):
        histogram.observe(value)
    metrics = Metrics()
    metrics.late = histogram
    found = scrape.samples(families(metrics, NOW, "1"))
    late = {name: value for name, value in found.items() if name.startswith("aipod_tick_lag")}
    assert late == {
        'aipod_tick_lag_seconds_bucket{le="1.0"}': 2,
        'aipod_tick_lag_seconds_bucket{le="2.0"}': 4,
        'aipod_tick_lag_seconds_bucket{le="+Inf"}': 5,
        "aipod_tick_lag_seconds_count": 5,
        "aipod_tick_lag_seconds_sum": 6.6,
    }


def test_buckets_go_up_to_hours() -> None:
    assert sorted(SECONDS) == list(SECONDS)
    assert SECONDS[-1] == 24 * 3600
    assert sorted(LAG) == list(LAG)


def test_what_others_have_named_counts_as_other() -> None:
    """Mutant seen: `setdefault` with whatever comes."""
    metrics = Metrics(["predict"], ["BUSY"])
    metrics.offer("/ai.AI/predict", "bidi_stream")
    for number in range(1000):
        metrics.begin(f"/x/{number}").ended("UNIMPLEMENTED", 0.0)
        metrics.of_method(f"m{number}").started += 1
        metrics.fail(f"R{number}")
    found = scrape.samples(families(metrics, NOW, "1"))
    assert found['grpc_server_started_total{grpc_method="other",grpc_service="other",grpc_type="other"}'] == 1000
    assert found['aipod_jobs_started_total{method="other"}'] == 1000
    assert found['aipod_call_errors_total{reason="other"}'] == 1000
    fresh = Metrics(["predict"], ["BUSY"])
    fresh.offer("/ai.AI/predict", "bidi_stream")
    fresh.begin("/").ended("UNIMPLEMENTED", 0.0)
    assert set(found) == set(scrape.samples(families(fresh, NOW, "1")))


# --- real jobs


def test_what_real_jobs_did(serve: Serve, tmp_path: Path) -> None:
    """Own clients and plain ones; every number that is not a time. Mutants seen at what they break, below."""
    served = serve("Plain", *ON, "--tick", "0.2", "--max-instances", "1")
    there = metrics_of(served)
    before, file = Scrape(there), tmp_path / "payload"
    file.write_bytes(PAYLOAD)
    assert before.counted("aipod_jobs_started_total") == before.counted("grpc_server_started_total") == {}

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            assert (await client.predict(file, a=1))["kwargs"] == {"a": 1}
            echoed = await client.chaos(file, metadata=[("x-func-name", "echo_bytes")])
            assert echoed == PAYLOAD
            for name in ("boom", "crash"):
                with pytest.raises(aipod.JobFailed):
                    await client.chaos(b"xy", metadata=[("x-func-name", name)])
            job = await client.submit("patient", b"z", seconds=600.0, mark=str(tmp_path / "mark"))
            await asyncio.to_thread(until, there, aipod_jobs={"run": 1})
            assert await asyncio.to_thread(lambda: Scrape(there).counted("aipod_instances")) == {"busy": 1}
            await job.cancel()
            with pytest.raises(aipod.JobCancelled):
                await job.wait()
            with pytest.raises(aipod.Refused):
                await client.chaos(b"", metadata=[("x-func-name", "no such method")])

    run(main)
    assert stranger.ask(served.address, "predict", {}, stranger.shaped(b"0" * 100_000, "frames")).json()
    assert stranger.ask(served.address, "predict", {"_aipod_bin_size": 5}, [b"?"]).info.reason == "BAD_CHUNK"
    assert stranger.ask(served.address, "boom").info.reason == "MODEL_ERROR"
    now = until(
        there,
        aipod_jobs_started_total={"predict": 3, "echo_bytes": 1, "boom": 2, "crash": 1, "patient": 1},
        aipod_jobs_ended_total={
            "predict done": 2,
            "predict failed": 1,
            "echo_bytes done": 1,
            "boom failed": 2,
            "crash interrupted": 1,
            "patient cancelled": 1,
        },
        aipod_worker_restarts_total={"run": 1},
        aipod_loads_total={"ok": 2},
        aipod_load_seconds_count={"": 2},
        aipod_call_errors_total={"UNKNOWN_METHOD": 1, "BAD_CHUNK": 1, "MODEL_ERROR": 1},
        aipod_jobs={},
        aipod_queue_length={},
        aipod_instances={"idle": 1},
        aipod_draining={},
        aipod_connections={},
    )
    up, down = len(PAYLOAD) * 2 + 2 * 2 + 1 + 100_000, len(PAYLOAD)
    moved = now.counted("aipod_payload_bytes_total")
    assert moved["up identity"] == up
    # Random bytes do not become fewer, zeros hardly count.
    assert 2 * len(PAYLOAD) < moved["up zstd"] < 2 * len(PAYLOAD) + 10_000
    assert down + 100 < moved["down identity"] < down + 1000, "and some JSON"
    assert down < moved["down zstd"] < down + 2000
    phases = now.counted("aipod_job_phase_seconds_count")
    assert phases == {
        **{f"{method} {phase}": count for method, count in [("boom", 2), ("crash", 1), ("echo_bytes", 1)]
           for phase in ("upload", "queue", "run")},
        "echo_bytes download": 1, "predict upload": 3, "predict queue": 2, "predict run": 2, "predict download": 2,
        "patient upload": 1, "patient queue": 1, "patient run": 1,
    }  # fmt: skip
    codes = now.counted("grpc_server_handled_total")
    assert codes["INVALID_ARGUMENT predict ai.AI bidi_stream"] == 1
    assert codes["UNIMPLEMENTED chaos ai.AI bidi_stream"] == 1
    assert codes["INTERNAL chaos ai.AI bidi_stream"] == 1, "of the plain client: to an own one it is an outcome"
    assert codes["OK predict ai.AI bidi_stream"] == 2
    assert sum(codes.values()) == sum(now.counted("grpc_server_started_total").values())
    assert now.counted("grpc_server_handling_seconds_count") == {
        "chaos ai.AI bidi_stream": sum(count for name, count in codes.items() if " chaos " in name),
        "predict ai.AI bidi_stream": 3,
    }
    # kwargs and 3 chunks; kwargs and 4 frames; kwargs and a bad one.
    assert now.counted("grpc_server_msg_received_total")["predict ai.AI bidi_stream"] == 4 + 5 + 2
    assert now.counted("grpc_server_msg_sent_total")["predict ai.AI bidi_stream"] >= 2 + 2
    assert now["aipod_connections_accepted_total"] == 4
    assert now["aipod_spool_free_bytes"] > 0
    assert now["aipod_spool_bytes"] > 0
    assert now.counted("aipod_build_info") == {f"{platform.python_version()} {aipod.__version__}": 1}
    assert now["process_open_fds"] > 5


def test_the_page_is_what_prometheus_and_its_linter_want(serve: Serve, work: Work) -> None:
    served = serve(RESUME, *ON)
    there = metrics_of(served)
    assert run(lambda: work.client().visit(served.address)).phase.name == "DONE"
    called = 'grpc_server_handled_total{grpc_code="OK",grpc_method="chaos"'  # counted when the caller has its answer
    plain = wait_until(lambda: (page := Scrape(there)) and any(name.startswith(called) for name in page) and page)
    time.sleep(2 * FRESH)
    strict = scrape.open_samples(there)
    moving = ("process_", "aipod_spool_free")  # of others
    names = {name for name in plain if not name.startswith(moving)}
    assert set(strict) == set(plain)
    assert {name: strict[name] for name in names} == {name: plain[name] for name in names}
    tool = require("promtool")
    checked = subprocess.run([tool, "check", "metrics"], input=plain.text, capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_an_upload_that_is_cut_a_job_that_is_found_again_and_a_worker_that_is_killed(serve: Serve, work: Work) -> None:
    """Mutants seen: `resumed` at each place; an upload that is left has ended; what comes again is counted as new."""
    served = serve(RESUME, *ON, "--tick", "0.1", "--instances", "2")
    there = metrics_of(served)

    async def main() -> None:
        cut = work.client()
        await begun(cut, served.address, 1000)
        await asyncio.to_thread(
            until, there, aipod_jobs={}, aipod_payload_bytes_total={"up identity": 1000, "up zstd": 1014}
        )
        outcome = await cut.visit(served.address)
        assert outcome.phase.name == "DONE"
        again = await cut.visit(served.address)
        assert again == outcome
        assert await wire.attach(served.address, cut.ticket, before=outcome.data[:60_000]) == outcome
        killed = work.client("wait_again")
        task = await running(work, killed, served.address)
        workers = [pid for pid in children(served.process.pid) if b"aipod.worker" in cmdline(pid)]
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        await work.started(3)
        work.until.touch()
        assert (await task).phase.name == "DONE"

    run(main)
    until(
        there,
        aipod_jobs_started_total={"count": 1, "wait_again": 1},
        aipod_jobs_ended_total={"count done": 1, "wait_again done": 1},
        aipod_resumes_total={"upload": 1, "watch": 1, "download": 1, "run": 1},
        aipod_worker_restarts_total={"run": 1},
        aipod_jobs={},
    )


def cmdline(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_what_the_next_server_does_with_the_jobs_of_one_that_was_killed(tmp_path: Path, work: Work) -> None:
    """Mutants seen: `recover` and `end` tell nobody of what they store."""
    first, second = (Served(RESUME, tmp_path, (*ON, "--tick", "0.1"), "127.0.0.1:0", forked=True) for _ in range(2))
    try:
        runs, waits, forgotten = work.client("wait"), work.client(), work.client(size=10)

        async def main() -> None:
            task = await running(work, runs, first.address)
            queued = [asyncio.create_task(one.visit(first.address)) for one in (waits, forgotten)]
            await asyncio.to_thread(
                until, metrics_of(first), aipod_jobs={"run": 1, "queue": 2}, aipod_queue_length={"": 2}
            )
            first.process.kill()
            await asyncio.gather(task, *queued, return_exceptions=True)
            assert (await runs.visit(second.address)).reason == "INTERRUPTED"
            assert (await waits.visit(second.address)).phase.name == "DONE"
            assert (await forgotten.visit(second.address)).phase.name == "DONE"

        run(main)
        until(
            metrics_of(second),
            aipod_jobs_started_total={},
            aipod_jobs_ended_total={"wait interrupted": 1, "count done": 2},
            aipod_resumes_total={"job": 2, "watch": 3},
        )
    finally:
        for served in (first, second):
            assert served.stop() in (0, -signal.SIGKILL), served.log_text()


def test_strangers_name_no_series(serve: Serve, tokens: Tokens) -> None:  # noqa: F811
    """Paths, methods, versions, tokens, headers. Health and reflection count as what they are."""
    served = serve("Plain", *ON, "--tokens", str(tokens.path))
    there = metrics_of(served)
    with stranger.open_channel(served.address) as channel:
        for path in ("/ai.AI/evil1", "/evil2.Service/evil3", "/evil4"):
            with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
                channel.unary_unary(path)(b"", timeout=20, metadata=[("evil-header", "evil5")])
    for name, token in (("evil6", "evil7"), ("evil8", tokens.bob)):
        metadata = [("authorization", f"Bearer {token}"), ("x-upstream", "evil9")]
        stranger.ask(served.address, name, version="evil10", metadata=metadata)
    stranger.ask(served.address, "log", version="evil11", metadata=[("authorization", f"Bearer {tokens.bob}")])
    health = [sys.executable, "-m", "aipod", "health", "--to", served.address]
    assert subprocess.run(health, cwd=ROOT, capture_output=True, text=True).stdout == "SERVING\n"
    listing = subprocess.run([require("grpcurl"), "-plaintext", served.address, "list"], capture_output=True, text=True)
    assert "ai.AI" in listing.stdout
    now = until(
        there,
        aipod_call_errors_total={"UNKNOWN_METHOD": 1, "UNAUTHENTICATED": 1, "MODEL_ERROR": 1},
        aipod_jobs_started_total={"log": 1},
    )
    started = now.counted("grpc_server_started_total")
    assert started["other other other"] == 3
    assert started["Check grpc.health.v1.Health unary"] == 1
    assert sum(count for name, count in started.items() if "ServerReflection" in name) >= 1
    assert now.counted("grpc_server_handled_total")["UNIMPLEMENTED other other other"] == 3
    assert "evil" not in now.text
    assert "bob" not in now.text


def test_heartbeats_are_late_by_what_the_loop_is_kept(serve: Serve) -> None:
    """A model that keeps the loop of its own server. Mutant seen: nobody observes."""
    served = serve("tests.models_observed:Loop", *ON, "--tick", "0.1")
    there = metrics_of(served)

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            await client.chaos(b"", metadata=[("x-func-name", "block")], seconds=0.7)

    run(main)
    now = Scrape(there)
    assert now["aipod_tick_lag_seconds_count"] > 0
    assert now['aipod_tick_lag_seconds_bucket{le="0.5"}'] < now["aipod_tick_lag_seconds_count"]


# --- who may scrape, and what else they may try


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("0.0.0.0:0", "anybody who can reach it could read the metrics; add --insecure"),
        ("[::]:0", "anybody who can reach it could read the metrics; add --insecure"),
        ("unix:/tmp/metrics", "it is not HOST:PORT"),
        ("9090", "it is not HOST:PORT"),
        ("127.0.0.1:70000", "it is not HOST:PORT"),
    ],
)
def test_addresses_that_are_refused(tmp_path: Path, address: str, why: str) -> None:
    """Mutant seen: no look at the address."""
    command = [sys.executable, "-m", "aipod", "serve", "aipod.examples.basics:Echo", "--bind", "127.0.0.1:0"]
    command += ["--spool", str(tmp_path), "--metrics", address]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"cannot listen for metrics on {address}: {why}" in done.stderr.splitlines()[-1]


def test_other_addresses_are_for_who_asks_for_them(serve: Serve) -> None:
    served = serve("Plain", "--metrics", "0.0.0.0:0", "--insecure")
    there = metrics_of(served)
    assert Scrape(there.replace("0.0.0.0", "127.0.0.1"))["aipod_draining"] == 0


def test_without_the_option_nothing_listens(serve: Serve) -> None:
    served = serve("Plain")
    assert stranger.ask(served.address, "hello").json() == "hello world"
    assert "metrics" not in served.log_text()
    sockets = set()
    for path in Path(f"/proc/{served.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            sockets.add(os.readlink(path))
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line]
    assert [int(fields[1].partition(":")[2], 16) for fields in listening if f"socket:[{fields[9]}]" in sockets] == [
        served.port
    ]


def test_a_server_that_drains_gives_its_port_to_the_next_one(serve: Serve, tmp_path: Path) -> None:
    """Else half of all scrapes would have the numbers of one, half those of the other. Mutant seen: it stays open."""
    there = f"127.0.0.1:{free_port()}"
    options = ("--metrics", there, "--reuse-port", "--tick", "0.1")
    first = serve("Plain", *options)
    mark = tmp_path / "mark"
    with stranger.open_channel(first.address) as channel:
        requests = [stranger.first_message("chaos", {"seconds": 600, "mark": str(mark)})]
        call = stranger.start(channel, "chaos", iter(requests), metadata=[("x-func-name", "patient")])
        until(there, aipod_jobs={"run": 1})
        first.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not connects(there), seconds=20)
        assert first.process.poll() is None, "its job still runs"
        (tmp_path / "second").mkdir()
        second = serve("Plain", *options, directory=tmp_path / "second")
        for _ in range(5):
            assert Scrape(there).counted("aipod_jobs") == {}
        call.cancel()
    assert first.stop() == 0
    assert second.process.poll() is None


def connects(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) == 0


def test_metrics_are_told_to_the_end_of_a_drain_and_no_longer(serve: Serve, tmp_path: Path) -> None:
    served = serve("Plain", *ON, "--tick", "0.1", "--drain", "600")
    there = metrics_of(served)
    with stranger.open_channel(served.address) as channel:
        requests = [stranger.first_message("chaos", {"seconds": 600, "mark": str(tmp_path / "mark")})]
        call = stranger.start(channel, "chaos", iter(requests), metadata=[("x-func-name", "patient")])
        until(there, aipod_jobs={"run": 1})
        served.process.send_signal(signal.SIGTERM)
        until(there, aipod_draining={"": 1}, aipod_jobs={"run": 1})
        # One that says nothing keeps the server from nothing.
        with socket.create_connection((there.partition(":")[0], int(there.rpartition(":")[2]))) as silent:
            call.cancel()
            assert served.stop() == 0
            silent.settimeout(20)
            assert silent.recv(1) == b""
    assert not connects(there)


# --- the page by itself


class Asked:
    """A page on a port, and how often it was made."""

    def __init__(self, nursery: trio.Nursery, *, size: int = 0, patience: float = PATIENCE) -> None:
        self.made = 0
        self._size = size
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.address = self._sock.getsockname()
        nursery.start_soon(functools.partial(serve_page, self._sock, Page(self._collect), patience=patience))

    async def _collect(self) -> list[Metric]:
        self.made += 1
        return [GaugeMetricFamily("a", "x" * self._size, 1)]

    async def ask(self, data: bytes, *, end: bool = False) -> bytes:
        """All that comes back; `end`: nothing more is sent."""
        async with await trio.open_tcp_stream(*self.address) as stream:
            answer = bytearray()
            with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(20):
                await stream.send_all(data)
                if end:
                    await stream.send_eof()
                while piece := await stream.receive_some(65536):
                    answer += piece
            return bytes(answer)


GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (GET, b"200"),
        (b"GET /metrics?name=a HTTP/1.0\r\n\r\n", b"200"),
        (GET.replace(b"GET", b"POST"), b"405"),
        (GET.replace(b"/metrics", b"/"), b"404"),
        (GET.replace(b"/metrics", b"/metrics/x"), b"404"),
        (GET.replace(b"Host: x\r\n", b""), b"400"),
        (GET.replace(b"Host: x", b"Host x"), b"400"),
        (GET.replace(b"Host: x", b"Host: x\r\nContent-Length: -1"), b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9, b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"404"),
        (GET.replace(b"x\r\n\r\n", b"x" * (3 * MAX_REQUEST)), b"431"),
        (b"GET /" + b"x" * (3 * MAX_REQUEST), b"431"),
        (GET.replace(b"Host: x", b"Host: x\r\nAccept: application/openmetrics-text;version=9e999;\xff"), b"200"),
        (GET * 3, b"200"),
    ],
)
async def test_requests(request_: bytes, status: bytes) -> None:
    """Each has one answer, and then the connection ends. Mutant seen: the limit is not h11's."""
    async with trio.open_nursery() as nursery:
        answer = await Asked(nursery).ask(request_)
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert answer.count(b"HTTP/1.1 ") == 1
        assert (b"\na 1.0\n" in answer) == (status == b"200")
        nursery.cancel_scope.cancel()


async def test_a_head_and_halves_of_requests() -> None:
    async with trio.open_nursery() as nursery:
        asked = Asked(nursery)
        head, _, body = (await asked.ask(GET.replace(b"GET", b"HEAD"))).partition(b"\r\n\r\n")
        whole = (await asked.ask(GET)).partition(b"\r\n\r\n")
        assert (head, body) == (whole[0], b"")
        assert await asked.ask(b"", end=True) == b""
        assert (await asked.ask(GET[:-1], end=True)).startswith(b"HTTP/1.1 400")
        nursery.cancel_scope.cancel()


async def test_peers_that_say_nothing_keep_nobody_out() -> None:
    """One more than there may be ends the oldest. Mutant seen: no end of any."""
    async with trio.open_nursery() as nursery:
        asked = Asked(nursery)
        silent = [await trio.open_tcp_stream(*asked.address) for _ in range(AT_ONCE + 3)]
        with trio.fail_after(20):
            for stream in silent[:3]:
                assert await stream.receive_some(1) == b""
            assert (await asked.ask(GET)).startswith(b"HTTP/1.1 200")
            assert await silent[3].receive_some(1) == b""
            with trio.move_on_after(0.05) as pause:
                await silent[-1].receive_some(1)
            assert pause.cancelled_caught
        for stream in silent:
            await stream.aclose()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("data", [b"", b"GET /met", GET], ids=["silent", "half", "does not read"])
async def test_every_connection_ends(data: bytes) -> None:
    """Mutant seen: no patience."""
    async with trio.open_nursery() as nursery:
        asked = Asked(nursery, size=30_000_000, patience=0.3)
        async with await trio.open_tcp_stream(*asked.address) as stream:
            await stream.send_all(data)
            if data == GET:
                await trio.sleep(1)
            got = 0
            with trio.fail_after(20), contextlib.suppress(trio.BrokenResourceError):
                while piece := await stream.receive_some(1 << 20):
                    got += len(piece)
            assert got < 30_000_000
        nursery.cancel_scope.cancel()


async def test_a_page_that_cannot_be_made_costs_one_answer(caplog: pytest.LogCaptureFixture) -> None:
    """Mutant seen: it ends the server."""

    class Broken(Asked):
        async def _collect(self) -> list[Metric]:
            if not self.made:
                self.made += 1
                raise ZeroDivisionError
            return await super()._collect()

    async with trio.open_nursery() as nursery:
        asked = Broken(nursery)
        assert await asked.ask(GET) == b""
        assert "a request for metrics failed" in caplog.text
        assert (await asked.ask(GET)).startswith(b"HTTP/1.1 200")
        nursery.cancel_scope.cancel()


async def test_the_page_is_not_made_for_each_who_asks(mock_clock: MockClock) -> None:
    """Mutants seen: it is made each time; it is never made again."""
    made = 0

    async def collect() -> list[Metric]:
        nonlocal made
        made += 1
        return [GaugeMetricFamily("a", "", made)]

    page = Page(collect)
    texts = []

    async def ask() -> None:
        texts.append((await page.text(""))[1])

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(ask)
    assert made == 1
    assert len(set(texts)) == 1
    mock_clock.jump(FRESH)
    assert b"\na 2.0\n" in (await page.text(""))[1]
    assert b"\na 3.0\n" in (await page.text("application/openmetrics-text"))[1]


async def test_a_process_without_descriptors_says_so_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """Mutants seen: it ends; a line each time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with trio.open_nursery() as nursery:
        asked = Asked(nursery)
        assert (await asked.ask(GET)).startswith(b"HTTP/1.1 200")
        with socket.socket() as peer:
            resource.setrlimit(resource.RLIMIT_NOFILE, (peer.fileno() + 1, hard))
            try:
                await trio.to_thread.run_sync(peer.connect, asked.address)
                await trio.sleep(2.5 * AGAIN)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            peer.sendall(GET)
            with trio.fail_after(20):
                assert (await trio.to_thread.run_sync(peer.recv, 100)).startswith(b"HTTP/1.1 200")
        assert caplog.messages == ["no request for metrics can be accepted for now: Too many open files"]
        nursery.cancel_scope.cancel()


# --- embedded


def test_two_servers_in_one_process_have_numbers_of_their_own(tmp_path: Path) -> None:
    """And leave the logging of their application as it was."""
    program = Path(__file__).parent / "two_servers.py"
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 2\n", "")
