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
