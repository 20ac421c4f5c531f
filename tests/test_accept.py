"""How requests get in, and that whatever goes wrong there costs the request alone: a server in this process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import grpclib.const
import pytest
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError, StreamTerminatedError

from aipod.config import Config
from aipod.transport.channel import Channel, open_call, read_status
from aipod.transport.headers import apart, check_headers, response_is_readable, trailers_are_readable
from aipod.transport.limits import Bucket
from aipod.transport.requests import MAX_FOR_ANYBODY, REFUSED, Handler, TrioHandler
from aipod.transport.server import Server
from aipod.transport.stream import StreamRefused
from aipod.wire.ai import Raw
from tests.conftest import run
from tests.test_transport import HEADERS

WATCH = "/grpc.health.v1.Health/Watch"


class Service:
    """What grpclib takes for a service; asyncio-flavored but for what there is no spawner for."""

    def __mapping__(self) -> Mapping[str, Any]:
        kinds = (Cardinality.STREAM_STREAM, Raw, Raw)
        return {
            "/t/well": grpclib.const.Handler(self.well, *kinds),
            "/t/cancels": grpclib.const.Handler(self.cancels, *kinds),
            "/t/no-handler": object(),  # grpclib stumbles before it can answer, and says nothing
            WATCH: grpclib.const.Handler(self.well, *kinds),
            "/t/no-spawner": TrioHandler(self.well, *kinds),
        }

    async def well(self, stream: Any) -> None:
        while (message := await stream.recv_message()) is not None:
            await stream.send_message(message)

    async def cancels(self, stream: Any) -> None:
        await stream.recv_message()
        raise asyncio.CancelledError


def call(channel: Channel, path: str) -> Any:
    return channel.request(path, Cardinality.STREAM_STREAM, Raw, Raw)


@contextlib.asynccontextmanager
async def channel_to_server(**options: Any) -> AsyncIterator[tuple[Channel, Server]]:
    server = Server([Service()], Config(), **options)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        await server.listen([sock])
        channel = Channel(f"127.0.0.1:{sock.getsockname()[1]}", Config())
        try:
            yield channel, server
        finally:
            await channel.aclose()
            server.stop_listening()
            server.abort()


@pytest.mark.parametrize("path", ["/t/cancels", "/t/no-handler", "/t/no-spawner"])
def test_a_request_that_cannot_be_served_ends_and_its_connection_goes_on(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Mutants seen: the exception leaves `accept`; a handler of grpclib's that says nothing is released, no more."""

    async def whole_call(channel: Channel, path: str) -> None:
        async with call(channel, path) as stream:
            await stream.send_message(Raw())
            await stream.recv_message()

    async def main() -> None:
        async with channel_to_server() as (channel, _), call(channel, "/t/well") as other:
            await open_call(other)
            await other.send_message(Raw(data=b"before"))
            assert (await other.recv_message()).data == b"before"
            with pytest.raises(StreamTerminatedError, match="error_code: 2"):
                await whole_call(channel, path)
            await other.send_message(Raw(data=b"after"), end=True)
            assert (await other.recv_message()).data == b"after"
            assert await other.recv_message() is None
            await read_status(other)

    with caplog.at_level(logging.ERROR, logger="aipod"):
        run(main)
    said = [record.getMessage() for record in caplog.records if record.name == "aipod.transport"]
    assert (
        said
        == {
            "/t/cancels": [],
            "/t/no-handler": ["the handler of a request ended without a status"],
            "/t/no-spawner": ["a request that could not be taken"],
        }[path]
    )


def test_only_a_connection_without_a_call_makes_room_and_it_may_have_a_second() -> None:
    """Mutants seen: those with calls make room too; those that came just now do."""

    async def main() -> None:
        async with channel_to_server() as (channel, server):
            async with call(channel, "/t/well") as stream:
                await open_call(stream)
                await stream.send_message(Raw(data=b"begun"))
                assert (await stream.recv_message()).data == b"begun"
                [protocol] = server.protocols
                protocol.last_call = 0.0
                assert not server._make_room()
                await stream.end()
                await read_status(stream)
            while protocol.processor.streams:
                await asyncio.sleep(0)
            protocol.last_call = time.monotonic() + 600  # whatever the machine does meanwhile
            assert not server._make_room()
            protocol.last_call = 0.0
            while not server._make_room():  # what was written last has not been acknowledged yet
                await asyncio.sleep(0)
            assert server.protocols == set()
            await protocol.ended.wait()
            assert not channel.connected

    run(main)


