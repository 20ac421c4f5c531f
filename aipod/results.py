"""What a method returned, as bytes to be kept in the journal or as the file `res` of its job. Standard library only."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Up to this length a result travels and is kept as bytes; above it, it is a file.
INLINE = 64 * 1024
KINDS = ("json", "bytes", "file")
# Not EFBIG: to a limit of the file's own nothing else makes room.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class BadResult(Exception):
    """The method returned something that cannot be sent; `reason` is one of errors.TABLE."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Result:
    """`kind` says what it was; `inline` holds it where it is short, else it is in the job's `res`."""

    kind: str
    inline: bytes | None = None


def settle(value: Any, *, payload: Path, work_dir: Path, res: Path) -> Result:
    """Turn `value` into a `Result`, writing `res` where it is long. Blocks. Raises `BadResult`.

    `res` appears whole or not at all. A file in the work directory is renamed to it, the payload itself is linked
    (never a second copy), any other file is copied. On a full disk the payload is removed for it.
    """
    if isinstance(value, Path):
        _adopt(value, payload=payload, work_dir=work_dir, res=res)
        return Result("file")
    kind, data = encode(value)
    if len(data) <= INLINE:
        return Result(kind, data)
    _make(res, payload, lambda fresh: fresh.write_bytes(data))
    return Result(kind)


def encode(value: Any) -> tuple[str, bytes]:
    """The kind of what was returned, and its bytes; not of a path. Raises `BadResult`."""
    if isinstance(value, bytes | bytearray | memoryview):
        return "bytes", bytes(value)
    try:
        # Not NaN and Infinity: no JSON parser but Python's takes them.
        return "json", json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise BadResult(
            "RESULT_NOT_JSON",
            f"the method returned what JSON cannot hold: {exc}; return plain lists, dicts, numbers and strings, "
            f"bytes, or a pathlib.Path",
        ) from None


def _make(res: Path, payload: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file, which becomes `res`. Where it does not fit, the payload makes room: it has served."""
    fresh = res.with_suffix(".tmp")
    try:
        try:
            write(fresh)
        except OSError as exc:
            if exc.errno not in _NO_ROOM:
                raise
            payload.unlink(missing_ok=True)
            write(fresh)
        fresh.rename(res)
    except OSError as exc:
        fresh.unlink(missing_ok=True)
        raise BadResult("RESULT_NOT_STORED", f"the method has run, its result cannot be stored: {exc}") from None


def _adopt(source: Path, *, payload: Path, work_dir: Path, res: Path) -> None:
    try:
        real = source.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as exc:  # a loop of links before Python 3.13; a NUL in the name
        raise BadResult("RESULT_NO_FILE", f"the method returned the path of no file: {exc}") from None
    if not real.is_file():
        raise BadResult("RESULT_NO_FILE", f"the method returned {source.name!r}, which is not a file")
    if real == payload.resolve():
        os.link(real, res)
    elif real.is_relative_to(work_dir.resolve()):
        real.rename(res)
    else:
        _make(res, payload, lambda fresh: shutil.copyfile(real, fresh))
