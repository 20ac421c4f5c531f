"""The client's end of a connection, against a real h2 peer that does what proxies do when they leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from grpclib.const import Cardinality
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import RequestReceived, StreamEnded
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

import aipod
from aipod.config import MIB, Config
from aipod.transport.call import Call
from aipod.transport.channel import Channel, open_call, read_status, reset, send_message
from aipod.transport.stream import StreamRefused
from aipod.wire.ai import Raw
from tests.conftest import Serve, run

Behave = Callable[[H2Connection, int], None]
HEADERS = [(":status", "200"), ("content-type", "application/grpc")]


@contextlib.asynccontextmanager
async def peer(behave: Behave) -> AsyncIterator[Channel]:
    """A channel to a server that answers the first complete request as `behave` says, and closes the connection.

    It takes one stream at a time.
    """

    served: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        h2 = H2Connection(H2Configuration(client_side=False))
        h2.local_settings = Settings(client=False, initial_values={SettingCodes.MAX_CONCURRENT_STREAMS: 1})
        h2.initiate_connection()
        writer.write(h2.data_to_send())
        while data := await reader.read(65536):
            for event in h2.receive_data(data):
                if isinstance(event, StreamEnded):
                    behave(h2, event.stream_id)
                    reader.feed_eof()
            writer.write(h2.data_to_send())
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        channel = Channel(f"{host}:{port}", Config())
        try:
            yield channel
        finally:
            await channel.aclose()
            await asyncio.gather(*filter(None, served), return_exceptions=True)


def new_call(channel: Channel) -> Call:
    return channel.request("/ai.AI/chaos", Cardinality.STREAM_STREAM, Raw, Raw)


async def connection_ends(channel: Channel) -> None:
    while not channel._protocol.handler.connection_lost:
        await asyncio.sleep(0)


def test_a_response_that_has_arrived_whole_is_read_though_the_connection_has_ended() -> None:
    message = bytes(Raw(data=b"answer", last=True))

    def answer(h2: H2Connection, stream: int) -> None:
        h2.send_headers(stream, HEADERS)
        h2.send_data(stream, b"\0" + len(message).to_bytes(4, "big") + message)
        h2.send_headers(stream, [("grpc-status", "0"), ("grpc-message", "fine")], end_stream=True)

    async def main() -> None:
        async with peer(answer) as channel:
            async with new_call(channel) as stream:
                await stream.send_message(Raw(), end=True)
                await stream.recv_initial_metadata()
                await connection_ends(channel)
                assert await stream.recv_message() == Raw(data=b"answer", last=True)
                assert await stream.recv_message() is None
                await read_status(stream)

    run(main)


def test_binary_values_that_come_joined_are_values_by_themselves() -> None:
    """Mutant seen: they are refused. Stock grpclib raises binascii.Error."""

    def answer(h2: H2Connection, stream: int) -> None:
        h2.send_headers(stream, [*HEADERS, ("x-bin", "AA,AAA")])
        h2.send_headers(stream, [("grpc-status", "0"), ("y-bin", "AA==,AAEC")], end_stream=True)

    async def main() -> None:
        async with peer(answer) as channel:
            async with new_call(channel) as stream:
                await stream.send_message(Raw(), end=True)
                assert await stream.recv_message() is None
                await read_status(stream)
                assert stream.initial_metadata is not None
                assert stream.initial_metadata.getall("x-bin") == [b"\0", b"\0\0"]
                assert stream.trailing_metadata is not None
                assert stream.trailing_metadata.getall("y-bin") == [b"\0", b"\0\1\2"]

    run(main)


@pytest.mark.parametrize("how", ["GOAWAY", "REFUSED_STREAM"])
def test_a_call_that_was_not_processed_says_so_though_the_connection_ends_behind_it(how: str) -> None:
    def refuse(h2: H2Connection, stream: int) -> None:
        if how == "REFUSED_STREAM":
            h2.reset_stream(stream, ErrorCodes.REFUSED_STREAM)
        else:
            frame = GoAwayFrame(0)
            frame.last_stream_id = stream - 1
            h2._data_to_send += frame.serialize()

    async def main() -> None:
        async with peer(refuse) as channel:
            async with new_call(channel) as stream:
                await stream.send_message(Raw(), end=True)
                await connection_ends(channel)
                with pytest.raises(StreamRefused):
                    await stream.recv_message()

    run(main)


def test_a_call_that_waits_for_a_stream_moves_to_a_new_connection_when_its_own_is_told_to_go() -> None:
    def leave(h2: H2Connection, stream: int) -> None:
        frame = GoAwayFrame(0)
        frame.last_stream_id = stream
        h2._data_to_send += frame.serialize()
        h2.send_headers(stream, HEADERS)

    async def main() -> None:
        async with peer(leave) as channel:
            async with new_call(channel) as first, new_call(channel) as waiting:
                await first.send_request()
                while channel._protocol.connection._connection.remote_settings.max_concurrent_streams != 1:
                    await asyncio.sleep(0)
                task = asyncio.create_task(open_call(waiting))
                await asyncio.sleep(0)
                await first.send_message(Raw(), end=True)
                await task
                assert waiting.peer.addr() == first.peer.addr()
                assert waiting._stream.connection is not first._stream.connection
                reset(first)
                reset(waiting)

    run(main)


def test_a_call_that_waits_for_a_stream_waits_no_longer_than_its_deadline() -> None:
    """Mutant seen: it waits until there is one."""

    async def main() -> None:
        async with peer(lambda h2, stream: None) as channel, new_call(channel) as call:
            await open_call(call)
            while channel._protocol.connection._connection.remote_settings.max_concurrent_streams != 1:
                await asyncio.sleep(0.01)
            late = channel.request("/ai.AI/chaos", Cardinality.STREAM_STREAM, Raw, Raw, timeout=0.2)
            with pytest.raises(TimeoutError):
                async with late:
                    await open_call(late)
            assert not channel._protocol.connection.places.awaited
            reset(call)

    run(main, timeout=20)


def test_a_server_that_takes_no_calls_is_not_waited_for() -> None:
    async def main() -> None:
        served: list[asyncio.Task[None] | None] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            served.append(asyncio.current_task())
            h2 = H2Connection(H2Configuration(client_side=False))
            h2.local_settings = Settings(client=False, initial_values={SettingCodes.MAX_CONCURRENT_STREAMS: 0})
            h2.initiate_connection()
            writer.write(h2.data_to_send())
            await reader.read()
            writer.close()
            await writer.wait_closed()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            async with aipod.Client(f"{host}:{port}", config=Config(attempts=2)) as client:
                with pytest.raises(aipod.Unreachable):
                    await client.predict(b"x")
            await asyncio.gather(*filter(None, served))

    run(main)


def test_senders_wait_for_a_peer_that_does_not_read() -> None:
    """Python 3.12 up to .8 and 3.13 up to .1 do not pause who writes by writelines() (CVE-2024-12254)."""

    async def main() -> None:
        goes_on, ended = asyncio.Event(), asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            h2 = H2Connection(H2Configuration(client_side=False))
            h2.local_settings = Settings(
                client=False,
                initial_values={SettingCodes.INITIAL_WINDOW_SIZE: 2**24, SettingCodes.MAX_FRAME_SIZE: 2**20},
            )
            h2.initiate_connection()
            h2.increment_flow_control_window(2**30)
            writer.write(h2.data_to_send())
            await goes_on.wait()
            while await reader.read(2**20):
                pass
            writer.close()
            await writer.wait_closed()
            ended.set()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            channel = Channel(f"{host}:{port}", Config())
            async with contextlib.AsyncExitStack() as stack:
                calls = [await stack.enter_async_context(new_call(channel)) for _ in range(50)]
                for call in calls:
                    await open_call(call)
                async with asyncio.TaskGroup() as group:
                    for call in calls:
                        group.create_task(send_message(call, Raw(data=bytes(MIB))))
                    for _ in range(100):
                        await asyncio.sleep(0)
                    connection = channel._protocol.connection
                    assert connection.paused_since is not None
                    # One frame, which is as long as a message here, above what makes writers wait.
                    assert connection._transport.get_write_buffer_size() < 2 * MIB
                    goes_on.set()
                for call in calls:
                    reset(call)
            await channel.aclose()
            await ended.wait()

    run(main)


@pytest.mark.parametrize("doing", ["reads", "reads a message", "waits for the status", "sends", "sends alone"])
def test_a_call_that_is_ended_here_wakes_whoever_waits_for_it_and_cancels_nobody(doing: str) -> None:
    """Mutants seen: nobody is woken, or no sender; a sender without a window sends on."""

    def begin(h2: H2Connection, stream: int) -> None:
        if doing != "reads":
            h2.send_headers(stream, HEADERS)
        if doing == "sends alone":  # it is the stream's window that is used up
            h2.increment_flow_control_window(2**24)

    async def use(channel: Channel) -> None:
        async with new_call(channel) as call:
            await open_call(call)
            if doing != "reads":
                await call.recv_initial_metadata()
            if doing == "waits for the status":
                await call.end()
            steps = {
                "reads": call.recv_initial_metadata,
                "reads a message": call.recv_message,
                "waits for the status": call.recv_trailing_metadata,
                "sends": lambda: send_message(call, Raw(data=bytes(MIB))),
                "sends alone": lambda: send_message(call, Raw(data=bytes(MIB))),
            }

            async def one() -> int:
                with pytest.raises(ZeroDivisionError):
                    await steps[doing]()
                task = asyncio.current_task()
                assert task is not None
                return task.cancelling()

            waiting = asyncio.create_task(one())
            await asyncio.sleep(0.05)
            assert not waiting.done()
            call.fail(ZeroDivisionError())
            async with asyncio.timeout(20):
                assert await waiting == 0
            reset(call)
            await call.recv_message()  # nor does anything else go on

    async def main() -> None:
        async with silent(begin) as channel:
            with pytest.raises(ZeroDivisionError):
                await use(channel)

    run(main)


def test_who_is_cancelled_when_the_call_has_ended_is_cancelled() -> None:
    """Not told of that end instead: asyncio.timeout would take it for the error. Mutant seen."""

    async def main() -> None:
        async with silent(lambda h2, stream: h2.send_headers(stream, HEADERS)) as channel, new_call(channel) as call:
            await open_call(call)
            waiting = asyncio.create_task(call.recv_message())
            await asyncio.sleep(0.05)
            call.fail(ZeroDivisionError())
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            reset(call)

    run(main)


def test_a_call_that_is_given_up_when_the_server_has_ended_it_is_over() -> None:
    """Its status was not read, and this side not ended. Mutant seen: only what can be reset is given up."""

    def end(h2: H2Connection, stream: int) -> None:
        h2.send_headers(stream, HEADERS)
        h2.send_headers(stream, [("grpc-status", "0")], end_stream=True)
        h2.reset_stream(stream, ErrorCodes.NO_ERROR)

    async def main() -> None:
        async with silent(end) as channel, new_call(channel) as call:
            await open_call(call)
            assert await call.recv_message() is None
            while call._stream.closable:
                await asyncio.sleep(0)
            reset(call)

    run(main)


@contextlib.asynccontextmanager
async def silent(behave: Behave) -> AsyncIterator[Channel]:
    """A channel to a server that begins each call as `behave` says, gives no window, and says no more."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        h2 = H2Connection(H2Configuration(client_side=False))
        h2.initiate_connection()
        writer.write(h2.data_to_send())
        while data := await reader.read(65536):
            for event in h2.receive_data(data):
                if isinstance(event, RequestReceived):
                    behave(h2, event.stream_id)
            writer.write(h2.data_to_send())
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        channel = Channel(f"{host}:{port}", Config())
        try:
            yield channel
        finally:
            await channel.aclose()


