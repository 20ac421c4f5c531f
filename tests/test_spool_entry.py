"""A job's directory in the hands of who holds it, from its claim to its end, and what is left of it."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from aipod.codec import digest, frame, stored
from aipod.config import KIB, MIB
from aipod.job.upload import ChunkSink
from aipod.results import INLINE
from aipod.spool import ENDED, MAX_LOG, SYNC_AFTER, SYNC_BYTES, Journal, Spool, Sweeper
from aipod.spool.entry import SLOW
from aipod.wire.ai import Raw
from bench.disk import forget, small_job
from tests.conftest import left_in
from tests.spools import (
    PLAIN,
    TICKETED,
    A,
    B,
    claimed,
    killed,
    left_empty,
    opened,
    refusal,
    sweep,
)

spool = pytest.fixture(left_empty)


NOBODY = 65534


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
    entry.report.note(0.5, "half")
    entry.ask_to_stop()
    entry.result.write_bytes(b"x" * (MIB + 1))
    assert [len(piece) for piece in entry.read_result(0)] == [MIB, 1]
    assert b"".join(entry.read_result(MIB - 1)) == b"xx"
    entry.store({"phase": "DONE"})
    assert entry.read()["phase"] in ENDED
    assert left_in(spool.path) == [A, f"{A}.lock", f"{A}/res", f"{A}/state"]  # what it needed for its run has gone
    entry.destroy()


def test_pieces_are_written_in_one_go_and_all_count(spool: Spool) -> None:
    """Mutants seen: the first one alone is in the digest; behind an empty one it never ends."""
    entry = claimed(spool, A, PLAIN, size=9)
    entry.write(b"abc", memoryview(b"def"), b"ghi", b"")
    assert (entry.written, entry.digest) == (9, digest(b"abcdefghi"))
    entry.seal()
    assert entry.payload.read_bytes() == b"abcdefghi"
    entry.destroy()


def test_one_that_is_complete_begins_as_it_is_told_where_another_was_left(spool: Spool) -> None:
    """Its maker was killed before its first line. Mutant seen: then it stands in line."""
    (spool.path / A).mkdir()
    entry = spool.claim(A, TICKETED, b"{}", size=3, payload=b"abc", begin={"phase": "RUNNING", "worker": "w"})
    assert entry is not None
    state = entry.read()
    assert (state["phase"], state["worker"], state["offset"]) == ("RUNNING", "w", 3)
    entry.destroy()


@pytest.mark.parametrize("pack", [stored, lambda data: frame(data, 1)], ids=["stored", "packed"])
@pytest.mark.parametrize("have", [0, 1, 128 * KIB, 300 * KIB + 7, MIB - 1, MIB])
async def test_of_a_chunk_that_begins_below_what_is_there_the_rest_is_written(
    spool: Spool, have: int, pack: Callable[[bytes], bytes]
) -> None:
    """A client that comes back may begin anywhere. Mutants seen: what was skipped is forgotten at the next block; one
    block more is skipped.
    """
    data = os.urandom(MIB)
    entry = claimed(spool, A, TICKETED, size=MIB)
    entry.write(data[:have])
    await trio.to_thread.run_sync(ChunkSink(entry, MIB, 0).feed, [Raw(data=pack(data), offset=0)])
    assert (entry.written, entry.digest) == (MIB, digest(data))
    entry.seal()
    assert entry.payload.read_bytes() == data
    entry.destroy()


@pytest.mark.parametrize("end", ["let_go", "destroy"])
def test_an_outcome_does_not_wait_for_the_room_of_a_long_payload(spool: Spool, end: str) -> None:
    """It has no name, and its room comes back with the entry. Mutants seen: at once; never; a short one too."""
    entry = claimed(spool, A)
    assert entry._fd is not None
    os.ftruncate(entry._fd, SLOW)
    entry.written = SLOW
    entry.store({"phase": "DONE"})
    assert entry.has_rest
    assert left_in(spool.path) == [A, f"{A}.lock", f"{A}/state"]
    assert nameless() == 1
    getattr(entry, end)()
    assert nameless() == 0
    short = claimed(spool, B)
    short.write(b"abc")
    short.store({"phase": "DONE"})
    assert not short.has_rest
    for job in (A, B):
        short.let_go()
        with spool.holding(job) as left:
            if left is not None:
                left.destroy()


def test_whoever_has_the_outcome_has_the_entry_before_its_room(spool: Spool) -> None:
    """Another one may have the job while the disk takes its time. Mutants seen: it is freed all the same; never."""
    entry = claimed(spool, A)
    assert entry._fd is not None
    os.ftruncate(entry._fd, SLOW)
    entry.written = SLOW
    entry.store({"phase": "DONE"})
    entry.let_go(free=False)
    with spool.holding(A) as next_one:
        assert next_one is not None
        assert nameless() == 1
        next_one.destroy()
    entry.free()
    assert nameless() == 0


def nameless() -> int:
    """Open files of a spool that have been removed."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sum(link.endswith("/in (deleted)") for link in links)


