"""Who watches a job and how it ends, seen from the wire: answers, cancels, releases and failures stay."""

from __future__ import annotations

import asyncio
import os

import pytest

from aipod.codec import job_id
from aipod.config import MIB
from aipod.wire.ai import Op, Phase
from tests.conftest import Serve, run
from tests.models_resume import LONG, answer_to
from tests.pairs import (
    BOTH,
    GRACE,
    MODEL,
    PAYLOAD,
    TICK,
    Pair,
    Work,
    entries,
    left,
    opened,
    refused,
    running,
    two_servers,
    work_in,
)
from tests.phases import until
from tests.wire import ask, attach, call

pair = pytest.fixture(scope="module")(two_servers)
work = pytest.fixture(work_in)

# Who watches


@BOTH
def test_attach_needs_a_ticket_and_nothing_else_and_disturbs_nobody(pair: Pair, work: Work, way: str) -> None:
    first, second = pair.of(way)

    async def main() -> None:
        client = work.client("wait", lines=50)
        async with opened(client, first) as uploader:
            async with call(second, client.ticket, Op.ATTACH) as watcher:
                assert (await watcher.phase(Phase.RECEIVING)).offset == 0
                await uploader.chunk(PAYLOAD, 0, sync=True)
                await uploader.until(lambda state: state.offset == len(PAYLOAD))
                await watcher.until(lambda state: state.offset == len(PAYLOAD))
                await uploader.last(PAYLOAD)
                state = await watcher.until(lambda state: state.message == "step 49" and len(watcher.log) > 300)
                assert state.progress == pytest.approx(0.98)
                log = "".join(f"line {n}\n" for n in range(50)).encode()
                assert watcher.log == log
                # Also from where a client has left off, and in the same words from anywhere.
                for address in (first, second):
                    async with call(address, client.ticket, Op.ATTACH, log_have=100) as again:
                        await again.until(lambda state: len(again.log) == len(log) - 100)
                        assert again.log == log[100:]
                work.until.touch()
                outcome = await watcher.outcome()
            assert await uploader.outcome() == outcome
        assert outcome.json == "done"
        assert work.lines == ["start"]
        for address in (first, second):
            async with call(address, client.ticket, Op.ATTACH, log_have=7) as late:
                assert await late.outcome() == outcome
                assert late.log == log[7:]

    run(main)


