"""A server whose calls wait, all of whose connections end at once: when each call hears of it, in turns of the loop.

`python -m tests.unwinding` prints a line of JSON for each way in which they end.
"""

from __future__ import annotations

import collections
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import hpack
import trio
from grpclib.const import Cardinality

from aipod.config import Config
from aipod.transport import bridge
from aipod.transport.requests import TrioHandler
from aipod.transport.server import Server
from aipod.wire.ai import Raw
from tests.test_transport import HEADERS, raw_frame

CONNECTIONS, CALLS = 12, 100
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS_FRAME, RST_STREAM, SETTINGS, PING = 1, 3, 4, 6
ACK, END_HEADERS = 1, 4


class Turns(trio.abc.Instrument):
    """Counts turns of trio's loop."""

    now = 0

    def before_io_wait(self, timeout: float) -> None:
        self.now += 1


class Service:
    """Its calls wait until `let_go`, or for ever."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.begun = 0
        self.ended: list[int] = []  # the turns in which calls have
        self.let_go = trio.Event()

    def __mapping__(self) -> dict[str, TrioHandler]:
        return {"/ai.AI/chaos": TrioHandler(self._wait, Cardinality.STREAM_STREAM, Raw, Raw)}

    async def _wait(self, stream: Any) -> None:
        self.begun += 1
        try:
            # Nurseries of its own, as every call has.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                await self.let_go.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.ended.append(self._turns.now)


async def until(condition: Callable[[], Any]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.001)


async def connect(port: int, calls: int) -> trio.SocketStream:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    encoder = hpack.Encoder()
    opened = [raw_frame(HEADERS_FRAME, END_HEADERS, 2 * n + 1, encoder.encode(HEADERS)) for n in range(calls)]
    await stream.send_all(PREFACE + raw_frame(SETTINGS, 0, 0, b"") + b"".join(opened))
    return stream


async def ping(stream: trio.SocketStream, answered: list[int], turns: Turns) -> None:
    """One PING after the other, until the server closes."""
    wanted = raw_frame(PING, ACK, 0, bytes(8))
    while True:
        await stream.send_all(raw_frame(PING, 0, 0, bytes(8)))
        data = b""
        while wanted not in data:
            if not (received := await stream.receive_some()):
                return
            data += received
        answered.append(turns.now)


async def lose(peers: list[trio.SocketStream], *_: Any) -> None:
    for peer in peers:
        peer.socket.close()


async def lose_while_they_end(peers: list[trio.SocketStream], server: Server, service: Service) -> None:
    """The calls end by themselves before most of them hear that their connection is lost."""
    await lose(peers)
    await until(lambda: service.ended)
    service.let_go.set()


async def reset(peers: list[trio.SocketStream], *_: Any) -> None:
    for peer in peers:
        await peer.send_all(b"".join(raw_frame(RST_STREAM, 0, 2 * n + 1, bytes(4)) for n in range(CALLS)))


async def reset_and_lose(peers: list[trio.SocketStream], *_: Any) -> None:
    await reset(peers)
    await lose(peers)


async def lose_while_it_drains(peers: list[trio.SocketStream], server: Server, service: Service) -> None:
    await lose(peers)
    await until(lambda: service.ended)
    server.stop_listening()


async def lose_before_its_end(peers: list[trio.SocketStream], server: Server, service: Service) -> None:
    """`abort` has every call cancelled at once: nobody else is there to wait."""
    await lose(peers)
    await until(lambda: service.ended)
    server.abort()


WAYS = [lose, lose_while_they_end, reset, reset_and_lose, lose_while_it_drains, lose_before_its_end]


async def unwind(way: Callable[..., Awaitable[None]], turns: Turns) -> dict[str, Any]:
    service = Service(turns)
    async with bridge.open_loop(), trio.open_nursery() as calls:
        with socket.create_server(("127.0.0.1", 0)) as sock:

            async def start() -> Server:
                server = Server([service], Config(), bridge.Spawner(calls))
                await server.listen([sock])
                return server

            server = await bridge.to_trio(start)()
            peers = [await connect(sock.getsockname()[1], CALLS) for _ in range(CONNECTIONS)]
            other = await connect(sock.getsockname()[1], 0)
            await until(lambda: service.begun == CONNECTIONS * CALLS)
            handlers: list[Any] = [protocol.handler for protocol in server.protocols]
            answered: list[int] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ping, other, answered, turns)
                await until(lambda: answered)
                await way(peers, server, service)
                await until(lambda: len(service.ended) == service.begun)
                nursery.cancel_scope.cancel()
            await until(lambda: not any(handler._tasks or handler._cancelled for handler in handlers))
            for stream in (*peers, other):
                stream.socket.close()
            await until(lambda: not server.protocols)
            server.stop_listening()
            server.abort()
    first, last = min(service.ended), max(service.ended)
    return {
        "begun": service.begun,
        "ended": len(service.ended),
        "most in a turn": max(collections.Counter(service.ended).values()),
        "PINGs answered meanwhile": sum(first < turn < last for turn in answered),
    }


def main() -> None:
    turns = Turns()
    for way in WAYS:
        print(json.dumps({"way": way.__name__, **trio.run(unwind, way, turns, instruments=[turns])}), flush=True)


if __name__ == "__main__":
    main()
