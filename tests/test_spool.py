"""The spool directory: journals, locks, claims, sweeps, a full disk, and what is left afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aipod.codec import digest
from aipod.config import GIB, MIB
from aipod.errors import Refused
from aipod.spool import MAX_LOG, SYNC_AFTER, SYNC_BYTES, Entry, Journal, Spool, SpoolError
from tests.conftest import ROOT, left_in

A, B, C = "a" * 32, "b" * 32, "c" * 32
PLAIN: dict[str, Any] = {"ticketed": False}
TICKETED: dict[str, Any] = {"ticketed": True}
TTL = 3600.0


def opened(path: Path, app: str = "m.Class") -> Spool:
    return Spool.open(path, app, reserve=0, ttl=TTL)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    """A spool in which a test must leave nothing."""
    spool = opened(tmp_path / "spool")
    yield spool
    assert left_in(spool.path) == []


def refusal(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(Refused) as caught:
        function(*args, **kwargs)
    return caught.value.reason


@contextlib.contextmanager
def killed(spool: Spool, job_id: str, fields: dict[str, Any]) -> Iterator[Entry]:
    """An entry as a server leaves it that is killed at the end of the block: there, and not held."""
    entry = spool.claim(job_id, fields, size=None)
    yield entry
    entry.seal()
    entry._lock.release()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may be longer, which is what a full disk looks like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# The journal


def test_a_journal_is_the_fold_of_its_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state")
    assert journal.read() == {}
    for fields in ({"a": 1, "text": "line\nbreak é"}, {"b": 2}, {"a": 3}):
        journal.append(fields)
    assert journal.read() == {"a": 3, "b": 2, "text": "line\nbreak é"}


def test_a_journal_torn_at_any_byte_has_its_whole_lines_and_can_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "state"
    journal = Journal(path)
    states: list[dict[str, Any]] = [{}]
    ends = [0]
    for fields in ({"phase": "RECEIVING"}, {"offset": 5}, {"phase": "RUNNING", "worker": "w"}):
        journal.append(fields)
        states.append(states[-1] | fields)
        ends.append(path.stat().st_size - 1)  # the checksum says that a line is whole, not its line break
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        expected = states[sum(end <= cut for end in ends) - 1]
        assert journal.read() == expected
        journal.append({"phase": "FAILED"}, sync=True)
        assert journal.read() == expected | {"phase": "FAILED"}


def test_a_journal_with_any_bit_flipped_loses_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "state"
    journal = Journal(path)
    for fields in ({"a": 1}, {"b": 2}, {"c": 3}):
        journal.append(fields)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        state = journal.read()
        assert state.items() <= {"a": 1, "b": 2, "c": 3}.items()
        assert len(state) == (2 if whole[place : place + 1] != b"\n" else 1 if place < len(whole) - 1 else 2)


def test_a_journal_on_a_full_disk_stays_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state")
    journal.append({"a": 1})
    size = (tmp_path / "state").stat().st_size
    with largest_file(size + 10), pytest.raises(OSError, match=r"No space|File too large"):
        journal.append({"b": 2})
    assert (tmp_path / "state").stat().st_size == size
    journal.append({"c": 3})
    assert journal.read() == {"a": 1, "c": 3}


# Entries


def test_an_entry_from_its_claim_to_its_end(spool: Spool) -> None:
    entry = spool.claim(A, PLAIN | {"method": "predict"}, b'{"top": 5}', size=6)
    assert (spool.path / A).stat().st_mode & 0o777 == 0o700
    entry.write(b"abc")
    entry.write(b"def")
    assert entry.written == 6
    assert entry.seal() == digest(b"abcdef") == entry.seal()
    assert entry.payload.read_bytes() == b"abcdef"
    assert entry.payload.stat().st_mode & 0o777 == 0o400
    state = Journal(spool.path / A / "state").read()
    assert (state["method"], json.loads(state["kwargs"])) == ("predict", {"top": 5})
    entry.drop_payload()
    entry.drop_payload()
    entry.result.write_bytes(b"x" * (MIB + 1))
    assert [len(piece) for piece in entry.read_result(0)] == [MIB, 1]
    assert b"".join(entry.read_result(MIB - 1)) == b"xx"
    assert left_in(spool.path) == [A, f"{A}.lock", f"{A}/res", f"{A}/state"]
    entry.destroy()


def test_long_kwargs_are_a_file(spool: Spool) -> None:
    entry = spool.claim(A, PLAIN, b"x" * 100_000, size=None)
    assert (spool.path / A / "kw").read_bytes() == b"x" * 100_000
    assert (spool.path / A / "state").stat().st_size < 200
    entry.destroy()


def test_a_destroyed_entry_does_not_take_its_successor_along(spool: Spool) -> None:
    first = spool.claim(A, PLAIN, size=None)
    first.destroy()
    second = spool.claim(A, PLAIN, size=None)
    first.destroy()
    assert spool.is_held(A)
    assert second.payload.exists()
    second.destroy()


def test_nothing_is_synced_before_the_first_tick_and_a_checkpoint_says_what_is(spool: Spool) -> None:
    entry = spool.claim(A, PLAIN, size=None)
    entry.write(b"abc")
    entry.checkpoint()
    assert entry.durable == 0
    entry._synced_at -= SYNC_AFTER
    entry.checkpoint()
    assert entry.durable == 3
    assert Journal(spool.path / A / "state").read()["offset"] == 3
    for _ in range(SYNC_BYTES // MIB):
        entry.write(bytes(MIB))
    entry.checkpoint()
    assert entry.durable == entry.written == SYNC_BYTES + 3
    entry.destroy()


def test_a_log_is_read_from_anywhere_cut_at_characters_and_bounded(spool: Spool) -> None:
    entry = spool.claim(A, PLAIN, size=None)
    assert entry.read_log(0, 100) == b""
    entry.append_log("eins zwei drü\n")
    assert entry.read_log(5, 4) == b"zwei"
    assert entry.read_log(10, 3) == b"dr"
    assert entry.read_log(12, 3) == "ü\n".encode()
    assert entry.read_log(1000, 100) == b""
    for _ in range(3):
        entry.append_log("é" * (MAX_LOG // 4))
    entry.append_log("more")
    assert (spool.path / A / "log").stat().st_size == entry.log_size <= MAX_LOG + 64
    seen, text = 0, b""
    while piece := entry.read_log(seen, 1_000_001):
        seen += len(piece)
        text += piece
    assert seen == entry.log_size
    assert text.decode().endswith("é\n[the log is full; the rest is dropped]\n")
    entry.destroy()


# Locks


def test_two_processes_exclude_each_other(spool: Spool) -> None:
    program = """if True:
        import sys
        from pathlib import Path
        from aipod.spool import Spool
        spool = Spool.open(Path(sys.argv[1]), "m.Class", reserve=0)
        entry = spool.claim("a" * 32, {"ticketed": False}, size=None)
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
        assert refusal(spool.claim, A, PLAIN, size=None) == "JOB_EXISTS"
        assert spool.sweep() == 0
        assert (spool.path / A).exists()
        process.kill()
        process.wait()
        assert not spool.is_held(A)
        assert refusal(spool.claim, A, PLAIN, size=None) == "JOB_EXISTS"  # not held, but there
        assert spool.sweep() == 1


