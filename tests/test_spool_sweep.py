"""What a sweep removes and what it leaves alone."""

from __future__ import annotations

import fcntl
import gc
import os
import tracemalloc
from pathlib import Path

import pytest

from aipod.spool import Spool
from tests.conftest import left_in
from tests.spools import (
    PLAIN,
    TICKETED,
    TTL,
    UPLOAD_TTL,
    A,
    B,
    Broom,
    C,
    claimed,
    killed,
    left_empty,
    opened,
    sweep,
)

spool = pytest.fixture(left_empty)


def test_a_sweep_removes_what_no_ticket_can_claim(spool: Spool) -> None:
    with killed(spool, A, PLAIN) as entry:
        entry.write(b"payload")
        entry.work.mkdir()
        (entry.work / "scratch").write_text("x")
    (spool.path / B).mkdir()  # killed between mkdir and the journal's first line: not worth a count
    (spool.path / ".trash-0123").mkdir()
    (spool.path / ".trash-0123" / "in").write_text("x")
    (spool.path / f"{C}.lock").touch()  # killed before mkdir, or after the entry was renamed
    (spool.workers / "123-abc.lock").touch()
    assert sweep(spool) == 1
    assert list(spool.workers.iterdir()) == []


def test_a_sweep_leaves_held_entries_and_living_workers_alone(spool: Spool) -> None:
    """I12. Mutants seen: an entry is removed without its lock; the lock file of any worker is removed."""
    entry = claimed(spool, A)
    with spool.worker_lock("123-abc").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep(spool) == 0
        assert left_in(spool.path) == [A, f"{A}.lock", f"{A}/in", f"{A}/state", "workers/123-abc.lock"]
    entry.destroy()
    assert sweep(spool) == 0


def test_an_entry_waits_for_the_worker_that_still_computes_for_it(spool: Spool) -> None:
    """I7. Mutant seen: the worker's lock is not looked at."""
    with killed(spool, A, PLAIN) as entry:
        entry.record({"phase": "RUNNING", "worker": "123-abc"})
    with spool.worker_lock("123-abc").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep(spool) == 0
        assert entry.payload.exists()
    assert sweep(spool) == 1


@pytest.mark.parametrize(("phase", "keep"), [("RECEIVING", UPLOAD_TTL), ("QUEUED", UPLOAD_TTL), ("DONE", TTL)])
def test_a_ticketed_entry_is_kept_until_nothing_has_changed_for_its_time(spool: Spool, phase: str, keep: float) -> None:
    """I3, I12. Mutant seen: its time does not begin anew when somebody comes back."""
    broom = Broom(spool)
    with killed(spool, A, TICKETED | {"phase": phase}):
        pass
    assert broom.sweep() == 0
    broom.clock.now += keep - 1
    assert broom.sweep() == 0
    spool.look(A).watch()  # somebody came back
    assert broom.sweep() == 0
    broom.clock.now += keep - 1
    assert broom.sweep() == 0
    broom.clock.now += 1
    assert broom.sweep() == 1


def test_an_upload_that_becomes_an_answer_has_the_time_of_an_answer(spool: Spool) -> None:
    """I3, I12. Mutant seen: it keeps the time of an upload."""
    broom = Broom(spool)
    with killed(spool, A, TICKETED) as entry:
        assert broom.sweep() == 0
        broom.clock.now += UPLOAD_TTL
        assert broom.sweep() == 0  # held
        entry.store({"phase": "FAILED"})
    assert broom.sweep() == 0
    broom.clock.now += TTL - 1
    assert broom.sweep() == 0
    broom.clock.now += 1
    assert broom.sweep() == 1


def test_what_is_remembered_of_an_entry_is_few_bytes(spool: Spool) -> None:
    """Of what ends in a day there may be much. Mutant seen: names, times and floats as they are: 300 bytes."""
    ids = [f"{number:032x}" for number in range(300)]
    for job_id in ids:
        with killed(spool, job_id, TICKETED | {"phase": "DONE"}):
            pass
    broom = Broom(spool)
    assert broom.sweep() == 0  # it removes the payloads
    tracemalloc.start()
    try:
        assert broom.sweep() == 0
        broom.clock.now += TTL - 1
        assert broom.sweep() == 0
        gc.collect()
        lines = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/spool/sweep.py")])
    finally:
        tracemalloc.stop()
    assert sum(each.size for each in lines.statistics("filename")) < 50 * len(ids)
    spool.look(ids[100]).watch()
    broom.clock.now += 1
    assert broom.sweep() == len(ids) - 1


def test_a_process_that_has_just_started_lets_entries_live_longer(spool: Spool) -> None:
    """I11. Mutant seen: an entry that is seen for the first time counts as old."""
    with killed(spool, A, TICKETED):
        pass
    old = Broom(spool)
    assert old.sweep() == 0
    old.clock.now += UPLOAD_TTL
    assert sweep(spool) == 0
    assert old.sweep() == 1


@pytest.mark.parametrize("wall", [0, 2_147_483_648 + 86400])
def test_no_wall_clock_decides(spool: Spool, wall: int) -> None:
    """I11: a modification time in 1970 does not make an entry old, nor does one in 2038 keep it.

    Mutant seen: age = time.time() - mtime.
    """
    broom = Broom(spool)
    with killed(spool, A, TICKETED):
        pass
    for path in (*(spool.path / A).iterdir(), spool.path / A):
        os.utime(path, (wall, wall), follow_symlinks=False)
    assert broom.sweep() == 0
    broom.clock.now += UPLOAD_TTL - 1
    assert broom.sweep() == 0
    broom.clock.now += 1
    assert broom.sweep() == 1


def test_a_sweep_touches_nothing_that_is_not_named_as_a_spool_s(tmp_path: Path) -> None:
    """Somebody may put other things into the directory."""
    spool = opened(tmp_path)
    (tmp_path / "poetry").mkdir()
    (tmp_path / ("x" * 32)).mkdir()
    for name in ("poetry.lock", "poetry/source", "notes"):
        (tmp_path / name).write_text("precious")
    assert sweep(spool) == 0
    assert left_in(tmp_path) == ["notes", "poetry", "poetry.lock", "poetry/source", "x" * 32]


def test_an_entry_that_cannot_be_removed_costs_nobody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = claimed(opened(tmp_path), A)
    (tmp_path / f"{A}.lock").unlink()
    (tmp_path / f"{A}.lock").mkdir()  # unlink() raises, as on a file system that has become read-only
    entry.destroy()
    assert "could not be removed" in caplog.text


def test_an_entry_with_which_nothing_can_be_done_costs_nobody_else(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    """Mutant seen: a sweep that goes on after some exceptions only."""
    with killed(spool, A, PLAIN) as entry:
        entry.record({"phase": "RUNNING", "worker": "no\0name"})
    (spool.workers / "123-abc.lock").mkdir()
    with killed(spool, B, PLAIN):
        pass
    assert sweep(spool) == 1
    assert f"job {A}" in caplog.text
    assert not (spool.path / B).exists()
    (spool.workers / "123-abc.lock").rmdir()
    entry.record({"worker": ""})
    assert sweep(spool) == 1
