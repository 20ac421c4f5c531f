"""What is sent: four kinds of files, made once and kept in a directory of this user's.

    random    what no compressor shrinks: encrypted, already compressed
    tar       the libraries and sources of this Python installation, in an order that mixes both
    weights   float32 of a normal distribution, as a network's weights: barely shrinks
    json      lines of JSON: shrinks well

`tar` and `json` begin anew where the installation ends or after 32 MiB: no level that is measured looks back so far
(zstd's windows are at most 8 MiB, and aipod's frames 1 MiB). Whoever measures reads the file once before, so that all
peers find it in the page cache.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
import os
import random
import stat
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.models import describe

MIB = 1 << 20
BLOCK = 32 * MIB
KINDS = ("random", "tar", "weights", "json")
NUMPY = "weights"  # the kind that needs it
_SOURCES = (".py", ".pyi", ".c", ".h", ".txt")
FORMAT = 1  # of these files' names: another number where what is in them changes
# Of the names that an installation has many more of than it needs.
_SKIPPED = ("__pycache__", "test", "tests", "idlelib")


def make(kind: str, size: int, directory: Path) -> Path:
    """The file of that kind and size, in the page cache."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise SystemExit(f"{directory} belongs to somebody else, or others may write to it; choose another --directory")
    path = directory / f"{kind}-{size}-{FORMAT}"
    if not path.exists():
        fresh = path.with_suffix(f".{os.getpid()}")
        try:
            with fresh.open("wb") as file:
                left = size
                for block in _MAKERS[kind]():
                    left -= file.write(block[:left])
                    if left <= 0:
                        break
            fresh.rename(path)
        finally:
            fresh.unlink(missing_ok=True)
    described(path)
    return path


def kinds() -> tuple[str, ...]:
    """Those that can be made here."""
    return tuple(kind for kind in KINDS if kind != NUMPY or importlib.util.find_spec("numpy"))


@functools.cache
def described(path: Path) -> dict[str, Any]:
    """What every peer's model must say of it. Reads it, once for each process."""
    return describe(path)


def _random() -> Iterator[bytes]:
    while True:
        yield os.urandom(MIB)


def _weights() -> Iterator[bytes]:
    import numpy

    made = numpy.random.default_rng(7)
    while True:
        yield (made.standard_normal(MIB // 4, dtype=numpy.float32) * 0.02).tobytes()


def _json() -> Iterator[bytes]:
    made, blocks, lines, size = random.Random(7), list[bytes](), list[bytes](), 0
    words = [hashlib.sha256(b"%d" % number).hexdigest()[: 3 + number % 8] for number in range(2000)]
    while len(blocks) * MIB < BLOCK:
        record = {
            "id": made.getrandbits(48),
            "time": f"2026-01-{made.randrange(1, 29):02}T{made.randrange(24):02}:{made.randrange(60):02}:00Z",
            "kind": made.choice(("view", "click", "order", "return")),
            "score": round(made.gauss(0.5, 0.2), 6),
            "text": " ".join(made.choices(words, k=made.randrange(4, 20))),
        }
        lines.append(json.dumps(record).encode() + b"\n")
        size += len(lines[-1])
        if size >= MIB:
            yield (block := b"".join(lines))
            blocks.append(block)
            lines, size = [], 0
    yield from itertools.cycle(blocks)


def _tar() -> Iterator[bytes]:
    files = {path for name in ("stdlib", "platstdlib", "purelib", "platlib") for path in _files(name)}
    # By a hash of the name: libraries and sources lie side by side, in the same order each time.
    ordered = sorted(files, key=lambda path: hashlib.sha256(bytes(path)).digest())
    while True:
        for path in ordered:
            yield from _member(path)


def _files(name: str) -> Iterator[Path]:
    """Libraries and sources below one of the installation's directories."""
    for base, directories, names in os.walk(sysconfig.get_path(name)):
        directories[:] = sorted(set(directories) - set(_SKIPPED))
        for each in names:
            path = Path(base, each)
            if (path.suffix in _SOURCES or ".so" in path.suffixes) and path.is_file() and not path.is_symlink():
                yield path


def _member(path: Path) -> Iterator[bytes]:
    about = tarfile.TarInfo("/".join(path.parts[-4:]))
    with path.open("rb") as file:
        about.size = os.fstat(file.fileno()).st_size
        yield about.tobuf()
        while piece := file.read(MIB):
            yield piece
    yield bytes(-about.size % tarfile.BLOCKSIZE)


_MAKERS: dict[str, Callable[[], Iterator[bytes]]] = {
    "random": _random,
    "tar": _tar,
    "weights": _weights,
    "json": _json,
}
