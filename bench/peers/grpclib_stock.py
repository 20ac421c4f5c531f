"""grpclib as it is installed, asyncio on both sides, moving betterproto2's `Raw`."""

from __future__ import annotations

import asyncio
from typing import Any

from grpclib.client import Channel, StreamStreamMethod
from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server, Stream

from aipod.wire.ai import Raw
from bench.peers import common


class Service:
    def __mapping__(self) -> dict[str, Handler]:
        return {
            common.UP: Handler(self._up, Cardinality.STREAM_STREAM, Raw, Raw),
            common.DOWN: Handler(self._down, Cardinality.STREAM_STREAM, Raw, Raw),
        }

    async def _up(self, stream: Stream[Any, Any]) -> None:
        receipt = common.Receipt()
        while (message := await stream.recv_message()) is not None:
            receipt.add(message.data)
        await stream.send_message(Raw(data=receipt.seal()))

    async def _down(self, stream: Stream[Any, Any]) -> None:
        order = common.read_order((await stream.recv_message()).data)
        for data, _ in common.messages(*order):
            await stream.send_message(Raw(data=data))
        try:
            common.check((await stream.recv_message()).data, *order)
        except common.WrongData as exc:
            raise GRPCError(Status.DATA_LOSS, str(exc)) from exc


async def _serve() -> None:
    server = Server([Service()])
    await server.start("127.0.0.1", 0)
    assert server._server is not None, "it has started"
    common.announce(server._server.sockets[0].getsockname()[1])
    await server.wait_closed()


def serve() -> None:
    asyncio.run(_serve())


class Client:
    def __init__(self, channel: Channel) -> None:
        self._up = StreamStreamMethod[Any, Any](channel, common.UP, Raw, Raw)
        self._down = StreamStreamMethod[Any, Any](channel, common.DOWN, Raw, Raw)

    async def up(self, size: int, message: int) -> None:
        async with self._up.open() as stream:
            for data, last in common.messages(size, message):
                await stream.send_message(Raw(data=data), end=last)
            receipt = (await stream.recv_message()).data
        common.check(receipt, size, message)

    async def down(self, size: int, message: int) -> None:
        async with self._down.open() as stream:
            await stream.send_message(Raw(data=common.make_order(size, message)))
            receipt = common.Receipt()
            while receipt.total < size:
                receipt.add((await stream.recv_message()).data)
            await stream.send_message(Raw(data=receipt.seal()), end=True)


async def _run(name: str, port: int, *numbers: int) -> common.Report:
    async with Channel("127.0.0.1", port) as channel:
        client = Client(channel)
        if name == "small":
            return await common.time_calls(client.up, *numbers)
        return await common.time_transfer(client.up if name == "send" else client.down, *numbers)


def send(port: int, size: int, message: int) -> common.Report:
    return asyncio.run(_run("send", port, size, message))


def receive(port: int, size: int, message: int) -> common.Report:
    return asyncio.run(_run("receive", port, size, message))


def small(port: int, calls: int) -> common.Report:
    return asyncio.run(_run("small", port, calls))


if __name__ == "__main__":
    common.main(serve, {"send": send, "receive": receive, "small": small})
