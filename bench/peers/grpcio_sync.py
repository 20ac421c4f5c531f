"""grpcio's synchronous face moving `ai.Raw`, with the options that it has by itself: most of its users' clients.

It sends three times as fast as its asyncio face, which takes all of a core for 300 MB/s, whoever receives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from bench.peers import common
from bench.peers.grpcio_aio import Raw


def _up_handler(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
    receipt = common.Receipt()
    for message in requests:
        receipt.add(message.data)
    yield Raw(data=receipt.seal())


def _down_handler(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
    order = common.read_order(next(requests).data)
    for data, _ in common.messages(*order):
        yield Raw(data=data)
    common.check(next(requests).data, *order)


def serve() -> None:
    server = grpc.server(ThreadPoolExecutor(8))
    service, _, up = common.UP.strip("/").rpartition("/")
    down = common.DOWN.rpartition("/")[2]
    methods = {
        name: grpc.stream_stream_rpc_method_handler(handler, Raw.FromString, Raw.SerializeToString)
        for name, handler in {up: _up_handler, down: _down_handler}.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    common.announce(port)
    server.wait_for_termination()


def _up(channel: grpc.Channel, size: int, message: int) -> None:
    requests = (Raw(data=data) for data, _ in common.messages(size, message))
    (receipt,) = channel.stream_stream(common.UP, Raw.SerializeToString, Raw.FromString)(requests)
    common.check(receipt.data, size, message)


def _down(channel: grpc.Channel, size: int, message: int) -> None:
    receipt, whole = common.Receipt(), threading.Event()

    def requests() -> Iterator[Any]:
        yield Raw(data=common.make_order(size, message))
        whole.wait()
        yield Raw(data=receipt.seal())

    for answer in channel.stream_stream(common.DOWN, Raw.SerializeToString, Raw.FromString)(requests()):
        receipt.add(answer.data)
        if receipt.total == size:
            whole.set()


def _time(work: Callable[[grpc.Channel, int, int], None], port: int, size: int, message: int) -> common.Report:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        work(channel, min(size, common.WARM_UP * message), message)
        with common.Clock() as clock:
            work(channel, size, message)
        return clock.report()


def send(port: int, size: int, message: int) -> common.Report:
    return _time(_up, port, size, message)


def receive(port: int, size: int, message: int) -> common.Report:
    return _time(_down, port, size, message)


if __name__ == "__main__":
    common.main(serve, {"send": send, "receive": receive})