def test_a_connection_without_a_call_of_somebodys_makes_room_first() -> None:
    """However long ago the other's call was; its own, which are of nobody, are as if there were none.

    Mutants seen: such a call is one; its connection is as good as any other.
    """

    async def main() -> None:
        async with channel_to_server(knows="Bearer somebody".__eq__) as (nobody, server):
            somebody = Channel(f"127.0.0.1:{nobody._port}", Config())
            async with contextlib.aclosing(somebody), call(nobody, "/t/well") as stream:
                await stream.send_message(Raw(data=b"begun"))
                assert (await stream.recv_message()).data == b"begun"
                [theirs] = server.protocols
                identity = [("authorization", "Bearer somebody")]
                kinds = Cardinality.STREAM_STREAM, Raw, Raw
                async with somebody.request("/t/well", *kinds, metadata=identity) as other:
                    await other.send_message(Raw(data=b"begun"), end=True)
                    assert (await other.recv_message()).data == b"begun"
                    await read_status(other)
                [mine] = server.protocols - {theirs}
                while mine.processor.streams:
                    await asyncio.sleep(0)
                mine.last_call, theirs.last_call = 0.0, 1.0
                assert server._make_room()
                assert server.protocols == {mine}
                with pytest.raises(StreamTerminatedError):
                    await stream.recv_message()

    run(main)


def test_methods_that_are_not_there_are_refused_and_slowed() -> None:
    """A request that is refused counts as `REFUSED` frames, and the next ones wait.

    Mutant seen: those for unknown methods count as none.
    """

    async def ask(channel: Channel, path: str) -> None:
        async with call(channel, path) as stream:
            await stream.send_message(Raw(data=b"well"), end=True)
            assert (await stream.recv_message()).data == b"well"
            await read_status(stream)

    async def main() -> None:
        async with channel_to_server() as (channel, server):
            await channel.__connect__()
            [protocol] = server.protocols
            protocol._frames = Bucket(0.01, REFUSED - 1)  # what is owed stays so for as long as the test lasts
            for _ in range(3):
                await ask(channel, "/t/well")
            assert protocol._resting is None
            with pytest.raises(GRPCError) as caught:
                await ask(channel, "/no.Such/method")
            assert caught.value.status is Status.UNIMPLEMENTED
            assert protocol._resting is not None
            assert not protocol.transport.is_reading()

    run(main)


def test_who_only_watches_health_makes_room_too() -> None:
    """Nobody needs a token for that. Beside a call it stays.

    Mutants seen: what is open for it is a call (as it was); so is its beginning, or its end, for how long none was.
    """

    async def main() -> None:
        async with channel_to_server() as (channel, server), contextlib.AsyncExitStack() as stack:
            watch, other = [await stack.enter_async_context(call(channel, path)) for path in (WATCH, "/t/well")]
            for stream in (watch, other):
                await stream.send_message(Raw(data=b"begun"))
                assert (await stream.recv_message()).data == b"begun"
            [protocol] = server.protocols
            protocol.last_call = 0.0
            assert not server._make_room()
            await other.end()
            await read_status(other)
            while len(protocol.processor.streams) > 1:
                await asyncio.sleep(0)
            protocol.last_call = 0.0
            async with call(channel, WATCH) as stream:
                await stream.send_message(Raw(data=b"asked"), end=True)
                assert (await stream.recv_message()).data == b"asked"
                await read_status(stream)
            while len(protocol.processor.streams) > 1:
                await asyncio.sleep(0)
            assert protocol.last_call == 0.0
            while not server._make_room():  # what was written last has not been acknowledged yet
                await asyncio.sleep(0)
            assert server.protocols == set()
            with pytest.raises(StreamTerminatedError):
                await watch.recv_message()

    run(main)


