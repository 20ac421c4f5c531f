"""A signal: no new jobs, running ones finish within --drain, the pool is released, exit 0, nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from aipod.cli.serve import _running
from aipod.client import Event
from aipod.errors import Interrupted
from tests import stranger
from tests.calls import calls, marked, own, plain
from tests.conftest import ROOT, Serve, Served, alive, children, left_in, wait_until

WORK = "tests.models_lifecycle:Work"
TOGETHER = "tests.models_lifecycle:Together"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"  # grpc.health.v1.HealthCheckResponse
SIGNALS = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]


def check(channel: grpc.Channel, service: str) -> bytes:
    """The answer of grpc.health.v1, as bytes; the request is its field 1."""
    ask: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
    name = service.encode()
    answer: bytes = ask(b"\n" + bytes([len(name)]) + name if name else b"", timeout=10)
    return answer


def ended(served: Served, *, seconds: float) -> None:
    """The server has exited with status 0, in time, and nothing of it is left."""
    below = children(served.process.pid)
    served.process.communicate(timeout=seconds)
    assert served.process.returncode == 0, served.log_text()
    assert left_in(served.spool) == []
    assert list((served.spool / "workers").iterdir()) == []
    assert not any(map(alive, below))
    assert "Traceback" not in served.log_text()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_running_jobs_finish_and_new_ones_are_refused(serve: Serve, tmp_path: Path, number: int) -> None:
    served = serve(WORK)
    until = tmp_path / "until"
    with calls() as threads, stranger.open_channel(served.address) as channel:
        jobs = [threads.submit(own, served.address, "predict", mark=str(tmp_path / "mark"), until=str(until))]
        pid = marked(tmp_path / "mark")
        # In line behind it: under way as well.
        events: list[Event] = []
        arguments = {"mark": str(tmp_path / "2"), "until": str(until)}
        jobs.append(threads.submit(own, served.address, "predict", on_event=events.append, **arguments))
        wait_until(lambda: any(event.phase == "QUEUED" for event in events))
        assert [check(channel, name) for name in ("", "ai.AI", "liveness")] == [SERVING] * 3
        served.process.send_signal(number)
        wait_until(lambda: check(channel, "") == NOT_SERVING)
        assert [check(channel, name) for name in ("ai.AI", "readiness", "liveness")] == [
            NOT_SERVING,
            NOT_SERVING,
            SERVING,
        ]
        call = stranger.start(
            grpc.insecure_channel(served.address, options=[("grpc.enable_retries", 0)]),
            "chaos",
            iter([stranger.first_message("chaos", {})]),
        )
        refused = stranger.reply_of(call)
        assert (refused.code, refused.info.reason) == (StatusCode.UNAVAILABLE, "DRAINING")
        retry = RetryInfo()
        assert Status.FromString(refused.trailers["grpc-status-details-bin"]).details[1].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() > 0
        until.touch()
        assert [job.result() for job in jobs] == ["done", "done"]
    ended(served, seconds=10)
    assert (served.data / f"closed-{pid}").exists()


def test_a_drain_that_is_too_short_cancels_the_job_and_ends_in_time(serve: Serve, tmp_path: Path) -> None:
    served = serve(WORK, "--drain", "0.5", "--cancel-grace", "0.5", "--instances", "3")
    began = time.monotonic()
    with calls() as threads:
        never = str(tmp_path / "never")
        obeys = threads.submit(own, served.address, "predict", mark=str(tmp_path / "obeys"), until=never)
        stays = threads.submit(own, served.address, "stubborn", mark=str(tmp_path / "stays"))
        stock = threads.submit(plain, served.address, "predict", mark=str(tmp_path / "stock"), until=never)
        for name in ("obeys", "stays", "stock"):
            marked(tmp_path / name)
        began = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        # Not a refusal: a client that tried again would run the method twice.
        for future in (obeys, stays):
            with pytest.raises(Interrupted, match="shut down while the method ran"):
                future.result()
        assert (stock.result().code, stock.result().info.reason) == (StatusCode.CANCELLED, "CANCELLED")
    ended(served, seconds=10)
    assert time.monotonic() - began < 10
    assert (tmp_path / "obeys").read_text() == "cancelled"


def test_a_job_that_has_not_started_when_the_drain_is_over_may_be_tried_elsewhere(serve: Serve, tmp_path: Path) -> None:
    served = serve(WORK, "--drain", "0.5")
    with calls() as threads:
        threads.submit(plain, served.address, "predict", mark=str(tmp_path / "mark"), until=str(tmp_path / "never"))
        marked(tmp_path / "mark")
        call = stranger.start(
            grpc.insecure_channel(served.address, options=[("grpc.enable_retries", 0)]),
            "chaos",
            iter([stranger.first_message("chaos", {})]),
        )
        waiting = threads.submit(stranger.reply_of, call)
        wait_until(lambda: len(list(served.spool.glob("*/state"))) == 2)
        served.process.send_signal(signal.SIGTERM)
        assert (waiting.result().code, waiting.result().info.reason) == (StatusCode.UNAVAILABLE, "DRAINING")
    ended(served, seconds=10)


@pytest.mark.parametrize(("model", "method"), [(WORK, "stubborn"), (TOGETHER, "with_trio"), (TOGETHER, "stuck")])
def test_a_second_signal_ends_it_at_once(serve: Serve, tmp_path: Path, model: str, method: str) -> None:
    served = serve(model)
    with calls() as threads:
        threads.submit(plain, served.address, method, mark=str(tmp_path / "mark"))
        marked(tmp_path / "mark")
        below = children(served.process.pid)
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in served.log_text())
        served.process.send_signal(signal.SIGINT)
        served.process.communicate(timeout=5)
    wait_until(lambda: not any(map(alive, below)), seconds=2)
    assert "Traceback" not in served.log_text()
    # Whatever it had no time for, the next one does.
    after = serve(model)
    wait_until(lambda: left_in(after.spool) == [])


def test_a_signal_while_a_job_waits_for_its_model_to_load(serve: Serve, tmp_path: Path) -> None:
    served = serve("tests.models_lifecycle:SlowLoad", "--drain", "0.5")
    with calls() as threads:
        waiting = threads.submit(plain, served.address, "chaos")
        worker = int(marked(served.data / "loading"))
        served.process.send_signal(signal.SIGTERM)
        ended(served, seconds=10)
        assert not alive(worker)
        waiting.cancel()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_while_the_module_is_imported(tmp_path: Path, number: signal.Signals) -> None:
    """Mutant seen: who only looks at the class makes a spool for that (it stayed when the server was killed)."""
    mark = tmp_path / "mark"
    command = [sys.executable, "-m", "aipod", "serve", "tests.models_slow_import:Slow", "--bind", "127.0.0.1:0"]
    command += ["--spool", str(tmp_path / "spool"), "--data", str(tmp_path / "data")]
    environment = {**os.environ, "AIPOD_TEST_MARK": str(mark), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as process:
        worker = int(marked(mark, seconds=30))
        process.send_signal(number)
        output, _ = process.communicate(timeout=10)
    assert (process.returncode, output) == (0 if number == signal.SIGTERM else -signal.SIGKILL, b"")
    if number == signal.SIGKILL:  # then the kernel ends it, soon
        wait_until(lambda: not alive(worker))
    assert not alive(worker)
    assert list(tmp_path.iterdir()) == [mark]


def test_hup_is_nothing_under_nohup(tmp_path: Path) -> None:
    """Mutant seen: who closes the terminal drains it."""
    serve = [sys.executable, "-m", "aipod", "serve", WORK, "--bind", "127.0.0.1:0", "--spool", "tmp"]
    command = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *serve, "--data", str(tmp_path / "data")]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert ("SIGHUP" in log, "SIGTERM: draining" in log) == (False, True)


def test_idle_connections_and_a_health_watch_do_not_hold_it_up(serve: Serve) -> None:
    served = serve(WORK)
    with stranger.open_channel(served.address) as idle, stranger.open_channel(served.address) as watching:
        assert check(idle, "") == SERVING
        watch: Any = watching.unary_stream("/grpc.health.v1.Health/Watch")
        states = watch(b"")
        assert next(states) == SERVING
        served.process.send_signal(signal.SIGTERM)
        assert next(states) == NOT_SERVING
        ended(served, seconds=5)
        with pytest.raises(grpc.RpcError):
            next(states)


def test_the_instance_of_an_async_class_is_closed(serve: Serve) -> None:
    served = serve(TOGETHER)
    pid = own(served.address, "chaos")
    assert pid == served.process.pid
    served.process.send_signal(signal.SIGTERM)
    ended(served, seconds=5)
    assert (served.data / f"closed-{pid}").exists()


async def test_what_keeps_a_drain_from_its_end_is_named() -> None:
    """Mutant seen: it is always a method that still runs."""
    begun, end = threading.Event(), threading.Event()

    def write_slowly() -> None:
        begun.set()
        end.wait()

    assert "write_slowly" not in _running()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, write_slowly)
        await trio.to_thread.run_sync(begun.wait)
        assert "write_slowly from " in _running()
        end.set()
    assert "write_slowly" not in _running()