@pytest.mark.parametrize("size", [100, LONG, 3 * MIB + 5])
def test_the_answer_comes_from_where_the_client_has_it_as_often_as_asked(pair: Pair, work: Work, size: int) -> None:
    """I3, I4. Mutant seen: `have` is not looked at."""

    async def main() -> None:
        client = work.client(size=size)
        outcome = await client.visit(pair.a.address)
        answer = answer_to(PAYLOAD, size)
        assert outcome.data == answer
        for have in (0, 1, size // 2, size - 1, size):
            for address in pair.of("ab"):
                assert await attach(address, client.ticket, before=answer[:have]) == outcome
        assert work.lines == ["start"]

    run(main)


def test_a_watcher_of_a_job_that_is_not_there(pair: Pair) -> None:
    async def main() -> None:
        before = entries(pair.spool)
        for op in (Op.ATTACH, Op.CANCEL, Op.RELEASE):
            assert (await refused(ask, pair.a.address, os.urandom(16), op)).reason == "NOT_FOUND"
        assert entries(pair.spool) == before

    run(main)


# Ends


@BOTH
@pytest.mark.parametrize("phase", ["RECEIVING", "abandoned", "RUNNING"])
def test_cancel_ends_a_job_in_any_phase_and_for_ever(pair: Pair, work: Work, phase: str, way: str) -> None:
    """I14. Mutants seen: the holder does not look for `cancel`; the end of a cancelled upload is not stored."""
    first, second = pair.of(way)

    async def main() -> None:
        client = work.client("wait")
        if phase == "RUNNING":
            task = await running(work, client, first)
            await ask(second, client.ticket, Op.CANCEL)
            outcome = await task
            assert work.lines == ["start", "cancelled"]
        else:
            async with opened(client, first) as one:
                await one.chunk(PAYLOAD[:100], 0, sync=True)
                await one.until(lambda state: state.offset == 100)
                if phase == "RECEIVING":
                    await ask(second, client.ticket, Op.CANCEL)
                    outcome = await one.outcome()
            if phase == "abandoned":
                async with asyncio.timeout(5):  # the server may not have seen yet that it was left
                    while (await ask(second, client.ticket, Op.CANCEL)).phase != Phase.CANCELLED:
                        await asyncio.sleep(0.05)
                outcome = await attach(second, client.ticket)
            assert work.lines == []
        assert (outcome.phase, outcome.reason) == (Phase.CANCELLED, "CANCELLED")
        for address in (first, second):
            async with asyncio.timeout(10):
                assert await attach(address, client.ticket) == outcome
            for committed in (False, True):
                client.committed = committed
                assert await client.visit(address) == outcome
            assert (await ask(address, client.ticket, Op.CANCEL)).phase == Phase.CANCELLED
        assert "cancelled" not in work.lines[2:]
        assert work.lines.count("start") == (phase == "RUNNING")

    run(main)


def test_a_job_in_line_is_cancelled_without_a_start(pair: Pair, work: Work) -> None:
    async def main() -> None:
        blockers = [await running(work, work.client("wait"), pair.a.address) for _ in range(3)]
        client = work.client("wait")
        async with opened(client, pair.a.address) as one:
            await one.chunk(PAYLOAD, 0)
            await one.last(PAYLOAD)
            assert (await one.phase(Phase.QUEUED)).offset == len(PAYLOAD)
            async with call(pair.b.address, client.ticket, Op.ATTACH) as other:
                assert (await other.phase(Phase.QUEUED)).offset == len(PAYLOAD)
            await ask(pair.b.address, client.ticket, Op.CANCEL)
            assert (await one.outcome()).phase == Phase.CANCELLED
        work.until.touch()
        assert {(await task).json for task in blockers} == {"done"}
        assert work.lines == ["start"] * 3

    run(main)


def test_cancel_of_what_has_ended_changes_nothing(pair: Pair, work: Work) -> None:
    async def main() -> None:
        client = work.client()
        outcome = await client.visit(pair.a.address)
        assert (await ask(pair.b.address, client.ticket, Op.CANCEL)).phase == Phase.DONE
        assert await attach(pair.a.address, client.ticket) == outcome

    run(main)


def test_release_forgets_an_answer_for_ever(pair: Pair, work: Work) -> None:
    """I14. Mutant seen: the tombstone is removed with the answer, and a delayed RUN starts the job again."""

    async def main() -> None:
        client = work.client()
        await client.visit(pair.a.address)
        assert (await ask(pair.b.address, client.ticket, Op.RELEASE)).phase == Phase.RELEASED
        assert not (pair.spool / job_id(client.ticket) / "res").exists()
        for address in pair.of("ab"):
            assert (await attach(address, client.ticket)).reason == "RELEASED"
            client.committed, client.phase = False, Phase.NONE
            assert (await client.visit(address)).phase == Phase.RELEASED
        assert work.lines == ["start"]

    run(main)


def test_a_failure_is_an_answer_that_stays(pair: Pair, work: Work) -> None:
    """I14. Mutant seen: it is told and not stored, and the job is run again."""

    async def main() -> None:
        client = work.client("boom")
        outcome = await client.visit(pair.a.address)
        assert (outcome.phase, outcome.reason) == (Phase.FAILED, "MODEL_ERROR")
        for address in pair.of("abab"):
            assert await attach(address, client.ticket) == outcome
            client.committed, client.phase = False, Phase.NONE
            assert await client.visit(address) == outcome
        assert work.lines == ["start"]

    run(main)


def test_tickets_of_jobs_that_have_ended_are_released_along_with_another_call(pair: Pair, work: Work) -> None:
    async def main() -> None:
        client, running_one = work.client(), work.client("wait")
        await client.visit(pair.a.address)
        task = await running(work, running_one, pair.a.address)
        released = [client.ticket, running_one.ticket, os.urandom(16)]
        other = work.client(size=10)
        async with opened(other, pair.a.address, released=released):
            pass
        async with asyncio.timeout(5):
            while (await attach(pair.b.address, client.ticket)).phase != Phase.RELEASED:
                await asyncio.sleep(0.05)
        work.until.touch()
        assert (await task).json == "done"  # only what has ended is
        await ask(pair.a.address, other.ticket, Op.CANCEL)

    run(main)


def test_one_call_releases_many_and_is_answered_when_that_is_done(pair: Pair, work: Work) -> None:
    """Its own job among them. Mutant seen: the others are released some time later."""

    async def main() -> None:
        clients = [work.client() for _ in range(20)]
        for client in clients:
            await client.visit(pair.a.address)
        tickets = [client.ticket for client in clients]
        assert (await ask(pair.a.address, tickets[0], Op.RELEASE, released=tickets)).phase == Phase.RELEASED
        journals = [pair.spool / job_id(ticket) / "state" for ticket in tickets]
        assert [b"RELEASED" in journal.read_bytes() for journal in journals] == [True] * 20

    run(main)


# Nobody there


def test_a_job_that_nobody_watches_is_cancelled_after_the_grace_and_not_before(pair: Pair, work: Work) -> None:
    """I16. When exactly: tests/test_job.py. Mutant seen: a watcher in another process does not count."""

    async def main() -> None:
        client = work.client("wait")
        await left(await running(work, client, pair.a.address))
        # Watched from elsewhere, it goes on for longer than the grace: what is the same is told once a tick.
        async with call(pair.b.address, client.ticket, Op.ATTACH) as watcher:
            for _ in range(2 + int(GRACE / TICK) + 2):
                assert (await watcher.state()).phase == Phase.RUNNING
        await until(lambda: "cancelled" in work.lines)
        outcome = await attach(pair.b.address, client.ticket)
        assert (outcome.phase, outcome.reason) == (Phase.CANCELLED, "CANCELLED")
        assert "nobody came back for it for 2 s" in outcome.message

    run(main)


def test_the_grace_of_a_job_in_its_own_process(pair: Pair, serve: Serve, work: Work) -> None:
    """I16. Mutants seen: no grace (the job of the patient server ends, too); nobody is missed in its own process."""

    async def main() -> None:
        patient = serve(MODEL, "--tick", "0.2", "--grace", "600", "--instances", "2").address
        client, other = work.client("wait"), work.client("wait")
        for one in (client, other):
            await left(await running(work, one, patient))
        async with call(patient, other.ticket, Op.ATTACH) as ticks:
            for _ in range(5):  # ticks of the server, in which it looks who is watched
                assert (await ticks.state()).phase == Phase.RUNNING
        async with call(patient, client.ticket, Op.ATTACH) as again:
            assert (await again.state()).phase == Phase.RUNNING
            work.until.touch()
            assert (await again.outcome()).json == "done"
        assert (await attach(patient, other.ticket)).json == "done"
        work.until.unlink()
        client = work.client("wait")
        await left(await running(work, client, pair.a.address))
        await until(lambda: "cancelled" in work.lines)
        assert "nobody came back for it for 2 s" in (await attach(pair.a.address, client.ticket)).message

    run(main)
