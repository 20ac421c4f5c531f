"""Opening and syncing the files of an entry.

A model may put anything in their place, and who opens a FIFO waits for another.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from aipod.errors import Refused


class NotKept(OSError):
    """A sync has failed. The system tells that once: a later one that succeeds says nothing of what was lost before.

    https://wiki.postgresql.org/wiki/Fsync_Errors
    """


def keep(sync: Callable[[int], None], fd: int) -> None:
    """`sync(fd)`, which is `os.fsync` or `os.fdatasync`. Raises `NotKept`."""
    try:
        sync(fd)
    except OSError as exc:
        raise NotKept(exc.errno, exc.strerror) from exc


def not_kept() -> Refused:
    """What is told of it to who has sent what was lost."""
    return Refused("BUSY", "the server's disk did not keep what was sent last; it is to be sent again")


def open_regular(path: Path | str, flags: int) -> tuple[int, os.stat_result]:
    """A descriptor of the regular file at `path`, and what is told of it; never waits for another process.

    Raises `Refused(DAMAGED)` where there is something else, and `OSError`; `IsADirectoryError` for a directory.
    """
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENXIO):  # a link; a FIFO that nobody reads, or a socket
            raise _damaged(path) from None
        raise
    try:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise _damaged(path)
    except BaseException:
        os.close(fd)
        raise
    return fd, found


def read_regular(path: Path | str) -> bytes:
    """All that is in the file; as `open_regular`."""
    with os.fdopen(open_regular(path, os.O_RDONLY)[0], "rb") as file:
        return file.read()


def _damaged(path: Path | str) -> Refused:
    return Refused("DAMAGED", f"the job's files are damaged: {os.path.basename(path)!r} is no regular file")
