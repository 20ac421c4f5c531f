"""When ended jobs are forgotten before their time: by a clock that the test turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from aipod.job.job import Keep, Told
from aipod.results import INLINE
from aipod.service.forget import KEEP_ANSWERED, KEEP_RELEASED, Forgetter
from aipod.spool import Spool


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
    told = Told(spool.look(job_id), spool.id, Keep())
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


def test_a_released_job_says_so_for_a_minute(spool: Spool) -> None:
    clock = Clock()
    forgetter = Forgetter(spool, clock=clock)
    told = ended(spool, "a", **done(INLINE + 1))
    trio.run(forgetter.release, [told.look.id, "d" * 32])
    assert told.look.read()["phase"] == "RELEASED"
    assert told.look.read()["inline"] is None
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
