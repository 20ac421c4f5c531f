"""A TCP proxy on loopback that treats each connection badly in a way of its own."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator

# How connections fare, and how often.
WAYS = {"well": 3, "reset": 3, "fin": 2, "silence": 1, "throttle": 2}
MEAN = 3 << 20  # bytes, both directions together, until a connection is cut
RATE = 2 << 20  # bytes a second in each direction of a throttled one
BURIED = 20.0  # seconds until a silent one ends after all
_PIECE = 64 * 1024


class Connection:
    """One of a client's, and the one behind it."""

    def __init__(self, way: str, left: int) -> None:
        self.way = way
        self.left = left  # bytes until it is cut
        self.silent = False
        self.writers: list[asyncio.StreamWriter] = []

    def reset(self) -> None:
        for writer in self.writers:
            # Without it the kernel sends FIN where nothing is unread.
            sock: socket.socket = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def fin(self) -> None:
        for writer in self.writers:
            writer.close()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, proxy: Proxy) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_PIECE):
                if self.silent:
                    continue
                if self.way == "throttle":
                    await asyncio.sleep(len(data) / RATE)
                writer.write(data)
                await writer.drain()
                self.left -= len(data)
                if self.left <= 0 and self.way in ("reset", "fin", "silence"):
                    proxy.cut(self)
        if not self.silent:  # else the other side does not hear of it
            self.fin()


class Proxy:
    """In front of 127.0.0.1:`port`. `done` counts what was done to connections."""

    def __init__(self, port: int, rng: random.Random) -> None:
        self._target = port
        self._rng = rng
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._kind = False
        self.port = 0
        self.done: collections.Counter[str] = collections.Counter()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def be_kind(self) -> None:
        """Do nothing bad any more; what is silent ends in time."""
        self._kind = True
        for connection in self._connections:
            connection.way = "well"

    def cut(self, connection: Connection) -> None:
        """Do to a connection what it is for, once."""
        way, connection.way = connection.way, "well"
        self.done[way] += 1
        if way == "silence":
            connection.silent = True
            asyncio.get_running_loop().call_later(BURIED, connection.reset)
        elif way == "fin":
            connection.fin()
        else:
            connection.reset()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        way = "well" if self._kind else self._rng.choices(list(WAYS), list(WAYS.values()))[0]
        self.done["throttle"] += way == "throttle"
        connection = Connection(way, int(self._rng.expovariate(1 / MEAN)))
        connection.writers.append(writer)
        self._connections.add(connection)
        try:
            with contextlib.suppress(OSError):  # no server listens
                back_reader, back = await asyncio.open_connection("127.0.0.1", self._target)
                connection.writers.append(back)
                async with asyncio.TaskGroup() as group:
                    group.create_task(connection.carry(reader, back, self))
                    group.create_task(connection.carry(back_reader, writer, self))
        except asyncio.CancelledError:
            pass  # the run is over; asyncio's server would log it
        finally:
            connection.reset()
            self._connections.discard(connection)
            self._tasks.discard(task)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def open_proxy(port: int, rng: random.Random) -> AsyncIterator[Proxy]:
    """This is an asyncio-flavored async function."""
    proxy = Proxy(port, rng)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.aclose()
