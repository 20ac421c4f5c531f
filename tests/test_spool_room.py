"""Opening a spool, and what a full disk does to the jobs in it."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from aipod.config import GIB, MIB
from aipod.errors import Refused
from aipod.spool import SYNC_AFTER, SYNC_BYTES, Journal, Spool, SpoolError
from tests.conftest import left_in
from tests.spools import (
    PLAIN,
    TICKETED,
    A,
    B,
    Broom,
    claimed,
    largest_file,
    left_empty,
    opened,
    refusal,
)

spool = pytest.fixture(left_empty)

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


def test_a_directory_of_something_else_is_no_spool(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(SpoolError, match="is no spool"):
        opened(tmp_path)
    assert left_in(tmp_path) == ["notes"]


# A full disk


def test_a_payload_that_would_eat_into_the_reserve_is_refused_before_its_first_byte(tmp_path: Path) -> None:
    """I10. Mutant seen: its size is not looked at."""
    spool = Spool.open(tmp_path, "m.Class", reserve=GIB)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert refusal(spool.claim, A, PLAIN, size=free) == "SPOOL_FULL"
    assert refusal(spool.claim, A, PLAIN, size=(1 << 64) - 1) == "SPOOL_FULL"
    full = Spool.open(tmp_path, "m.Class", reserve=free * 2)
    assert refusal(full.claim, A, PLAIN) == "SPOOL_FULL"
    with pytest.raises(Refused, match=f"{full.reserve} stay free for results") as caught:
        full.check_space(5)
    assert (caught.value.metadata["wanted"], caught.value.metadata["reserve"]) == ("5", str(full.reserve))
    assert caught.value.metadata["free"].isdecimal()
    assert left_in(tmp_path) == []


def test_a_payload_that_can_never_fit_is_told_so(spool: Spool) -> None:
    """It need not come again. Mutants seen: whatever does not fit now never will; the reserve is not counted."""
    stat = os.statvfs(spool.path)
    free, whole = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize

    def comes_again(wanted: int, reserve: int) -> bool:
        spool.reserve = reserve
        with pytest.raises(Refused) as caught:
            spool.check_space(wanted)
        never = "it never has" in caught.value.message
        assert never == (caught.value.retry_after is None)
        return not never

    assert not comes_again(whole + 1, 0)
    assert not comes_again(1, whole)
    assert not comes_again(whole // 2 + 1, whole // 2)
    assert comes_again(0, whole + 1)  # nothing more is wanted: an upload that goes on
    if (margin := whole - free) > 2 * MIB:  # others write to this disk meanwhile
        assert comes_again(whole - margin // 2, 0)
        assert comes_again(1, whole - margin // 2)


def test_a_reserve_that_is_eaten_into_stops_an_upload(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    entry = claimed(spool, A)
    spool.reserve = 1 << 62
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
    """I10: what was acknowledged stays, the rest is sent again.

    Mutants seen: `durable` counts what is written; it goes on at the file's size.
    """
    data = os.urandom(20_000)
    entry = claimed(spool, A, TICKETED | {"size": 20_000})
    entry.write(data[:3000])
    entry.checkpoint(now=True)
    with largest_file(10_000):
        assert refusal(entry.write, data[3000:]) == "SPOOL_FULL"
        assert (entry.written, entry.durable) == (10_000, 3000)
        with largest_file((entry.path / "state").stat().st_size):  # not even the journal takes a line
            entry.let_go()
    again = spool.hold(A)
    assert again is not None
    again.resume()
    assert again.durable == again.written == 3000
    again.write(data[again.written :])
    again.seal()
    assert again.payload.read_bytes() == data
    again.destroy()


def test_an_outcome_that_does_not_fit_gets_the_payload_s_room(spool: Spool) -> None:
    """I10. Mutant seen: the payload stays."""
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


def test_the_reserve_is_kept_while_a_payload_of_unknown_size_comes_in(tmp_path: Path) -> None:
    """One message may bring gigabytes: the disk is looked at every `SYNC_BYTES`, not once per message."""
    spool = opened(tmp_path)
    entry = claimed(spool, A)
    entry.write(bytes(SYNC_BYTES))
    spool.reserve = 1 << 62
    assert refusal(entry.write, b"x") == "SPOOL_FULL"
    entry.destroy()


# A quota


def limited(path: Path, limit: int) -> Spool:
    return Spool.open(path, "m.Class", reserve=0, max_spool=limit)


def test_of_two_payloads_that_fit_alone_one_is_refused_before_its_first_byte(tmp_path: Path) -> None:
    """Until what the other takes is given back, however that comes. Mutant seen: only what is written counts."""
    spool = limited(tmp_path, 10 * MIB)
    assert refusal(spool.claim, A, PLAIN, size=11 * MIB) == "SPOOL_FULL"
    first = claimed(spool, A, TICKETED, size=500_000)  # not set aside on the disk
    assert refusal(spool.claim, B, PLAIN, size=10 * MIB) == "SPOOL_FULL"
    assert left_in(tmp_path) == [A, f"{A}.lock", f"{A}/in", f"{A}/state"]
    first.destroy()
    second = claimed(spool, B, TICKETED, size=9 * MIB)
    with pytest.raises(Refused, match=r"of 10485760 bytes are free \(--max-spool\)") as caught:
        spool.claim(A, PLAIN, size=2 * MIB)
    assert caught.value.retry_after
    assert not spool.has_room(2 * MIB)
    second.write(bytes(9 * MIB))
    second.seal()
    second.result.write_bytes(bytes(5 * MIB))
    second.store({"phase": "DONE"})
    assert refusal(spool.claim, A, PLAIN, size=6 * MIB) == "SPOOL_FULL"
    first = claimed(spool, A, PLAIN, size=4 * MIB)
    second.release()
    second.destroy()
    first.destroy()
    claimed(spool, A, PLAIN, size=9 * MIB).destroy()
    assert left_in(tmp_path) == []


def test_of_many_payloads_at_once_as_many_are_taken_as_fit(tmp_path: Path) -> None:
    """Mutant seen: each looks whether there is room, and takes it later."""
    spool = limited(tmp_path, 10 * MIB)
    start = threading.Barrier(16)
    entries: list[Any] = []

    def claim(n: int) -> None:
        start.wait()
        with contextlib.suppress(Refused):
            entries.append(spool.claim(f"{n:032x}", PLAIN, size=3 * MIB))

    threads = [threading.Thread(target=claim, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entries) == 3
    for entry in entries:
        entry.destroy()
    assert left_in(tmp_path) == []


def test_an_upload_of_unknown_size_pauses_at_the_quota_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """Who comes back before that brings nothing. Mutant seen: each who comes back brings a second's worth."""
    spool = limited(tmp_path, 10 * MIB)
    other = claimed(spool, B, PLAIN, size=6 * MIB)
    entry = claimed(spool, A, TICKETED)
    entry.write(bytes(4 * MIB + 1))
    entry._synced_at -= SYNC_AFTER
    assert refusal(entry.checkpoint) == "SPOOL_FULL"
    entry.let_go()
    for _ in range(2):
        again = spool.hold(A)
        assert again is not None
        assert again.durable == 4 * MIB + 1
        assert refusal(again.resume) == "SPOOL_FULL"
        again.let_go()
    other.destroy()
    again = spool.hold(A)
    assert again is not None
    again.resume()
    again.write(b"x")
    again._synced_at -= SYNC_AFTER
    again.checkpoint()
    assert again.durable == 4 * MIB + 2
    again.destroy()
    assert left_in(tmp_path) == []


