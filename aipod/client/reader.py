"""Where the bytes of a payload come from: memory, files, and streams that can be read once.

Each kind has `fresh`, the next pieces that were never read, and `again`, any that were. Both block.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from aipod.blocks import Blocks
from aipod.codec import LAID, Laid
from aipod.config import CHUNK, MIB
from aipod.errors import UsageError
from aipod.packing import BATCH, Piece

# A file above it that is not in the system's cache does not stay there: sent once, it would have taken the place of
# what others need.
HUGE = 256 * MIB
# Chunks of a file that its sender has in hands: four batches (read ahead, packed, ready, being sent), a message that is
# held back, and what a socket has not taken.
_IN_HANDS = 4 * BATCH + 2
# Places at which a file is looked at for that.
_LOOKS = 16
# Seconds after which what a slow source has given goes out, though it is less than could go at once: a browser may take
# minutes for that, and a server waits one for a message (`Config.upload_stall`).
SLOW = 1.0

Payload = bytes | bytearray | memoryview | str | os.PathLike[str] | IO[bytes] | Iterable[bytes] | AsyncIterable[bytes]


class Reader(Protocol):
    """One kind of source. `size`: None where it is not known; `tag`: empty where nothing names what is read."""

    @property
    def size(self) -> int | None: ...

    @property
    def tag(self) -> bytes: ...

    def fresh(self) -> list[Piece]:
        """The next pieces of at most `CHUNK` bytes, at most `BATCH`; none at the end."""

    def again(self, start: int, end: int) -> list[Piece]:
        """Bytes `start` to `end`, which `fresh` has given before."""

    def close(self) -> None:
        """Close what was opened here."""


def open_reader(payload: Payload) -> Reader:
    """The reader for `payload`. Raises `UsageError` for what is none. Blocks for a path."""
    if isinstance(payload, bytes | bytearray | memoryview):
        return Memory(payload)
    if isinstance(payload, str | os.PathLike):
        path = Path(payload)
        if not path.is_file():
            kind = "is not a regular file" if path.exists() else "does not exist"
            raise UsageError(f"{str(path)!r} {kind}; a path names a file to send, bytes are sent as they are")
        # Files of /proc have content but no size: only the end of the reading tells, and the next one may differ.
        return File(path) if path.stat().st_size else Stream(_read_path(path))
    if hasattr(payload, "read"):
        return Seekable(payload) if _is_seekable(payload) else Stream(_read(payload))
    if isinstance(payload, AsyncIterable):
        return Stream(iter(()))
    if isinstance(payload, Iterable):
        return Stream(_rechunk(payload))
    raise UsageError(f"a payload is bytes, a path, a binary file or an iterable of bytes, not {type(payload)}")


class Memory:
    """Bytes."""

    tag = b""

    def __init__(self, payload: bytes | bytearray | memoryview) -> None:
        self.view = memoryview(payload).cast("B")
        self.size = len(self.view)
        self._read = 0

    def fresh(self) -> list[Piece]:
        start, self._read = self._read, min(self.size, self._read + BATCH * CHUNK)
        return self.again(start, self._read)

    def again(self, start: int, end: int) -> list[Piece]:
        return [self.view[at : min(at + CHUNK, end)] for at in range(start, end, CHUNK)]

    def close(self) -> None:
        pass


class File:
    """A file with a size, opened when it is first read. It must not change: a half-written one is no whole one."""

    def __init__(self, path: Path, huge: int = HUGE) -> None:
        self._path = path
        self._huge = huge
        self._stamp = _stamp(path.stat())
        self.size = self._stamp[0]
        name = f"{os.path.abspath(path)}\0{self._stamp[0]}\0{self._stamp[1]}"
        self.tag = hashlib.sha256(os.fsencode(name)).digest()[:16]
        self.lays = False  # chunks that are most likely stored
        self._blocks = Blocks(LAID, _IN_HANDS)
        self._file: IO[bytes] | None = None
        self._passes = False  # what was read leaves the system's cache again
        self._read = 0
        self._closed = False
        self._lock = threading.Lock()  # a thread may still read when the caller has gone

    def fresh(self) -> list[Piece]:
        with self._lock:
            if self._closed:
                return []
            if self._file is None:
                self._file = self._path.open("rb", buffering=0)
                self._passes = self.size > self._huge and not _is_cached(self._file.fileno(), self.size)
            # Not only up to `size`: a file that has grown is noticed.
            pieces = self._take(self._read, self._read + BATCH * CHUNK)
            if self._passes:
                os.posix_fadvise(self._file.fileno(), 0, self._read, os.POSIX_FADV_DONTNEED)
            self._read += sum(map(len, pieces))
            if self._read > self.size or (not pieces and self._read < self.size):
                raise self._changed()
            if not pieces:
                self._check()
            return pieces

    def again(self, start: int, end: int) -> list[Piece]:
        with self._lock:
            if self._closed:
                return []
            self._check()
            pieces = self._take(start, end)
            if sum(map(len, pieces)) != end - start:
                raise self._changed()
            return pieces

    def _take(self, start: int, end: int) -> list[Piece]:
        pieces: list[Piece] = []
        while start < end and (piece := self._read_one(start, min(CHUNK, end - start))):
            pieces.append(piece)
            start += len(piece)
        return pieces

    def _read_one(self, start: int, size: int) -> Piece:
        assert self._file is not None
        block = self._blocks.take()
        if self.lays and size == CHUNK:
            laid = Laid(block)
            count = os.preadv(self._file.fileno(), laid.pieces, start)
            return laid if count == CHUNK else laid.joined(count)
        return block[: os.preadv(self._file.fileno(), [block[:size]], start)]

    def _check(self) -> None:
        assert self._file is not None
        if _stamp(os.fstat(self._file.fileno())) != self._stamp:
            raise self._changed()

    def _changed(self) -> UsageError:
        return UsageError(
            f"{str(self._path)!r} changed while it was sent (it had {self.size} bytes when the call began); call "
            "again once it is complete"
        )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._file is not None:
                self._file.close()


class Seekable:
    """A binary file of the caller's, from where it stands to its end."""

    size = None
    tag = b""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._start: int = file.tell()
        self._read = 0
        self._lock = threading.Lock()  # a reading that was given up may still go on

    def fresh(self) -> list[Piece]:
        pieces = self._take(self._read, BATCH * CHUNK)
        self._read += sum(map(len, pieces))
        return pieces

    def again(self, start: int, end: int) -> list[Piece]:
        pieces = self._take(start, end - start)
        if sum(map(len, pieces)) != end - start:
            raise UsageError("the payload's file has become shorter while it was sent; call again once it is complete")
        return pieces

    def _take(self, start: int, length: int) -> list[Piece]:
        pieces: list[Piece] = []
        with self._lock:
            self._file.seek(self._start + start)
            while length and (piece := _read_piece(self._file, min(CHUNK, length))):
                pieces.append(piece)
                length -= len(piece)
        return pieces

    def close(self) -> None:
        pass


