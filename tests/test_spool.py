"""The spool directory: journals, locks, claims, sweeps, a full disk, and what is left afterwards."""

from __future__ import annotations

import ast
import contextlib
import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aipod.codec import digest
from aipod.config import GIB, MIB
from aipod.errors import Refused
from aipod.spool import MAX_LOG, SYNC_AFTER, SYNC_BYTES, Entry, Journal, Spool, SpoolError, Sweeper
from aipod.spool.journal import Fields
from bench.disk import forget, small_job
from tests.conftest import ROOT, left_in

A, B, C = "a" * 32, "b" * 32, "c" * 32
PLAIN: dict[str, Any] = {"ticketed": False}
TICKETED: dict[str, Any] = {"ticketed": True}
UPLOAD_TTL, TTL = 3600.0, 86400.0
NOBODY = 65534


def opened(path: Path, app: str = "m.Class") -> Spool:
    return Spool.open(path, app, reserve=0)


def claimed(spool: Spool, job_id: str, fields: dict[str, Any] = PLAIN, kwargs: bytes = b"{}", **options: Any) -> Entry:
    """A new entry, where there must be none."""
    entry = spool.claim(job_id, fields, kwargs, **options)
    assert entry is not None
    return entry


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Broom:
    """A process that sweeps: how often it finds something is what it says."""

    def __init__(self, spool: Spool) -> None:
        self.clock = Clock()
        self._sweeper = Sweeper(spool, upload_ttl=UPLOAD_TTL, ttl=TTL, clock=self.clock)

    def sweep(self) -> int:
        return sum(self._sweeper.sweep())


def sweep(spool: Spool) -> int:
    """One sweep of a process that has just been started."""
    return Broom(spool).sweep()


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
    entry = claimed(spool, job_id, fields)
    yield entry
    entry._close()
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


@contextlib.contextmanager
def descriptors(free: int) -> Iterator[None]:
    """This process may open `free` more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        expected = states[sum(end <= cut for end in ends) - 1]
        journal, other = Journal(path), Journal(path)
        assert journal.read() == other.read() == expected
        journal.append({"phase": "FAILED"}, sync=True)
        # Nothing of the torn line comes back to life, whoever has read it before.
        assert journal.read() == other.read() == Journal(path).read() == expected | {"phase": "FAILED"}


def test_a_journal_with_any_bit_flipped_loses_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "state"
    journal = Journal(path)
    for fields in ({"a": 1}, {"b": 2}, {"c": 3}):
        journal.append(fields)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        state = Journal(path).read()
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


def test_a_reader_that_comes_again_reads_only_what_is_new_and_notices_another_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    writer, reader = Journal(path), Journal(path)
    for n in range(3):
        writer.append({"n": n, f"key{n}": "x" * 100})
        assert reader.read() == Journal(path).read()
        assert reader._known.end == path.stat().st_size
    path.unlink()
    assert reader.read() == {}
    Journal(path).append({"other": 1})
    assert reader.read() == {"other": 1}


def test_a_read_while_a_line_is_half_written_takes_it_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "state"
    Journal(path).append({"a": 1})
    Journal(path).append({"b": 2})
    whole = path.read_bytes()
    reader = Journal(path)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert reader.read() in ({}, {"a": 1}, {"a": 1, "b": 2})
    assert reader.read() == {"a": 1, "b": 2}


def test_a_reader_notices_a_journal_that_was_replaced_by_a_longer_one(tmp_path: Path) -> None:
    """Mutant seen: no look at the inode."""
    path = tmp_path / "state"
    writer, reader = Journal(path), Journal(path)
    writer.append({"a": 1, "b": 2})
    assert reader.read() == {"a": 1, "b": 2}
    writer.replace({"a": 3, "text": "x" * 100})
    assert reader.read() == writer.read() == {"a": 3, "text": "x" * 100}
    writer.append({"c": 4})
    assert reader.read() == writer.read() == Journal(path).read() == {"a": 3, "text": "x" * 100, "c": 4}
    assert os.listdir(tmp_path) == ["state"]


def test_a_journal_that_a_full_disk_cannot_replace_is_as_before(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state")
    journal.append({"a": 1})
    with largest_file(10), pytest.raises(OSError, match=r"No space|File too large"):
        journal.replace({"b": 2})
    assert journal.read() == Journal(tmp_path / "state").read() == {"a": 1}
    assert os.listdir(tmp_path) == ["state"]


def _keys(tree: ast.AST) -> Iterator[str]:
    """The keys that a module writes into journals or looks for in them."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.Call(func=ast.Attribute(attr="record" | "store" | "claim"), args=args)
                | ast.Call(func=ast.Attribute(value=ast.Attribute(attr="_journal"), attr="append"), args=args)
            ):
                found: list[ast.expr | None] = [key for arg in args if isinstance(arg, ast.Dict) for key in arg.keys]
            case (
                ast.Assign(targets=[ast.Name(id="fields")], value=ast.Dict(keys=keys))
                | ast.AnnAssign(target=ast.Name(id="fields"), value=ast.Dict(keys=keys))
                | ast.AugAssign(target=ast.Name(id="fields"), value=ast.Dict(keys=keys))
            ):
                found = list(keys)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="fields" | "state"), attr="get"), args=[key, *_]):
                found = [key]
            case ast.Subscript(value=ast.Name(id="fields" | "state"), slice=key):
                found = [key]
            case _:
                continue
        yield from (key.value for key in found if isinstance(key, ast.Constant) and isinstance(key.value, str))


