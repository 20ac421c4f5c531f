"""Uploads that lose their connections, seen from the wire: where they go on, who may, and that one run comes of it."""

from __future__ import annotations

import asyncio

import pytest

from aipod.codec import job_id
from aipod.wire.ai import Phase, Raw
from tests import wire
from tests.conftest import run
from tests.models_resume import LONG, answer_to
from tests.pairs import (
    BOTH,
    PAYLOAD,
    Pair,
    Work,
    begun,
    opened,
    refused,
    two_servers,
    work_in,
)
from tests.phases import until
from tests.wire import Client, Lost, Outcome, Refusal, attach

pair = pytest.fixture(scope="module")(two_servers)
work = pytest.fixture(work_in)


@BOTH
def test_an_upload_that_is_cut_is_resumed_at_the_durable_offset(pair: Pair, work: Work, way: str) -> None:
    """I1, I5. Mutant seen: `resume` begins at 0."""
    first, second = pair.of(way)

    async def main() -> None:
        client = work.client()
        await begun(client, first, 1000)
        outcome = await client.visit(second, chunk=500)
        assert client.sent == [1000, 1500, 2000, 2500, 3000]
        assert outcome.data == answer_to(PAYLOAD, LONG)
        assert work.lines == ["start"]

    run(main)


def test_what_was_written_and_not_told_is_durable_when_a_connection_is_left(pair: Pair, work: Work) -> None:
    async def main() -> None:
        client = work.client()
        async with opened(client, pair.a.address) as one:
            await one.chunk(PAYLOAD[:2000], 0)
            # The server has it when it has answered what comes behind.
            await one.chunk(PAYLOAD[2000:2001], 2000, sync=True)
            await one.until(lambda state: state.offset == 2001)
            await one.chunk(PAYLOAD[2001:3000], 2001)
            written = pair.spool / job_id(client.ticket) / "in"
            await until(lambda: written.stat().st_size == 3000)
        assert (await client.visit(pair.b.address)).phase == Phase.DONE
        assert client.sent == [3000]

    run(main)


@BOTH
def test_take_over_from_a_silent_connection_within_two_ticks(pair: Pair, work: Work, way: str) -> None:
    """I6. Time is the server's: the heartbeats that the newer one hears before the upload is its own.

    Mutants seen: the holder does not heed who asks; nobody asks (the newer one hears BUSY).
    """
    first, second = pair.of(way)

    async def main() -> None:
        client = work.client()
        async with opened(client, first) as silent:
            await silent.chunk(PAYLOAD[:1000], 0, sync=True)
            await silent.until(lambda state: state.offset == 1000)
            async with opened(client, second) as newer:
                assert newer.beats <= 1 + 2, "one at once, and one for each tick"
                assert (newer.states[-1].phase, newer.states[-1].offset) == (Phase.RECEIVING, 1000)
                superseded = await refused(silent.outcome)
                assert (superseded.reason, superseded.metadata) == ("SUPERSEDED", {"epoch": str(client.epoch)})
                await newer.chunk(PAYLOAD[1000:], 1000)
                await newer.last(PAYLOAD)
                assert (await newer.outcome()).data == answer_to(PAYLOAD, LONG)
        assert work.lines == ["start"]

    run(main)


@BOTH
def test_a_delayed_older_connection_does_not_disturb_a_newer_one(pair: Pair, work: Work, way: str) -> None:
    """I6. Mutant seen: no comparison of epochs."""
    first, second = pair.of(way)

    async def main() -> None:
        client = work.client()
        client.epoch = 10
        async with opened(client, first) as newer:
            await newer.chunk(PAYLOAD[:1000], 0)
            client.epoch = 0
            late = await refused(client.visit, second)
            assert (late.reason, late.metadata) == ("SUPERSEDED", {"epoch": "11"})
            await newer.chunk(PAYLOAD[1000:], 1000)
            await newer.last(PAYLOAD)
            assert (await newer.outcome()).phase == Phase.DONE
        assert work.lines == ["start"]
        # Once there is nothing to be brought, who asks does not matter.
        client.epoch, client.committed, client.phase = 0, True, Phase.NONE
        assert (await client.visit(second)).phase == Phase.DONE

    run(main)


def test_a_newer_connection_takes_over_again_and_again(pair: Pair, work: Work) -> None:
    """Each sends a little; no byte that was told durable is asked for again."""

    async def main() -> None:
        client = work.client()
        for turn in range(6):
            async with opened(client, pair.of("ab")[turn % 2]) as one:
                have = one.states[-1].offset
                assert have == turn * 500
                await one.chunk(PAYLOAD[have : have + 500], have, sync=True)
                await one.until(lambda state, end=have + 500: state.offset == end)  # type: ignore[misc]
        assert (await client.visit(pair.a.address)).data == answer_to(PAYLOAD, LONG)
        assert work.lines == ["start"]

    run(main)


def test_a_cut_after_any_message(pair: Pair, work: Work) -> None:
    """I5: the connection is cut after the k-th message that the client sends, or receives, for every k.

    Mutant seen: a lost connection cancels the job.
    """

    class Cut(wire.Call):
        """A connection that is cut once so many messages have gone one way."""

        sent = received = 0
        after_sent: int | None = None
        after_received: int | None = None

        async def send(self, message: Raw, *, end: bool = False) -> None:
            if self.sent == self.after_sent:
                raise Lost
            self.sent += 1
            await super().send(message, end=end)

        async def receive(self) -> Raw | None:
            if self.received == self.after_received:
                raise Lost
            self.received += 1
            return await super().receive()

    async def story(direction: str, k: int, addresses: list[str]) -> bool:
        """Whether there was a k-th message."""
        work.starts.unlink(missing_ok=True)
        client = work.client()
        cut = type("CutAt", (Cut,), {direction: k})
        whole = True
        try:
            outcome = await client.visit(addresses[0], kind=cut)
        except Lost:
            whole = False
            outcome = await client.until_known(addresses[::-1])
        assert outcome.data == answer_to(PAYLOAD, LONG)
        assert work.lines == ["start"]
        return not whole

    async def main() -> None:
        for direction in ("after_sent", "after_received"):
            k = 0
            while await story(direction, k, pair.of("ab")):
                k += 1
            assert k >= 5

    run(main, timeout=120)


def test_of_many_clients_with_one_ticket_one_starts_the_job_and_all_hear_the_answer(pair: Pair, work: Work) -> None:
    """I2, I6, I7. Mutant seen: the lock is let go between the upload and the run."""

    async def one_of(client: Client, address: str, epoch: int) -> Outcome:
        mine = work.client()
        mine.ticket, mine.epoch = client.ticket, epoch
        try:
            return await mine.visit(address, chunk=700)
        except Refusal as exc:
            assert exc.reason == "SUPERSEDED"  # noqa: PT017
            return await attach(address, mine.ticket)

    async def main() -> None:
        for turn in range(12):
            work.starts.unlink(missing_ok=True)
            client = work.client()
            addresses = (pair.of("ab") + pair.of("ba"))[: 2 + turn % 2]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one_of(client, a, n * 10)) for n, a in enumerate(addresses)]
            assert {task.result().data for task in tasks} == {answer_to(PAYLOAD, LONG)}
            assert work.lines == ["start"]

    run(main, timeout=120)
