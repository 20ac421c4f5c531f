"""The listening side: which requests get in, and how the connections end."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, cast

import grpclib.const
import grpclib.server
import trio

# What a status with details is made of: grpclib would import it with the first one, which may be the one that says that
# there is no descriptor left, as for an import.
from google.rpc import status_pb2  # noqa: F401
from grpclib.const import Cardinality, Status
from grpclib.encoding.proto import ProtoStatusDetailsCodec
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.metadata import decode_metadata, encode_grpc_message
from h2.errors import ErrorCodes
from h2.exceptions import StreamClosedError

from aipod.config import Config
from aipod.metrics import OTHER, Metrics
from aipod.transport.bridge import Spawner, inline
from aipod.transport.codec import Codec, encode_pieces
from aipod.transport.headers import MAX_REFUSAL, Headers, Problem, apart, check_headers, parse_timeout
from aipod.transport.protocol import REFUSED, STREAM_SLACK, H2Protocol
from aipod.transport.sockets import BACKLOG
from aipod.transport.stream import RECEIVING, H2Stream, PeerStalled
from aipod.transport.tls import server_context

log = logging.getLogger("aipod.transport")

# Seconds that a new connection has for its first call before it may have to make room: else peers that come at the same
# moment would push each other out.
_SETTLING = 1.0

# gRPC's own services, health and reflection: nobody needs a token for them, so a stream of theirs is no call for which
# a connection could keep others out.
_FOR_ANYBODY = "/grpc."
# Their streams at once per connection. Nothing ends a Health/Watch, which is 20 KB for 74 bytes from anybody: as many
# as calls, 1000, made 20 MB of each connection. Who watches opens one for each name; there are seven.
MAX_FOR_ANYBODY = 16

# As metrics call them.
_KINDS = {
    Cardinality.UNARY_UNARY: "unary",
    Cardinality.UNARY_STREAM: "server_stream",
    Cardinality.STREAM_UNARY: "client_stream",
    Cardinality.STREAM_STREAM: "bidi_stream",
}

# What a send raises when the peer has reset the stream, dropped the connection, or takes nothing any more.
PEER_GONE = (StreamClosedError, StreamTerminatedError, PeerStalled)


class TrioHandler(grpclib.const.Handler):
    """A method whose function is trio-flavored: it gets a trio task of its own, which is cancelled with the call."""


class Handler(grpclib.server.Handler):
    """Starts a task per request, after looking at its headers; every request gets an answer."""

    protocol: ServerProtocol
    _tasks: dict[Any, Any]  # asyncio tasks, and cancel scopes of trio tasks
    _cancelled: set[Any]

    def __init__(self, server: Server) -> None:
        super().__init__(server._mapping, server._codec, server._status_details_codec, server.__dispatch__)
        self._server = server
        self._for_anybody: set[H2Stream] = set()

    def accept(self, stream: Any, headers: Headers, release_stream: Callable[[], Any]) -> None:
        try:
            self._accept(stream, apart(headers), release_stream)
        except Exception:
            # It would end the connection, with its other calls.
            log.exception("a request that could not be taken")
            stream.reset_now(ErrorCodes.INTERNAL_ERROR)
            release_stream()

    def _accept(self, stream: H2Stream, headers: Headers, release_stream: Callable[[], Any]) -> None:
        streams = self.protocol.processor.streams
        seen = dict(headers)
        handler = self.mapping.get(seen.get(":path", ""))
        problem = check_headers(headers)
        if problem is None and handler is None:
            # grpclib's own answer has no content-type, which a strict client takes for no gRPC at all.
            problem = Problem(Status.UNIMPLEMENTED, f"there is no method {seen[':path']}")
        reset = problem.reset if problem is not None else None
        if problem is None and not self._note_length(stream, seen.get("content-length")):
            reset = ErrorCodes.PROTOCOL_ERROR
        limit = self._server.settings.stream_limit
        # A stream is over for its peer before its handler is: it may open the next one.
        many = len(streams) > limit and self.protocol.h2.open_inbound_streams > limit
        for_anybody = problem is None and seen[":path"].startswith(_FOR_ANYBODY)
        if for_anybody:
            many = many or sum(other.closable for other in self._for_anybody) >= MAX_FOR_ANYBODY
        if self.protocol.processor.draining or many or len(streams) > STREAM_SLACK * limit:
            # It says that nothing was done, so the peer may retry (RFC 9113 section 8.7).
            reset = ErrorCodes.REFUSED_STREAM
        if problem is not None or reset is not None:
            self.protocol.count_frames(REFUSED)
        if reset is not None:
            try:
                stream.reset_nowait(reset)
            except StreamClosedError:
                log.debug("a stream was reset by its peer before it could be refused")
            release_stream()
            return
        stream.rpc = self._server.metrics.begin(seen.get(":path", ""))
        stream.began = time.monotonic()
        if problem is not None:
            self._start(stream, release_stream, _reply(stream, problem))
            return
        self.protocol.last_busy = time.monotonic()
        if for_anybody:
            self._for_anybody.add(stream)
        else:
            stream.is_call = True
            self.protocol.last_call = time.monotonic()
        stream.inbox.encoding = seen.get("grpc-encoding", "identity")
        stream.timeout = parse_timeout(seen["grpc-timeout"]) if "grpc-timeout" in seen else None
        if isinstance(handler, TrioHandler):
            self._start_trio(stream, release_stream, handler, headers)
            return
        # The deadline becomes a cancel scope where the call enters trio; grpclib's own reads another clock.
        kept = [(name, value) for name, value in headers if name != "grpc-timeout"]
        work = grpclib.server.request_handler(
            self.mapping, stream, kept, self.codec, self.status_details_codec, self.dispatch, _nothing
        )
        self._start(stream, release_stream, work)

    def _start(self, stream: H2Stream, release_stream: Callable[[], Any], work: Coroutine[Any, Any, None]) -> None:
        """Do `work` in an asyncio task."""
        task = self.loop.create_task(work)
        self._tasks[stream] = task

        def done(task: Any) -> None:
            if stream.owes_an_end and not task.cancelled():  # grpclib keeps what it could not tell to itself
                log.error("the handler of a request ended without a status")
            # Also for a task that was cancelled before its first step, whose own `finally` never runs: its window
            # would be lost to the connection.
            self._ended(stream, task, release_stream, None if task.cancelled() else task.exception())

        task.add_done_callback(done)

    def _start_trio(
        self, stream: H2Stream, release_stream: Callable[[], Any], handler: TrioHandler, headers: Headers
    ) -> None:
        """Have the handler serve the call in a trio task."""
        assert self._server.spawner is not None, "a server with trio-flavored methods has a spawner"
        stream.inbox.new_event = trio.Event
        call = grpclib.server.Stream[Any, Any](
            stream,
            dict(headers)[":path"],
            *(handler.cardinality, handler.request_type, handler.reply_type),
            codec=self.codec,
            status_details_codec=self.status_details_codec,
            dispatch=self.dispatch,
        )
        call.metadata = decode_metadata(headers)

        def ended(error: Exception | None) -> None:
            self._ended(stream, scope, release_stream, error)

        scope = self._tasks[stream] = self._server.spawner.start(_serve, handler, call, on_end=ended)

    def _ended(
        self, stream: H2Stream, task: Any, release_stream: Callable[[], Any], error: BaseException | None
    ) -> None:
        self._tasks.pop(stream, None)
        self._cancelled.discard(task)
        self._for_anybody.discard(stream)
        # Without a status it was left by its peer, or cancelled.
        code = Status(int(stream.status)).name if stream.status else Status.CANCELLED.name
        stream.rpc.ended(code, time.monotonic() - stream.began)
        if stream.is_call:
            self.protocol.last_call = self.protocol.answered = time.monotonic()
        # A peer that still sends is told to stop (RFC 9113 section 8.1); one without a status hears of it at all.
        stream.reset_now(ErrorCodes.INTERNAL_ERROR if stream.owes_an_end else ErrorCodes.NO_ERROR)
        release_stream()
        if error is not None:
            log.error("a request handler failed", exc_info=error)

    def _note_length(self, opened: H2Stream, length: str | None) -> bool:
        """Have DATA compared with content-length; False where the request has ended and it says otherwise."""
        if length is None:
            return True
        assert opened.id is not None
        stream = self.protocol.h2.streams[opened.id]
        stream._expected_content_length = int(length)
        return stream.state_machine.state in RECEIVING or int(length) == 0

    def cancel(self, stream: Any) -> None:
        task = self._tasks.pop(stream, None)
        if task is not None:
            task.cancel()
            self._cancelled.add(task)


def _nothing() -> None:
    """Stands in for release_stream, which the task's done callback calls."""


