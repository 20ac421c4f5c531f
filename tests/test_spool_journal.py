"""The journal of a job: torn, damaged, on a full disk, and read while it is written."""

from __future__ import annotations

import ast
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aipod.errors import TOLD
from aipod.spool import Journal
from aipod.spool.journal import Fields
from tests.conftest import ROOT
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


@pytest.mark.parametrize("text", [b"5", b"null", b"[1]", b'[["a", 5]]', b"[" * 100_000, b"9" * 5000, b"{", b"\xff"])
def test_a_line_that_is_no_object_is_as_if_never_written(tmp_path: Path, text: bytes) -> None:
    """Though its checksum is right. Mutant seen: no look at what it is."""
    path = tmp_path / "state"
    journal = Journal(path)
    journal.append({"a": 1})
    with path.open("ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(text), text))
    journal.append({"b": 2})
    assert journal.read() == Journal(path).read() == {"a": 1, "b": 2}


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
    assert found | set(TOLD) == set(Fields.__annotations__)
