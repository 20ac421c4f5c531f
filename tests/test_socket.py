"""What is written before a connection is closed goes out."""

from __future__ import annotations

import asyncio
import socket

import pytest

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
