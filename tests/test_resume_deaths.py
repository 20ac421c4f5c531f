"""Servers that are killed or drained, or that have all the jobs they may have, and full disks, seen from the wire."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode
from grpclib.const import Status

import aipod
from aipod.codec import job_id
from aipod.config import MIB
from aipod.results import INLINE
from aipod.spool import Journal
from aipod.wire.ai import Op, Phase
from tests import stranger
from tests.conftest import Served, run, wait_until
from tests.models_resume import LONG, answer_to
from tests.pairs import (
    MODEL,
    PAYLOAD,
    TICK,
    Work,
    begun,
    entries,
    opened,
    refused,
    running,
    work_in,
)
from tests.phases import until
from tests.wire import Lost, Refusal, ask, attach, call

work = pytest.fixture(work_in)


@pytest.fixture
def serve_one(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Servers of a spool of this test's own, one instance each."""
    started: list[Served] = []

    def start(*options: str) -> Served:
        fixed = ("--tick", "0.2", "--drain", "0", "--cancel-grace", "1")
        started.append(Served(MODEL, tmp_path, (*fixed, *options), "127.0.0.1:0", forked=True))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            assert served.stop() == 0, served.log_text()


def kill(served: Served) -> None:
    served.process.kill()
    served.process.communicate()


def test_a_run_is_interrupted_when_its_server_dies_and_what_waited_is_run(
    serve_one: Callable[..., Served], work: Work
) -> None:
    """I7. Mutants seen: RUNNING is adopted as QUEUED; a job whose lock is held counts as free; nobody adopts."""

    async def main() -> None:
        first, second = serve_one(), serve_one()
        client, waiting, boring = work.client("wait"), work.client(size=10), work.client(size=20)
        task = await running(work, client, first.address)
        queued = [asyncio.create_task(one.visit(first.address)) for one in (waiting, boring)]
        async with call(second.address, client.ticket, Op.ATTACH) as watcher:
            await watcher.phase(Phase.RUNNING)
            for one in (waiting, boring):
                async with asyncio.timeout(10):
                    while one.phase != Phase.QUEUED or not one.committed:
                        await asyncio.sleep(0.02)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):  # while its server lives nobody says otherwise
                    await watcher.outcome()
            assert {state.phase for state in watcher.states} == {Phase.RUNNING}
            kill(first)
            for lost in (task, *queued):
                with pytest.raises(Lost):
                    await lost
            outcome = await watcher.outcome()
        assert (outcome.phase, outcome.reason) == (Phase.FAILED, "INTERRUPTED")
        assert await client.visit(second.address) == outcome
        # Who has only the ticket has it run as well.
        assert (await attach(second.address, waiting.ticket)).data == answer_to(PAYLOAD, 10)
        assert (await boring.visit(second.address)).data == answer_to(PAYLOAD, 20)
        assert work.lines == ["start"] * 3

    run(main)


def test_an_outcome_that_is_not_in_the_journal_is_no_run_for_ever(serve_one: Callable[..., Served], work: Work) -> None:
    """I7. The server has given up to store it, or its line is torn; the worker lives on and waits for other jobs.

    Mutant seen: the worker's lock keeps its name from run to run.
    """

    async def main() -> None:
        served = serve_one()
        client = work.client()
        assert (await client.visit(served.address)).phase == Phase.DONE
        state = served.spool / job_id(client.ticket) / "state"
        with state.open("rb+") as file:
            file.truncate(state.stat().st_size - 3)
        outcome = await attach(served.address, client.ticket)
        assert (outcome.phase, outcome.reason) == (Phase.FAILED, "INTERRUPTED")
        assert await client.visit(served.address) == outcome
        assert (await work.client().visit(served.address)).phase == Phase.DONE  # by the same worker
        assert work.lines == ["start"] * 2

    run(main)


