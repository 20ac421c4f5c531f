"""When ended jobs are forgotten before their time: by a clock that the test turns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio

from aipod.job.watched import KEEP_ANSWERED, KEEP_RELEASED, Keep, Told
from aipod.results import INLINE
from aipod.service.forget import AT_ONCE, Forgetter
from aipod.spool import Spool
from aipod.wire.ai import Op, Open, Phase
from tests.conftest import left_in
from tests.spools import descriptors


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return self.now


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.open(tmp_path / "spool", "app", reserve=0)


def ended(spool: Spool, digits: str, **fields: Any) -> Told:
    """A job that has ended, as a viewer sees it."""
    job_id = (digits * 32)[:32]
    entry = spool.claim(job_id, {"ticketed": True, "method": "predict", "version": "v"})
    assert entry is not None
    entry.store(fields)
    entry.let_go()
    told = Told(spool.look(job_id), spool.id, Keep(3600, 600, 86400))
    told.learn(told.look.read(), {})
    return told


def done(size: int) -> dict[str, Any]:
    return {"phase": "DONE", "kind": "bytes", "answer": size, "digest": "00", "inline": "x" * min(size, 10)}


# A call for the answer, one that only submits, one that attaches.
WANTED, SUBMIT, ATTACH = Open(), Open(have=2**64 - 1), Open(op=Op.ATTACH)


def small_ones(spool: Spool, digits: str) -> dict[str, Told]:
    return {digit: ended(spool, digit, **done(INLINE)) for digit in digits}


def test_what_was_sent_is_kept_until_its_client_says_that_it_has_it(spool: Spool) -> None:
    """Mutant seen: what was sent goes after `KEEP_ANSWERED` (as it once did, wherever the answer had gone)."""
    clock = Clock()
    forgetter = Forgetter(spool, clock=clock)
    jobs = small_ones(spool, "ab")
    for told in jobs.values():
        forgetter.told(told, WANTED)
    trio.run(forgetter.release, [jobs["a"].look.id])
    clock.now += 100 * KEEP_ANSWERED
    trio.run(forgetter.remove_due)
    assert not jobs["a"].look.read()
    assert jobs["b"].look.read()["phase"] == "DONE"


def test_released_jobs_go_many_at_once(spool: Spool) -> None:
    """Mutant seen: a way into a thread and back for each, so that they came faster than they went."""
    clock = Clock()
    forgetter = Forgetter(spool, clock=clock)
    ids = [ended(spool, f"{n:02x}", **done(INLINE)).look.id for n in range(AT_ONCE * 2 + 50)]
    trio.run(forgetter.release, ids)
    clock.now += KEEP_RELEASED
    clock.asked = 0
    trio.run(forgetter.remove_due)
    assert clock.asked == 3 + 2  # then for more released ones, and for others
    assert left_in(spool.path) == []


def test_where_there_are_too_many_the_oldest_small_ones_that_were_sent_go(spool: Spool) -> None:
    """Mutants seen: submitted jobs count as sent; attached ones do; who attaches is told a time that is not true."""
    clock = Clock()
    forgetter = Forgetter(spool, unsaid=2, clock=clock)
    jobs = small_ones(spool, "0123456")
    large = ended(spool, "b", **done(INLINE + 1))
    failed = ended(spool, "c", phase="FAILED", reason="MODEL_ERROR", message="no")
    for told in (large, failed, *(jobs[digit] for digit in "01234")):
        forgetter.told(told, WANTED)
    forgetter.told(jobs["0"], ATTACH)
    for told, opening in ((jobs["5"], SUBMIT), (jobs["6"], ATTACH)):
        for _ in range(3):
            forgetter.told(told, opening)

    def left() -> set[str]:
        return {name[0] for name in os.listdir(spool.path) if len(name) == 32}

    clock.now += KEEP_ANSWERED - 1
    trio.run(forgetter.remove_due)
    assert left() == set("0123456bc")
    clock.now += 1
    trio.run(forgetter.remove_due)
    assert left() == set("0456b")
    clock.now += 100 * KEEP_ANSWERED
    trio.run(forgetter.remove_due)
    assert left() == set("0456b")


def test_where_there_is_no_room_small_ones_that_were_sent_go(spool: Spool) -> None:
    clock = Clock()
    full = Spool.open(spool.path, "app", reserve=1 << 62)
    forgetter = Forgetter(full, clock=clock)
    jobs = small_ones(spool, "ab")
    forgetter.told(jobs["a"], WANTED)
    forgetter.told(jobs["b"], SUBMIT)
    clock.now += KEEP_ANSWERED - 1
    trio.run(forgetter.remove_due)
    assert jobs["a"].look.read()
    clock.now += 1
    trio.run(forgetter.remove_due)
    assert not jobs["a"].look.read()
    assert jobs["b"].look.read()


def test_a_client_is_told_how_long_its_job_is_kept(spool: Spool) -> None:
    """The least, that is: it is for the client to come in time. Mutant seen: every answer has its `--ttl`."""
    small, large = ended(spool, "a", **done(INLINE)), ended(spool, "b", **done(INLINE + 1))
    failed = ended(spool, "c", phase="FAILED", reason="MODEL_ERROR", message="no")
    released = ended(spool, "d", phase="RELEASED")
    told = [watched.state().ttl for watched in (small, large, failed, released)]
    assert told == [KEEP_ANSWERED, 86400, KEEP_ANSWERED, KEEP_RELEASED]
    for phase, ttl in ((Phase.RECEIVING, 3600), (Phase.QUEUED, 600), (Phase.RUNNING, 600)):
        large.phase = phase
        assert large.state().ttl == ttl
    assert [Keep(ended=5).of(phase, small=True) for phase in (Phase.DONE, Phase.RELEASED)] == [5, 5]


def test_a_released_job_says_so_for_a_minute(spool: Spool) -> None:
    clock = Clock()
    forgetter = Forgetter(spool, clock=clock)
    told = ended(spool, "a", **done(INLINE + 1))
    trio.run(forgetter.release, [told.look.id, "d" * 32])
    assert told.look.read()["phase"] == "RELEASED"
    assert "inline" not in told.look.read()
    clock.now += KEEP_RELEASED - 1
    trio.run(forgetter.remove_due)
    assert told.look.read()["phase"] == "RELEASED"
    clock.now += 1
    trio.run(forgetter.remove_due)
    assert not told.look.read()


def test_a_job_that_has_not_ended_is_neither_released_nor_removed(spool: Spool) -> None:
    clock = Clock()
    forgetter = Forgetter(spool, clock=clock)
    entry = spool.claim("a" * 32, {"ticketed": True, "method": "predict", "version": "v"})
    assert entry is not None
    for held in (True, False):
        trio.run(forgetter.release, [entry.id])
        clock.now += KEEP_RELEASED
        trio.run(forgetter.remove_due)
        assert entry.read()["method"] == "predict"
        assert "phase" not in entry.read()
        if held:
            entry.let_go()


async def test_an_ended_job_that_somebody_has_for_a_moment_is_released_all_the_same(spool: Spool) -> None:
    """As who makes a long answer durable. Mutant seen: it is kept for its whole time."""
    forgetter = Forgetter(spool)
    watched = ended(spool, "a", **done(INLINE))
    entry = spool.hold(watched.look.id)
    assert entry is not None
    assert forgetter._release(watched.look.id) is None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(forgetter.release, [watched.look.id])
        await trio.sleep(0.1)
        entry.let_go()
    assert watched.look.read()["phase"] == "RELEASED"


def test_without_a_descriptor_nothing_is_forgotten_and_nothing_ends(spool: Spool) -> None:
    """What goes on beside the calls must not end the server. Mutant seen: what `hold` raises is not caught."""
    clock = Clock()
    forgetter = Forgetter(spool, unsaid=0, clock=clock)
    first, second = ended(spool, "a", **done(INLINE)), ended(spool, "b", **done(INLINE))
    forgetter.told(first, WANTED)
    clock.now += KEEP_ANSWERED
    with descriptors(0):
        assert forgetter._remove(first.look.id)
        assert not forgetter._release(second.look.id)
    for told in (first, second):
        assert told.look.read()["phase"] == "DONE"
    assert forgetter._release(second.look.id)
