"""gRPC's negative HTTP/2 cases: a server of raw frames does to aipod's client what a broken or a strict one may do.

https://github.com/grpc/grpc/blob/master/doc/negative-http2-interop-test-descriptions.md
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import h2.events
import pytest
from grpclib.client import Stream
from grpclib.exceptions import GRPCError, StreamTerminatedError
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame, RstStreamFrame

from aipod.config import Config
from aipod.transport.channel import Channel, open_call, read_status, reset, send_message
from aipod.transport.stream import StreamRefused
from aipod.wire.ai import Raw
from tests.conftest import run
from tests.interop import body
from tests.test_interop import new_call

ANSWER = bytes(Raw(data=body(50_000)))
ANSWER = b"\0" + len(ANSWER).to_bytes(4, "big") + ANSWER
HEADERS = [(":status", "200"), ("content-type", "application/grpc")]
Script = Callable[["Peer", int], None]


class Peer:
    """One connection of the server."""

    def __init__(self, script: Script, max_streams: int, writer: asyncio.StreamWriter) -> None:
        self.script = script
        self.writer = writer
        self.h2 = H2Connection(H2Configuration(client_side=False))
        self.h2.local_settings = Settings(
            client=False, initial_values={SettingCodes.MAX_CONCURRENT_STREAMS: max_streams}
        )
        self.h2.initiate_connection()
        self.requests: list[int] = []
        self.most = 0  # requests at once
        self.pings = 0
        self.acks = 0
        self.flush()

    def take(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                self.requests.append(event.stream_id)
                self.most = max(self.most, self.h2.open_inbound_streams)
            elif isinstance(event, h2.events.StreamEnded):
                self.script(self, event.stream_id)
            elif isinstance(event, h2.events.PingAckReceived):
                self.acks += 1
        self.flush()

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())

    def ping(self) -> None:
        self.pings += 1
        self.h2.ping(self.pings.to_bytes(8, "big"))

    def data(self, stream: int, data: bytes) -> None:
        for at in range(0, len(data), 16384):
            self.h2.send_data(stream, data[at : at + 16384])

    def finish(self, stream: int) -> None:
        self.h2.send_headers(stream, HEADERS)
        self.data(stream, ANSWER)
        self.h2.send_headers(stream, [("grpc-status", "0")], end_stream=True)

    def reset(self, stream: int, code: int) -> None:
        """By hand: any code."""
        self.flush()
        self.writer.write(RstStreamFrame(stream, error_code=code).serialize())

    def goaway(self, last: int) -> None:
        self.flush()
        self.writer.write(GoAwayFrame(0, last_stream_id=last).serialize())


@contextlib.asynccontextmanager
async def served(script: Script, *, max_streams: int = 100) -> AsyncIterator[tuple[Channel, list[Peer]]]:
    peers: list[Peer] = []
    tasks: set[asyncio.Task[Any] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        peers.append(Peer(script, max_streams, writer))
        peer = peers[-1]
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                peer.take(data)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        channel = Channel(f"{host}:{port}", Config())
        try:
            yield channel, peers
        finally:
            await channel.aclose()
            await asyncio.wait([task for task in tasks if task is not None], timeout=10)


async def call(channel: Channel) -> list[bytes]:
    """A call of one request: the answers. Raises what becomes of it."""
    answers = []
    async with new_call(channel) as stream:
        try:
            await open_call(stream)
            await send_message(stream, Raw(data=b"x"), end=True)
            async for message in messages_of(stream):
                answers.append(message.data)
            await read_status(stream)
        finally:
            reset(stream)
    return answers


async def messages_of(stream: Stream[Any, Any]) -> AsyncIterator[Raw]:
    while (message := await stream.recv_message()) is not None:
        yield message


CODES_OF_RESETS = [ErrorCodes.NO_ERROR, ErrorCodes.INTERNAL_ERROR, ErrorCodes.CANCEL, ErrorCodes.ENHANCE_YOUR_CALM, 99]


@pytest.mark.parametrize("code", CODES_OF_RESETS)
@pytest.mark.parametrize("where", ["after_header", "during_data", "after_data"])
def test_rst(where: str, code: int) -> None:
    """The call fails, at once; the connection goes on."""

    def script(peer: Peer, stream: int) -> None:
        if stream != 1:
            peer.finish(stream)
            return
        peer.h2.send_headers(stream, HEADERS)
        peer.data(stream, {"after_header": b"", "during_data": ANSWER[:30_000], "after_data": ANSWER}[where])
        peer.reset(stream, code)

    async def main() -> None:
        async with served(script) as (channel, peers):
            with pytest.raises((StreamTerminatedError, GRPCError)):
                await call(channel)
            assert await call(channel) == [body(50_000)]
            assert [peer.requests for peer in peers] == [[1, 3]]

    run(main, timeout=20)


@pytest.mark.parametrize("where", ["after_header", "during_data", "after_data"])
def test_rst_refused_stream_says_that_nothing_was_done(where: str) -> None:
    def script(peer: Peer, stream: int) -> None:
        if where != "after_header":
            peer.h2.send_headers(stream, HEADERS)
            peer.data(stream, ANSWER if where == "after_data" else ANSWER[:30_000])
        peer.reset(stream, ErrorCodes.REFUSED_STREAM)

    async def main() -> None:
        async with served(script) as (channel, _):
            with pytest.raises(StreamRefused if where == "after_header" else StreamTerminatedError):
                await call(channel)

    run(main, timeout=20)


def test_goaway_moves_the_next_call_to_a_new_connection() -> None:
    def script(peer: Peer, stream: int) -> None:
        peer.goaway(stream)
        peer.finish(stream)

    async def main() -> None:
        async with served(script) as (channel, peers):
            for _ in range(3):
                assert await call(channel) == [body(50_000)]
            assert [peer.requests for peer in peers] == [[1], [1], [1]]

    run(main, timeout=20)


def test_no_ping_is_unanswered_at_the_end_of_a_call() -> None:
    def script(peer: Peer, stream: int) -> None:
        peer.ping()
        peer.h2.send_headers(stream, HEADERS)
        peer.ping()
        for at in range(0, len(ANSWER), 10_000):
            peer.data(stream, ANSWER[at : at + 10_000])
            peer.ping()
        peer.h2.send_headers(stream, [("grpc-status", "0")], end_stream=True)

    async def main() -> None:
        async with served(script) as (channel, peers):
            assert await call(channel) == [body(50_000)]
            channel.close()
            while peers[0].acks < peers[0].pings:
                assert not peers[0].writer.transport.is_closing(), "closed with a PING unanswered"
                await asyncio.sleep(0.01)
            assert peers[0].pings == peers[0].acks == 8

    run(main, timeout=20)


def test_max_streams() -> None:
    """Once it has seen that the server takes one stream, the client has no more than one at a time."""

    def script(peer: Peer, stream: int) -> None:
        asyncio.get_running_loop().call_soon(answer, peer, stream)

    def answer(peer: Peer, stream: int) -> None:
        peer.finish(stream)
        peer.flush()

    async def main() -> None:
        async with served(script, max_streams=1) as (channel, peers):
            assert await call(channel) == [body(50_000)]
            assert await asyncio.gather(*(call(channel) for _ in range(15))) == [[body(50_000)]] * 15
            assert [(len(peer.requests), peer.most) for peer in peers] == [(16, 1)]

    run(main, timeout=20)
