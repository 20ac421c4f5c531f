"""The payload on its way into the spool: received on the loop, checked, decompressed and written in threads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Callable, Sequence

import trio
from trio.from_thread import check_cancelled

from aipod.codec import StreamDecoder, decode_chunk, new_hasher
from aipod.config import MIB
from aipod.errors import Refused
from aipod.job.request import Request
from aipod.spool import SYNC_AFTER, Entry
from aipod.wire.ai import Raw

# What may wait between the network and the disk, per call. One message may exceed it (they are bounded by
# Config.max_message); after it the stream's window fills and the peer stops.
INBOX = 4 * MIB
DIGEST = 16  # bytes
# Threads for payloads and results, of all jobs: a slow disk must not take those that heartbeats and small steps need.
BULK = trio.CapacityLimiter(24)

Receive = Callable[[], Awaitable[Raw | None]]


class Inbox:
    """Messages between the task that receives and the one that writes; `put` waits while `INBOX` bytes are inside."""

    def __init__(self) -> None:
        self._messages: list[Raw] = []
        self._bytes = 0
        self._ended = False
        self._changed = trio.Event()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def put(self, message: Raw) -> None:
        while self._bytes > INBOX:
            await self._changed.wait()
        self._messages.append(message)
        self._bytes += _weight(message)
        self._notify()

    def end(self) -> None:
        self._ended = True
        self._notify()

    async def take(self) -> list[Raw]:
        """All that is there, at least one message; an empty list at the end."""
        while not self._messages and not self._ended:
            await self._changed.wait()
        taken, self._messages, self._bytes = self._messages, [], 0
        self._notify()
        return taken


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
        self._entry.checkpoint()

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
        self._entry.checkpoint()

    def _chunk(self, message: Raw) -> int:
        """Write what is new in a chunk; the offset of its end."""
        check_cancelled()
        have = self._entry.written
        if message.offset > have:
            raise Refused("OFFSET_MISMATCH", f"a chunk at {message.offset}, where {have} bytes have arrived")
        data = decode_chunk(message.data)
        end = message.offset + len(data)
        if self._size is not None and end > self._size:
            raise Refused("SIZE_MISMATCH", f"the payload is longer than the {self._size} bytes that were declared")
        check_limit(end, self._limit)
        if end > have:
            self._entry.write(memoryview(data)[have - message.offset :])
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
    stall: float,
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

    async def read() -> None:
        message: Raw | None = request.take_first()
        while message is not None:
            if len(message.digest) not in (0, DIGEST):
                raise Refused("BAD_MESSAGE", f"a digest of {len(message.digest)} bytes; it must have {DIGEST}, or none")
            arrived(0, len(message.data))
            await inbox.put(message)
            if not request.plain and message.last:
                break
            with trio.move_on_after(stall) as patience:
                message = await receive()
            if patience.cancelled_caught:
                raise Refused("UPLOAD_STALLED", f"no message for {stall:g} s (--upload-stall)")
        inbox.end()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        while True:
            with trio.move_on_after(SYNC_AFTER) as pause:
                messages = await inbox.take()
            if pause.cancelled_caught:  # the client has nothing to send: what there is becomes durable meanwhile
                await trio.to_thread.run_sync(entry.checkpoint, limiter=BULK)
                continue
            if not messages:
                break
            before = entry.written
            await trio.to_thread.run_sync(sink.feed, messages, limiter=BULK)
            arrived(entry.written - before, 0)
            if any(message.sync for message in messages):
                await trio.to_thread.run_sync(functools.partial(entry.checkpoint, now=True), limiter=BULK)
                synced()
            del messages
        await trio.to_thread.run_sync(sink.finish, limiter=BULK)