def test_a_restartable_method_is_run_once_more_and_no_more(serve_one: Callable[..., Served], work: Work) -> None:
    async def main() -> None:
        servers = [serve_one() for _ in range(2)]
        client = work.client("wait_again")
        task = await running(work, client, servers[0].address)
        for n in (0, 1):
            following = serve_one() if n else servers[1]
            kill(servers[n])
            with pytest.raises(Lost):
                await task
            task = asyncio.create_task(client.visit(following.address))
            if n == 0:
                await work.started(2)
        outcome = await task
        assert (outcome.phase, outcome.reason) == (Phase.FAILED, "INTERRUPTED")
        assert work.lines == ["start"] * 2
        assert await attach(following.address, client.ticket) == outcome

    run(main)


def test_a_server_that_drains_leaves_its_jobs_to_the_next_one(serve_one: Callable[..., Served], work: Work) -> None:
    async def main() -> None:
        first, second = serve_one(), serve_one()
        blocker, waiting, uploading = work.client("wait"), work.client(size=10), work.client(size=20)
        task = await running(work, blocker, first.address)
        queued = asyncio.create_task(waiting.visit(first.address))
        async with opened(uploading, first.address) as one:
            await one.chunk(PAYLOAD[:1000], 0)
            payload = first.spool / job_id(uploading.ticket) / "in"
            await until(lambda: payload.stat().st_size == 1000)  # it has arrived
            async with asyncio.timeout(10):
                while waiting.phase != Phase.QUEUED:
                    await asyncio.sleep(0.02)
            stopped = asyncio.create_task(asyncio.to_thread(first.stop))
            refusal = await refused(one.outcome)
            assert (refusal.reason, refusal.retry) == ("DRAINING", True)
        ended = await task
        assert (ended.phase, ended.reason) == (Phase.FAILED, "INTERRUPTED")
        with pytest.raises((Refusal, Lost)):  # it comes again
            await queued
        assert await stopped == 0
        assert await attach(second.address, blocker.ticket) == ended
        assert (await uploading.visit(second.address)).data == answer_to(PAYLOAD, 20)
        assert uploading.sent[0] == 1000
        assert (await waiting.visit(second.address)).data == answer_to(PAYLOAD, 10)
        assert work.lines.count("start") == 3

    run(main)


