"""The messages of one stream, put together from DATA payload (gRPC over HTTP/2: Length-Prefixed-Message)."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import struct
import zlib
from collections.abc import Callable
from typing import Any, Protocol

from grpclib.const import Status

from aipod.config import KIB, MIB
from aipod.transport.codec import BadMessage
from aipod.transport.window import Budget, ReceiveWindow

_PREFIX = struct.Struct(">BL")  # compressed flag, length
PREFIX = _PREFIX.size
_WBITS = {"gzip": 31, "deflate": 15}
# Buffers that are kept when their messages were dealt with: how many, as many as a transfer has in hands, and which
# sizes (a chunk and its fields).
_SPARES = 8
_SPARE_LEAST = 64 * KIB
_SPARE_MOST = 2 * MIB
# Less than that is copied faster than it is read by itself.
_WORTH_READING = 64 * KIB
# Messages of a stream that wait to be read; also how many are read without a look at what else there is to do.
_READY = 64
# Compressed bytes that are inflated at once: at most a thousand times as many. They cost up to eight times what bytes
# that come out of them do, and some have nothing in them (1 MiB of empty blocks takes 0.1 s).
_STEP = 4 * KIB
_PER_COMPRESSED = 8
_NOTHING = memoryview(b"")


async def let_others_run() -> None:
    """Let the loop do what else there is. Not asyncio.sleep(0): a trio task may be waiting here."""
    loop = asyncio.get_running_loop()
    turn = loop.create_future()
    loop.call_soon(_end, turn)
    await turn


def _end(turn: asyncio.Future[None]) -> None:
    if not turn.done():  # cancelled
        turn.set_result(None)


class Event(Protocol):
    """asyncio.Event or trio.Event."""

    def set(self) -> None: ...
    async def wait(self) -> Any: ...


class _Spares:
    """Buffers of messages that were dealt with, for the next ones: in the cache still, and not to be zeroed again.

    For all threads: the one that deals with a message is not the one that receives the next.
    """

    def __init__(self) -> None:
        self._buffers: list[memoryview] = []

    def take(self, size: int) -> memoryview:
        if size >= _SPARE_LEAST:
            with contextlib.suppress(IndexError):
                while len(buffer := self._buffers.pop()) < size:
                    pass  # one that is too short would only be in the way
                return buffer[:size]
        return memoryview(bytearray(size))

    def give(self, buffer: memoryview) -> None:
        whole = memoryview(buffer.obj)
        if _SPARE_LEAST <= len(whole) <= _SPARE_MOST and len(self._buffers) < _SPARES:
            self._buffers.append(whole)
        buffer.release()


_spares = _Spares()


def recycle(piece: bytes | memoryview) -> None:
    """The message that `piece` was most of (`codec`) is of no use to anybody any more: `piece` is neither, from now on.

    To be called from any thread, or not at all.
    """
    if isinstance(piece, memoryview):
        _spares.give(piece)


class Inbox:
    """Collects payload and gives out messages. One task may read; what feeds it never waits.

    `new_event` makes what the reader waits for: in trio an event of asyncio's costs several turns of the loop.
    `inflating` has one for all inboxes of a connection: who inflates a message has it.
    """

    new_event: Callable[[], Event] = asyncio.Event

    def __init__(self, limit: int, window: ReceiveWindow, inflating: Budget) -> None:
        self.window = window
        self._inflating = inflating
        self.encoding = "identity"  # the peer's grpc-encoding
        self.ended = False
        self.received = 0  # bytes of payload
        self.owed = 0  # bytes that the frame under way has announced, and that have not come
        self.limit = limit
        self._prefix = bytearray()
        self._begun = False  # a message is under way, and its prefix is complete
        self._flag = 0
        self._missing = 0  # bytes of it still to come
        self._size = 0  # bytes of it that are in `_body`
        self._body = _NOTHING
        self._ready: collections.deque[tuple[int, memoryview]] = collections.deque()
        self._count = [0, 0]  # messages begun, messages taken
        self._backlog = bytearray()  # payload that is not looked at yet: short messages cost more than their bytes
        self._unbroken = 0  # messages read without a wait
        self._problem: Exception | None = None
        self._deaf = False  # what comes is dropped
        self._arrival: Event | None = None  # of what the reader waits for

    def arrived(self, length: int, size: int) -> None:
        """A frame of `length` bytes begins, `size` of them payload. Before `feed`, which may then raise nothing."""
        self.owed = size
        self.window.arrived(length, hungry=not self._ready)
        if length > size:
            self.window.taken(length - size, hungry=False)

    def feed(self, data: memoryview) -> None:
        """Take payload; it is copied once. What is wrong with it is for the reader to hear."""
        self.received += len(data)
        self.owed -= len(data)
        done = 0 if self._backlog else self._parse(data)
        if done < len(data):
            self._backlog += data[done:]

    def room(self, most: int) -> memoryview | None:
        """Where the next bytes of payload, `most` of them at most, can be read into their message at once; None where
        they had better be fed. `filled` says that they were; nothing may happen to the inbox in between.
        """
        room = self._body[self._size : self._size + min(self._missing, most)]  # nothing, where no message is under way
        return room if len(room) >= _WORTH_READING else None

    def filled(self, size: int) -> None:
        """So many bytes were read into the `room`."""
        self.received += size
        self.owed -= size
        self._size += size
        self._missing -= size
        if not self._missing:
            self._complete()

    def _parse(self, data: memoryview) -> int:
        """Cut messages out of `data` until enough are ready; how many bytes are done with."""
        pos, end = 0, len(data)
        while pos < end and len(self._ready) < _READY:
            if self._deaf:
                self.window.taken(end - pos, hungry=True)
                return end
            if not self._begun:
                part = data[pos : pos + PREFIX - len(self._prefix)]
                self._prefix += part
                pos += len(part)
                if len(self._prefix) == PREFIX:
                    self._begin()
            else:
                part = data[pos : pos + self._missing]
                self._add(part)
                pos += len(part)
                if not self._missing:
                    self._complete()
        return pos

    def _begin(self) -> None:
        self._flag, self._missing = _PREFIX.unpack(self._prefix)
        self._prefix.clear()
        if self._missing > self.limit:
            text = f"a message of {self._missing} bytes; the limit is {self.limit}"
            self._refuse(BadMessage(Status.RESOURCE_EXHAUSTED, text))
        elif self._flag > 1 or (self._flag == 1 and self.encoding not in _WBITS):
            text = f"a message with flag {self._flag} where grpc-encoding is {self.encoding}"
            self._refuse(BadMessage(Status.INTERNAL, text))
        else:
            self._begun = True
            self._count[0] += 1
            # Memory only for what may come already: a prefix alone must not cost a message.
            room = self.window.expect(self._count[0], PREFIX + self._missing)
            self._body = _spares.take(min(self._missing, room))
            self._size = 0
            if not self._missing:
                self._complete()

    def _add(self, part: memoryview) -> None:
        end = self._size + len(part)
        if end > len(self._body):  # more room has come since
            body = _spares.take(min(self._size + self._missing, max(end, 2 * len(self._body))))
            body[: self._size] = self._body[: self._size]
            self._body = body
        self._body[self._size : end] = part
        self._size = end
        self._missing -= len(part)

    def _complete(self) -> None:
        self._ready.append((self._flag, self._body))
        self._body = _NOTHING  # whoever has the message may be done with it long before the stream is over
        self._begun = False
        self._wake()

    def _refuse(self, problem: BadMessage) -> None:
        self._problem = problem
        self._deaf = True
        self.window.taken(PREFIX, hungry=True)
        self._wake()

    def fail(self, error: Exception) -> None:
        """Who waits for a message that is not there gets `error`."""
        self._problem = error
        self._wake()

    def eof(self) -> None:
        """The peer has ended its side."""
        self.ended = True
        self.window.end()
        self._wake()

    def close(self) -> None:
        """Nobody reads any more: drop what there is and what comes."""
        self._deaf = True
        self._ready.clear()
        self._backlog.clear()
        self._body = _NOTHING
        self.window.close()

    def _wake(self) -> None:
        if self._arrival is not None:
            self._arrival.set()

    async def read(self) -> memoryview | None:
        """The next message, None at the end; it is the reader's, one that came compressed until the reader waits for
        anything. Raises BadMessage for what is none.

        This is an asyncio-flavored function; a trio-flavored one, but for large compressed messages and long runs of
        messages, where `new_event` makes trio's events. Cancelled in a compressed message, it has taken that.
        """
        self._unbroken += 1
        if self._unbroken > _READY:
            self._unbroken = 0
            await let_others_run()
        if len(self._ready) <= _READY // 2 and self._backlog:
            with memoryview(self._backlog) as backlog:
                done = self._parse(backlog)
            del self._backlog[:done]
        await self.arrival()
        if not self._ready:
            if self._problem is not None:
                raise self._problem
            if self._begun or self._prefix:
                raise BadMessage(Status.INTERNAL, "the stream ended inside a message")
            return None
        flag, message = self._ready.popleft()
        size = PREFIX + len(message)
        self._count[1] += 1
        try:
            return message if flag == 0 else await self._inflate(message)
        finally:
            # Not before: what waits for its turn to be inflated is still in memory.
            self.window.done(self._count[1])
            self.window.taken(size, hungry=not self._ready)

    @property
    def has_news(self) -> bool:
        """Whether `read` need not wait for the peer."""
        return bool(self._ready) or self._problem is not None or self.ended

    async def arrival(self) -> None:
        """Wait until it `has_news`. Cancelled, nothing is lost. Flavored as `read`."""
        while not self.has_news:
            self._unbroken = 0
            self._arrival = self.new_event()
            try:
                await self._arrival.wait()
            finally:
                self._arrival = None

    async def _inflate(self, body: memoryview) -> memoryview:
        """The message in a compressed one: bounded, and in steps, between which the loop does what else there is.

        One after the other on a connection: else each of its streams would have a message of the limit in hands. When
        the next one's turn comes the reader has parsed this one, which goes: the traceback of an error would keep it.
        """
        event = self.new_event()
        turn = self._inflating.ask(1, event.set)
        try:
            await event.wait()
            message = await self._inflate_now(body)
            asyncio.get_running_loop().call_soon(message.release)
            return message
        finally:
            self._inflating.withdraw(turn)
            _spares.give(body)

    async def _inflate_now(self, body: memoryview) -> memoryview:
        decoder, out, spent = zlib.decompressobj(_WBITS[self.encoding]), bytearray(), 0
        try:
            for start in range(0, len(body), _STEP):
                before = len(out)
                out += decoder.decompress(body[start : start + _STEP], self.limit + 1 - before)
                if decoder.eof or len(out) > self.limit:
                    break
                spent += len(out) - before + _PER_COMPRESSED * _STEP
                if spent > MIB:
                    spent = 0
                    await let_others_run()
        except zlib.error as exc:
            problem = BadMessage(Status.INTERNAL, f"a message that is not {self.encoding}: {exc}")
        else:
            if len(out) > self.limit:
                text = f"a message over the limit of {self.limit} bytes after decompression"
                problem = BadMessage(Status.RESOURCE_EXHAUSTED, text)
            elif decoder.eof:
                return memoryview(out)
            else:
                problem = BadMessage(Status.INTERNAL, f"a truncated {self.encoding} message")
        del out, decoder  # the traceback of what is raised would hold them
        raise problem
