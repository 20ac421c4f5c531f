"""What a caller sends, as chunks: read, hashed and compressed in threads, one batch ahead of the network."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from aipod.codec import Compressor, new_hasher
from aipod.config import CHUNK
from aipod.errors import UsageError
from aipod.wire.ai import Raw

# Chunks per thread hop: a hop costs as much as reading 100 KiB, four chunks in flight cost 8 MiB.
BATCH = 4

Payload = bytes | bytearray | memoryview | str | os.PathLike[str] | IO[bytes] | Iterable[bytes] | AsyncIterable[bytes]


class Source:
    """A payload. `size` is None where it is not known beforehand; one that is not `replayable` can be sent once."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self.size: int | None = None
        self.replayable = True
        self.started = False
        if isinstance(payload, bytes | bytearray | memoryview):
            self._payload = memoryview(payload).cast("B")
            self.size = len(self._payload)
        elif isinstance(payload, str | os.PathLike):
            path = Path(payload)
            if not path.is_file():
                kind = "is not a regular file" if path.exists() else "does not exist"
                raise UsageError(f"{str(path)!r} {kind}; a path names a file to send, bytes are sent as they are")
            self._payload = path
            self._stamp = _stamp(path.stat())
            # Files of /proc have content but no size: only the end of the reading tells.
            self.size = self._stamp[0] or None
        elif hasattr(payload, "read") or isinstance(payload, AsyncIterable | Iterable):
            self.replayable = False
        else:
            raise UsageError(f"a payload is bytes, a path, a binary file or an iterable of bytes, not {type(payload)}")

    def check_replayable(self) -> bool:
        """Whether it can be sent (again)."""
        return self.replayable or not self.started

    async def batches(self, level: int) -> AsyncGenerator[list[Raw], None]:
        """The payload as messages; the last one has `last` and the digest. This is an asyncio-flavored generator.

        Raises `UsageError` where the source yields something else than bytes, or a file changed while it was read.
        """
        self.started = True
        packer = _Packer(level)
        if isinstance(self._payload, AsyncIterable):
            async for pieces in _grouped(self._payload):
                yield await asyncio.to_thread(packer.pack, pieces)
        else:
            pieces_of = self._pieces()
            try:
                while pieces := await asyncio.to_thread(_take, pieces_of):
                    yield await asyncio.to_thread(packer.pack, pieces)
                    del pieces
            finally:
                with contextlib.suppress(ValueError):  # a thread is reading: the file is closed when it has
                    pieces_of.close()
        yield packer.finish()

    def _pieces(self) -> Generator[bytes | memoryview, None, None]:
        payload: Any = self._payload
        if isinstance(payload, memoryview):
            for start in range(0, len(payload), CHUNK):
                yield payload[start : start + CHUNK]
        elif isinstance(payload, Path):
            yield from self._read_unchanged(payload)
        elif hasattr(payload, "read"):
            yield from _read(payload)
        else:
            yield from _rechunk(payload)

    def _read_unchanged(self, path: Path) -> Generator[bytes, None, None]:
        """A half-written file must not pass for a whole one. The last pieces are still here when this raises."""
        read = 0
        with path.open("rb", buffering=0) as file:
            for piece in _read(file):
                read += len(piece)
                if self.size is not None and read > self.size:
                    break
                yield piece
            if self.size is not None and (read != self.size or _stamp(os.fstat(file.fileno())) != self._stamp):
                raise UsageError(
                    f"{str(path)!r} changed while it was sent (it had {self.size} bytes when the call began); call "
                    "again once it is complete"
                )


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _read(file: IO[bytes]) -> Iterator[bytes]:
    while True:
        piece: bytes | None = file.read(CHUNK)
        if piece is None:
            raise UsageError("the payload's file is non-blocking and has nothing to read now; make it a blocking one")
        _check_bytes(piece)
        if not piece:
            return
        yield piece


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


async def _grouped(pieces: AsyncIterable[bytes]) -> AsyncIterator[list[bytes]]:
    held = bytearray()
    async for piece in pieces:
        _check_bytes(piece)
        held += piece
        if len(held) >= BATCH * CHUNK:
            whole = len(held) // CHUNK * CHUNK
            yield [bytes(held[start : start + CHUNK]) for start in range(0, whole, CHUNK)]
            del held[:whole]
    if held:
        yield [bytes(held[start : start + CHUNK]) for start in range(0, len(held), CHUNK)]


def _take(pieces: Iterator[Any]) -> list[Any]:
    taken = []
    for piece in pieces:
        taken.append(piece)
        if len(taken) == BATCH:
            break
    return taken


class _Packer:
    """Turns pieces into chunks, holding back the newest until it is known whether it is the last."""

    def __init__(self, level: int) -> None:
        self._compressor = Compressor(level)
        self._hasher = new_hasher()
        self._offset = 0
        self._held: list[Raw] = []

    def pack(self, pieces: list[Any]) -> list[Raw]:
        ready = self._held
        for piece in pieces:
            self._hasher.update(piece)
            ready.append(Raw(data=self._compressor.frame(piece), offset=self._offset))
            self._offset += len(piece)
        self._held = [ready.pop()]
        return ready

    def finish(self) -> list[Raw]:
        last = self._held.pop() if self._held else Raw()
        last.last = True
        last.digest = self._hasher.digest()
        return [last]
