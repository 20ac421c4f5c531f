"""The journal of one job."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from aipod.spool.regular import keep, open_regular


class Fields(TypedDict, total=False):
    """What a job's journal tells: the keys of its lines, all of which may be missing. Later lines over earlier ones.

    Whoever adds one says here what it means. A reader of another version ignores what it does not know.
    """

    # The first line, by who claims the job (`Entry.create`, with the fields of job.request): the request.
    ticketed: bool  # False: a plain client's; nobody can come back to it
    boot: str  # names the machine's run; another one now, and not settled: most is not to be believed (look._is_lost)
    print: str  # the request's fingerprint: whoever comes with the same ticket must have the same
    owner: str  # name of who began it, where callers have names; nobody else may know of it
    method: str
    version: str
    epoch: int  # of the connection that brought it; newer ones leave theirs as files
    size: int | None  # bytes of the payload, where the caller has told
    metadata: dict[str, str]  # headers for the method, without credentials
    kwargs: str  # a JSON object, where it is not longer than INLINE; else it is in the file `kw`
    fenced: bool  # there never was a job: it is RELEASED from the beginning, so that none can start under this ticket

    # By who holds the entry.
    offset: int  # bytes of the payload that are durable: at each checkpoint; all of it, when the job is queued
    settled: bool  # the entry's files have their names on disk, and from now on every line is synced
    lost: bool  # the disk has failed to keep a part of an entry that had not settled: it never will
    phase: str  # name of a wire.ai.Phase; RECEIVING where it is missing. In the first line: its payload came with it
    worker: str  # with RUNNING: name of the lock that is held until this run is over; empty where the server runs it
    adopted: int  # with QUEUED: how many processes in a row have taken it up from one that had died
    attempt: int  # with RUNNING: how often the method was started, this time included

    # With an outcome, its last line but for RELEASED; `Entry.release` then leaves of all this what tells of no answer.
    kind: str  # of an answer: json, bytes or file
    answer: int  # its length in bytes
    digest: str  # of its bytes, hexadecimal
    inline: str | None  # its bytes as latin-1, where there are not more than INLINE; else they are in the file `res`
    reason: str  # why there is no answer, one of errors.TABLE
    message: str  # the same for a person
    type: str  # name of the exception's class, where the method raised one
    trace: str  # its traceback, where the server gives that away
    signal: str  # what ended the worker, where it was a signal: its name
    exit: str  # the worker's exit status, where it ended by itself


class _Known(NamedTuple):
    """What was read of a journal, or written to it."""

    inode: int
    end: int  # the whole lines up to here are in `state`
    state: dict[str, Any]


_NOTHING = _Known(0, 0, {})
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode
_DECODE = json.JSONDecoder().decode


class Journal:
    """Append-only lines, each checksummed; a torn line (power cut, full disk) is as if never written.

    So is one that is no JSON object though its checksum is right: one job's file must not end a server.

    It remembers how far it came, so that who reads again every second reads only what is new, and who writes reads
    nothing again. The mutable state is replaced whole: threads that come at once cost each other a reading at most.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = str(path)
        self._known = _NOTHING
        self.stays_open = False  # between two lines, for who writes several
        self._fd: int | None = None

    def append(self, fields: dict[str, Any], *, sync: bool = False) -> None:
        """Add a line. Raises `OSError`, `Refused` (DAMAGED); then the journal is as before."""
        line = _line(fields)
        fd, stat = self._opened()
        try:
            size, known = stat.st_size, self._known
            if size == 0:
                known = _Known(stat.st_ino, 0, {})
            elif (known.inode, known.end) != (stat.st_ino, size) and os.pread(fd, 1, size - 1) != b"\n":
                # The line before was torn. With a line break behind it, it might come to life after all.
                size = os.pread(fd, size, 0).rfind(b"\n") + 1
                os.ftruncate(fd, size)
            try:
                _write(fd, line, sync=sync)
            except OSError:
                os.ftruncate(fd, size)
                raise
        finally:
            if self.stays_open:
                self._fd = fd
            else:
                os.close(fd)
        if (known.inode, known.end) == (stat.st_ino, size):
            self._known = _Known(stat.st_ino, size + len(line), known.state | fields)

    def _opened(self) -> tuple[int, os.stat_result]:
        if self._fd is not None:
            stat = os.fstat(self._fd)
            if stat.st_nlink:
                return self._fd, stat
            self.close()  # a model has removed it, or put another file in its place
        return open_regular(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT)

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def replace(self, fields: dict[str, Any], *, sync: bool = False) -> None:
        """Have the journal tell `fields` and nothing else any more.

        Raises `OSError`, `Refused` (DAMAGED); then it is as before.
        """
        line, fresh = _line(fields), f"{self._path}.tmp"
        self.close()
        directory = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            fd, stat = open_regular(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                _write(fd, line, sync=sync)
            finally:
                os.close(fd)
            os.rename(fresh, self._path)
            if sync:
                os.fsync(directory)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise
        finally:
            os.close(directory)
        self._known = _Known(stat.st_ino, len(line), dict(fields))

    def read(self) -> dict[str, Any]:
        """The fold of all whole lines, later ones over earlier ones; empty where there is none.

        Raises `OSError`, `Refused` (DAMAGED).
        """
        try:
            fd, stat = open_regular(self._path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return {}  # a model can do that to its job
        try:
            known = self._known
            # Another file than the one that was read, or one that somebody has cut.
            if stat.st_ino != known.inode or stat.st_size < known.end:
                known = _Known(stat.st_ino, 0, {})
            raw = os.pread(fd, stat.st_size - known.end, known.end) if stat.st_size > known.end else b""
        finally:
            os.close(fd)
        whole, end, _ = raw.rpartition(b"\n")
        if end:
            state = dict(known.state)
            for line in whole.split(b"\n"):
                check, _, text = line.partition(b" ")
                if text and check == b"%08x" % zlib.crc32(text):
                    state.update(_fields(text))
            known = _Known(known.inode, known.end + len(whole) + 1, state)
        self._known = known
        return dict(known.state)


def _line(fields: dict[str, Any]) -> bytes:
    text = _ENCODE(fields)
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def _fields(text: bytes) -> dict[str, Any]:
    try:
        fields = _DECODE(text.decode())
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _write(fd: int, line: bytes, *, sync: bool) -> None:
    if os.write(fd, line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if sync:
        keep(os.fdatasync, fd)
