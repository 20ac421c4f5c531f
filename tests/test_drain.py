"""A signal: no new jobs, running ones finish within --drain, the pool is released, exit 0, nothing is left."""

from __future__ import annotations

import asyncio
import os
import queue
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

import aipod
from aipod.cli.serve import _running
from aipod.client import Event
from aipod.codec import job_id
from aipod.errors import Interrupted
from aipod.identity import add_token
from aipod.wire.ai import Op, Phase
from tests import stranger
from tests.calls import calls, marked, own, plain
from tests.conftest import ROOT, Serve, Served, alive, children, left_in, run, wait_until
from tests.models_resume import answer_to
from tests.pairs import MODEL as JOBS
from tests.test_hardening import (
    ACK,
    ANY_STREAM,
    DATA,
    END_STREAM,
    GOAWAY,
    HEADERS_FRAME,
    PING,
    RST_STREAM,
    Bare,
    request,
)
from tests.test_transport import raw_frame
from tests.wire import Client, Refusal, ask, attach, call

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
        wait_until(lambda: "draining: at most" in served.log_text())
        assert [check(channel, name) for name in ("ai.AI", "readiness", "liveness")] == [
            NOT_SERVING,
            NOT_SERVING,
            SERVING,
        ]
        call = stranger.start(
            grpc.insecure_channel(served.address),  # no retry policy
            "chaos",
            iter([stranger.first_message("chaos", {})]),
        )
        refused = stranger.reply_of(call)
        assert (refused.code, refused.info.reason) == (StatusCode.UNAVAILABLE, "DRAINING")
        retry = RetryInfo()
        assert Status.FromString(refused.trailers["grpc-status-details-bin"]).details[1].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() > 0
        with Bare(served) as bare:
            bare.send(bare.headers(1) + raw_frame(DATA, END_STREAM, 1, request(b"{}")))
            first = next(flags for kind, flags, _, _ in bare.frames() if kind == HEADERS_FRAME)
            assert first & END_STREAM, "with headers before the status no client's retry policy would act on it"
        until.touch()
        assert [job.result() for job in jobs] == ["done", "done"]
    ended(served, seconds=10)
    assert (served.data / f"closed-{pid}").exists()
    said = served.log_text()
    assert said.index("done in") < said.index("drained in"), "whoever reads the log knows that the jobs have ended"


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


# ---- who is answered while it drains


def test_a_connection_is_told_to_go_and_what_was_on_its_way_is_served(serve: Serve, tmp_path: Path) -> None:
    """RFC 9113 section 6.8. Mutants seen: one GOAWAY only; the call that was on its way is refused as a new one; so is
    one that comes in the same read as the answer to the PING.
    """
    served = serve(WORK)
    until = tmp_path / "until"
    with calls() as threads, Bare(served) as bare:
        job = threads.submit(own, served.address, "predict", mark=str(tmp_path / "mark"), until=str(until))
        marked(tmp_path / "mark")
        frames = bare.frames()
        next(frames)
        served.process.send_signal(signal.SIGTERM)
        assert next(body for kind, _, _, body in frames if kind == GOAWAY) == ANY_STREAM
        kind, flags, _, farewell = next(frames)
        assert (kind, flags) == (PING, 0)
        # As if it had not read that yet; and grpcio's core writes the answer to a PING before what waited already.
        one, two = (bare.headers(number) + raw_frame(DATA, END_STREAM, number, request(b"{}")) for number in (1, 3))
        bare.send(one + raw_frame(PING, ACK, 0, farewell) + two)
        # Nor does the second one name a stream.
        assert next(body for kind, _, _, body in frames if kind == GOAWAY) == ANY_STREAM
        bare.send(bare.headers(5) + raw_frame(DATA, END_STREAM, 5, request(b"{}")))
        assert next((stream, body) for kind, _, stream, body in frames if kind == RST_STREAM) == (5, b"\0\0\0\7")
        until.touch()
        after = list(frames)
        assert sorted(stream for kind, _, stream, body in after if kind == DATA and b"PONG" not in body) == [1, 3]
        trailers = [stream for kind, flags, stream, _ in after if kind == HEADERS_FRAME and flags & END_STREAM]
        assert sorted(trailers) == [1, 3]
        assert job.result() == "done"
    ended(served, seconds=10)