def test_a_server_that_has_stopped_is_found_by_ping(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Silence alone would be borne for ten minutes. The call goes on when the server does.

    Mutant seen: a PING is sent, but nobody waits for its answer.
    """
    served = serve("tests.models_lifecycle:Work")
    mark, until = tmp_path / "mark", tmp_path / "until"
    config = Config(ping_interval=0.2, ping_timeout=2, silence=600)

    async def main() -> None:
        async with aipod.Client(served.address, config=config) as client:
            call = asyncio.create_task(client.predict(mark=str(mark), until=str(until)))
            while not mark.exists():
                await asyncio.sleep(0.02)
            protocol = client._link.channel()._latest
            assert protocol is not None
            served.process.send_signal(signal.SIGSTOP)
            try:
                await protocol.ended.wait()
            finally:
                served.process.send_signal(signal.SIGCONT)
            until.touch()
            assert await call == "done"

    with caplog.at_level(logging.INFO, logger="aipod.transport"):
        run(main)
    assert "connection aborted: no answer to PING" in caplog.messages


UNCLOSED = """
import asyncio, gc, sys
import aipod
loop = asyncio.new_event_loop()

async def call(client):
    return await client.chaos()

async def alone():
    async with asyncio.timeout(20):
        while len(loop._selector.get_map()) > 1:  # what wakes it
            await asyncio.sleep(0.02)

client = aipod.Client(sys.argv[1])
loop.run_until_complete(call(client))
if sys.argv[2] == "thread":
    clients = [client]
    del client

    def forget():
        clients.clear()
        gc.collect()

    async def elsewhere():
        await asyncio.to_thread(forget)
        await alone()

    loop.run_until_complete(elsewhere())
else:
    del client
    gc.collect()
    loop.run_until_complete(alone())
loop.run_until_complete(loop.shutdown_default_executor())
loop.close()
"""


@pytest.mark.parametrize("where", ["still", "thread"])
def test_one_that_nobody_has_closed_is_closed_by_its_loop(serve: Serve, where: str) -> None:
    """It may be forgotten where its loop stands still, as in a REPL, or in another thread.

    Mutant seen: grpclib's `__del__` alone, which raises there, and the connection stays.
    """
    served = serve("tests.models_lifecycle:Work")
    command = [sys.executable, "-W", "default::ResourceWarning", "-c", UNCLOSED, served.address, where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Unclosed connection") == 1
    assert "Exception ignored" not in done.stderr


def test_of_a_client_that_cannot_be_made_nothing_is_told_but_why() -> None:
    """Mutant seen: what closes a channel that nobody has closed finds that it never was one, and prints a traceback."""
    code = """
import aipod, asyncio
async def main():
    async with aipod.Client("localhost:1", config=aipod.Config(tls=True, tls_ca="/nonexistent")) as client:
        await client.chaos(b"")
try:
    asyncio.run(main())
except Exception as exc:
    print(type(exc).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("TLSError\n", "")
