"""What is written in one turn of the loop goes out together, in order, and before the connection ends."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from aipod.config import KIB
from aipod.transport.socket import Socket
from tests.conftest import run


class Recorded(asyncio.Protocol):
    """The other end. It records what it gets, and whether that was the end."""

    def __init__(self) -> None:
        self.data = b""
        self.over = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.data += data

    def eof_received(self) -> None:
        self.over.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set()


class Counted:
    """A transport of asyncio's that counts how often it is written to."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self.sizes.append(len(data))
        self._transport.write(data)

    def writelines(self, buffers: list[bytes]) -> None:
        self.sizes.append(sum(map(len, buffers)))
        self._transport.writelines(buffers)


async def connected(*, lingers: bool = True) -> tuple[Socket, Counted, Recorded]:
    """asyncio-flavored."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    _, peer = await loop.create_connection(Recorded, sock=theirs)
    counted = Counted(transport)
    return Socket(counted, lingers=lingers), counted, peer  # type: ignore[arg-type]


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


def test_small_pieces_of_one_turn_are_one_write() -> None:
    """Or three are. Mutants seen: each is a write; another order; nothing at the turn's end; all wait for that."""

    async def main() -> None:
        sock, counted, peer = await connected()
        sock.write(b"headers ")
        sock.writelines([memoryview(b"a message "), memoryview(b"in two")])
        assert sock.get_write_buffer_size() == sock.waiting == 24
        assert sock.taken == 0
        assert counted.sizes == []
        await until(lambda: len(peer.data) == 24)
        assert peer.data == b"headers a message in two"
        assert counted.sizes == [24]
        assert sock.get_write_buffer_size() == 0
        await until(lambda: sock.taken == 24)
        for piece in (b"headers ", b"message ", b"trailers"):
            sock.write(piece)
        assert counted.sizes == [24, 24], "a whole call waits for nothing"
        sock.write(b"!")
        await until(lambda: peer.data.endswith(b"headers message trailers!"))
        assert counted.sizes == [24, 24, 1]
        sock.abort()

    run(main)


def test_what_is_large_waits_for_nothing_and_overtakes_nothing() -> None:
    """Mutant seen: it goes out before what was written first."""

    async def main() -> None:
        sock, counted, peer = await connected()
        large = bytes(20 * KIB)
        sock.write(b"first")
        sock.write(large)
        assert counted.sizes == [5, 20 * KIB]
        sock.write(b"second")
        sock.writelines([memoryview(large), memoryview(b"third")])
        assert counted.sizes == [5, 20 * KIB, 6, 20 * KIB + 5]
        await until(lambda: len(peer.data) == 5 + 20 * KIB + 6 + 20 * KIB + 5)
        assert peer.data == b"first" + large + b"second" + large + b"third"
        sock.abort()

    run(main)


@pytest.mark.parametrize("lingers", [True, False], ids=["a server", "a client"])
def test_what_was_written_last_goes_out_before_the_end(lingers: bool) -> None:
    """Mutant seen: it is forgotten."""

    async def main() -> None:
        sock, _, peer = await connected(lingers=lingers)
        sock.write(b"goodbye")
        sock.close()
        sock.write(b"too late")
        await peer.over.wait()
        assert peer.data == b"goodbye"
        sock.abort()

    run(main)


def test_an_abort_drops_what_waits_unless_it_was_written_out() -> None:
    async def main() -> None:
        sock, _, peer = await connected()
        sock.write(b"goaway")
        sock.write_out()
        sock.write(b"never")
        sock.abort()
        await peer.over.wait()
        assert peer.data == b"goaway"

    run(main)
