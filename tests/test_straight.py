"""Payload that is read from the socket into its message, and not copied there."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import grpclib.protocol as base
import h2.connection
import pytest
from hyperframe.frame import DataFrame, PingFrame

from aipod.config import KIB, MIB, Config
from aipod.transport.protocol import H2Protocol
from aipod.transport.scratch import scratch
from aipod.transport.stream import H2Stream
from aipod.transport.wakes import Wakes
from tests.conftest import run
from tests.test_transport import HEADERS, prefixed
from tests.test_windows import Wire


class Takes(base.AbstractHandler):
    """Leaves the calls to the test."""

    def __init__(self) -> None:
        self.streams: list[H2Stream] = []

    def accept(self, stream: Any, headers: Any, release_stream: Callable[[], Any]) -> None:
        self.streams.append(stream)

    def cancel(self, stream: base.Stream) -> None: ...

    def close(self) -> None: ...


class Fed:
    """A server's connection with two calls, fed by hand."""

    def __init__(self) -> None:
        handler = Takes()
        config = Config(stream_window=4 * MIB, max_frame=2 * MIB)
        self.protocol, self.wire = H2Protocol(handler, config, Wakes(), client=False), Wire()
        self.protocol.connection_made(self.wire)
        self.straight = 0  # bytes that went into their messages at once
        client = h2.connection.H2Connection()
        client.initiate_connection()
        client.send_headers(1, HEADERS)
        client.send_headers(3, HEADERS)
        self.give(client.data_to_send())
        self.streams = handler.streams

    def give(self, data: bytes, most: Callable[[], int] = lambda: 1 << 30) -> None:
        rest = memoryview(data)
        while rest:
            buffer = self.protocol.get_buffer(-1)
            size = min(len(buffer), len(rest), most())
            self.straight += size if buffer.obj is not scratch.view.obj else 0
            buffer[:size] = rest[:size]
            rest = rest[size:]
            self.protocol.buffer_updated(size)

    def end(self) -> None:
        self.wire.abort()
        self.protocol.connection_lost(None)


def fed(test: Callable[[Fed], Awaitable[None]]) -> None:
    async def main() -> None:
        feed = Fed()
        try:
            await test(feed)
        finally:
            feed.end()

    run(main)


def data(stream_id: int, payload: bytes, *, end: bool = False, padding: int = 0) -> bytes:
    frame = DataFrame(stream_id, payload, pad_length=padding)
    frame.flags |= {"END_STREAM"} if end else set()
    frame.flags |= {"PADDED"} if padding else set()
    return frame.serialize()


def test_a_chunk_in_a_frame_of_its_own_is_read_into_its_message() -> None:
    """Mutants seen: none is; a read behind it takes half of the next one; its end is not noticed."""

    async def test(feed: Fed) -> None:
        for number in range(8):
            chunk = random.Random(number).randbytes(MIB)
            feed.give(data(1, prefixed(chunk), end=number == 7))
            assert await feed.streams[0].inbox.read() == chunk
        assert await feed.streams[0].inbox.read() is None
        assert feed.straight > 0.9 * 8 * MIB
        assert feed.streams[0].inbox.received == 8 * (MIB + 5)
        assert feed.streams[0].inbox.owed == 0

    fed(test)


def test_short_frames_are_read_many_at_once() -> None:
    """As stock clients send them. Mutant seen: each is read by itself."""

    async def test(feed: Fed) -> None:
        reads = 0

        def most() -> int:
            nonlocal reads
            reads += 1
            return 1 << 30

        chunk = prefixed(bytes(3 * MIB))
        feed.give(b"".join(data(1, chunk[at : at + 16 * KIB]) for at in range(0, len(chunk), 16 * KIB)), most)
        assert feed.straight == 0
        assert reads < 20

    fed(test)


@pytest.mark.parametrize("seed", range(20))
def test_messages_are_the_same_however_they_are_read(seed: int) -> None:
    """Of two streams by turns, in frames of any length, some padded, with others between them; in reads of any length.

    Mutants seen: padding is taken for payload; what is left of the read before is written over; a message in several
    frames is read on behind its frame; what a stream is sent goes into the other's.
    """
    rng = random.Random(seed)
    sent: dict[int, list[bytes]] = {1: [], 3: []}
    waiting = {1: b"", 3: b""}
    for stream_id in sent:
        for _ in range(6):
            message = rng.randbytes(rng.choice([0, 5, 300, 70 * KIB, 300 * KIB, 600 * KIB]))
            sent[stream_id].append(message)
            waiting[stream_id] += prefixed(message)
    stream = b""
    while any(waiting.values()):
        stream_id = rng.choice([each for each in waiting if waiting[each]])
        size = rng.choice([1, 7, 10 * KIB, 100 * KIB, 400 * KIB, MIB])
        part, waiting[stream_id] = waiting[stream_id][:size], waiting[stream_id][size:]
        stream += data(stream_id, part, end=not waiting[stream_id], padding=rng.choice([0, 0, 1, 255]))
        stream += PingFrame(0, b"12345678").serialize() if rng.random() < 0.2 else b""

    async def test(feed: Fed) -> None:
        feed.give(stream, lambda: rng.choice([1, 9, 40, 5000, 90_000, 300_000, MIB]))
        for call in feed.streams:
            assert call.id is not None
            got = []
            while (message := await call.inbox.read()) is not None:
                got.append(bytes(message))
            assert got == sent[call.id]
            assert call.inbox.owed == 0
        assert feed.straight > 0

    fed(test)


def test_what_comes_for_a_call_that_is_over_goes_nowhere() -> None:
    """In the middle of its message, and of another call's. Mutants seen: it goes on filling the one, or the other."""

    async def test(feed: Fed) -> None:
        chunk, other = prefixed(bytes(MIB)), prefixed(random.Random(1).randbytes(MIB))
        feed.give(data(1, chunk[: 300 * KIB]) + data(3, other[: 300 * KIB]))
        first, second = feed.streams
        before = feed.straight
        assert before > 0
        feed.protocol.processor.register(first)()  # releases it
        feed.give(data(1, chunk[300 * KIB :]))
        assert feed.straight == before
        feed.give(data(3, other[300 * KIB :], end=True))
        assert await second.inbox.read() == other[5:]
        assert feed.straight > before

    fed(test)
