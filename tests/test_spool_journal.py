"""The journal of a job: torn, damaged, on a full disk, and read while it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aipod.spool import Journal
from tests.spools import (
    largest_file,
)


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
        assert reader._read == path.stat().st_size
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
