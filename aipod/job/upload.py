"""The payload on its way into the spool: received on the loop, checked, decompressed and written in threads."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import trio
from trio.from_thread import check_cancelled

from aipod.codec import StreamDecoder, chunk_pieces, new_hasher
from aipod.config import MIB
from aipod.errors import Refused
from aipod.job.request import Request
from aipod.spool import SYNC_AFTER, SYNC_BYTES, Entry
from aipod.transport.inbox import recycle
from aipod.wire.ai import Raw

# What may wait between the network and the disk, per call. One message may exceed it (they are bounded by
# Config.max_message); after it the stream's window fills and the peer stops.
INBOX = 4 * MIB
# Bytes of payload that a thread writes before the loop hears of it: a hop for each message costs as much as writing it.
# Not more, for the loop then looks whether there is something to sync.
STRETCH = SYNC_BYTES // 4
# Seconds that this thread waits for more, and messages that are worth waking it for: to come back later costs as much
# as writing a chunk, and each wake a fight for the interpreter's lock. And seconds after which it comes back anyhow.
LINGER, WORTH_WAKING, LONGEST = 0.005, 2, 0.1
DIGEST = 16  # bytes
# Threads for payloads and results, of all jobs: a slow disk must not take those that heartbeats and small steps need.
BULK = trio.CapacityLimiter(24)

Receive = Callable[[], Awaitable[Raw | None]]


class Inbox:
    """Messages between the task that receives and the thread that writes.

    `put` waits while `INBOX` bytes are inside; the thread takes what has come since without asking the loop.
    """

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()  # of what follows
        self._news = threading.Condition(self._lock)
        self._lingers = False  # a thread waits for that
        self._messages: list[Raw] = []
        self._bytes = 0
        self._waiting = False  # in `put`
        self._ended = False
        self._arrival = trio.Event()
        self._room = trio.Event()

    async def put(self, message: Raw) -> None:
        weight = _weight(message)
        while True:
            with self._lock:
                self._waiting = self._bytes > INBOX
                if not self._waiting:
                    self._messages.append(message)
                    self._bytes += weight
                    if self._lingers and (len(self._messages) >= WORTH_WAKING or self._bytes > INBOX):
                        self._news.notify()
                    break
                self._room = trio.Event()
            await self._room.wait()
        self._arrival.set()

    def end(self) -> None:
        with self._lock:
            self._ended = True
            self._news.notify()
        self._arrival.set()

    def take(self, patience: float = 0.0) -> list[Raw]:
        """All that is there, or comes within so many seconds; to be called from any thread."""
        with self._lock:
            if patience and not self._messages and not self._ended:
                self._lingers = True
                self._news.wait(patience)
                self._lingers = False
            taken, self._messages, self._bytes = self._messages, [], 0
            wakes, self._waiting = self._waiting, False
        if wakes:
            self._token.run_sync_soon(self._room.set)
        return taken

    async def wait(self) -> bool:
        """Until there is something to take; False at the end."""
        while not self._messages:
            if self._ended:
                return False
            self._arrival = trio.Event()
            await self._arrival.wait()
        return True


def _weight(message: Raw) -> int:
    """At least the encoded size, and what a small message costs besides."""
    if message.open is None and message.state is None and not message._unknown_fields:
        return len(message.data) + len(message.digest) + 64
    return len(bytes(message)) + 64  # 60 us: not for every chunk


class PlainSink:
    """A plain client's payload: any zstd stream, complete at the half-close."""

    def __init__(self, entry: Entry, size: int | None, limit: int) -> None:
        self._entry = entry
        self._size = size
        self._limit = limit
        self._decoder = StreamDecoder(self._write, check_cancelled)

    def _write(self, data: bytes) -> None:
        check_cancelled()  # one message may become gigabytes
        after = self._entry.written + len(data)
        if self._size is not None and after > self._size:
            raise Refused("SIZE_MISMATCH", f"the payload is longer than the {self._size} bytes that were declared")
        check_limit(after, self._limit)
        self._entry.write(data)

    def feed(self, messages: Sequence[Raw]) -> None:
        for message in messages:
            self._decoder.feed(message.data)
            if message.open is not None:
                raise Refused("BAD_MESSAGE", "open is for the first message of a call")

    def finish(self) -> None:
        self._decoder.finish()
        if self._size is not None and self._entry.written != self._size:
            raise Refused(
                "SIZE_MISMATCH", f"the payload has {self._entry.written} bytes, but {self._size} were declared"
            )
        self._entry.seal()


