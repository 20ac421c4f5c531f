"""What a method returned becomes bytes or the file `res`, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from aipod.results import INLINE, BadResult, Result, _make, settle
from tests.spools import largest_file


class Place:
    """A job's directory."""

    def __init__(self, path: Path) -> None:
        self.payload = path / "in"
        self.work = path / "work"
        self.res = path / "res"
        self.payload.write_bytes(b"payload")
        self.work.mkdir()

    def settle(self, value: Any) -> Result:
        return settle(value, payload=self.payload, work_dir=self.work, res=self.res)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "job").mkdir()
    return Place(tmp_path / "job")


@pytest.mark.parametrize("value", [None, True, 1, 1.5, "é\ud800", [1, (2,)], {"a": {"b": []}}, {1: 2}])
def test_json(place: Place, value: Any) -> None:
    assert place.settle(value) == Result("json", json.dumps(value).encode())
    assert not place.res.exists()


@pytest.mark.parametrize("value", [b"\xff\0", bytearray(b"\xff\0"), memoryview(b"\xff\0")])
def test_bytes(place: Place, value: Any) -> None:
    assert place.settle(value) == Result("bytes", b"\xff\0")


@pytest.mark.parametrize(("size", "inline"), [(INLINE, True), (INLINE + 1, False)])
def test_what_is_long_is_a_file(place: Place, size: int, inline: bool) -> None:
    data = os.urandom(size)
    assert place.settle(data) == Result("bytes", data if inline else None)
    assert place.res.exists() is not inline
    assert inline or place.res.read_bytes() == data
    assert sorted(path.name for path in place.res.parent.iterdir()) == ["in", *([] if inline else ["res"]), "work"]


@pytest.mark.parametrize("kind", ["bytes", "copy"])
def test_a_full_disk_is_told_and_leaves_no_half_a_result(place: Place, tmp_path: Path, kind: str) -> None:
    (tmp_path / "model").write_bytes(bytes(INLINE + 1))
    with largest_file(INLINE), pytest.raises(BadResult) as caught:
        place.settle(tmp_path / "model" if kind == "copy" else bytes(INLINE + 1))
    assert caught.value.reason == "RESULT_NOT_STORED"
    assert sorted(path.name for path in place.res.parent.iterdir()) == ["in", "work"]


@pytest.mark.parametrize("need", [1, 2], ids=["room enough without the payload", "not even then"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_on_a_full_disk_the_payload_makes_room_for_the_result(place: Place, error: int, need: int) -> None:
    """Not where that cannot help. Mutants seen: the answer is lost; the payload goes for any error; it is tried on."""
    tries = 0

    def write(fresh: Path) -> None:
        nonlocal tries
        tries += 1
        fresh.write_bytes(b"half")
        if place.payload.exists() or need == 2:
            raise OSError(error, os.strerror(error))
        fresh.write_bytes(b"whole")

    full = error in (errno.ENOSPC, errno.EDQUOT)
    with contextlib.nullcontext() if full and need == 1 else pytest.raises(BadResult, match=os.strerror(error)):
        _make(place.res, place.payload, write)
    assert tries == (2 if full else 1)
    left = [*([] if full else ["in"]), *(["res"] if full and need == 1 else []), "work"]
    assert sorted(path.name for path in place.res.parent.iterdir()) == left
    assert need == 2 or not full or place.res.read_bytes() == b"whole"


def nested() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "make",
    [
        object,
        set,
        lambda: float("nan"),
        lambda: [float("inf")],
        lambda: {(1,): 2},
        lambda: {"a": b"x"},
        nested,
        endless,
    ],
)
def test_what_json_cannot_hold(place: Place, make: Any) -> None:
    with pytest.raises(BadResult) as caught:
        place.settle(make())
    assert caught.value.reason == "RESULT_NOT_JSON"
    assert not place.res.exists()


def test_a_file_in_the_work_directory_is_moved(place: Place) -> None:
    (place.work / "made").write_bytes(b"made")
    inode = (place.work / "made").stat().st_ino
    assert place.settle(place.work / "made") == Result("file")
    assert place.res.stat().st_ino == inode
    assert not (place.work / "made").exists()


def test_the_payload_is_linked(place: Place) -> None:
    assert place.settle(place.payload) == Result("file")
    assert place.res.samefile(place.payload)


def test_another_file_is_copied_also_through_a_link(place: Place, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    (place.work / "link").symlink_to(tmp_path / "model")
    assert place.settle(place.work / "link") == Result("file")
    assert place.res.read_bytes() == b"weights"
    assert (tmp_path / "model").exists()
    assert not place.res.is_symlink()


@pytest.mark.parametrize("name", ["missing", "work", "loop", "fifo", "a\0b", "x" * 300])
def test_a_path_to_no_file(place: Place, name: str) -> None:
    (place.work / "loop").symlink_to(place.work / "loop")
    os.mkfifo(place.work / "fifo")
    path = place.work if name == "work" else place.work / name
    with pytest.raises(BadResult) as caught:
        place.settle(path)
    assert caught.value.reason == "RESULT_NO_FILE"
    assert not place.res.exists()