class Stream:
    """What can be read once, and is kept in a temporary file that has no name."""

    size = None
    tag = b""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._kept: IO[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()  # a thread may still read when the caller has gone

    def fresh(self) -> list[Piece]:
        pieces: list[bytes] = []
        for piece in self._pieces:
            pieces.append(piece)
            if len(pieces) == BATCH:
                break
        self.keep(pieces)
        return [*pieces]

    def keep(self, pieces: Sequence[bytes]) -> None:
        """Write what was read to the temporary file."""
        with self._lock:
            if self._closed or not pieces:
                return
            if self._kept is None:
                self._kept = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - `close` closes it
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[self._kept.write(view) :]

    def again(self, start: int, end: int) -> list[Piece]:
        assert self._kept is not None
        pieces: list[Piece] = []
        while start < end:
            piece = os.pread(self._kept.fileno(), min(CHUNK, end - start), start)
            assert piece, "the temporary file has everything that was read"
            pieces.append(piece)
            start += len(piece)
        return pieces

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._kept is not None:
                self._kept.close()
        if isinstance(self._pieces, Generator):
            with contextlib.suppress(ValueError):  # a thread is reading: the file is closed when it has
                self._pieces.close()


def _is_cached(fd: int, size: int) -> bool:
    """Whether somebody has read, or written, of the file of late, as far as the system tells."""
    for part in range(_LOOKS):
        try:
            if os.preadv(fd, [bytearray(1)], size * part // _LOOKS, os.RWF_NOWAIT):
                return True
        except BlockingIOError:
            continue
        except (OSError, AttributeError):  # no such thing on this file system, or on this system
            return True
    return False


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _is_seekable(file: Any) -> bool:
    try:
        return bool(file.seekable())
    except (AttributeError, OSError, ValueError):
        return False


def _read_path(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        yield from _read(file)


def _read(file: Any) -> Iterator[bytes]:
    while piece := _read_piece(file, CHUNK):
        yield piece


def _read_piece(file: Any, size: int) -> bytes:
    piece = file.read(size)
    if piece is None:
        raise UsageError("the payload's file is non-blocking and has nothing to read now; make it a blocking one")
    _check_bytes(piece)
    return bytes(piece)


def _check_bytes(piece: object) -> None:
    if not isinstance(piece, bytes | bytearray | memoryview):
        raise UsageError(f"the payload yields {type(piece).__name__}, not bytes; open files in binary mode")


def _rechunk(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of any length as pieces of `CHUNK` bytes and a rest."""
    held = bytearray()
    for piece in pieces:
        _check_bytes(piece)
        held += piece
        while len(held) >= CHUNK:
            yield bytes(held[:CHUNK])
            del held[:CHUNK]
    if held:
        yield bytes(held)


async def grouped(
    pieces: AsyncIterable[bytes], clock: Callable[[], float] = time.monotonic
) -> AsyncGenerator[list[bytes], None]:
    """Pieces of any length as lists of at most `BATCH` chunks, of less where they come slowly.

    This is an asyncio-flavored generator.
    """
    held, since = bytearray(), 0.0
    async for piece in pieces:
        _check_bytes(piece)
        now = clock()
        since = since if held else now
        held += piece
        while len(held) >= BATCH * CHUNK:
            yield _chunks(held[: BATCH * CHUNK])
            del held[: BATCH * CHUNK]
            since = now
        if held and now - since >= SLOW:
            yield _chunks(held)
            held.clear()
    if held:
        yield _chunks(held)


def _chunks(data: bytearray) -> list[bytes]:
    return [bytes(data[start : start + CHUNK]) for start in range(0, len(data), CHUNK)]
