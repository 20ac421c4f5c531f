"""Which requests get in, and what becomes of one."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, cast

import grpclib.const
import grpclib.server
import trio

# What a status with details is made of: grpclib would import it with the first one, which may be the one that says that
# there is no descriptor left, as for an import.
from google.rpc import status_pb2  # noqa: F401
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.metadata import decode_metadata, encode_grpc_message
from h2.errors import ErrorCodes
from h2.exceptions import StreamClosedError

from aipod.config import KIB
from aipod.transport.bridge import inline
from aipod.transport.codec import encode_pieces
from aipod.transport.headers import MAX_REFUSAL, Headers, Problem, apart, check_headers, parse_timeout
from aipod.transport.http2 import BEGINNING, RECEIVING
from aipod.transport.protocol import STREAM_SLACK
from aipod.transport.stream import H2Stream, PeerStalled

if TYPE_CHECKING:
    from aipod.transport.server import Server, ServerProtocol

log = logging.getLogger("aipod.transport")

# gRPC's own services, health and reflection: nobody needs a token for them, so a stream of theirs is no call for which
# a connection could keep others out; nor is a call of somebody who is not known.
_FOR_ANYBODY = "/grpc."
# Their streams at once per connection. Nothing ends a Health/Watch, which is 20 KB for 74 bytes from anybody: as many
# as calls, 1000, made 20 MB of each connection. Who watches opens one for each name; there are seven.
MAX_FOR_ANYBODY = 16
# The longest message of theirs: a name. A thousand connections with so many streams have 64 MB of them.
MAX_ASKED = 4 * KIB

# Frames that a request counts for that is refused: it costs as much as a hundred of those that are no payload, and an
# honest peer has few.
REFUSED = 50

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
        many = len(streams) > limit and self.protocol.h2.count_inbound() > limit
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
        stream.was_on_its_way = self.protocol.leaving
        if for_anybody:
            self._for_anybody.add(stream)
            stream.inbox.limit = MAX_ASKED
        else:  # what nobody is known by, the service refuses
            stream.is_call = self._server.knows(seen.get("authorization", ""))
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
            self._cancelled.add(task)
            stream.connection.wakes.add(task.cancel)

    def close(self) -> None:
        """Nothing but a mark: the connection's end cancels its streams one by one (`Processor.close`)."""
        self.closing = True


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


def request_timeout(stream: grpclib.server.Stream[Any, Any]) -> float | None:
    """Seconds that the caller gave this call; None where it did not say."""
    return cast(H2Stream, stream._stream).timeout


def was_on_its_way(stream: grpclib.server.Stream[Any, Any]) -> bool:
    """Whether a call of a connection that was told to go came before its peer had heard of that."""
    return cast(H2Stream, stream._stream).was_on_its_way


def has_message(stream: grpclib.server.Stream[Any, Any]) -> bool:
    """Whether a message can be received without a wait for the peer, or none comes any more."""
    return cast(H2Stream, stream._stream).inbox.has_news


async def message_arrived(stream: grpclib.server.Stream[Any, Any]) -> None:
    """Wait until a message can be received at once, or none comes any more. Trio-flavored; cancelled, none is lost."""
    await cast(H2Stream, stream._stream).inbox.arrival()


def end_request(stream: grpclib.server.Stream[Any, Any]) -> None:
    """Take no more of a call that has the one message that there is to be: what else comes is dropped."""
    cast(H2Stream, stream._stream).inbox.close()


def peer_certificate(stream: grpclib.server.Stream[Any, Any]) -> dict[str, Any] | None:
    """The verified certificate of the caller, as `ssl.SSLSocket.getpeercert` gives it; None without mTLS."""
    return stream.peer.cert() or None


async def send_beginning(stream: grpclib.server.Stream[Any, Any]) -> None:
    """Send the initial metadata, as grpclib does where nobody adds anything to it: asyncio-flavored."""
    await cast(H2Stream, stream._stream).send_headers(BEGINNING)
    stream._send_initial_metadata_done = True


async def send_message(stream: grpclib.server.Stream[Any, Any], message: Any) -> None:
    """Send one message of a call whose initial metadata was sent. This is an asyncio-flavored function."""
    await cast(H2Stream, stream._stream).send_message(encode_pieces(message))


def send_now(stream: grpclib.server.Stream[Any, Any], message: Any) -> bool:
    """As `send_message`, where it has to wait for nothing; else False, and nothing was sent.

    Raises one of `PEER_GONE`.
    """
    return cast(H2Stream, stream._stream).send_now(encode_pieces(message))


def joined(stream: grpclib.server.Stream[Any, Any]) -> contextlib.AbstractContextManager[None]:
    """Have what is sent in the block go out in one write. Nothing in it may wait."""
    return cast(H2Stream, stream._stream).joined()
