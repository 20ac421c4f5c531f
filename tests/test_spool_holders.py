"""Who holds a job: locks of processes and threads, and which connection has an upload."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from aipod.errors import Refused
from aipod.spool import Entry, Spool
from aipod.spool.locks import try_lock
from tests.conftest import ROOT, left_in
from tests.spools import (
    PLAIN,
    TICKETED,
    A,
    B,
    claimed,
    descriptors,
    killed,
    left_empty,
    opened,
    refusal,
    sweep,
)

spool = pytest.fixture(left_empty)

# Locks


def test_a_claim_waits_for_who_only_looks_whether_there_is_an_entry(spool: Spool) -> None:
    """A sweep holds the lock file of a job that is about to begin, and its process gets no time to go on.

    Mutant seen: a tenth of a second is enough; `claim_plain` then failed, for it takes no ticket for known.
    """
    lock = try_lock(spool.lock_path(A))
    assert lock is not None
    timer = threading.Timer(0.5, lock.release)
    timer.start()
    entry = spool.claim(A, PLAIN)
    timer.join()
    assert entry is not None
    entry.destroy()


def test_two_processes_exclude_each_other(spool: Spool) -> None:
    program = """if True:
        import sys
        from pathlib import Path
        from aipod.spool import Spool
        spool = Spool.open(Path(sys.argv[1]), "m.Class", reserve=0)
        entry = spool.claim("a" * 32, {"ticketed": False})
        print("held", flush=True)
        sys.stdin.read()
        entry.destroy()
    """
    command = [sys.executable, "-c", program, str(spool.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        assert spool.is_held(A)
        assert spool.claim(A, PLAIN) is None
        assert spool.hold(A) is None
        assert sweep(spool) == 0
        assert (spool.path / A).exists()
        process.kill()
        process.wait()
        assert not spool.is_held(A)
        assert spool.claim(A, PLAIN) is None  # not held, but there
        assert sweep(spool) == 1


def test_of_many_threads_one_claims_a_job(spool: Spool) -> None:
    start = threading.Barrier(20)
    got: list[Any] = []

    def claim() -> None:
        start.wait()
        got.append(spool.claim(A, PLAIN))

    threads = [threading.Thread(target=claim) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got.count(None) == 19
    next(entry for entry in got if isinstance(entry, Entry)).destroy()


def test_what_was_killed_before_its_first_line_is_nothing(spool: Spool) -> None:
    (spool.path / A).mkdir()
    assert spool.hold(A) is None
    (spool.path / A).mkdir()
    (spool.path / A / "in").write_bytes(b"noise")
    entry = claimed(spool, A)
    assert entry.payload.stat().st_size == 0
    entry.destroy()


def test_a_fence_is_there_for_ever_and_fences_nothing_that_is(spool: Spool) -> None:
    assert spool.fence(A)
    assert not spool.fence(A)
    assert spool.claim(A, TICKETED) is None
    assert spool.look(A).read().items() >= {"phase": "RELEASED", "fenced": True}.items()
    assert left_in(spool.path) == []  # nothing but the line
    entry = claimed(spool, B, TICKETED)
    assert not spool.fence(B)
    entry.destroy()


# Who may upload


def test_the_newest_epoch_gets_the_upload_whatever_the_order(spool: Spool) -> None:
    """I6. Mutant seen: no comparison of epochs."""
    first = claimed(spool, A, TICKETED | {"epoch": 5})
    assert spool.take_over(A, 7) is None  # asked
    assert first.words().wanted == 7
    assert refusal(spool.take_over, A, 6) == "SUPERSEDED"  # a delayed one
    assert first.words().wanted == 7
    first.let_go()
    assert refusal(spool.take_over, A, 6) == "SUPERSEDED"  # also where nobody holds it
    second = spool.take_over(A, 7)
    assert second is not None
    assert second.wanted() == 7
    assert spool.take_over(A, 1 << 63) is None
    assert [name for name in os.listdir(second.path) if name.startswith("want-")] == [f"want-{1 << 63:020d}"]
    second.destroy()


def test_who_asks_while_another_is_getting_the_lock_gets_it(tmp_path: Path) -> None:
    """I6. Mutants seen: no look at who else has asked once the lock is held; the last to ask wins, not the highest."""

    class Race(Spool):
        """A newer connection comes between the look and the lock."""

        def hold(self, job_id: str) -> Entry | None:
            self.look(job_id).ask(9)
            return super().hold(job_id)

    with killed(opened(tmp_path), A, TICKETED | {"epoch": 5}):
        pass
    spool = Race.open(tmp_path, "m.Class", reserve=0)
    assert refusal(spool.take_over, A, 8) == "SUPERSEDED"
    assert not spool.is_held(A)
    entry = spool.take_over(A, 9)
    assert entry is not None
    entry.ask(7)  # a delayed one that has looked before
    assert entry.words().wanted == 9
    entry.destroy()


def test_an_older_epoch_than_the_first_is_superseded_before_anybody_has_asked(spool: Spool) -> None:
    """I6. Mutant seen: the epoch of who has begun the upload does not count."""
    with killed(spool, A, TICKETED | {"epoch": 5}):
        pass
    assert refusal(spool.take_over, A, 4) == "SUPERSEDED"
    again = spool.take_over(A, 5)
    assert again is not None
    again.destroy()


def test_of_many_who_ask_at_once_the_highest_stays(spool: Spool) -> None:
    entry = claimed(spool, A, TICKETED | {"epoch": 0})
    start = threading.Barrier(16)

    def ask(epoch: int) -> None:
        start.wait()
        with contextlib.suppress(Refused):
            assert spool.take_over(A, epoch) is None

    threads = [threading.Thread(target=ask, args=(epoch,)) for epoch in range(1, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert entry.words().wanted == 16
    entry.destroy()


def test_claims_go_on_while_others_sweep(spool: Spool) -> None:
    """A sweep looks into the lock file of every job; a new one must not be refused because of it."""
    other = opened(spool.path)
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            sweep(other)

    sweeper = threading.Thread(target=go_on)
    sweeper.start()
    try:
        for n in range(500):
            entry = claimed(spool, f"{n:032x}")
            assert entry.payload.exists()
            entry.destroy()
    finally:
        stop.set()
        sweeper.join()


HOLDERS = """if True:
    import os, sys, time
    from pathlib import Path
    from aipod.spool import Spool, Sweeper
    spool, until, holds = Spool.open(Path(sys.argv[1]), "m.Class", reserve=0), time.monotonic() + 60, 0
    mark = spool.path.parent / "mark"
    while holds < 60 and time.monotonic() < until:
        entry = spool.claim("a" * 32, {"ticketed": True}) or spool.hold("a" * 32)
        if entry is not None:
            os.mkdir(mark)  # raises where there is another holder
            os.rmdir(mark)
            holds += 1
            if holds % 2:
                entry.destroy()  # and with it the lock's file
            else:
                entry.let_go()
        for _ in Sweeper(spool, upload_ttl=0, ttl=0).sweep():
            pass
    print(holds)