def test_every_key_of_a_journal_is_explained_in_one_place() -> None:
    found = {
        key
        for package in ("spool", "job", "service")
        for path in (ROOT / "aipod" / package).glob("*.py")
        for key in _keys(ast.parse(path.read_text()))
    }
    assert found == set(Fields.__annotations__)


# Entries


def test_an_entry_from_its_claim_to_its_end(spool: Spool) -> None:
    entry = claimed(spool, A, PLAIN | {"method": "predict"}, b'{"top": 5}', size=6)
    assert (spool.path / A).stat().st_mode & 0o777 == 0o700
    entry.write(b"abc")
    entry.write(b"def")
    assert entry.written == 6
    assert entry.digest == digest(b"abcdef")
    entry.seal()
    entry.seal()
    assert entry.payload.read_bytes() == b"abcdef"
    assert entry.payload.stat().st_mode & 0o777 == 0o400
    state = Journal(spool.path / A / "state").read()
    assert (state["method"], json.loads(state["kwargs"])) == ("predict", {"top": 5})
    entry.work.mkdir()
    (entry.work / "scratch").touch()
    entry.note_progress(0.5, "half")
    entry.ask_to_stop()
    entry.result.write_bytes(b"x" * (MIB + 1))
    assert [len(piece) for piece in entry.read_result(0)] == [MIB, 1]
    assert b"".join(entry.read_result(MIB - 1)) == b"xx"
    entry.store({"phase": "DONE"})
    assert entry.ended
    assert left_in(spool.path) == [A, f"{A}.lock", f"{A}/res", f"{A}/state"]  # what it needed for its run has gone
    entry.destroy()


@pytest.mark.parametrize("phase", ["CANCELLED", "RELEASED", "FAILED"])
def test_an_outcome_without_an_answer_keeps_none(spool: Spool, phase: str) -> None:
    entry = claimed(spool, A, TICKETED, b"x" * 100_000)
    entry.append_log("a line\n")
    entry.result.write_bytes(b"x")
    entry.store({"phase": phase})
    kept = ["state"] if phase == "RELEASED" else ["log", "state"]
    assert sorted(path.name for path in entry.path.iterdir()) == kept
    entry.destroy()


def test_an_answer_is_settled_when_nobody_holds_it(spool: Spool) -> None:
    """Not one that was released meanwhile, or has gone."""
    entry = claimed(spool, A, REQUEST)
    entry.store({"phase": "DONE"})
    entry.let_go()
    other = spool.hold(A)
    assert other is not None
    assert not entry.settle_answer()
    other.let_go()
    assert entry.settle_answer()
    assert spool.look(A).read()["settled"]
    entry = claimed(spool, B, REQUEST)
    entry.store({"phase": "DONE"})
    entry.release()
    entry.let_go()
    assert entry.settle_answer()
    assert "settled" not in spool.look(B).read()
    for job_id in (A, B):
        with spool.holding(job_id) as held:
            assert held is not None
            held.destroy()
    assert entry.settle_answer()


REQUEST = TICKETED | {"print": "fingerprint", "method": "predict", "version": "v", "epoch": 3, "size": 9}
ANSWER = {"phase": "DONE", "kind": "json", "answer": 8, "digest": "00", "inline": "an answer"}


