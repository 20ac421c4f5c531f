"""grpcio sends a call again by itself that a GOAWAY says was not processed, and may lose messages of it.

Its core (seen in 1.66.2, 1.80.0 and 1.85.3) sends the messages anew that it has sent before. One that its caller hands
over meanwhile it takes for sent when the one before it was: the half-close follows, and the server has a whole request
that lacks a message. aipod's server names no stream in a GOAWAY, so nothing is sent again. nginx does at a reload, and
what its callers can do about that is here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from aipod.codec import Compressor
from aipod.wire.ai import Raw
from tests.conftest import Serve, first_only, require
from tests.test_hardening import ANY_STREAM, DATA, GOAWAY, HEADERS_FRAME
from tests.test_nginx import everywhere, proxy, to, unpacked

SIZE = 20_000
PREFACE = 24  # bytes
# Seconds in which a caller hands the next message over. Only where messages are lost anything depends on them.
MEANWHILE = 2.0


def frames(sock: socket.socket, skip: int) -> Iterator[bytes]:
    """What comes, frame by frame; the `skip` bytes before go along with the first."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := sock.recv(65536):
            data += more
            while len(data) >= skip + 9 and len(data) >= (
                end := skip + 9 + int.from_bytes(data[skip : skip + 3], "big")
            ):
                yield data[:end]
                data, skip = data[end:], 0


class Relay:
    """Between a client and a server: the first GOAWAY waits here until the client's next call has.

    The server says nothing on a second connection before `answers` is set.
    """

    def __init__(self, port: int) -> None:
        self._target = "127.0.0.1", port
        self.told = threading.Event()  # the GOAWAY is here
        self.taken = threading.Event()  # the client takes the first message of its next call for sent
        self.moved = threading.Event()  # the call that has crossed it is answered, or comes again
        self.answers = threading.Event()
        self._crossed = threading.Event()
        self._open: list[socket.socket] = []

    def __enter__(self) -> Relay:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)
        return self

    def __exit__(self, *args: object) -> None:
        for event in (self.told, self.taken, self.moved, self.answers, self._crossed):
            event.set()
        for sock in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _start(self, target: Any, *args: Any) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                is_first = not self._open
                if not is_first:
                    self.moved.set()
                server = socket.create_connection(self._target)
                self._open += [client, server]
                self._start(self._up, client, server, is_first)
                self._start(self._down, server, client, is_first)

    def _up(self, client: socket.socket, server: socket.socket, is_first: bool) -> None:
        kept = b""
        with ended(server):
            for frame in frames(client, PREFACE):
                kept += frame
                if is_first and self.told.is_set() and not self._crossed.is_set():
                    if frame[3] != DATA:
                        continue
                    self._crossed.set()
                server.sendall(kept)
                kept = b""

    def _down(self, server: socket.socket, client: socket.socket, is_first: bool) -> None:
        again = False  # what has crossed the GOAWAY comes again
        if not is_first:
            self.answers.wait(60)
        with ended(client):
            for frame in frames(server, 0):
                if frame[3] == GOAWAY and is_first:
                    again = again or frame[9:13] != ANY_STREAM[:4]
                    self.told.set()
                    self._crossed.wait(60)
                    self.taken.wait(60)
                if frame[3] == HEADERS_FRAME and self._crossed.is_set() and not again:
                    self.moved.set()
                client.sendall(frame)


@contextlib.contextmanager
def ended(sock: socket.socket) -> Iterator[None]:
    """What the other side sends is at its end: so is what `sock` is sent."""
    with contextlib.suppress(OSError):
        try:
            yield
        finally:
            sock.shutdown(socket.SHUT_WR)


class Caller:
    """A plain client by grpcio: one connection, a payload of `SIZE` bytes."""

    def __init__(self, relay: Relay, *options: tuple[str, Any], kwargs: bytes = b"{}", waits: bool = False) -> None:
        self._relay = relay
        self._waits = waits
        compressor = Compressor(3)
        self._messages = [bytes(Raw(data=compressor.frame(data))) for data in (kwargs, os.urandom(SIZE))]
        self._channel = grpc.insecure_channel(relay.address, options=options)

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *args: object) -> None:
        self._channel.close()

    def call(self, *, crosses: bool = False) -> bytes:
        """The answer. `crosses`: the payload follows when the server has heard, or is to hear again, of the call."""
        answered = threading.Event()

        def messages() -> Iterator[bytes]:
            yield self._messages[0]
            if crosses:
                self._relay.taken.set()
                self._relay.moved.wait(60)
                self._start_clock()
            if self._waits:
                answered.wait(60)
            yield self._messages[1]

        chaos = self._channel.stream_stream("/ai.AI/chaos", response_deserializer=Raw.parse)
        call = chaos(messages(), metadata=to("classify"), timeout=60)
        try:
            call.initial_metadata()
        finally:
            answered.set()
        return unpacked(list(call)[-1].data)

    def _start_clock(self) -> None:
        clock = threading.Timer(0.0 if self._waits else MEANWHILE, self._relay.answers.set)
        clock.daemon = True
        clock.start()


def test_what_crosses_a_goaway_of_ours_is_served_whole(serve: Serve) -> None:
    """Nobody has to do anything. Mutants seen: that GOAWAY names the last stream; what comes behind it is refused (both
    as it was).
    """
    served = serve("tests.models_proxied:Classify", "--max-age", "1")
    with Relay(served.port) as relay, Caller(relay) as caller:
        assert b'"size":20000' in caller.call()
        assert relay.told.wait(60)
        assert b'"size":20000' in caller.call(crosses=True)


@first_only("it is grpcio's, whatever Python it is in")
@pytest.mark.parametrize("how", ["at once", "with its size", "without retries", "when the server has answered"])
def test_what_crosses_a_goaway_of_nginx(serve: Serve, tmp_path: Any, how: str) -> None:
    """A caller that sends at once loses its payload: where that fails, grpcio is mended, and the advice can go."""
    require("nginx")
    served = serve("tests.models_proxied:Classify")
    options = [("grpc.enable_retries", 0)] if how == "without retries" else []
    kwargs = b'{"_aipod_bin_size": 20000}' if how == "with its size" else b"{}"
    with (
        proxy(tmp_path, everywhere(served.address)) as nginx,
        Relay(nginx.port) as relay,
        Caller(relay, *options, kwargs=kwargs, waits=how == "when the server has answered") as caller,
    ):
        assert b'"size":20000' in caller.call()
        nginx.reload()
        assert relay.told.wait(60)
        if how in ("at once", "when the server has answered"):
            assert (b'"size":0}' if how == "at once" else b'"size":20000}') in caller.call(crosses=True)
            return
        with pytest.raises(grpc.RpcError) as caught:
            caller.call(crosses=True)
        refused = grpc.StatusCode.UNAVAILABLE if options else grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.code() is refused
