"""When ended jobs are forgotten before their time: by a clock that the test turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from aipod.job.job import KEEP_ANSWERED, KEEP_RELEASED, Keep, Told
from aipod.results import INLINE
from aipod.service.forget import Forgetter
from aipod.spool import Spool
from aipod.wire.ai import Phase
from tests.spools import descriptors


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.open(tmp_path / "spool", "app", reserve=0)


def ended(spool: Spool, digit: str, **fields: Any) -> Told:
    """A job that has ended, as a viewer sees it."""
    job_id = digit * 32
    entry = spool.claim(job_id, {"ticketed": True, "method": "predict", "version": "v"})
    assert entry is not None
    entry.store(fields)
    entry.let_go()
    told = Told(spool.look(job_id), spool.id, Keep(3600, 600, 86400))
    told.learn(told.look.read(), {})
    return told


def done(size: int) -> dict[str, Any]:
    return {"phase": "DONE", "kind": "bytes", "answer": size, "digest": "00", "inline": "x" * min(size, 10)}


def test_small_jobs_are_removed_when_their_client_can_not_look_for_them_any_more(spool: Spool) -> None:
    clock = Clock()
    forgetter = Forgetter(spool, clock=clock)
    small, large = ended(spool, "a", **done(INLINE)), ended(spool, "b", **done(INLINE + 1))
    failed = ended(spool, "c", phase="FAILED", reason="MODEL_ERROR", message="no")
    for told in (small, large, failed):
        forgetter.answered(told)
    clock.now += KEEP_ANSWERED - 1
    forgetter.remove_due()
    assert small.look.read()
    assert failed.look.read()
    clock.now += 1
    forgetter.remove_due()
    assert not small.look.read()
    assert not failed.look.read()
    assert large.look.read()["phase"] == "DONE"


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
    forgetter.remove_due()
    assert told.look.read()["phase"] == "RELEASED"
    clock.now += 1
    forgetter.remove_due()
    assert not told.look.read()


def test_a_job_that_has_not_ended_is_neither_released_nor_removed(spool: Spool) -> None:
    clock = Clock()
    forgetter = Forgetter(spool, clock=clock)
    entry = spool.claim("a" * 32, {"ticketed": True, "method": "predict", "version": "v"})
    assert entry is not None
    for held in (True, False):
        trio.run(forgetter.release, [entry.id])
        clock.now += KEEP_RELEASED
        forgetter.remove_due()
        assert entry.read()["method"] == "predict"
        assert "phase" not in entry.read()
        if held:
            entry.let_go()


def test_without_a_descriptor_nothing_is_forgotten_and_nothing_ends(spool: Spool) -> None:
    """What goes on beside the calls must not end the server. Mutant seen: what `hold` raises is not caught."""
    clock = Clock()
    forgetter = Forgetter(spool, clock=clock)
    first, second = ended(spool, "a", **done(INLINE)), ended(spool, "b", **done(INLINE))
    forgetter.answered(first)
    clock.now += KEEP_ANSWERED
    with descriptors(0):
        forgetter.remove_due()
        assert not forgetter._release(second.look.id)
    for told in (first, second):
        assert told.look.read()["phase"] == "DONE"
    assert forgetter._release(second.look.id)