@pytest.mark.parametrize("settled", [False, True])
def test_of_a_released_job_stays_that_it_was_there(spool: Spool, settled: bool) -> None:
    """Not its answer, its arguments, its headers. Mutants seen: a line more; the answer is kept; `settled` is lost."""
    entry = claimed(spool, A, REQUEST | {"metadata": {"x-user": "somebody"}}, b'{"name": "argument"}')
    if settled:
        entry.settle()
    entry.record({"phase": "QUEUED", "offset": 9})
    entry.record({"phase": "RUNNING", "worker": "w", "attempt": 1})
    entry.append_log("a line\n")
    entry.store(ANSWER)
    reader = spool.look(A)
    assert reader.read()["inline"] == "an answer"
    entry.release()
    left = {key: REQUEST[key] for key in ("ticketed", "print", "method", "version", "epoch")}
    left |= {"boot": spool.boot, "offset": 9, "attempt": 1, "phase": "RELEASED"} | (
        {"settled": True} if settled else {}
    )
    assert reader.read() == entry.read() == spool.look(A).read() == left
    assert [json.loads(line[9:]) for line in (entry.path / "state").read_bytes().splitlines()] == [left]
    assert os.listdir(entry.path) == ["state"]
    entry.destroy()


def test_an_answer_that_the_disk_is_full_of_can_be_released(spool: Spool) -> None:
    entry = claimed(spool, A, REQUEST)
    entry.result.write_bytes(b"x")
    entry.store({"phase": "DONE"})

    class Tight(Journal):
        """A disk that has no room for another file before one has gone."""

        def replace(self, fields: dict[str, Any], *, sync: bool = False) -> None:
            if entry.result.exists():
                raise OSError(errno.ENOSPC, "full")
            super().replace(fields, sync=sync)

    entry._journal = Tight(entry.path / "state")
    entry.release()
    assert "size" not in entry.read()
    assert os.listdir(entry.path) == ["state"]
    entry.destroy()


def test_a_sweep_removes_an_answer_whose_server_was_killed_while_it_was_released(spool: Spool) -> None:
    with killed(spool, A, REQUEST) as entry:
        entry.store({"phase": "DONE"})
        entry.result.write_bytes(b"x")
        (entry.path / "state.tmp").write_bytes(b"x")
        entry._journal.append({"phase": "RELEASED"})
    assert sweep(spool) == 0
    assert os.listdir(entry.path) == ["state"]


def test_a_sweep_removes_what_a_job_whose_server_was_killed_at_its_end_does_not_need(spool: Spool) -> None:
    """The outcome is in the journal; the payload, gigabytes perhaps, was about to be removed."""
    entry = claimed(spool, A, TICKETED)
    entry.write(b"x" * 100_000)
    entry.ask(7)
    entry.work.mkdir()
    entry.record({"phase": "DONE", "kind": "json", "answer": 1, "digest": "", "inline": "1"})
    entry._close()  # killed
    entry._lock.release()
    assert sum(Sweeper(spool, upload_ttl=100, ttl=100).sweep()) == 0
    assert left_in(spool.path) == []
    assert sorted(path.name for path in entry.path.iterdir()) == ["state"]


def test_an_upload_is_taken_up_at_its_durable_offset(spool: Spool) -> None:
    """What was written behind it, by whom ever, is noise."""
    entry = claimed(spool, A, TICKETED | {"size": 9})
    entry.write(b"abc")
    entry.checkpoint(now=True)
    entry.write(b"noise")
    entry._close()  # killed
    entry._lock.release()
    again = spool.hold(A)
    assert again is not None
    again.resume()
    assert (again.written, again.durable, again.digest) == (3, 3, None)
    again.write(b"defghi")
    again.let_go()
    again.let_go()
    third = spool.hold(A)
    assert third is not None
    third.resume()
    assert (third.written, third.durable) == (9, 9)  # leaving makes durable what there is
    third.seal()
    assert third.payload.read_bytes() == b"abcdefghi"
    third.destroy()


