"""A plain TCP socket: the bound that no protocol on top of it can reach. 1 MiB per sendall and recv_into."""

from __future__ import annotations

import socket
import struct

from bench.peers import common

# Direction, size, message length; the receipt's length.
_ORDER = struct.Struct(">cQQ")
_LENGTH = struct.Struct(">B")


def send_all(sock: socket.socket, size: int, message: int) -> None:
    for data, _ in common.messages(size, message):
        sock.sendall(data)


def receive_all(sock: socket.socket, size: int, message: int) -> bytes:
    """Read `size` bytes, message by message, into one buffer; the receipt."""
    receipt = common.Receipt()
    buffer = memoryview(bytearray(message))
    while receipt.total < size:
        view = buffer[: size - receipt.total]
        _fill(sock, view)
        receipt.add(view)
    return receipt.seal()


def _fill(sock: socket.socket, view: memoryview) -> None:
    got = 0
    while got < len(view):
        count = sock.recv_into(view[got:])
        if not count:
            raise EOFError("the peer has closed the connection")
        got += count


def _read(sock: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    _fill(sock, memoryview(data))
    return bytes(data)


def give_receipt(sock: socket.socket, receipt: bytes) -> None:
    sock.sendall(_LENGTH.pack(len(receipt)) + receipt)


def take_receipt(sock: socket.socket) -> bytes:
    return _read(sock, *_LENGTH.unpack(_read(sock, _LENGTH.size)))


def serve() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        common.announce(listener.getsockname()[1])
        while True:
            sock, _ = listener.accept()
            with sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    while True:
                        direction, size, message = _ORDER.unpack(_read(sock, _ORDER.size))
                        if direction == b"u":
                            give_receipt(sock, receive_all(sock, size, message))
                        else:
                            send_all(sock, size, message)
                            common.check(take_receipt(sock), size, message)
                            sock.sendall(b"k")
                except EOFError:
                    continue


def _up(sock: socket.socket, size: int, message: int) -> None:
    sock.sendall(_ORDER.pack(b"u", size, message))
    send_all(sock, size, message)
    common.check(take_receipt(sock), size, message)


def _down(sock: socket.socket, size: int, message: int) -> None:
    sock.sendall(_ORDER.pack(b"d", size, message))
    give_receipt(sock, receive_all(sock, size, message))
    _read(sock, 1)


def _timed(up: bool, port: int, size: int, message: int) -> common.Report:
    transfer = _up if up else _down
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transfer(sock, min(size, common.WARM_UP * message), message)
        with common.Clock() as clock:
            transfer(sock, size, message)
    return clock.report() | {"bytes": size}


def send(port: int, size: int, message: int) -> common.Report:
    return _timed(True, port, size, message)


def receive(port: int, size: int, message: int) -> common.Report:
    return _timed(False, port, size, message)


if __name__ == "__main__":
    common.main(serve, {"send": send, "receive": receive})
