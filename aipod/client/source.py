"""What a caller sends, as chunks from any offset: read, hashed and compressed in threads.

Every byte is hashed once, when it is first read. What can be read once only is kept in a temporary file, so that it can
be sent again; files and memory are read again where they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import hashlib
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from aipod.client.reader import File, Memory, Payload, Reader, Seekable, Stream, grouped, open_reader
from aipod.codec import Laid, frame, new_hasher
from aipod.config import CHUNK, KIB
from aipod.errors import UsageError
from aipod.packing import BATCH, Packed, Packer, Piece
from aipod.wire.ai import Raw

# A hop into a thread costs as much as compressing so many bytes.
HOP = 64 * KIB

InThread = Callable[..., Coroutine[Any, Any, Any]]


class Source:
    """A payload. `size` is None where it is not known beforehand; `tag` names what it is read from.

    asyncio-flavored; for one task at a time. Raises `UsageError` for what is no payload. Leaving its scope closes what
    it has opened. `in_thread`: what runs that which waits for nobody. What the caller's own code gives may wait for
    anything, another call of this client too: it is read in a thread of its own, of which nobody else has need.
    """

    def __init__(self, payload: Payload, in_thread: InThread = asyncio.to_thread) -> None:
        self._reader: Reader = open_reader(payload)
        self._in_thread = in_thread
        self._read_in_thread = in_thread if isinstance(self._reader, Memory | File) else self._in_own_thread
        self._own_thread: ThreadPoolExecutor | None = None
        self._items = payload if isinstance(self._reader, Stream) and isinstance(payload, AsyncIterable) else None
        self._groups: AsyncGenerator[list[bytes], None] | None = None
        self.size = self._reader.size
        self.tag = self._reader.tag
        self.read = 0  # bytes that were read and hashed
        self._ended = False
        self._hasher = new_hasher()
        # The one reading under way. It outlives an attempt that is given up: the next one finds what it has read.
        self._reading: asyncio.Task[list[Piece]] | None = None
        self._newest: tuple[int, list[Piece]] = (0, [])  # where it began, and what the last reading brought

    async def __aenter__(self) -> Source:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reading is not None:
            self._reading.cancel()  # a thread that waits for input is left to itself: nothing can end it
            await asyncio.wait([self._reading])
            if not self._reading.cancelled():
                self._reading.exception()
        if self._groups is not None:
            with contextlib.suppress(Exception):
                await self._groups.aclose()
        self._newest = (0, [])
        if self._own_thread is not None:
            self._own_thread.shutdown(wait=False)
        if not isinstance(self._reader, Memory):
            await asyncio.to_thread(self._reader.close)

    def content_tag(self) -> str:
        """What tells this payload from others without reading a file. Blocks for bytes in memory: it hashes them."""
        if isinstance(self._reader, Memory):
            return "bytes " + hashlib.sha256(self._reader.view).hexdigest()
        return f"file {self.tag.hex()}" if self.tag else "stream"

    @property
    def is_compared(self) -> bool:
        """Nothing but its bytes tells it from another (`content_tag` does not), and they can be had at any time."""
        return isinstance(self._reader, Seekable)

    async def digest(self) -> bytes:
        """Of all of it, read to its end for that. This is an asyncio-flavored function. Raises as `batches`."""
        while await self._pieces(self.read, inline=False):
            pass
        return bytes(self._hasher.digest())

    def whole(self, level: int) -> Raw | None:
        """All of it as one message, with `last` and digest, where that takes no thread and nothing was read yet."""
        if not isinstance(self._reader, Memory) or self._reader.size > HOP or self.read or self._ended:
            return None
        self._note(self._hash(self._reader.fresh()))
        data = frame(self._reader.view, level) if self._reader.size else b""
        return Raw(data=data, last=True, digest=self._hasher.digest())

    async def batches(self, packer: Packer) -> AsyncGenerator[Packed, None]:
        """The payload from `packer.offset` on; the last message has `last` and the digest of it all.

        This is an asyncio-flavored generator. Raises `UsageError` where the source yields something else than bytes, is
        shorter than that offset, or is a file that changed; and what the source raises.
        """
        inline = isinstance(self._reader, Memory) and self._reader.size <= HOP
        held: list[Raw] = []  # the newest message, until it is known whether it is the last
        while pieces := await self._pieces(packer.offset, inline=inline):
            if isinstance(self._reader, File):
                self._reader.lays = packer.stores
            while pieces:
                some, pieces = pieces[: packer.chunks], pieces[packer.chunks :]
                packed = packer.pack(some) if inline else await self._in_thread(packer.pack, some)
                held, packed.messages = [packed.messages[-1]], held + packed.messages[:-1]
                yield packed
                del some, packed  # while the next ones are made
        last = held[0] if held else Raw(offset=packer.offset)
        last.last = True
        last.digest = self._hasher.digest()
        yield Packed(packer.level, [last])

    async def _pieces(self, offset: int, *, inline: bool) -> list[Piece]:
        """Up to `BATCH` chunks from `offset` on; none at the end."""
        while True:
            if self._reading is not None:
                # Not awaited: an attempt that is given up must not take the reading with it.
                await asyncio.wait([self._reading])
                self._take()
            at, pieces = self._newest
            if pieces and at == offset:
                self._newest = (0, [])
                if not inline:
                    self._read_ahead()
                return pieces
            if offset < self.read:
                end = min(self.read, offset + BATCH * CHUNK)
                again: list[Piece] = await self._read_in_thread(self._reader.again, offset, end)
                return again
            if self._ended:
                if offset > self.read:
                    raise UsageError(f"the payload has {self.read} bytes now, but {offset} of it were sent before")
                return []
            if inline:
                self._note(self._hash(self._reader.fresh()))
                continue
            self._newest = (0, [])
            self._read_ahead()

    def _read_ahead(self) -> None:
        """Read on while what is here is packed and sent."""
        self._reading = asyncio.create_task(self._read_on(), name="aipod-read")

    def _take(self) -> None:
        """What the finished reading brought. Raises what it raised."""
        assert self._reading is not None
        reading, self._reading = self._reading, None
        self._note(reading.result())

    def _note(self, pieces: list[Piece]) -> None:
        self._newest = (self.read, pieces)
        self.read += sum(map(len, pieces))
        self._ended = not pieces

    async def _read_on(self) -> list[Piece]:
        """The next pieces that nobody has read yet."""
        if self._items is None:
            read: list[Piece] = await self._read_in_thread(lambda: self._hash(self._reader.fresh()))
            return read
        if self._groups is None:
            self._groups = grouped(self._items)
        nothing: list[bytes] = []
        pieces = await anext(self._groups, nothing)
        assert isinstance(self._reader, Stream)
        await self._in_thread(self._reader.keep, pieces)
        hashed: list[Piece] = await self._in_thread(self._hash, [*pieces])
        return hashed

    async def _in_own_thread(self, fn: Callable[..., Any], *args: Any) -> Any:
        """As `asyncio.to_thread`, which has few threads, for all."""
        if self._own_thread is None:
            self._own_thread = ThreadPoolExecutor(1, thread_name_prefix="aipod-payload")
        work = functools.partial(contextvars.copy_context().run, fn, *args)
        return await asyncio.get_running_loop().run_in_executor(self._own_thread, work)

    def _hash(self, pieces: list[Piece]) -> list[Piece]:
        for piece in pieces:
            for part in piece.pieces if isinstance(piece, Laid) else (piece,):
                self._hasher.update(part)
        return pieces
