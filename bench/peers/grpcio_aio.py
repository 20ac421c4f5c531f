"""grpcio.aio moving `ai.Raw`, made and parsed by protobuf's own runtime.

`--stock` leaves the channel's and the server's options alone; without it they are raised as far as they help: its
guide (https://grpc.io/docs/guides/performance/) names the maximum frame size and look-ahead for large messages, and for
all calls one channel and one stub that are used again.
"""

from __future__ import annotations

import asyncio
import importlib.resources
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from bench.peers import common

MIB = 1 << 20
TUNED: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.http2.max_frame_size", 4 * MIB),
    ("grpc.http2.lookahead_bytes", 16 * MIB),
    ("grpc.http2.write_buffer_size", 16 * MIB),
]


def _raw_class() -> Any:
    data = (importlib.resources.files("aipod.wire") / "ai.binpb").read_bytes()
    files = descriptor_pb2.FileDescriptorSet.FromString(data).file
    return message_factory.GetMessages(files, descriptor_pool.DescriptorPool())["ai.Raw"]


Raw = _raw_class()


async def _up_handler(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    receipt = common.Receipt()
    while (message := await context.read()) is not grpc.aio.EOF:
        receipt.add(message.data)
    await context.write(Raw(data=receipt.seal()))


async def _down_handler(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    order = common.read_order((await context.read()).data)
    for data, _ in common.messages(*order):
        await context.write(Raw(data=data))
    common.check((await context.read()).data, *order)


async def _echo_handler(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.write(await context.read())


async def _serve(options: list[tuple[str, int]]) -> None:
    server = grpc.aio.server(options=options)
    service, _, up = common.UP.strip("/").rpartition("/")
    down, echo = (path.rpartition("/")[2] for path in (common.DOWN, common.ECHO))
    methods = {
        name: grpc.stream_stream_rpc_method_handler(handler, Raw.FromString, Raw.SerializeToString)
        for name, handler in {up: _up_handler, down: _down_handler, echo: _echo_handler}.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    common.announce(port)
    await server.wait_for_termination()


def serve(stock: bool = False) -> None:
    asyncio.run(_serve([] if stock else TUNED))


class Client:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._up = channel.stream_stream(common.UP, Raw.SerializeToString, Raw.FromString)
        self._down = channel.stream_stream(common.DOWN, Raw.SerializeToString, Raw.FromString)
        self._echo = channel.stream_stream(common.ECHO, Raw.SerializeToString, Raw.FromString)

    async def up(self, size: int, message: int) -> None:
        call = self._up()
        for data, _ in common.messages(size, message):
            await call.write(Raw(data=data))
        await call.done_writing()
        receipt = (await call.read()).data
        await _finish(call)
        common.check(receipt, size, message)

    async def down(self, size: int, message: int) -> None:
        call = self._down()
        await call.write(Raw(data=common.make_order(size, message)))
        receipt = common.Receipt()
        while receipt.total < size:
            receipt.add((await call.read()).data)
        await call.write(Raw(data=receipt.seal()))
        await call.done_writing()
        await _finish(call)

    async def echo(self, payload: bytes) -> bytes:
        call = self._echo()
        await call.write(Raw(data=payload))
        await call.done_writing()
        answer: bytes = (await call.read()).data
        await _finish(call)
        return answer


async def _finish(call: Any) -> None:
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        raise common.WrongData(f"{code}: {await call.details()}")


async def _run(name: str, port: int, *numbers: int, stock: bool) -> common.Report:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[] if stock else TUNED) as channel:
        client = Client(channel)
        if name == "small":
            return await common.time_calls(client.up, *numbers)
        if name == "calls":
            return await common.time_jobs(client.echo, *numbers)
        return await common.time_transfer(client.up if name == "send" else client.down, *numbers)


def send(port: int, size: int, message: int, stock: bool = False) -> common.Report:
    return asyncio.run(_run("send", port, size, message, stock=stock))


def receive(port: int, size: int, message: int, stock: bool = False) -> common.Report:
    return asyncio.run(_run("receive", port, size, message, stock=stock))


def small(port: int, calls: int, stock: bool = False) -> common.Report:
    return asyncio.run(_run("small", port, calls, stock=stock))


def calls(port: int, count: int, at_once: int, stock: bool = False) -> common.Report:
    return asyncio.run(_run("calls", port, count, at_once, stock=stock))


if __name__ == "__main__":
    common.main(serve, {"send": send, "receive": receive, "small": small, "calls": calls})