def test_an_upload_that_was_sealed_and_not_queued_can_be_taken_up() -> None:
    """By who is not root, too, whom the mode of a sealed payload concerns."""
    with tempfile.TemporaryDirectory() as path:
        root = os.geteuid() == 0
        if root:
            os.chown(path, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            spool = opened(Path(path) / "spool")
            with killed(spool, A, TICKETED) as entry:
                entry.write(b"abc")
                entry.checkpoint(now=True)
                entry.seal()
            again = spool.hold(A)
            assert again is not None
            again.resume()
            again.write(b"def")
            again.seal()
            assert again.payload.read_bytes() == b"abcdef"
            again.destroy()
        finally:
            if root:
                os.seteuid(0)


def test_an_upload_that_was_never_durable_begins_anew_and_is_hashed(spool: Spool) -> None:
    with killed(spool, A, TICKETED) as entry:
        entry.write(b"noise that is longer")
    again = spool.hold(A)
    assert again is not None
    again.resume()
    assert (again.written, again.durable) == (0, 0)
    again.write(b"abc")
    again.seal()
    assert again.digest == digest(b"abc")
    assert again.payload.read_bytes() == b"abc"
    again.destroy()


def test_a_payload_shorter_than_what_was_acknowledged_is_damage(spool: Spool) -> None:
    with killed(spool, A, TICKETED) as entry:
        entry.write(b"abcdef")
        entry.checkpoint(now=True)
    os.truncate(entry.payload, 5)
    again = spool.hold(A)
    assert again is not None
    assert refusal(again.resume) == "DAMAGED"
    again.destroy()


def test_what_a_small_job_costs(spool: Spool) -> None:
    """Every call of the system from its claim until it is forgotten. Who adds one has a reason for it."""
    calls: Counter[str] = Counter()

    def count(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and function.__module__ in ("posix", "fcntl") and "path" not in function.__name__:
            calls[function.__name__] += 1

    sys.setprofile(count)
    try:
        forget(spool, small_job(spool))
    finally:
        sys.setprofile(None)
    assert calls == {
        **{"statvfs": 1, "mkdir": 1, "rename": 1, "rmdir": 1, "unlink": 3, "listdir": 1, "scandir": 1},
        # The lock twice; the payload; the journal: written four times, read once, looked at once; its directory.
        **{"open": 10, "close": 10, "flock": 4, "fstat": 9, "write": 5, "pread": 4, "fchmod": 1},
        **{"stat": 2, "chmod": 1, "urandom": 3},
    }


def test_long_kwargs_are_a_file(spool: Spool) -> None:
    entry = claimed(spool, A, PLAIN, b"x" * 100_000)
    assert (spool.path / A / "kw").read_bytes() == b"x" * 100_000
    assert (spool.path / A / "state").stat().st_size < 200
    entry.destroy()


def test_a_destroyed_entry_does_not_take_its_successor_along(spool: Spool) -> None:
    first = claimed(spool, A)
    first.destroy()
    second = claimed(spool, A)
    first.destroy()
    assert spool.is_held(A)
    assert second.payload.exists()
    second.destroy()


def test_nothing_is_synced_before_the_first_tick_and_a_checkpoint_says_what_is(spool: Spool) -> None:
    entry = claimed(spool, A)
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
    entry = claimed(spool, A)
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


@pytest.mark.parametrize("step", ["record", "store"])
def test_what_is_recorded_while_the_entry_settles_waits_for_it(spool: Spool, step: str) -> None:
    """Else DONE would stand in an entry that counts as on disk, without a sync of it or of its answer.

    Mutant seen: no lock.
    """
    reached, go_on = threading.Event(), threading.Event()

    class Slow(Journal):
        """On a disk that takes its time to sync."""

        def append(self, fields: dict[str, Any], *, sync: bool = False) -> None:
            if "settled" in fields:
                reached.set()
                go_on.wait()
            super().append(fields, sync=sync)

    entry = claimed(spool, A, TICKETED)
    entry._journal = Slow(entry.path / "state")
    settling = threading.Thread(target=entry.settle, daemon=True)
    settling.start()
    reached.wait()
    ending = threading.Thread(target=getattr(entry, step), args=({"phase": "DONE"},))
    ending.start()
    ending.join(0.2)
    early = Journal(entry.path / "state").read()
    go_on.set()
    assert "phase" not in early
    settling.join()
    ending.join()
    lines = [json.loads(line[9:]) for line in (entry.path / "state").read_bytes().splitlines()]
    assert lines[1:] == [{"settled": True}, {"phase": "DONE"}]
    entry.destroy()


# Locks


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
    """I6."""
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
    with pytest.raises(OSError, match="symbolic links") as caught:
        spool.hold(A)
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


# Sweeps


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
    entry = claimed(spool, A)
    with spool.worker_lock("123-abc").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep(spool) == 0
        assert left_in(spool.path) == [A, f"{A}.lock", f"{A}/in", f"{A}/state", "workers/123-abc.lock"]
    entry.destroy()
    assert sweep(spool) == 0


def test_an_entry_waits_for_the_worker_that_still_computes_for_it(spool: Spool) -> None:
    with killed(spool, A, PLAIN) as entry:
        entry.record({"phase": "RUNNING", "worker": "123-abc"})
    with spool.worker_lock("123-abc").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep(spool) == 0
        assert entry.payload.exists()
    assert sweep(spool) == 1


@pytest.mark.parametrize(("phase", "keep"), [("RECEIVING", UPLOAD_TTL), ("QUEUED", UPLOAD_TTL), ("DONE", TTL)])
def test_a_ticketed_entry_is_kept_until_nothing_has_changed_for_its_time(spool: Spool, phase: str, keep: float) -> None:
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
    broom = Broom(spool)
    with killed(spool, A, TICKETED) as entry:
        assert broom.sweep() == 0
        broom.clock.now += UPLOAD_TTL
        assert broom.sweep() == 0  # I12: held
        entry.store({"phase": "FAILED"})
    assert broom.sweep() == 0
    broom.clock.now += TTL - 1
    assert broom.sweep() == 0
    broom.clock.now += 1
    assert broom.sweep() == 1


def test_a_process_that_has_just_started_lets_entries_live_longer(spool: Spool) -> None:
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


def test_a_directory_of_something_else_is_no_spool(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(SpoolError, match="is no spool"):
        opened(tmp_path)
    assert left_in(tmp_path) == ["notes"]


def test_the_reserve_is_kept_while_a_payload_of_unknown_size_comes_in(tmp_path: Path) -> None:
    """One message may bring gigabytes: the disk is looked at every `SYNC_BYTES`, not once per message."""
    spool = opened(tmp_path)
    entry = claimed(spool, A)
    entry.write(bytes(SYNC_BYTES))
    spool._reserve = 1 << 62
    assert refusal(entry.write, b"x") == "SPOOL_FULL"
    entry.destroy()


def test_an_entry_that_cannot_be_removed_costs_nobody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = claimed(opened(tmp_path), A)
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
    assert refusal(full.claim, A, PLAIN) == "SPOOL_FULL"
    assert left_in(tmp_path) == []


def test_a_reserve_that_is_eaten_into_stops_an_upload(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    entry = claimed(spool, A)
    spool._reserve = 1 << 62
    entry.write(b"abc")
    entry._synced_at -= SYNC_AFTER
    assert refusal(entry.checkpoint) == "SPOOL_FULL"
    assert entry.durable == 0
    entry.checkpoint(now=True)  # who leaves, or asks for it, keeps what there is
    assert entry.durable == 3
    entry.destroy()
    assert left_in(tmp_path) == []


def test_a_disk_that_fills_up_refuses_and_can_be_cleaned(spool: Spool) -> None:
    entry = claimed(spool, A)
    with largest_file(10_000):
        assert refusal(entry.write, bytes(20_000)) == "SPOOL_FULL"
        assert refusal(entry.record, {"text": "x" * 20_000}) == "SPOOL_FULL"
        assert refusal(spool.claim, B, PLAIN, b"x" * 20_000) == "SPOOL_FULL"
        assert refusal(spool.claim, B, PLAIN, b"x" * 100_000) == "SPOOL_FULL"
        entry.append_log("x" * 20_000)  # costs the log, not the job
    assert not spool.is_held(B)
    entry.destroy()


def test_a_full_disk_is_a_pause_for_an_upload(spool: Spool) -> None:
    """I10: what was acknowledged stays, the rest is sent again. Mutant seen: `durable` counts what is written."""
    data = os.urandom(20_000)
    entry = claimed(spool, A, TICKETED | {"size": 20_000})
    entry.write(data[:3000])
    entry.checkpoint(now=True)
    with largest_file(10_000):
        assert refusal(entry.write, data[3000:]) == "SPOOL_FULL"
        assert entry.written == 10_000
        with largest_file(400):  # not even the journal takes a line
            entry.let_go()
    again = spool.hold(A)
    assert again is not None
    again.resume()
    assert 3000 <= again.durable == again.written <= 10_000
    again.write(data[again.written :])
    again.seal()
    assert again.payload.read_bytes() == data
    again.destroy()


def test_an_outcome_that_does_not_fit_gets_the_payload_s_room(spool: Spool) -> None:
    entry = claimed(spool, A, TICKETED)
    entry.write(b"x")
    journal = Journal(entry.path / "state")
    tries: list[bool] = []

    class Tight(Journal):
        """A disk on which a line fits once the payload is gone."""

        def append(self, fields: dict[str, Any], *, sync: bool = False) -> None:
            tries.append(entry.payload.exists())
            if tries[-1]:
                raise OSError(errno.ENOSPC, "full")
            super().append(fields, sync=sync)

    entry._journal = Tight(entry.path / "state")
    entry.store({"phase": "FAILED"})
    assert tries == [True, False]
    assert journal.read()["phase"] == "FAILED"
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
