"""aipod's transport: its server under trio with a service that only counts, its channel under asyncio.

The server's imports are in its functions: importing the bridge to trio replaces asyncio's loop, also for the client.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import grpclib.client
from grpclib.const import Cardinality, Status

from aipod.config import Config
from aipod.transport.channel import Channel, open_call, read_status, send_message
from aipod.wire.ai import Raw
from bench.peers import common

if TYPE_CHECKING:
    from aipod.service.viewer import Call


# The server, trio-flavored. One message in, one message out:


async def server_receive(call: Call) -> Raw | None:
    return await call.receive()


async def server_send(call: Call, data: bytes) -> None:
    await call.send(Raw(data=data))


class Service:
    def __mapping__(self) -> dict[str, Any]:
        from aipod.transport.requests import TrioHandler

        return {
            common.UP: TrioHandler(self._up, Cardinality.STREAM_STREAM, Raw, Raw),
            common.DOWN: TrioHandler(self._down, Cardinality.STREAM_STREAM, Raw, Raw),
            common.ECHO: TrioHandler(self._echo, Cardinality.STREAM_STREAM, Raw, Raw),
        }

    async def _up(self, stream: Any) -> None:
        from aipod.service.status import Ending
        from aipod.service.viewer import Call

        call = Call(stream)
        await call.start()
        receipt = common.Receipt()
        while (message := await server_receive(call)) is not None:
            receipt.add(message.data)
        await server_send(call, receipt.seal())
        await call.finish(Ending(), {})

    async def _down(self, stream: Any) -> None:
        from aipod.service.status import Ending
        from aipod.service.viewer import Call

        call = Call(stream)
        await call.start()
        order = common.read_order(_data(await server_receive(call)))
        for data, _ in common.messages(*order):
            await server_send(call, data)
        ending = Ending()
        try:
            common.check(_data(await server_receive(call)), *order)
        except common.WrongData as exc:
            ending = Ending(Status.DATA_LOSS, str(exc))
        await call.finish(ending, {})

    async def _echo(self, stream: Any) -> None:
        from aipod.service.status import Ending
        from aipod.service.viewer import Call

        call = Call(stream)
        await call.start()
        await server_send(call, _data(await server_receive(call)))
        await call.finish(Ending(), {})


def _data(message: Raw | None) -> bytes:
    if message is None:
        raise common.WrongData("the call has ended early")
    return message.data


async def _serve(config: Config) -> None:
    import trio

    from aipod.transport import bridge
    from aipod.transport.server import Server

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(128)
        async with bridge.open_loop(), trio.open_nursery() as calls:

            async def start() -> Server:
                server = Server([Service()], config, bridge.Spawner(calls))
                await server.listen([sock])
                return server

            server = await bridge.to_trio(start)()
            common.announce(sock.getsockname()[1])
            try:
                await trio.sleep_forever()
            finally:
                server.abort()


def serve(frame: int = 0) -> None:
    import trio

    trio.run(_serve, settings(frame))


def settings(frame: int) -> Config:
    """HTTP/2 frames of `frame` bytes instead of the transport's own length, where it is not 0."""
    return Config(max_frame=frame) if frame else Config()


# The client, asyncio-flavored. One message out, one message in:

Stream = grpclib.client.Stream[Any, Any]


async def client_send(stream: Stream, data: bytes, *, last: bool = False) -> None:
    await send_message(stream, Raw(data=data), end=last)


async def client_receive(stream: Stream) -> bytes:
    return _data(await stream.recv_message())


class Client:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def _request(self, path: str) -> Stream:
        return self._channel.request(path, Cardinality.STREAM_STREAM, Raw, Raw)

    async def up(self, size: int, message: int) -> None:
        async with self._request(common.UP) as stream:
            await open_call(stream)
            for data, last in common.messages(size, message):
                await client_send(stream, data, last=last)
            receipt = await client_receive(stream)
            await read_status(stream)
        common.check(receipt, size, message)

    async def down(self, size: int, message: int) -> None:
        async with self._request(common.DOWN) as stream:
            await open_call(stream)
            await client_send(stream, common.make_order(size, message))
            receipt = common.Receipt()
            while receipt.total < size:
                receipt.add(await client_receive(stream))
            await client_send(stream, receipt.seal(), last=True)
            await read_status(stream)

    async def echo(self, payload: bytes) -> bytes:
        async with self._request(common.ECHO) as stream:
            await open_call(stream)
            await client_send(stream, payload, last=True)
            answer = await client_receive(stream)
            await read_status(stream)
        return answer


async def _run(name: str, port: int, config: Config, *numbers: int) -> common.Report:
    channel = Channel(f"127.0.0.1:{port}", config)
    try:
        client = Client(channel)
        if name == "small":
            return await common.time_calls(client.up, *numbers)
        if name == "calls":
            return await common.time_jobs(client.echo, *numbers)
        return await common.time_transfer(client.up if name == "send" else client.down, *numbers)
    finally:
        await channel.aclose()


def send(port: int, size: int, message: int, frame: int = 0) -> common.Report:
    return asyncio.run(_run("send", port, settings(frame), size, message))


def receive(port: int, size: int, message: int, frame: int = 0) -> common.Report:
    return asyncio.run(_run("receive", port, settings(frame), size, message))


def small(port: int, calls: int) -> common.Report:
    return asyncio.run(_run("small", port, Config(), calls))


def calls(port: int, count: int, at_once: int) -> common.Report:
    return asyncio.run(_run("calls", port, Config(), count, at_once))


if __name__ == "__main__":
    common.main(serve, {"send": send, "receive": receive, "small": small, "calls": calls})
