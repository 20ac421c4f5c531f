"""kill -9 of the server at every durable step of a job, one after the other: the job ends well, or as interrupted.

The steps are the same on every Python: the first of those that are supported tries each one, the others every fifth.

Each time a server is killed at its n-th step (`tests.killed_server`), and the client comes back with the same ticket to
another one on the same spool: in turn one that has been there all the time, and one that was started afterwards.

I2: the method starts at most once, a restartable one at most twice. I3, I14: whatever the first answer was, it is the
same at every later attach. I4: an answer is right. I7: a run whose server has died is told as interrupted.

Mutants seen: RUNNING is not written before the start; a job found RUNNING is always queued again; RESUME creates what
it does not find; a cancelled upload's end is told and not stored.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aipod.codec import job_id
from aipod.wire.ai import Op, Phase
from tests import wire
from tests.conftest import FIRST, Served
from tests.models_resume import LONG, answer_to

MODEL = "tests.models_resume:Jobs"
PAYLOAD = os.urandom(2500)
EVERY = 1 if FIRST else 5
# Nothing happens at ticks: the steps are the same every time.
OPTIONS = ("--tick", "30", "--drain", "0")


class Story:
    """One client's job, on a server that will be killed and then on others."""

    first: Served
    others: list[Served]

    def __init__(self, directory: Path, name: str) -> None:
        self.starts = directory / "starts"
        self.restartable = name == "again"
        self.client = wire.Client(
            name, PAYLOAD, {"starts": str(self.starts), "size": LONG}, restartable=self.restartable
        )

    @property
    def count(self) -> int:
        return len(self.starts.read_text().splitlines()) if self.starts.exists() else 0

    async def large(self) -> wire.Outcome:
        """Chunks, a checkpoint after each, an answer that is a file."""
        try:
            outcome = await self.client.visit(self.first.address, wait=True)
        except wire.Lost:
            outcome = await self.client.until_known([other.address for other in self.others])
        await self.told_again(outcome)
        return outcome

    async def small(self) -> wire.Outcome | None:
        """All in one message, an answer in the journal; None where it was not started and never will be."""
        self.client.payload, self.client.kwargs = b"", self.client.kwargs | {"size": 100}
        spool = (self.others[0].spool / "spool-id").read_text()
        try:
            outcome = await self.client.visit_at_once(self.first.address, spool)
        except wire.Lost:
            try:
                outcome = await self.client.until_known([other.address for other in self.others])
            except wire.Refusal as exc:
                assert exc.reason == "NOT_STARTED"  # noqa: PT017
                assert self.count == 0
                # And a delayed message cannot start it any more.
                self.client.committed = False
                late = await self.client.visit(self.others[0].address)
                assert late.phase == Phase.RELEASED
                assert self.count == 0
                return None
        await self.told_again(outcome)
        return outcome

    async def released(self) -> wire.Outcome:
        """As `large`, and a release."""
        outcome = await self.large()
        with contextlib.suppress(wire.Lost):
            await wire.ask(self.first.address, self.client.ticket, Op.RELEASE)
        now = await wire.attach(self.others[0].address, self.client.ticket)
        assert now == outcome or now.phase == Phase.RELEASED
        await self.told_again(now)
        return outcome

    async def cancelled(self) -> wire.Outcome:
        """An upload that is cancelled half way."""
        client = self.client
        client.epoch += 1
        try:
            async with wire.call(
                self.first.address, client.ticket, Op.RUN, client.name, client.kwargs, **client.fields
            ) as one:
                await one.state()
                await one.chunk(PAYLOAD[:1000], 0, sync=True)
                await one.until(lambda state: state.offset == 1000)
                await wire.ask(self.first.address, client.ticket, Op.CANCEL)
                outcome = await one.outcome()
                assert outcome.phase == Phase.CANCELLED
        except wire.Lost:
            outcome = await client.until_known([other.address for other in self.others])
        await self.told_again(outcome)
        return outcome

    async def told_again(self, outcome: wire.Outcome) -> None:
        for other in (*self.others, self.others[0]):
            assert await wire.attach(other.address, self.client.ticket) == outcome
        half = outcome.data[: len(outcome.data) // 2]
        assert await wire.attach(self.others[0].address, self.client.ticket, before=half) == outcome
        # RESUME tells it too: a client does not know whether it has ended.
        self.client.committed = True
        self.client.phase = Phase.NONE
        assert await self.client.visit(self.others[0].address) == outcome

    def judge(self, outcome: wire.Outcome | None) -> str:
        """What became of it, in a word."""
        assert self.count <= (2 if self.restartable else 1)
        if outcome is None:
            return "not started"
        if outcome.phase == Phase.DONE:
            assert self.count >= 1
            data = self.client.payload
            assert outcome.data == answer_to(data, self.client.kwargs["size"])
        elif outcome.phase == Phase.FAILED:
            assert outcome.reason == "INTERRUPTED"
            assert not self.restartable or self.count == 2
        else:
            assert (outcome.phase, self.count) == (Phase.CANCELLED, 0)
        return outcome.phase.name


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def survivor(directory: Path) -> Iterator[Served]:
    served = Served(MODEL, directory, ("--tick", "0.05", "--drain", "0"), "127.0.0.1:0")
    yield served
    assert served.stop() == 0


Tell = Callable[[Story], Any]
STORIES: list[tuple[Tell, str, set[str]]] = [
    (Story.large, "again", {"DONE"}),
    (Story.small, "count", {"DONE", "FAILED", "not started"}),
    (Story.released, "count", {"DONE", "FAILED"}),
    (Story.cancelled, "count", {"CANCELLED", "DONE"}),
]


@pytest.mark.parametrize(
    ("tell", "name", "wanted"), STORIES, ids=[f"{tell.__name__}-{name}" for tell, name, _ in STORIES]
)
def test_a_server_killed_at_any_step(
    directory: Path, survivor: Served, tell: Tell, name: str, wanted: set[str]
) -> None:
    def play(n: int) -> tuple[str, int]:
        """What became of the job where the server was killed at step `n`, and how many steps it came."""
        place = directory / f"{tell.__name__}-{name}-{n}"
        place.mkdir()
        log = place / "steps"
        story = Story(place, name)
        program = ("tests.killed_server", str(n), str(log), job_id(story.client.ticket))
        first = story.first = Served(MODEL, directory, OPTIONS, "127.0.0.1:0", program, forked=True)
        others = story.others = [survivor]
        try:
            if n % 4 == 1:
                # The next server on this spool, which finds what was left; the story gets no answer before.
                options = ("--tick", "0.05", "--drain", "0")
                others.insert(0, Served(MODEL, directory, options, "127.0.0.1:0", forked=True))
            became = story.judge(wire.sync(tell, story))
            return became, log.stat().st_size
        finally:
            if n:
                first.process.kill()
            for served in (first, *others[:-1]):
                served.stop()

    became, steps = play(0)
    assert became in wanted
    assert steps > 5
    with ThreadPoolExecutor(2) as threads:
        killed_at = range(1, steps + 1, EVERY)
        results = dict(zip(killed_at, threads.map(play, killed_at), strict=True))
    assert [n for n, (_, reached) in results.items() if reached != n - 1] == []  # each was killed where it should
    seen = {became for became, _ in results.values()}
    assert seen == wanted if EVERY == 1 else seen <= wanted
