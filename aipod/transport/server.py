"""The listening side: which requests get in, and how the connections end."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Callable, Sequence
from typing import Any, cast

import grpclib.server
from grpclib.const import Status
from grpclib.encoding.proto import ProtoStatusDetailsCodec
from grpclib.exceptions import StreamTerminatedError
from grpclib.metadata import encode_grpc_message
from h2.errors import ErrorCodes
from h2.exceptions import StreamClosedError

from aipod.config import Config
from aipod.transport.codec import Codec
from aipod.transport.http2 import H2Protocol, H2Stream, PeerStalled

log = logging.getLogger("aipod.transport")

# https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md: TimeoutValue is at most 8 digits.
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])\Z")
_UNIT = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_BASE64 = re.compile(r"[A-Za-z0-9+/,]*={0,2}\Z")
_ENCODINGS = ("identity", "gzip", "deflate")

Headers = list[tuple[str, str]]

# What a send raises when the peer has reset the stream, dropped the connection, or takes nothing any more.
PEER_GONE = (StreamClosedError, StreamTerminatedError, PeerStalled)


class Handler(grpclib.server.Handler):
    """Starts a task per request, after looking at its headers; every request gets an answer."""

    protocol: H2Protocol

    def __init__(self, server: Server) -> None:
        super().__init__(server._mapping, server._codec, server._status_details_codec, server.__dispatch__)
        self._server = server

    def accept(self, stream: Any, headers: Headers, release_stream: Callable[[], Any]) -> None:
        streams = self.protocol.processor.streams
        if self.protocol.processor.draining or len(streams) > self._server.settings.stream_limit:
            # REFUSED_STREAM says that nothing was done, so the peer may retry (RFC 9113 section 8.7).
            try:
                stream.reset_nowait(ErrorCodes.REFUSED_STREAM)
            except StreamClosedError:
                log.debug("a stream was reset by its peer before it could be refused")
            release_stream()
            return
        problem = check_headers(headers)
        path = dict(headers).get(":path")
        if problem is None and path not in self.mapping:
            # grpclib's own answer has no content-type, which a strict client takes for no gRPC at all.
            problem = Status.UNIMPLEMENTED, f"there is no method {path}", []
        if problem is not None:
            work = _reply(stream, *problem)
        else:
            seen = dict(headers)
            stream.encoding = seen.get("grpc-encoding", "identity")
            stream.timeout = parse_timeout(seen["grpc-timeout"]) if "grpc-timeout" in seen else None
            # The deadline becomes a cancel scope where the call enters trio; grpclib's own reads another clock.
            kept = [(name, value) for name, value in headers if name != "grpc-timeout"]
            work = grpclib.server.request_handler(
                self.mapping, stream, kept, self.codec, self.status_details_codec, self.dispatch, _nothing
            )
        task = self.loop.create_task(work)
        self._tasks[stream] = task

        def done(task: Any) -> None:
            # Also for a task that was cancelled before its first step, whose own `finally` never runs: its window
            # would be lost to the connection.
            self._tasks.pop(stream, None)
            self._cancelled.discard(task)
            release_stream()
            if not task.cancelled() and task.exception() is not None:
                log.error("a request handler failed", exc_info=task.exception())

        task.add_done_callback(done)

    def cancel(self, stream: Any) -> None:
        task = self._tasks.pop(stream, None)
        if task is not None:
            task.cancel()
            self._cancelled.add(task)


def _nothing() -> None:
    """Stands in for release_stream, which the task's done callback calls."""


def parse_timeout(value: str) -> float:
    """Seconds in a grpc-timeout header that `check_headers` has let through."""
    match = _TIMEOUT.match(value)
    assert match is not None
    return int(match[1]) * _UNIT[match[2]]


def check_headers(headers: Sequence[tuple[str, str]]) -> tuple[Status, str, Headers] | None:
    """Why a request cannot be served, or None. grpclib would leave some of these without any answer."""
    seen: dict[str, str] = {}
    for name, value in headers:
        seen.setdefault(name, value)
        if not value.isascii():
            return Status.INVALID_ARGUMENT, f"header {name} has a value that is not ASCII", []
        if name.endswith("-bin") and (not _BASE64.match(value) or len(value.rstrip("=")) % 4 == 1):
            return Status.INVALID_ARGUMENT, f"header {name} is not base64", []
    if ":method" not in seen or ":path" not in seen:
        return Status.INVALID_ARGUMENT, "a request without :method or :path", []
    timeout = seen.get("grpc-timeout")
    if timeout is not None:
        if not _TIMEOUT.match(timeout):
            return Status.INVALID_ARGUMENT, "grpc-timeout is not at most 8 digits and a unit", []
        if parse_timeout(timeout) == 0:
            return Status.DEADLINE_EXCEEDED, "the deadline has passed", []
    if seen.get("grpc-encoding", "identity") not in _ENCODINGS:
        accepted = [("grpc-accept-encoding", ",".join(_ENCODINGS))]
        return Status.UNIMPLEMENTED, "grpc-encoding is not one of grpc-accept-encoding", accepted
    return None


async def _reply(stream: H2Stream, status: Status, message: str, extra: Headers) -> None:
    """A trailers-only response."""
    headers = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", str(status.value))]
    headers += [("grpc-message", encode_grpc_message(message)), *extra]
    try:
        await stream.send_headers(headers, end_stream=True)
        if stream.closable:
            stream.reset_nowait()
    except StreamClosedError:
        log.debug("a bad request was reset by its peer before it was answered")


class Server(grpclib.server.Server):
    """grpclib's server with hardened connections. asyncio-flavored, like everything it calls."""

    def __init__(self, services: Sequence[Any], config: Config) -> None:
        super().__init__(services, codec=Codec(), status_details_codec=ProtoStatusDetailsCodec())
        self.settings = config
        self.protocols: set[ServerProtocol] = set()
        self._listeners: list[asyncio.AbstractServer] = []

    async def listen(self, sockets: Sequence[socket.socket]) -> None:
        """Accept connections on listening sockets. The sockets stay the caller's."""
        for sock in sockets:
            # A duplicate: asyncio closes what it is given.
            self._listeners.append(
                await self._loop.create_server(self._protocol_factory, sock=sock.dup())
                if sock.family != socket.AF_UNIX
                else await self._loop.create_unix_server(self._protocol_factory, sock=sock.dup())
            )

    def _protocol_factory(self) -> H2Protocol:
        handler = Handler(self)
        handler.protocol = ServerProtocol(handler, self)
        return handler.protocol

    def stop_listening(self) -> None:
        """Accept no more connections, and tell the open ones to bring no more requests (GOAWAY)."""
        for listener in self._listeners:
            listener.close()
        for protocol in list(self.protocols):
            protocol.drain()

    def abort(self) -> None:
        """Cancel what still runs and drop every connection."""
        for protocol in list(self.protocols):
            protocol.processor.close("the server is gone")
            protocol.transport.abort()


class ServerProtocol(H2Protocol):
    """A connection that its server knows."""

    transport: Any

    def __init__(self, handler: Handler, server: Server) -> None:
        super().__init__(handler, server.settings, client=False)
        self._server = server

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._server.protocols.add(self)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._server.protocols.discard(self)
        super().connection_lost(exc)


def request_timeout(stream: grpclib.server.Stream[Any, Any]) -> float | None:
    """Seconds that the caller gave this call; None where it did not say."""
    return cast(H2Stream, stream._stream).timeout