def test_a_server_that_has_all_the_jobs_it_may_have_refuses_one_more_and_keeps_what_there_is(
    serve_one: Callable[..., Served], work: Work
) -> None:
    """Whether it is new, an upload that goes on, or in line since its server was killed.

    Mutants seen: no bound of new ones; of uploads that go on; of those that are taken over.
    """

    async def main() -> None:
        first = serve_one()
        blocker, waiting, left_in_line, upload = work.client("wait"), *(work.client(size=size) for size in (1, 2, 3))
        tasks = [await running(work, work.client("wait"), first.address)]
        tasks.append(asyncio.create_task(left_in_line.visit(first.address)))
        await until(lambda: left_in_line.phase == Phase.QUEUED and left_in_line.committed)
        await begun(upload, first.address)
        full = serve_one("--max-jobs", "2").address
        task = await running(work, blocker, full)
        queued = asyncio.create_task(waiting.visit(full))
        await until(lambda: waiting.phase == Phase.QUEUED)
        kill(first)
        await asyncio.gather(*tasks, return_exceptions=True)
        before = entries(first.spool)
        for refusal in (
            await refused(work.client(size=4).visit, full),
            await refused(upload.visit, full),
            await refused(left_in_line.visit, full),
            await refused(attach, full, left_in_line.ticket),
        ):
            assert (refusal.status, refusal.reason, refusal.retry) == (Status.RESOURCE_EXHAUSTED, "OVERLOADED", True)
        plain = await asyncio.to_thread(stranger.ask, full, "count", work.client().kwargs)
        assert (plain.code, plain.info.reason) == (StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert entries(first.spool) == before
        # Whoever has a job here watches it as before, and a client that comes back gets its own.
        async with call(full, waiting.ticket, Op.ATTACH) as watcher:
            await watcher.phase(Phase.QUEUED)
        work.until.touch()
        assert (await task).json == "done"
        assert (await queued).data == answer_to(PAYLOAD, 1)
        assert (await left_in_line.until_known([full])).data == answer_to(PAYLOAD, 2)
        assert (await upload.until_known([full])).data == answer_to(PAYLOAD, 3)
        assert upload.sent[0] == 1000
        assert work.lines == ["start"] * 5

    run(main)


def test_of_many_jobs_that_come_at_once_no_more_are_taken_than_there_may_be(
    serve_one: Callable[..., Served], work: Work
) -> None:
    """They take descriptors before they are known. Mutant seen: what is just being made does not count."""
    served = serve_one("--max-jobs", "2")

    async def main() -> None:
        answered, leave = [], asyncio.Event()

        async def come() -> None:
            try:
                async with opened(work.client(), served.address):
                    answered.append("taken")
                    await leave.wait()
            except Refusal as exc:
                answered.append(exc.reason)

        async with asyncio.TaskGroup() as group:
            for _ in range(30):
                group.create_task(come())
            await until(lambda: len(answered) == 30)
            leave.set()
        assert sorted(answered) == ["OVERLOADED"] * 28 + ["taken"] * 2

    run(main)


def test_uploads_of_plain_clients_are_jobs_too(serve_one: Callable[..., Served], work: Work) -> None:
    """Mutant seen: a plain client's job counts when its payload is complete."""
    served = serve_one("--max-jobs", "2")
    complete = threading.Event()

    def requests() -> Iterator[Any]:
        yield stranger.first_message("chaos", work.client().kwargs)
        complete.wait(30)

    def come() -> stranger.Reply:
        return stranger.reply_of(stranger.start(channel, "chaos", requests(), metadata=[("x-func-name", "count")]))

    with stranger.open_channel(served.address) as channel, ThreadPoolExecutor(10) as threads:
        coming = [threads.submit(come) for _ in range(10)]
        wait_until(lambda: sum(one.done() for one in coming) == 8)
        complete.set()
        replies = [one.result() for one in coming]
    # Two were run, and their answers are no text.
    assert sorted(reply.info.reason for reply in replies) == ["OVERLOADED"] * 8 + ["RESULT_NOT_TEXT"] * 2
    assert work.lines == ["start"] * 2


# A full disk


def limit(served: Served, size: int) -> None:
    """No file of the server's may be longer from now on, which is what a full disk looks like."""
    resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_disk_that_fills_up_is_a_pause(serve_one: Callable[..., Served], work: Work) -> None:
    """I10. Mutants seen: no checkpoint on leaving; SPOOL_FULL comes without RetryInfo."""
    payload = os.urandom(3 * MIB)

    async def main() -> None:
        served = serve_one()
        client = work.client(payload=payload, size=10)
        fields: dict[str, Any] = {"size": None}
        limit(served, 2 * MIB + 1000)
        async with opened(client, served.address, **fields) as one:
            await one.chunk(payload[:MIB], 0, sync=True)
            await one.until(lambda state: state.offset == MIB)
            with contextlib.suppress(Lost):
                for n in (1, 2):
                    await one.chunk(payload[n * MIB : (n + 1) * MIB], n * MIB)
            refusal = await refused(one.outcome)
            assert (refusal.reason, refusal.retry) == ("SPOOL_FULL", True)
        # Still full: what there is is told, and no more.
        async with opened(client, served.address, **fields) as one:
            assert one.states[-1].offset == 2 * MIB + 1000
        # A known size is refused before the first byte, and leaves nothing.
        other = work.client(payload=payload)
        before = entries(served.spool)
        refusal = await refused(other.visit, served.address)
        assert (refusal.reason, refusal.retry) == ("SPOOL_FULL", True)
        assert entries(served.spool) == before
        limit(served, resource.RLIM_INFINITY)
        async with opened(client, served.address, **fields) as one:
            have = one.states[-1].offset
            assert have == 2 * MIB + 1000
            await one.chunk(payload[have:], have)
            await one.last(payload)
            assert (await one.outcome()).data == answer_to(payload, 10)
        assert work.lines == ["start"]

    run(main)


def test_who_gives_up_on_a_full_disk_leaves_nothing_on_it(serve_one: Callable[..., Served], tmp_path: Path) -> None:
    """What is raised says that nothing has run, and the job is cancelled, unless there is a ticket file for it.

    Mutants seen: no word to the server where the payload's end was sent, which never arrived; JobLost for that.
    """

    async def pieces() -> AsyncIterator[bytes]:
        yield os.urandom(3 * MIB)

    async def main() -> None:
        served = serve_one()
        limit(served, 2 * MIB)
        async with aipod.Client(served.address, config=aipod.Config(reconnect=2.0)) as client:
            for ticket_file in (tmp_path / "ticket", None):
                with pytest.raises(aipod.Refused, match="the method has not run") as caught:
                    await client.submit("count", pieces(), ticket_file=ticket_file, starts=str(tmp_path / "starts"))
                assert caught.value.reason == "SPOOL_FULL"
        left = (Journal(served.spool / name / "state").read() for name in entries(served.spool))
        phases = sorted(state.get("phase", "RECEIVING") for state in left)
        assert phases == ["CANCELLED", "RECEIVING"]
        assert sum(path.stat().st_size for path in served.spool.glob("*/in")) == 2 * MIB
        assert not (tmp_path / "starts").exists()

    run(main)


def test_a_disk_that_is_full_ends_neither_the_server_nor_what_it_knows(
    serve_one: Callable[..., Served], work: Work
) -> None:
    """Mutant seen: what `open.released` raises reaches the server's nursery (as it once did)."""

    async def main() -> None:
        served = serve_one()
        client = work.client(size=10)
        outcome = await client.visit(served.address)
        limit(served, 100)  # no journal takes another line
        async with call(served.address, os.urandom(16), Op.ATTACH, released=[client.ticket]) as one:
            assert (await refused(one.outcome)).reason == "NOT_FOUND"
        assert (await refused(ask, served.address, client.ticket, Op.RELEASE)).reason == "SPOOL_FULL"
        assert (await refused(work.client().visit, served.address)).reason == "SPOOL_FULL"
        assert await attach(served.address, client.ticket) == outcome
        limit(served, resource.RLIM_INFINITY)
        assert (await ask(served.address, client.ticket, Op.RELEASE)).phase == Phase.RELEASED
        assert served.process.poll() is None

    run(main)


def test_a_long_answer_that_came_at_once_is_on_disk_soon(serve_one: Callable[..., Served], work: Work) -> None:
    """Mutant seen: nobody settles it once it was told."""

    async def main() -> None:
        served = serve_one("--tick", "2")  # the job has ended long before
        client = work.client(size=LONG)
        assert (await client.visit(served.address)).data == answer_to(PAYLOAD, LONG)
        journal = Journal(served.spool / job_id(client.ticket) / "state")
        async with asyncio.timeout(10):
            while "settled" not in journal.read():
                await asyncio.sleep(0.01)

    run(main)


def test_an_upload_that_stands_still_is_let_go_of_and_goes_on_where_it_was(
    serve_one: Callable[..., Served], work: Work
) -> None:
    """A plain client's is removed. Mutants seen: no limit; what has arrived is lost; it cannot be taken up again."""
    payload = os.urandom(3000)

    async def main() -> None:
        served = serve_one("--upload-stall", "2")
        client = work.client(payload=payload, size=10)
        async with opened(client, served.address) as one:
            await one.chunk(payload[:1000], 0)
            refusal = await refused(one.outcome)
        assert (refusal.status, refusal.reason) == (Status.DEADLINE_EXCEEDED, "UPLOAD_STALLED")
        assert "no message for 2 s" in refusal.message
        async with opened(client, served.address) as one:
            assert one.states[-1].offset == 1000
        assert (await client.visit(served.address)).data == answer_to(payload, 10)
        assert client.sent == [1000, 2000]
        kept = entries(served.spool)

        def plain() -> stranger.Reply:
            with stranger.open_channel(served.address) as channel:
                never = threading.Event()

                def messages() -> Iterator[Any]:
                    yield stranger.first_message("chaos", {"starts": str(work.starts)})
                    never.wait()

                try:
                    return stranger.reply_of(
                        stranger.start(channel, "chaos", messages(), metadata=[("x-func-name", "count")])
                    )
                finally:
                    never.set()

        reply = await asyncio.to_thread(plain)
        assert (reply.code, reply.info.reason) == (StatusCode.DEADLINE_EXCEEDED, "UPLOAD_STALLED")
        assert entries(served.spool) == kept
        assert work.lines == ["start"]

    run(main)


def leave_descriptors(served: Served, free: int) -> None:
    """The server can open `free` more files and connections, and no more."""
    used = {int(name) for name in os.listdir(f"/proc/{served.process.pid}/fd")}
    lowest = next(n for n in range(1 << 20) if n - len([fd for fd in used if fd < n]) == free)
    _, hard = resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (lowest, hard))