"""


def test_a_lock_whose_file_is_removed_never_has_two_holders(spool: Spool) -> None:
    """I8, by chance."""
    command = [sys.executable, "-c", HOLDERS, str(spool.path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(map(int, said)) > 100
    sweep(spool)
    for name in (A, f"{A}.lock"):
        (spool.path / name).unlink(missing_ok=True)


def test_a_lock_whose_file_is_removed_while_it_is_being_got_is_not_got(spool: Spool) -> None:
    """I8. Mutant seen: `flock` without a look at its links."""
    entry = claimed(spool, A)

    def between(frame: Any, event: str, function: Any) -> None:
        """The file is open, and not yet locked."""
        if event == "c_return" and function is os.open:
            sys.setprofile(None)
            entry.destroy()

    sys.setprofile(between)
    try:
        again = claimed(spool, A)
    finally:
        sys.setprofile(None)
    assert not entry._lock.is_locked
    assert spool.is_held(A)
    again.destroy()


def test_a_lock_file_is_removed_while_it_is_held(spool: Spool) -> None:
    """I8. Mutant seen: it is removed after the lock was let go of."""
    entry = claimed(spool, A)
    held: list[bool] = []

    def look(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and function is os.unlink:
            held.append(spool.is_held(A))

    sys.setprofile(look)
    try:
        entry.destroy()
    finally:
        sys.setprofile(None)
    assert held == [True, True, True]  # the payload, the journal, the lock


def test_a_copy_of_its_descriptor_holds_no_lock(spool: Spool) -> None:
    """As a process has it that is being started, until it runs its program. Mutant seen: no `unlock_descriptor`."""
    entry = claimed(spool, A)
    copy = os.dup(entry._lock._fd or 0)
    entry.let_go()
    assert not spool.is_held(A)
    os.close(copy)
    assert sweep(spool) == 1


def test_a_process_that_a_model_forks_holds_no_job(spool: Spool) -> None:
    """It may live on when its server is killed. Nor does its end free what its parent holds. Mutants seen: no
    `register_at_fork`; a release in the child, not a close."""
    program = """if True:
        import os, sys, time
        from pathlib import Path
        from aipod.spool import Spool
        spool = Spool.open(Path(sys.argv[1]), "m.Class", reserve=0)
        entry = spool.claim("a" * 32, {"ticketed": True})
        if os.fork() == 0:
            entry.let_go()
            entry.destroy()
            os.write(1, b"forked")
            time.sleep(60)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", program, str(spool.path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.read(6) == b"forked"
            assert spool.is_held(A)
            process.kill()
            process.wait()
            assert not spool.is_held(A)
            entry = spool.hold(A)
            assert entry is not None
            entry.destroy()
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_lock_that_is_lost_is_let_go_of(spool: Spool) -> None:
    """By an error of the disk, say, on the way to who wanted it."""
    entry = claimed(spool, A, TICKETED)
    entry._close()
    assert spool.is_held(A)
    del entry
    assert not spool.is_held(A)
    (spool.path / A / "state").unlink()
    os.symlink("state", spool.path / A / "state")  # which cannot be read
    with pytest.raises(Refused) as caught:
        spool.hold(A)
    assert caught.value.reason == "DAMAGED"
    assert not spool.is_held(A)
    del caught
    (spool.path / A / "state").unlink()
    assert spool.hold(A) is None


def test_who_runs_out_of_descriptors_loses_no_job(spool: Spool) -> None:
    """Mutant seen: whatever is raised by a claim removes the entry, one that was there too."""
    entry = claimed(spool, A, TICKETED)
    entry.store({"phase": "FAILED"})
    entry.let_go()
    for free in range(3):
        with descriptors(free):
            for get in (spool.hold, lambda job_id: spool.claim(job_id, PLAIN)):
                try:
                    held = get(A)
                except Refused as exc:
                    assert exc.reason == "OVERLOADED"  # noqa: PT017
                else:
                    assert free == 2
                    if held is not None:
                        held.let_go()
        assert not spool.is_held(A)
        assert spool.look(A).read()["phase"] == "FAILED"
    again = spool.hold(A)
    assert again is not None
    again.destroy()


def test_a_look_makes_no_lock_file(spool: Spool) -> None:
    assert not spool.is_held(A)
    assert spool.hold(A) is None
    assert os.listdir(spool.path / "workers") == []
    assert left_in(spool.path) == []