class ChunkSink:
    """An own client's payload: chunks at their offsets, complete with `last` (nothing behind it is read).

    What the entry has already is skipped: a client that comes back may begin anywhere below. Where it turns out at the
    end that what has arrived is not the payload, all of it is forgotten, for nobody could complete it.
    """

    def __init__(self, entry: Entry, size: int | None, limit: int) -> None:
        self._entry = entry
        self._size = size
        self._limit = limit
        self._digest = b""
        self._total = 0
        self.complete = False

    def feed(self, messages: Sequence[Raw]) -> None:
        for message in messages:
            end = self._chunk(message) if message.data else message.offset
            if message.last:
                self.complete, self._digest, self._total = True, message.digest, end

    def _chunk(self, message: Raw) -> int:
        """Write what is new in a chunk; the offset of its end."""
        check_cancelled()
        have = self._entry.written
        if message.offset > have:
            raise Refused("OFFSET_MISMATCH", f"a chunk at {message.offset}, where {have} bytes have arrived")
        pieces = chunk_pieces(message.data)
        end = message.offset + sum(map(len, pieces))
        if self._size is not None and end > self._size:
            raise Refused("SIZE_MISMATCH", f"the payload is longer than the {self._size} bytes that were declared")
        check_limit(end, self._limit)
        if end > have:
            self._entry.write(*_behind(pieces, have - message.offset))
        return end

    def finish(self) -> None:
        written = self._entry.written
        if not self.complete:
            raise Refused("TRUNCATED", "the request ended before a message with last")
        if self._size not in (None, written):
            raise Refused("SIZE_MISMATCH", f"the payload has {written} bytes, but {self._size} were declared")
        if self._total != written:
            self._entry.start_over()
            raise Refused("SIZE_MISMATCH", f"the payload has {written} bytes, but last came at {self._total}")
        if self._digest and self._digest != (self._entry.digest or self._read_digest()):
            self._entry.start_over()
            raise Refused("DIGEST_MISMATCH", "what arrived is not the payload; the same call begins anew")
        self._entry.seal()

    def _read_digest(self) -> bytes:
        """The upload was taken up again: nobody has seen all of it pass by."""
        hasher = new_hasher()
        left = self._entry.written
        with contextlib.closing(self._entry.read_payload()) as pieces:
            for piece in pieces:
                check_cancelled()
                hasher.update(piece[:left])  # behind it is noise
                left -= min(left, len(piece))
        return hasher.digest()


def _behind(pieces: list[bytes | memoryview], start: int) -> Iterator[bytes | memoryview]:
    """What is in `pieces` from byte `start` on."""
    for piece in pieces:
        if start < len(piece):
            yield memoryview(piece)[start:] if start else piece
        start = max(0, start - len(piece))


def check_limit(size: int, limit: int) -> None:
    """Raises `Refused(PAYLOAD_TOO_LARGE)`; a `limit` of 0 is none."""
    if limit and size > limit:
        raise Refused("PAYLOAD_TOO_LARGE", f"the payload is over this server's limit of {limit} bytes (--max-payload)")


async def receive_payload(
    request: Request,
    entry: Entry,
    receive: Receive,
    *,
    limit: int,
    synced: Callable[[], None],
    arrived: Callable[[int, int], None],
) -> None:
    """Take the whole payload in. Returns when it is complete and checked.

    `synced` hears of a checkpoint that was asked for, `arrived` of bytes that have come: new ones of the payload, and
    what they and others were on the wire.

    This is a trio-flavored async function. Cancelled or raising `Refused`, the entry holds a part of the payload, and
    no thread writes to it any more.
    """
    sink = (PlainSink if request.plain else ChunkSink)(entry, request.size, limit)
    inbox = Inbox()
    durable = _Durable(entry, synced)

    async def read() -> None:
        message: Raw | None = request.take_first()
        while message is not None:
            if len(message.digest) not in (0, DIGEST):
                raise Refused("BAD_MESSAGE", f"a digest of {len(message.digest)} bytes; it must have {DIGEST}, or none")
            arrived(0, len(message.data))
            await inbox.put(message)
            if not request.plain and message.last:
                break
            message = await receive()
        inbox.end()

    def write() -> None:
        """In a thread: what is there and what comes meanwhile, for a stretch."""
        until, began, patience = entry.written + STRETCH, time.monotonic(), 0.0
        while entry.written < until and (messages := inbox.take(patience)):
            sink.feed(messages)
            for message in messages:
                recycle(message.data)
            durable.asked |= any(message.sync for message in messages)
            if durable.asked:
                break  # not before something was taken: while the one before is synced, the loop would only ask again
            patience = LINGER if time.monotonic() < began + LONGEST else 0.0

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        more = True
        while more:
            with trio.move_on_after(SYNC_AFTER) as pause:
                more = await inbox.wait()
            if more and not pause.cancelled_caught:
                before = entry.written
                await trio.to_thread.run_sync(write, limiter=BULK)
                arrived(entry.written - before, 0)
            # Also where the client has nothing to send: what there is becomes durable meanwhile.
            await durable.see_to_it(nursery)
        await durable.ended.wait()
        await trio.to_thread.run_sync(sink.finish, limiter=BULK)


class _Durable:
    """Has what was written synced beside the writing, which does not get further ahead than `SYNC_BYTES`."""

    def __init__(self, entry: Entry, synced: Callable[[], None]) -> None:
        self._entry = entry
        self._synced = synced
        self.asked = False  # by the client
        self._since = trio.current_time()
        self.ended = trio.Event()  # none is under way
        self.ended.set()

    @property
    def _is_due(self) -> bool:
        """As `Entry.checkpoint` has it."""
        late = trio.current_time() - self._since >= SYNC_AFTER
        return self.asked or late or self._entry.written - self._entry.durable >= SYNC_BYTES // 2

    async def see_to_it(self, nursery: trio.Nursery) -> None:
        """Begin to sync where it is time to; wait where too much is at stake. This is a trio-flavored function."""
        if self.ended.is_set() and self._is_due:
            self.ended = trio.Event()
            nursery.start_soon(self._sync)
        if self._entry.written - self._entry.durable > SYNC_BYTES - STRETCH:
            await self.ended.wait()

    async def _sync(self) -> None:
        while self._is_due:
            asked, self.asked = self.asked, False
            await trio.to_thread.run_sync(functools.partial(self._entry.checkpoint, now=asked), limiter=BULK)
            self._since = trio.current_time()
            if asked:
                self._synced()
        self.ended.set()