async def _serve(handler: TrioHandler, call: grpclib.server.Stream[Any, Any]) -> None:
    """Have `handler` serve a call; a GRPCError that it lets through becomes the status. Trio-flavored."""
    try:
        await handler.func(call)
    except GRPCError as exc:
        if not call._send_trailing_metadata_done and cast(H2Stream, call._stream).closable:
            status = {"status": exc.status, "status_message": exc.message, "status_details": exc.details}
            await inline(functools.partial(call.send_trailing_metadata, **status))


async def _reply(stream: H2Stream, problem: Problem) -> None:
    """A trailers-only response."""
    headers = [(":status", str(problem.http)), ("content-type", "application/grpc")]
    headers += [("grpc-status", str(problem.status.value))]
    headers += [("grpc-message", encode_grpc_message(problem.message[:MAX_REFUSAL])), *problem.headers]
    try:
        await stream.send_headers(headers, end_stream=True)
    except PEER_GONE:
        log.debug("the peer of a bad request was gone before it was answered")


class Server(grpclib.server.Server):
    """grpclib's server with hardened connections. asyncio-flavored, but for what its TrioHandlers do in `spawner`."""

    def __init__(
        self,
        services: Sequence[Any],
        config: Config,
        spawner: Spawner | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__(services, codec=Codec(config), status_details_codec=ProtoStatusDetailsCodec())
        self.spawner = spawner
        self.settings = config
        self.metrics = metrics or Metrics()
        for path, handler in self._mapping.items():
            kind = handler.cardinality if isinstance(handler, grpclib.const.Handler) else None
            self.metrics.offer(path, _KINDS.get(kind, OTHER))
        self.protocols: set[ServerProtocol] = set()
        self._arriving: dict[ServerProtocol, asyncio.Task[Any]] = {}  # accepted; their TLS handshakes are under way
        self._listeners: list[asyncio.AbstractServer] = []
        self._stopped = False

    async def listen(self, sockets: Sequence[socket.socket]) -> None:
        """Accept connections on listening sockets, with TLS where the settings say so. The sockets stay the caller's.

        Raises TLSError.
        """
        tls: dict[str, Any] = {}
        if (context := server_context(self.settings)) is not None:
            tls = {"ssl": context, "ssl_handshake_timeout": self.settings.handshake_timeout}
        for sock in sockets:
            create = self._loop.create_unix_server if sock.family == socket.AF_UNIX else self._loop.create_server
            # A duplicate: asyncio closes what it is given. Its `backlog` is also how often it calls accept() in a row,
            # and it goes on after an error: a thousand times where there is no descriptor left.
            self._listeners.append(await create(self._protocol_factory, sock=sock.dup(), backlog=1, **tls))
            sock.listen(BACKLOG)

    def _protocol_factory(self) -> H2Protocol:
        if self._stopped:  # accepted in the moment in which its listener was closed: asyncio would stumble over it
            raise ConnectionAbortedError("the server listens no more")
        limit = self.settings.max_connections
        if limit and len(self.protocols) + len(self._arriving) >= limit and not self._make_room():
            self.metrics.turned_away += 1
            log.info("a connection was refused: there are %d already (--max-connections)", limit)
            raise ConnectionAbortedError("there are enough connections")
        self.metrics.accepted += 1
        handler = Handler(self)
        handler.protocol = protocol = ServerProtocol(handler, self)
        # asyncio's own for this connection: it ends when the handshake is over, or has failed.
        task = asyncio.current_task()
        assert task is not None
        self._arriving[protocol] = task
        task.add_done_callback(lambda task: self.arrived(protocol))
        return protocol

    def arrived(self, protocol: ServerProtocol) -> None:
        """Its handshake is over."""
        self._arriving.pop(protocol, None)

    def _make_room(self) -> bool:
        """End the connection that has been idle longest, or whose handshake has; False where none has been for long."""
        settled = time.monotonic() - _SETTLING
        quiet = [protocol for protocol in (*self.protocols, *self._arriving) if protocol.last_call < settled]
        for protocol in sorted(quiet, key=lambda protocol: protocol.last_call):
            if protocol in self._arriving:
                self._arriving.pop(protocol).cancel()
                return True
            if protocol.is_idle:
                self.protocols.discard(protocol)
                protocol.make_room()
                return True
        return False

    def stop_listening(self) -> None:
        """Accept no more connections, and tell the open ones to bring no more requests (GOAWAY)."""
        self._stopped = True
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

    def __init__(self, handler: Handler, server: Server) -> None:
        super().__init__(handler, server.settings, client=False)
        self._server = server
        self.last_call = time.monotonic()  # when there was one; until then, when the connection was accepted
        self.answered = -math.inf  # when its last call ended

    @property
    def is_idle(self) -> bool:
        """Whether there is no call, and the peer's system has taken the answer to the last one, or had time enough.

        Whatever else it has not taken, such as answers to its PINGs, keeps nobody out; nor does one who takes an answer
        by the byte.
        """
        if any(cast(H2Stream, stream).is_call for stream in self.processor.streams.values()):
            return False
        answering = time.monotonic() - self.answered < self.settings.send_stall
        return not (answering and self.connection.waiting)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._server.arrived(self)
        if self._server._stopped:
            self.connection.abort("its handshake was over when the server listened no more")
            return
        self._server.protocols.add(self)

    def make_room(self) -> None:
        """Say that nothing more is taken (GOAWAY) and close, without waiting for the peer to do so.

        For an idle connection: nothing is lost with it but an answer that was taken too slowly (who watches the
        server's health is told that the connection is gone), and what it asks for meanwhile it may ask for again.
        """
        log.info("a connection makes room for a new one (--max-connections)")
        self.connection.goaway(self.h2.highest_inbound_stream_id)
        self.transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._server.protocols.discard(self)
        super().connection_lost(exc)


def request_timeout(stream: grpclib.server.Stream[Any, Any]) -> float | None:
    """Seconds that the caller gave this call; None where it did not say."""
    return cast(H2Stream, stream._stream).timeout


def peer_certificate(stream: grpclib.server.Stream[Any, Any]) -> dict[str, Any] | None:
    """The verified certificate of the caller, as `ssl.SSLSocket.getpeercert` gives it; None without mTLS."""
    return stream.peer.cert() or None


async def send_message(stream: grpclib.server.Stream[Any, Any], message: Any) -> None:
    """Send one message of a call whose initial metadata was sent. This is an asyncio-flavored function."""
    await cast(H2Stream, stream._stream).send_message(encode_pieces(message))