def test_who_does_not_answer_is_told_all_the_same(serve: Serve, tmp_path: Path) -> None:
    """Mutant seen: without its timer the second GOAWAY comes at the end only."""
    served = serve(WORK)
    until = tmp_path / "until"
    with calls() as threads, Bare(served) as bare:
        job = threads.submit(own, served.address, "predict", mark=str(tmp_path / "mark"), until=str(until))
        marked(tmp_path / "mark")
        served.process.send_signal(signal.SIGTERM)
        told = [body[:4] for kind, _, _, body in bare.frames() if kind == GOAWAY]
        assert told == [ANY_STREAM[:4]] * 2
        assert not job.done(), "the job goes on, the connection without a call has ended"
        until.touch()
        assert job.result() == "done"
    ended(served, seconds=10)


def test_who_asks_for_a_job_is_answered_and_who_brings_one_is_not(serve: Serve, tmp_path: Path) -> None:
    """Over new connections too, until the jobs have ended. Each refusal says that it may be tried again."""
    served = serve(JOBS, "--instances", "3", "--tick", "0.2")
    starts, until = str(tmp_path / "starts"), tmp_path / "until"

    def client(name: str = "wait", payload: bytes = b"x") -> Client:
        return Client(name, payload, {"starts": starts, "until": str(until)} if name == "wait" else {"starts": starts})

    async def reason(coroutine: Any) -> tuple[str, bool]:
        with pytest.raises(Refusal) as caught:
            await coroutine
        return caught.value.reason, caught.value.retry

    async def main() -> None:
        running, leaving, uploading, done = client(), client(), client("count", bytes(5000)), client("count")
        outcome = await done.visit(served.address)
        async with asyncio.TaskGroup() as group:
            start = group.create_task
            visits = [start(one.visit(served.address)) for one in (running, leaving)]
            while running.phase != Phase.RUNNING or leaving.phase != Phase.RUNNING:
                await asyncio.sleep(0.02)
            async with call(
                served.address, uploading.ticket, Op.RUN, "count", uploading.kwargs, **uploading.fields
            ) as one:
                await one.chunk(uploading.payload[:1000], 0)
                state = await one.state()
                payload = served.spool / job_id(uploading.ticket) / "in"
                while payload.stat().st_size < 1000:  # it has arrived
                    await asyncio.sleep(0.02)
                served.process.send_signal(signal.SIGTERM)
                assert await reason(one.outcome()) == ("DRAINING", True)
            uploading.spool, uploading.epoch = state.spool, 1
            # RUN, of a new job and of one that is here, and `last`
            assert await reason(client().visit(served.address)) == ("DRAINING", True)
            assert await reason(uploading.visit(served.address)) == ("DRAINING", True)
            uploading.committed = True
            assert await reason(uploading.visit(served.address)) == ("DRAINING", True)
            # RESUME of one that runs, ATTACH, CANCEL, RELEASE
            again = Client("wait", b"x", running.kwargs)
            again.ticket, again.spool, again.committed = running.ticket, running.spool, True
            watching = start(again.visit(served.address))
            attached = start(attach(served.address, running.ticket))
            while again.phase != Phase.RUNNING:
                await asyncio.sleep(0.02)
            assert (await ask(served.address, leaving.ticket, Op.CANCEL)).phase in (Phase.RUNNING, Phase.CANCELLED)
            assert (await visits[1]).phase == Phase.CANCELLED
            assert await attach(served.address, done.ticket) == outcome
            assert (await ask(served.address, done.ticket, Op.RELEASE)).phase == Phase.RELEASED
            # RESUME of what never was
            never = client()
            never.spool, never.committed = running.spool, True
            assert await reason(never.visit(served.address)) == ("NOT_STARTED", False)
            async with aipod.Client(served.address) as own_client:
                assert await own_client.chaos(metadata=[("x-func-name", "aipod.methods")])
            assert served.process.poll() is None
            until.touch()
            told = {await visits[0], await watching, await attached}
            assert [one.json for one in told] == ["done"]
        await asyncio.to_thread(served.process.communicate, timeout=20)
        assert served.process.returncode == 0, served.log_text()
        # What was received is there for the next one.
        following = serve(JOBS, "--tick", "0.2")
        uploading.committed = False
        assert (await uploading.visit(following.address)).data == answer_to(uploading.payload, 70_000)
        assert uploading.sent[0] == 1000

    run(main)