@pytest.mark.parametrize("shortage", ["of room", "of descriptors"])
def test_what_was_acknowledged_outlives_a_shortage(serve_one: Callable[..., Served], work: Work, shortage: str) -> None:
    """A run that ends in it, and a job in line, whose keyword arguments are in a file.

    Mutants seen: a job in line ends as FAILED; so does one whose keyword arguments cannot be read; the answer does.
    """

    async def main() -> None:
        served = serve_one()
        before = resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)
        first, second = work.client("wait"), work.client(size=10, more="x" * INLINE)
        task = await running(work, first, served.address)
        async with (
            opened(second, served.address) as one,
            call(served.address, first.ticket, Op.ATTACH) as other,
        ):
            await one.chunk(PAYLOAD, 0)
            await one.last(PAYLOAD)
            await one.phase(Phase.QUEUED)
            await other.phase(Phase.RUNNING)
            if shortage == "of room":
                limit(served, 100)
            else:
                leave_descriptors(served, 0)
            work.until.touch()
            # What has begun has its journal open: its outcome needs room, but no descriptor.
            waiting = [(one, Phase.QUEUED)] + [(other, Phase.RUNNING)] * (shortage == "of room")
            for watcher, phase in waiting:
                state = await watcher.until(lambda state: state.message.startswith("waiting: the server"))
                assert state.phase == phase
            if shortage == "of room":
                assert not task.done()
            else:
                assert (await task).json == "done"
            assert work.lines == ["start"]
            limit(served, resource.RLIM_INFINITY)
            resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, before)
            assert (await task).json == "done"
            assert (await one.outcome()).data == answer_to(PAYLOAD, 10)
        assert work.lines == ["start", "start"]
        assert "a bug of aipod" not in served.log_text()

    run(main)


