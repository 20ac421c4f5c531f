"""A disk that loses power: what a program does to a directory is recorded, and every image that a cut may leave made.

The program really works on its directory; after each of its system calls the directory is compared with what it was,
which gives the operation, and `os.fsync` and `os.fdatasync` say what they sync before they do. What is assumed of the
file system is what ext4 and XFS give: names change in order (a journal), a change of names is whole or not there, a
sync of a directory makes its own names permanent; the bytes of a file that were never
synced may be there, or not, or be zeros, or in part, whatever became of its name and of later bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Names = dict[str, int]  # path below the root: inode; directories end in "/"
Image = dict[str, bytes]  # path below the root: content; directories end in "/"
ROOT = 0
MANY = 100


@dataclasses.dataclass
class Op:
    """`kind`: names (they are `names` now), write (`inode` has `content` now) or sync (`inode`, a file's or not)."""

    kind: str
    inode: int = 0
    content: bytes = b""
    names: Names = dataclasses.field(default_factory=dict)


class Disk:
    """What was done below `path`, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ops: list[Op] = []
        self._names: Names = {}
        self._contents: dict[int, bytes] = {}
        self._known: dict[int, int] = {}  # st_ino: our own number, which is never given twice
        self._fresh = itertools.count(ROOT + 1)
        self._syncs = {"fsync": os.fsync, "fdatasync": os.fdatasync}

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """What the block does in this thread is recorded."""
        for name in self._syncs:
            setattr(os, name, self._synced(name))
        sys.setprofile(self._after_call)
        try:
            yield
        finally:
            sys.setprofile(None)
            for name, function in self._syncs.items():
                setattr(os, name, function)
            self.look()

    def _after_call(self, frame: Any, event: str, function: Any) -> None:
        if event == "c_return" and (
            function.__module__ in ("posix", "_io", "io") or type(function.__self__).__module__ == "_io"
        ):
            self.look()

    def _synced(self, name: str) -> Any:
        def sync(fd: int) -> None:
            self.look()
            self._syncs[name](fd)
            ino = os.fstat(fd).st_ino
            inode = ROOT if ino == self.path.stat().st_ino else self._known.get(ino)
            if inode is not None:  # else it is outside
                self.ops.append(Op("sync", inode))

        return sync

    def look(self) -> None:
        """See what is new."""
        names: Names = {}
        contents: dict[int, bytes] = {}
        numbers: dict[int, int] = {}
        for base, directories, files in os.walk(self.path):
            for name in (*directories, *files):
                path = os.path.join(base, name)
                ino = os.lstat(path).st_ino
                numbers[ino] = self._known.get(ino) or next(self._fresh)
                below = os.path.relpath(path, self.path)
                names[below + "/" * (name in directories)] = numbers[ino]
                if name in files:
                    with open(path, "rb") as file:
                        contents[numbers[ino]] = file.read()
        self._known = numbers
        if names != self._names:
            self.ops.append(Op("names", names=names))
            self._names = names
        for inode, content in contents.items():
            if content != self._contents.get(inode, b""):
                self.ops.append(Op("write", inode, content))
        self._contents = contents

    def images(self, done: int) -> Iterator[Image]:
        """Every image that a power cut may leave after `done` operations; some come twice."""
        ops = self.ops[:done]
        for names in self._possible_names(ops):
            inodes = {inode for path, inode in names.items() if not path.endswith("/")}
            choices = {inode: list(_possible_contents(inode, ops)) for inode in inodes}
            for picks in _picks(choices):
                yield {path: b"" if path.endswith("/") else picks[inode] for path, inode in names.items()}

    def _possible_names(self, ops: list[Op]) -> Iterator[Names]:
        """What a prefix of the changes, and those that a sync of their directory has made permanent, come to."""
        changes: list[dict[str, int | None]] = []
        permanent: set[int] = set()
        names: Names = {}
        for op in ops:
            if op.kind == "names":
                gone = dict.fromkeys(names.keys() - op.names.keys())
                changes.append(gone | {path: inode for path, inode in op.names.items() if names.get(path) != inode})
                names = op.names
            elif op.kind == "sync" and (directory := _directory(names, op.inode)) is not None:
                permanent |= {n for n, change in enumerate(changes) if _concerns(change, directory)}
        for end in range(len(changes) + 1):
            names = {}
            for n in sorted({*range(end), *permanent}):
                for path in sorted(changes[n]):
                    inode = changes[n][path]
                    if inode is None:
                        names.pop(path, None)
                    elif _parent(path) in ("", *names):  # else the directory that it was made in is not there
                        names[path] = inode
            yield names


def _directory(names: Names, inode: int) -> str | None:
    """The path of a directory, with its slash; None for a file."""
    if inode == ROOT:
        return ""
    return next((path for path, other in names.items() if other == inode and path.endswith("/")), None)


def _parent(path: str) -> str:
    above, slash, _ = path.rstrip("/").rpartition("/")
    return above + slash


def _concerns(change: dict[str, int | None], directory: str) -> bool:
    """Whether a name in `directory` was changed; what moves with its own directory is not."""
    return any(_parent(path) == directory and directory not in change for path in change)


def _possible_contents(inode: int, ops: list[Op]) -> list[bytes]:
    versions = [b""]
    for op in ops:
        if op.inode == inode and op.kind == "write":
            versions.append(op.content)
        elif op.inode == inode and op.kind == "sync":
            versions = versions[-1:]
    base, last = versions[0], versions[-1]
    if len(versions) == 1:
        return [base]
    found = [last, base, _zeroed(base, last), last[: (_common(base, last) + len(last)) // 2]]
    for before, after in itertools.pairwise(versions):  # one write is lost, and later ones are there
        start = _common(before, after)
        found.append(last[:start] + bytes(max(0, min(len(after), len(last)) - start)) + last[len(after) :])
    return list(dict.fromkeys(found))


def _zeroed(before: bytes, after: bytes) -> bytes:
    start = _common(before, after)
    return after[:start] + bytes(len(after) - start)


def _common(one: bytes, other: bytes) -> int:
    """How many bytes both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _picks(choices: dict[int, list[bytes]]) -> Iterator[dict[int, bytes]]:
    """What each file has become: all combinations, where they are not too many, else one file unlike the others."""
    several = {inode: found for inode, found in choices.items() if len(found) > 1}
    whole = {inode: found[0] for inode, found in choices.items()}
    lost = {inode: found[-1] if len(found) == 1 else found[1] for inode, found in choices.items()}
    if math.prod(map(len, several.values())) <= MANY:
        for picked in itertools.product(*several.values()):
            yield whole | dict(zip(several, picked, strict=True))
        return
    for others in (whole, lost):
        for inode, found in several.items():
            for content in found:
                yield others | {inode: content}


def make(image: Image, path: Path) -> None:
    """Write `image` below `path`."""
    for name in sorted(image):
        if name.endswith("/"):
            (path / name).mkdir(parents=True)
        else:
            (path / name).write_bytes(image[name])