def test_what_other_servers_and_runs_take_is_known_after_a_sweep_or_a_start(tmp_path: Path) -> None:
    """Mutants seen: what has gone counts on; a work directory does not count."""
    spool = limited(tmp_path, 10 * MIB)
    other = limited(tmp_path, 10 * MIB)
    theirs = claimed(other, A, TICKETED, size=6 * MIB)
    (theirs.work / "deep").mkdir(parents=True)
    (theirs.work / "deep" / "file").write_bytes(bytes(3 * MIB))
    assert refusal(limited(tmp_path, 10 * MIB).claim, B, PLAIN, size=2 * MIB) == "SPOOL_FULL"
    claimed(spool, B, PLAIN, size=2 * MIB).destroy()
    broom = Broom(spool)
    broom.sweep()
    assert refusal(spool.claim, B, PLAIN, size=2 * MIB) == "SPOOL_FULL"
    theirs.destroy()
    broom.sweep()
    claimed(spool, B, PLAIN, size=9 * MIB).destroy()
    assert left_in(tmp_path) == []


def test_a_ticket_that_is_there_already_is_counted_once_and_not_harmed(tmp_path: Path) -> None:
    """By who comes with it again. Mutant seen: a refusal removes what is there."""
    spool = limited(tmp_path, 10 * MIB)
    entry = claimed(spool, A, TICKETED, size=6 * MIB)
    entry.let_go()
    assert spool.claim(A, TICKETED, size=3 * MIB) is None
    assert refusal(spool._promise, spool.hold(A), 20 * MIB) == "SPOOL_FULL"
    again = spool.hold(A)
    assert again is not None
    claimed(spool, B, PLAIN, size=3 * MIB).destroy()
    again.destroy()
    assert left_in(tmp_path) == []


def test_an_upload_goes_on_for_which_there_was_room_when_it_began(tmp_path: Path) -> None:
    """Its journal takes a page of the disk as well. Mutant seen: it pauses for ever, for what it has been given."""
    spool = limited(tmp_path, 4 * MIB)
    entry = claimed(spool, A, TICKETED | {"size": 4 * MIB - 100}, size=4 * MIB - 100)
    broom = Broom(spool)
    for _ in range(2):
        entry.write(bytes(MIB))
        broom.sweep()
        assert not spool.has_room(1)
        entry._synced_at -= SYNC_AFTER
        entry.checkpoint()
        entry.let_go()
        again = spool.hold(A)
        assert again is not None
        assert again.resume()
        entry = again
    entry.destroy()
    assert left_in(tmp_path) == []