def test_who_finds_no_descriptor_comes_again_and_what_runs_goes_on(
    serve_one: Callable[..., Served], work: Work
) -> None:
    """Mutants seen: `claim` raises what the system does, INTERNAL to a client; what a job's tick raises ends it."""

    async def main() -> None:
        served = serve_one("--tick", "5")  # the first one comes when there is none
        before = resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)
        ended, client = work.client(size=10), work.client("wait")
        await ended.visit(served.address)
        task = await running(work, client, served.address)
        leave_descriptors(served, 0)
        await until(lambda: "would not survive a power cut" in served.log_text())
        refusals: list[tuple[str, bool]] = []
        watched: list[Phase] = []
        for free in (1, 2, 3):
            leave_descriptors(served, free)
            with contextlib.suppress(Lost):  # it cannot even be heard
                refusal = await refused(work.client().visit, served.address)
                refusals.append((refusal.reason, refusal.retry))
            with contextlib.suppress(Lost, Refusal):
                async with call(served.address, client.ticket, Op.ATTACH, released=[ended.ticket]) as watcher:
                    watched.append(Phase((await watcher.state()).phase))
            await asyncio.sleep(2 * TICK)
            resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, before)
        assert set(refusals) == {("OVERLOADED", True)}  # some were heard
        assert set(watched) == {Phase.RUNNING}
        assert served.process.poll() is None
        assert (await attach(served.address, ended.ticket)).phase in (Phase.DONE, Phase.RELEASED)
        work.until.touch()
        assert (await task).phase == Phase.DONE
        assert (await work.client(size=20).visit(served.address)).data == answer_to(PAYLOAD, 20)
        assert "a bug of aipod" not in served.log_text()

    run(main)
