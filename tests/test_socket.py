"""What is written before a connection is closed goes out."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from aipod.transport.socket import _WORTH_WAITING as FEW
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


@pytest.mark.parametrize("lingers", [True, False], ids=["a server", "a client"])
def test_what_was_written_last_goes_out_before_the_end(lingers: bool) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        _, peer = await loop.create_connection(Recorded, sock=theirs)
        sock = Socket(transport, lingers=lingers)
        sock.write(b"goodbye")
        sock.close()
        sock.write(b"too late")
        await peer.over.wait()
        assert peer.data == b"goodbye"
        sock.abort()

    run(main)


def test_what_is_joined_is_one_piece() -> None:
    """Also where the body fails: the streams have counted what they have written. Mutants seen: each by itself; all of
    it is lost.
    """

    async def main() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        theirs.setblocking(False)
        sock = Socket(transport, lingers=False)

        def fail() -> None:
            with sock.joined():
                sock.write(b"a")
                sock.writelines([memoryview(b"b"), memoryview(b"c")])
                with pytest.raises(BlockingIOError):
                    theirs.recv(100)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert theirs.recv(100) == b"abc"
        sock.write(b"behind")
        assert theirs.recv(100) == b"behind"
        sock.abort()
        theirs.close()

    run(main)


def test_what_is_sure_to_come_is_told_of_when_it_is_there() -> None:
    """Little is not waited for. Mutants seen: anything is; it is never set back; the end is waited for."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        transport, peer = await loop.create_connection(Recorded, sock=ours)
        sock = Socket(transport, lingers=False)

        def least() -> Any:
            return ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)

        async def told() -> int:
            """How much it knows of, when it has had every chance to know."""
            for _ in range(10):
                await asyncio.sleep(0)
            return len(peer.data)

        sock.wait_for(FEW - 1)
        assert least() == 1
        sock.wait_for(2 * FEW)
        assert least() == 2 * FEW
        theirs.sendall(bytes(2 * FEW - 1))
        assert await told() == 0
        theirs.sendall(b"x")
        while len(peer.data) < 2 * FEW:
            await asyncio.sleep(0)
        sock.wait_for(0)
        assert least() == 1
        theirs.sendall(b"y")
        while len(peer.data) <= 2 * FEW:
            await asyncio.sleep(0)
        sock.wait_for(FEW)
        theirs.close()
        await peer.over.wait()
        sock.abort()

    run(main)


def test_a_socket_that_is_closed_or_has_another_reader_is_left_alone() -> None:
    """Mutants seen: with TLS too; behind the end."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        tls = Socket(transport, lingers=False)
        tls.get_extra_info = lambda name: object() if name == "ssl_object" else transport.get_extra_info(name)
        tls.wait_for(FEW)
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
        sock = Socket(transport, lingers=False)
        sock.close()
        sock.wait_for(FEW)
        assert ours.fileno() == -1 or ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
        theirs.close()

    run(main)