def test_of_many_threads_one_claims_a_job(spool: Spool) -> None:
    start = threading.Barrier(20)
    got: list[Any] = []

    def claim() -> None:
        start.wait()
        try:
            got.append(spool.claim(A, PLAIN, size=None))
        except Refused as exc:
            got.append(exc.reason)

    threads = [threading.Thread(target=claim) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got.count("JOB_EXISTS") == 19
    next(entry for entry in got if isinstance(entry, Entry)).destroy()


def test_claims_go_on_while_others_sweep(spool: Spool) -> None:
    """A sweep looks into the lock file of every job; a new one must not be refused because of it."""
    other = opened(spool.path)
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            other.sweep()

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for n in range(500):
            entry = spool.claim(f"{n:032x}", PLAIN, size=None)
            assert entry.payload.exists()
            entry.destroy()
    finally:
        stop.set()
        sweeper.join()


# Sweeps


def test_a_sweep_removes_what_no_ticket_can_claim(spool: Spool) -> None:
    with killed(spool, A, PLAIN) as entry:
        entry.write(b"payload")
        entry.work.mkdir()
        (entry.work / "scratch").write_text("x")
    (spool.path / B).mkdir()  # killed between mkdir and the journal's first line
    (spool.path / ".trash-0123").mkdir()
    (spool.path / ".trash-0123" / "in").write_text("x")
    (spool.path / f"{C}.lock").touch()  # killed before mkdir, or after the entry was renamed
    (spool.workers / "123-abc.lock").touch()
    assert spool.sweep() == 2
    assert list(spool.workers.iterdir()) == []


def test_a_sweep_leaves_held_entries_and_living_workers_alone(spool: Spool) -> None:
    entry = spool.claim(A, PLAIN, size=None)
    with spool.worker_lock("123-abc").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert spool.sweep() == 0
        assert left_in(spool.path) == [A, f"{A}.lock", f"{A}/in", f"{A}/state", "workers/123-abc.lock"]
    entry.destroy()
    assert spool.sweep() == 0


def test_an_entry_waits_for_the_worker_that_still_computes_for_it(spool: Spool) -> None:
    with killed(spool, A, PLAIN) as entry:
        entry.record({"phase": "RUNNING", "worker": "123-abc"})
    with spool.worker_lock("123-abc").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert spool.sweep() == 0
        assert entry.payload.exists()
    assert spool.sweep() == 1


def test_a_ticketed_entry_is_kept_until_nothing_has_changed_for_the_ttl(spool: Spool) -> None:
    clock = Clock()
    with killed(spool, A, TICKETED):
        pass
    assert spool.sweep(clock) == 0
    clock.now += TTL - 1
    assert spool.sweep(clock) == 0
    (spool.path / A / "log").write_text("somebody came back")
    assert spool.sweep(clock) == 0
    clock.now += TTL - 1
    assert spool.sweep(clock) == 0
    clock.now += 1
    assert spool.sweep(clock) == 1


@pytest.mark.parametrize("wall", [0, 2_147_483_648 + 86400])
def test_no_wall_clock_decides(spool: Spool, wall: int) -> None:
    """A modification time in 1970 does not make an entry old, nor does one in 2038 keep it."""
    clock = Clock()
    with killed(spool, A, TICKETED):
        pass
    for path in (*(spool.path / A).iterdir(), spool.path / A):
        os.utime(path, (wall, wall), follow_symlinks=False)
    assert spool.sweep(clock) == 0
    clock.now += TTL - 1
    assert spool.sweep(clock) == 0
    clock.now += 1
    assert spool.sweep(clock) == 1


def test_a_sweep_touches_nothing_that_is_not_named_as_a_spool_s(tmp_path: Path) -> None:
    """Somebody may put other things into the directory."""
    spool = opened(tmp_path)
    (tmp_path / "poetry").mkdir()
    (tmp_path / ("x" * 32)).mkdir()
    for name in ("poetry.lock", "poetry/source", "notes"):
        (tmp_path / name).write_text("precious")
    assert spool.sweep() == 0
    assert left_in(tmp_path) == ["notes", "poetry", "poetry.lock", "poetry/source", "x" * 32]


def test_a_directory_of_something_else_is_no_spool(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(SpoolError, match="is no spool"):
        opened(tmp_path)
    assert left_in(tmp_path) == ["notes"]


def test_the_reserve_is_kept_while_a_payload_of_unknown_size_comes_in(tmp_path: Path) -> None:
    """One message may bring gigabytes: the disk is looked at every `SYNC_BYTES`, not once per message."""
    entry = Spool.open(tmp_path, "m.Class", reserve=0).claim(A, PLAIN, size=None)
    entry.write(bytes(SYNC_BYTES))
    entry._spool._reserve = 1 << 62
    assert refusal(entry.write, b"x") == "SPOOL_FULL"
    entry.destroy()


def test_an_entry_that_cannot_be_removed_costs_nobody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = opened(tmp_path).claim(A, PLAIN, size=None)
    (tmp_path / f"{A}.lock").unlink()
    (tmp_path / f"{A}.lock").mkdir()  # unlink() raises, as on a file system that has become read-only
    entry.destroy()
    assert "could not be removed" in caplog.text


# A full disk


def test_a_payload_that_would_eat_into_the_reserve_is_refused_before_its_first_byte(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path, "m.Class", reserve=GIB)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert refusal(spool.claim, A, PLAIN, size=free) == "SPOOL_FULL"
    assert refusal(spool.claim, A, PLAIN, size=(1 << 64) - 1) == "SPOOL_FULL"
    full = Spool.open(tmp_path, "m.Class", reserve=free * 2)
    assert refusal(full.claim, A, PLAIN, size=None) == "SPOOL_FULL"
    assert left_in(tmp_path) == []


def test_a_reserve_that_is_eaten_into_stops_an_upload(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    entry = spool.claim(A, PLAIN, size=None)
    spool._reserve = 1 << 62
    entry.write(b"abc")
    assert refusal(entry.checkpoint, now=True) == "SPOOL_FULL"
    entry.destroy()
    assert left_in(tmp_path) == []


def test_a_disk_that_fills_up_refuses_and_can_be_cleaned(spool: Spool) -> None:
    entry = spool.claim(A, PLAIN, size=None)
    with largest_file(10_000):
        assert refusal(entry.write, bytes(20_000)) == "SPOOL_FULL"
        assert refusal(entry.record, {"text": "x" * 20_000}) == "SPOOL_FULL"
        assert refusal(spool.claim, B, PLAIN, b"x" * 20_000, size=None) == "SPOOL_FULL"
        assert refusal(spool.claim, B, PLAIN, b"x" * 100_000, size=None) == "SPOOL_FULL"
        entry.append_log("x" * 20_000)  # costs the log, not the job
    assert not spool.is_held(B)
    entry.destroy()


# Opening


def test_a_spool_belongs_to_one_app_and_keeps_its_id(tmp_path: Path) -> None:
    first = opened(tmp_path / "deep" / "spool", "m.One")
    assert opened(tmp_path / "deep" / "spool", "m.One").id == first.id
    assert opened(tmp_path / "other", "m.One").id != first.id
    with pytest.raises(SpoolError, match=r"belongs to m\.One, not to m\.Two; choose another"):
        opened(tmp_path / "deep" / "spool", "m.Two")
    assert (tmp_path / "deep" / "spool").stat().st_mode & 0o777 == 0o700


def test_of_many_who_open_a_spool_at_once_one_decides_whose_it_is(tmp_path: Path) -> None:
    start = threading.Barrier(16)
    got: list[str] = []

    def open_it(n: int) -> None:
        start.wait()
        with contextlib.suppress(SpoolError):
            got.append(opened(tmp_path / "spool", f"m.Class{n % 2}").id)

    threads = [threading.Thread(target=open_it, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len(set(got)) == 1
    assert left_in(tmp_path / "spool") == []


def test_a_path_that_cannot_be_a_spool(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/spool")):
        with pytest.raises(SpoolError, match=r"cannot be used: .*--spool"):
            opened(path)