def test_what_the_last_server_has_told_of_a_run_is_told_no_more_of_the_next(spool: Spool) -> None:
    """A job that a drain has cancelled, and that runs anew, is not called cancelled. Mutant seen: nobody looks."""
    with killed(spool, A, TICKETED | {"phase": "RUNNING"}) as entry:
        entry.report.note(0.5, "cancelled; waiting for it to stop")
    with spool.holding(A) as again:
        assert again is not None
        assert not again.report.is_noted(0.0, "", 1.0)
        again.report.note(0.0, "", 1.0)
        assert again.report.is_noted(0.0, "", 1.0)
        assert spool.look(A).live() == {"progress": 0.0, "message": ""}
        again.destroy()


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
    """I1. What was written behind it, by whom ever, is noise.

    Mutants seen: it goes on at the file's size; who leaves makes nothing durable.
    """
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
    """I1. Mutant seen: the file's size is not looked at."""
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

    gc.collect()  # what other tests have left would close its files in between
    gc.disable()
    sys.setprofile(count)
    try:
        forget(spool, small_job(spool))
    finally:
        sys.setprofile(None)
        gc.enable()
    assert calls == {
        **{"statvfs": 1, "mkdir": 1, "rmdir": 1, "unlink": 4, "listdir": 1},
        # The lock three times; the payload; the journal: once for its run, once for its release; read twice.
        **{"open": 8, "close": 8, "flock": 6, "fstat": 9, "write": 4, "writev": 1, "pread": 2},
        **{"stat": 2, "urandom": 1},
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
    """I1. Mutant seen: what counts as durable does not stand in the journal."""
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


@contextlib.contextmanager
def broken(fd: int) -> Iterator[None]:
    """Syncs of `fd` fail: it is a pipe."""
    good = os.dup(fd)
    ends = os.pipe()
    os.dup2(ends[1], fd)
    try:
        yield
    finally:
        os.dup2(good, fd)
        for one in (good, *ends):
            os.close(one)


def test_a_sync_that_succeeds_after_one_that_failed_acknowledges_nothing(spool: Spool) -> None:
    """I1: an error of the disk is told once. The next holder goes on at the durable offset, and writes the rest anew.

    Mutants seen: what comes after a failed sync is synced again, by a checkpoint, a settling or a letting go.
    """
    entry = claimed(spool, A, TICKETED)
    entry.write(b"kept")
    entry.checkpoint(now=True)
    entry.write(b"lost")
    assert entry._fd is not None
    with broken(entry._fd):
        assert refusal(entry.checkpoint, now=True) == "BUSY"
    assert refusal(entry.checkpoint, now=True) == "BUSY"
    entry.let_go()
    assert spool.look(A).read()["offset"] == entry.durable == 4
    again = spool.hold(A)
    assert again is not None
    assert again.resume()
    assert again.written == 4
    again.write(b"more")
    again.checkpoint(now=True)
    assert again.read()["offset"] == 8
    assert again.payload.read_bytes() == b"keptmore"
    again.destroy()


def test_an_entry_that_the_disk_has_failed_to_keep_never_settles(spool: Spool) -> None:
    """Mutant seen: it is tried again, and believed."""
    entry = claimed(spool, A, TICKETED)
    entry.payload.unlink()
    os.mkfifo(entry.payload)
    assert refusal(entry.settle) == "BUSY"
    entry.payload.unlink()
    entry.settle()
    assert not entry.settled
    entry.store({"phase": "FAILED"})  # it is told all the same, as long as there is power
    assert entry.read().items() >= {"phase": "FAILED"}.items()
    assert "settled" not in entry.read()
    entry.destroy()


def test_an_upload_of_which_the_disk_has_failed_to_keep_the_beginning_is_begun_anew(spool: Spool) -> None:
    """The next holder's sync would succeed. Nothing of it was told to be durable, though an offset is in the journal.

    Mutant seen: the next holder does not know of it, and tells the offset.
    """
    entry = claimed(spool, A, TICKETED, b" " * (INLINE + 1))
    (entry.path / "kw").unlink()
    os.mkfifo(entry.path / "kw")
    entry.write(b"some")
    assert refusal(entry.checkpoint, now=True) == "BUSY"
    assert (entry.durable, entry.read()["offset"]) == (0, 4)
    entry.let_go()
    (entry.path / "kw").unlink()
    again = spool.hold(A)
    assert again is not None
    assert not again.resume()
    again.let_go()
    assert left_in(spool.path) == []
    claimed(spool, A, TICKETED).destroy()


def test_a_job_that_the_disk_has_failed_to_keep_does_not_settle_in_the_next_hands(spool: Spool) -> None:
    """Else a power cut could leave another payload, which would be run. Mutant seen: the next holder settles it."""
    entry = claimed(spool, A, TICKETED)
    entry.seal()
    entry.record({"phase": "QUEUED"})
    payload = entry.payload.rename(entry.path / "payload")
    os.mkfifo(entry.payload)
    assert refusal(entry.settle) == "BUSY"
    payload.rename(entry.payload)
    entry.let_go()
    again = spool.hold(A)
    assert again is not None
    again.settle()
    assert not again.settled
    again.let_go()
    assert opened(spool.path).look(A).read()["phase"] == "QUEUED"
    assert Spool.open(spool.path, "m.Class", reserve=0, boot="another").look(A).read() == {}
    again = spool.hold(A)
    assert again is not None
    again.destroy()


def test_a_long_answer_that_the_disk_has_failed_to_keep_never_settles(spool: Spool) -> None:
    entry = claimed(spool, A, TICKETED)
    os.mkfifo(entry.result)
    entry.store({"phase": "DONE"})
    entry.let_go()
    assert refusal(entry.settle_answer) == "BUSY"
    entry.result.unlink()
    assert entry.settle_answer()  # there is nothing to be tried again
    assert "settled" not in spool.look(A).read()
    again = spool.hold(A)
    assert again is not None
    again.destroy()
