"""The socket of a connection: how much its peer has taken, and how it is closed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import sys
import termios
from collections.abc import Iterator
from typing import Any

from aipod.config import KIB

# Seconds that a closed connection may take to send what was written last, and its peer to close it too.
_LINGER = 10.0
# Fewer bytes are not waited for: they come with what follows them.
_WORTH_WAITING = 64 * KIB


class Socket:
    """The transport as a connection and its streams see it: closed, it takes nothing more.

    A server ends its side only (`lingers`) and leaves it to the peer to close: closed while there is something unread,
    a socket is reset, and what was written last may be lost on the way (RFC 9112 section 9.6 tells the same of HTTP/1).
    """

    def __init__(self, transport: asyncio.Transport, *, lingers: bool) -> None:
        self._transport = transport
        self._lingers = lingers
        self._closed = False
        self._written = 0  # bytes
        self._least = 1  # bytes that must be there before the system tells of them
        self._joined: list[bytes] | None = None  # what is to be written as one
        self.abort = transport.abort
        self.get_extra_info = transport.get_extra_info
        self.get_write_buffer_size = transport.get_write_buffer_size
        self.set_write_buffer_limits = transport.set_write_buffer_limits

    @property
    def taken(self) -> int:
        """Bytes that the peer's system has acknowledged; with TLS not to the byte.

        Not those that ours has taken: it takes no more until a third of its buffer is free, which has up to 4 MiB, and
        a peer that reads slowly, but steadily, would look like one that does not read.
        """
        return self._written - self.waiting

    @property
    def unread(self) -> int:
        """Bytes that this system has received, and nobody has read."""
        return self._ask(termios.FIONREAD)

    @property
    def waiting(self) -> int:
        """Bytes that were written, and that the peer's system has not acknowledged."""
        return self.get_write_buffer_size() + self._ask(termios.TIOCOUTQ)

    def _ask(self, request: int) -> int:
        size, sock = bytes(4), self.get_extra_info("socket")
        # Not every system tells it of every socket; with TLS the socket may be closed, or gone, a moment before its
        # connection.
        if sock is not None:
            with contextlib.suppress(OSError, ValueError):
                size = fcntl.ioctl(sock.fileno(), request, size)
        return int.from_bytes(size, sys.byteorder)

    def wait_for(self, size: int) -> None:
        """`size` bytes at least are sure to come: have the system tell of them when they are there.

        Else it tells of each few packets, and each time costs as much as copying 100 KiB. An end, an error or a full
        buffer is told at once (tcp(7), SO_RCVLOWAT of socket(7)); not every system, nor every kind of socket, knows it.
        With TLS it is asyncio that reads.
        """
        least = size if size >= _WORTH_WAITING else 1
        if least == self._least or self._closed:
            return
        self._least = least
        sock = self.get_extra_info("socket")
        if sock is not None and self.get_extra_info("ssl_object") is None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Write as one what is written in the block, which waits for nothing, and is small."""
        if self._joined is not None:
            yield
            return
        self._joined = []
        try:
            yield
        finally:
            pieces, self._joined = self._joined, None
            if pieces and not self._closed:
                self._transport.write(b"".join(pieces))

    def write(self, data: Any) -> None:
        if not self._closed:
            self._written += len(data)
            if self._joined is not None:
                self._joined.append(bytes(data))
            else:
                self._transport.write(data)

    def writelines(self, buffers: list[memoryview]) -> None:
        if not self._closed:
            self._written += sum(map(len, buffers))
            if self._joined is not None:
                self._joined += map(bytes, buffers)
            else:
                self._transport.writelines(buffers)

    def is_closing(self) -> bool:
        return self._closed or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        self._closed = True
        # Nobody waits longer for a write buffer that is not read, or for a peer that does not close.
        asyncio.get_running_loop().call_later(_LINGER, self._transport.abort)
        # With something in its write buffer asyncio would end this side later, where nothing catches an error.
        if self._lingers and self._transport.can_write_eof() and not self._transport.get_write_buffer_size():
            try:
                self._transport.write_eof()
            except OSError:  # its peer has reset it
                self._transport.abort()
            self._transport.resume_reading()  # to see it close; the protocol drops what comes
        else:
            self._transport.close()
