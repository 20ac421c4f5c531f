"""A slow link: `serve --to=PORT [--rate=BITS] [--rtt=SECONDS]`, a proxy that delays and limits what it carries.

Each direction of a connection is a line of its own: what was read leaves it when what came before has left, at the
line's rate, and arrives half a round trip later. A line holds at most what is under way in a round trip, as a router's
queue would: then nothing more is read, and TCP holds the sender back. The kernel's own buffers at both ends are kept
small beside that. Without a rate nothing waits (that is what the proxy itself costs).
"""

from __future__ import annotations

import collections
import contextlib
import socket
import threading
import time

from bench.peers import common

KIB, MIB = 1 << 10, 1 << 20
BUFFER = 256 * KIB  # of a socket, each; the kernel doubles it
LEAST, MOST = 16 * KIB, 256 * KIB  # that are read at once: as much as the rate carries in a millisecond
UNLIMITED = 4 * MIB  # that a line without a rate holds


class Line:
    """One direction. `rate` is in bytes a second, 0 is none; `delay` in seconds."""

    def __init__(self, source: socket.socket, target: socket.socket, rate: float, delay: float) -> None:
        self._source, self._target = source, target
        self._rate, self._delay = rate, delay
        self._most = max(MOST, int(rate * delay * 2)) if rate else UNLIMITED
        self._piece = min(MOST, max(LEAST, int(rate / 1000))) if rate else MOST
        self._under_way: collections.deque[tuple[float, bytes]] = collections.deque()
        self._held = 0
        self._free_at = 0.0  # when the line has sent what it has taken
        self._changed = threading.Condition()

    def read(self) -> None:
        """Take from the source until it ends; then an empty piece, which is its end."""
        data = b"more"
        while data:
            with self._changed:
                self._changed.wait_for(lambda: self._held < self._most)
            try:
                data = self._source.recv(self._piece)
            except OSError:
                data = b""
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + (len(data) / self._rate if self._rate else 0)
            with self._changed:
                self._under_way.append((self._free_at + self._delay, data))
                self._held += len(data)
                self._changed.notify()

    def write(self) -> None:
        """Give to the target what is due. Where that has gone, the source hears of it."""
        data = b"more"
        while data:
            with self._changed:
                self._changed.wait_for(lambda: self._under_way)
                due, data = self._under_way.popleft()
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            try:
                self._target.sendall(data) if data else self._target.shutdown(socket.SHUT_WR)
            except OSError:
                with contextlib.suppress(OSError):
                    self._source.shutdown(socket.SHUT_RDWR)
                data = b""
            with self._changed:
                self._held = self._held - len(data) if data else -UNLIMITED  # at the end nobody waits for room
                self._changed.notify()


def _carry(client: socket.socket, to: int, rate: float, delay: float) -> None:
    """One connection, until both directions have ended."""
    with client:
        try:
            server = socket.socket()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)  # before it connects: its window is agreed
            server.connect(("127.0.0.1", to))
        except OSError:
            return
        with server:
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            lines = Line(client, server, rate, delay), Line(server, client, rate, delay)
            threads = [threading.Thread(target=run, daemon=True) for line in lines for run in (line.read, line.write)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()


def serve(to: int, rate: float = 0, rtt: float = 0) -> None:
    """`rate` is in bits a second, as links are sold."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        common.announce(listener.getsockname()[1])
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_carry, args=(client, to, rate / 8, rtt / 2), daemon=True).start()


if __name__ == "__main__":
    common.main(serve, {})