def test_what_a_peer_has_not_taken_protects_its_connection_for_a_while_after_a_call() -> None:
    """Not where there was no call, whatever was asked for: PINGs, or health.

    Mutants seen: anything that was not taken protects (as it did); what has no call has had one when it is accepted;
    an answer protects for ever, or not at all.
    """

    async def main() -> None:
        async with channel_to_server() as (channel, server):
            await channel.__connect__()
            [protocol] = server.protocols
            protocol.connection._socket.get_write_buffer_size = lambda: 1  # the peer does not read
            assert protocol.connection.waiting
            assert protocol.is_idle
            async with call(channel, WATCH) as stream:
                await stream.send_message(Raw(data=b"asked"), end=True)
                assert (await stream.recv_message()).data == b"asked"
                await read_status(stream)
            while protocol.processor.streams:
                await asyncio.sleep(0)
            assert protocol.is_idle
            async with call(channel, "/t/well") as stream:
                await stream.send_message(Raw(data=b"begun"))
                assert (await stream.recv_message()).data == b"begun"
                protocol.answered = 0.0
                assert not protocol.is_idle
                await stream.end()
                await read_status(stream)
            while protocol.processor.streams:
                await asyncio.sleep(0)
            assert not protocol.is_idle
            protocol.answered -= Config().send_stall
            assert protocol.is_idle

    run(main)


def test_streams_for_which_nobody_needs_a_token_are_few_at_once_on_each_connection() -> None:
    """One more is refused as not processed; a call is not, nor is one on another connection, nor after one has ended.

    Mutants seen: no bound (as it was); one for all connections; calls count too; so does what has ended for its peer;
    what has ended is kept.
    """

    async def begin(stream: Any) -> None:
        await stream.send_message(Raw(data=b"begun"))
        assert (await stream.recv_message()).data == b"begun"

    async def refused(channel: Channel) -> None:
        with pytest.raises(StreamRefused):
            async with call(channel, WATCH) as stream:
                await begin(stream)

    async def main() -> None:
        async with channel_to_server() as (channel, server), contextlib.AsyncExitStack() as stack:

            async def begun(channel: Channel, path: str = WATCH) -> Any:
                stream = await stack.enter_async_context(call(channel, path))
                await begin(stream)
                stack.push_async_callback(stream.cancel)
                return stream

            other = Channel(f"{channel._host}:{channel._port}", Config())
            stack.push_async_callback(other.aclose)
            for _ in range(MAX_FOR_ANYBODY):
                await begun(channel, "/t/well")
            for _ in range(MAX_FOR_ANYBODY - 1):
                await begun(channel)
            async with call(channel, WATCH) as last:
                await begin(last)
                await refused(channel)
                await begun(channel, "/t/well")
                await begun(other)
                await last.end()
                await read_status(last)
            handlers = [cast(Handler, protocol.handler) for protocol in server.protocols]
            while sum(len(protocol.processor.streams) for protocol in server.protocols) > 2 * MAX_FOR_ANYBODY + 1:
                await asyncio.sleep(0)
            assert sorted(len(handler._for_anybody) for handler in handlers) == [1, MAX_FOR_ANYBODY - 1]
            async with call(channel, WATCH) as last:
                await begin(last)
                await refused(channel)
                await last.cancel()  # its handler may not have ended when the next one comes
            await begun(channel)
            await refused(channel)

    run(main)


@pytest.mark.parametrize(
    ("value", "values"),
    [
        ("AAEC", ["AAEC"]),
        ("", [""]),
        ("AA,AAA", ["AA", "AAA"]),
        ("QQ==,Qg,", ["QQ==", "Qg", ""]),
    ],
)
def test_binary_values_that_come_joined_are_values_by_themselves(value: str, values: list[str]) -> None:
    """https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md: joined by commas, padded or not."""
    assert apart([("x-bin", value), ("x", "a,b")]) == [*(("x-bin", part) for part in values), ("x", "a,b")]
    assert check_headers(apart([*HEADERS, ("x-bin", value)])) is None
    assert response_is_readable(apart([(":status", "200"), ("x-bin", value)]))
    assert trailers_are_readable(apart([("x-bin", value)]))


@pytest.mark.parametrize("value", ["A", "AA,A", "A,AAA", "AA, AA", "A=A", "\xff", "***"])
def test_what_is_not_base64_in_one_of_its_parts_is_refused(value: str) -> None:
    problem = check_headers(apart([*HEADERS, ("x-bin", value)]))
    assert problem is not None
    assert problem.reset is None
    assert not response_is_readable(apart([(":status", "200"), ("x-bin", value)]))
    assert not trailers_are_readable(apart([("x-bin", value)]))


def test_values_that_come_joined_count_each() -> None:
    problem = check_headers(apart([*HEADERS, ("x-bin", "," * 100)]))
    assert problem is not None
    assert problem.message == "more than 100 headers"