def test_a_stock_clients_upload_goes_on_until_the_time_is_over(serve: Serve, tmp_path: Path) -> None:
    """One that is whole by then is run; another one is refused as what came too late. Mutant seen: it is told that its
    job waits here."""
    served = serve(WORK, "--drain", "3")
    with calls() as threads, stranger.open_channel(served.address) as channel:
        requests = [queue.Queue[Any]() for _ in range(2)]
        under_way = [stranger.start(channel, "train", iter(one.get, None), timeout=60) for one in requests]
        for one, started in zip(requests, under_way, strict=True):
            one.put(stranger.first_message("train", {}))
            one.put(next(stranger.more_messages("train", stranger.shaped(b"payload", "frame"))))
            assert next(started).data == b"PONG"
        wait_until(lambda: len(list(served.spool.glob("*/state"))) == 2)
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in served.log_text())
        requests[0].put(None)
        replies = [threads.submit(stranger.reply_of, one) for one in under_way]
        assert replies[0].result().json() == "trained"
        refused = replies[1].result()
        requests[1].put(None)
        assert (refused.code, refused.info.reason) == (StatusCode.UNAVAILABLE, "DRAINING")
        assert dict(refused.info.metadata) == {}
    ended(served, seconds=20)


def test_who_is_not_known_is_told_that_before_a_message_of_his_is_read(serve: Serve, tmp_path: Path) -> None:
    """While it drains as well. Mutant seen: the wait for a first message comes before."""
    token = add_token(tmp_path / "tokens", "somebody", (), ())
    served = serve(WORK, "--tokens", str(tmp_path / "tokens"))
    until, known = tmp_path / "until", [("authorization", f"Bearer {token}")]
    with stranger.open_channel(served.address) as channel:
        kwargs = {"mark": str(tmp_path / "mark"), "until": str(until)}
        job = stranger.start(channel, "predict", iter([stranger.first_message("predict", kwargs)]), metadata=known)
        marked(tmp_path / "mark")
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: check(channel, "") == NOT_SERVING)
        wait_until(lambda: "draining: at most" in served.log_text())
        with stranger.open_channel(served.address) as other:
            nothing = iter(queue.Queue[Any]().get, None)
            refused = stranger.reply_of(stranger.start(other, "chaos", nothing, timeout=30))
            assert (refused.code, refused.info.reason) == (StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        until.touch()
        assert stranger.reply_of(job).json() == "done"
    ended(served, seconds=20)


def test_who_only_waits_for_others_does_not_hold_it_up(serve: Serve, tmp_path: Path) -> None:
    """A watcher of another server's job, and a call without a message. Mutant seen: it waits for them."""
    working, served = serve(WORK), serve(WORK, "--drain", "100")
    until = tmp_path / "until"

    async def main() -> None:
        async with aipod.Client(working.address) as one, aipod.Client(served.address) as other:
            job = await one.submit("predict", kwargs={"mark": str(tmp_path / "mark"), "until": str(until)})
            await asyncio.to_thread(marked, tmp_path / "mark")
            events: list[Event] = []
            watching = asyncio.create_task(other.attach(job.ticket).wait(on_event=events.append))
            with stranger.open_channel(served.address) as channel:
                silent = stranger.start(channel, "chaos", iter(queue.Queue[Any]().get, None), timeout=100)
                assert next(silent).data == b"PONG"
                while not any(event.phase == "RUNNING" for event in events):
                    await asyncio.sleep(0.02)
                served.process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(served.process.communicate, timeout=30)
                assert served.process.returncode == 0
                assert silent.code() is StatusCode.UNAVAILABLE
            while not any(event.phase == "WAITING" for event in events):
                await asyncio.sleep(0.02)
            watching.cancel()
            await asyncio.wait([watching])
            until.touch()
            assert await job.wait() == "done"

    run(main)
