"""One stream: messages in and out, bounded, and given up where the peer takes nothing."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import struct
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import betterproto2
import grpclib.protocol as base
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from h2.connection import ConnectionInputs, ConnectionState
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError, StreamClosedError, TooManyStreamsError
from h2.stream import StreamInputs, StreamState

from aipod.config import KIB, MIB
from aipod.metrics import Rpc
from aipod.transport.codec import encode_pieces
from aipod.transport.frames import data_head, headers_head
from aipod.transport.http2 import CODED, H2
from aipod.transport.inbox import PREFIX, Inbox, let_others_run
from aipod.transport.window import ReceiveWindow

if TYPE_CHECKING:
    import grpclib.client
    import grpclib.server

    from aipod.transport.connection import H2Connection

    Call = grpclib.client.Stream[Any, Any] | grpclib.server.Stream[Any, Any]

# A message up to it does not wait for its turn behind long ones (a heartbeat has 10 bytes).
SMALL = 16 * KIB
# Of a message that is sent at once, with others in one write perhaps: it is copied once more for that.
_AT_ONCE = 128 * KIB
# What a peer may have got before it sends the WINDOW_UPDATE frames for it; those for more count like other frames.
_MOST_OWED = 16 * MIB
# Sent without a look at anything else that the loop has to do.
_SLICE = 4 * MIB

SENDING = (StreamState.OPEN, StreamState.HALF_CLOSED_REMOTE)


_RESPONSE = [(":status", "200"), ("content-type", "application/grpc")]
_NO_STATUS = [("grpc-status", str(Status.UNKNOWN.value)), ("grpc-message", "the response ended without a status")]


# What a call begins with, and whether the last of that ends this side. Asked for when nothing is left to wait for.
Begin = Callable[[], tuple[Sequence[betterproto2.Message], bool]]


def nothing_yet() -> tuple[Sequence[betterproto2.Message], bool]:
    """Of a call whose first message comes later."""
    return (), False


class PeerStalled(GRPCError):
    """The peer took no data for `send_stall` seconds."""


class StreamRefused(StreamTerminatedError):
    """The server has done nothing for this call and says so (RFC 9113 section 8.7): it may be made again."""


class _Lazy:
    """An event that is made when it is first asked for: most never are."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, stream: H2Stream, owner: type) -> asyncio.Event:
        event = stream.__dict__[self._name] = asyncio.Event()
        return event


class H2Stream(base.Stream):
    """A stream that reads bounded messages and gives up on a peer that takes nothing."""

    connection: H2Connection
    _h2_connection: H2
    inbox: Inbox
    timeout: float | None = None  # server: seconds of the call's grpc-timeout
    is_call = False  # server: of a service that not everybody may use
    was_on_its_way = False  # server: its connection was told to go; its peer had not heard of that
    finished_by_peer = False  # client: the server has completed its response and wants no more of the request
    refused = False  # client: the server has said that it has not processed the call
    sent_at_once = 0  # client: messages that went out with the request's headers
    ended_at_once = False  # client: so did the end of this side
    given_up = False  # client: nothing is sent any more
    blocked_since: float | None = None  # a sender waits for the peer's window since then (monotonic)
    stalled = False
    rpc = Rpc("", "", "")  # server: what counts its messages; a client's counts for nobody
    began = 0.0  # server: monotonic
    status = ""  # server: the grpc-status that it was ended with
    _body: memoryview | None = None  # what the second recv_data of a message gives
    window_updated = _Lazy()
    headers_received = _Lazy()
    trailers_received = _Lazy()

    def __init__(
        self,
        connection: H2Connection,
        h2: H2,
        transport: Any,
        *,
        stream_id: int | None = None,
        wrapper: Any = None,
    ) -> None:
        # Not grpclib's: it makes a queue besides, which nobody uses here, and all the events.
        self.connection = connection
        self._h2_connection = h2
        self._transport = transport
        self.wrapper = wrapper
        self.headers = self.trailers = None
        if stream_id is not None:
            self.init_stream(stream_id, connection)

    def init_stream(self, stream_id: int, connection: base.Connection) -> None:
        self.id = stream_id
        settings = self.connection.settings
        window = ReceiveWindow(
            settings.stream_window,
            settings.max_window,
            self.connection.growth,
            self.connection.long_messages,
            self._credit,
        )
        self.inbox = Inbox(settings.message_limit, window, self.connection.inflating)

    def _credit(self, size: int) -> None:
        assert self.id is not None
        self.connection.credit_stream(self.id, size)

    async def send_request(
        self, headers: Any, end_stream: bool = False, *, _processor: Any, begin: Begin = nothing_yet
    ) -> Any:
        """Open the stream. Behind the headers, and in one write with them, goes what `begin` gives, as much of that as
        the peer's window takes now.
        """
        if self._h2_connection.remote_settings.max_concurrent_streams == 0:
            raise StreamRefused("the server takes no calls on this connection")
        h2, places = self._h2_connection, self.connection.places
        called = False
        try:
            while True:
                await self.connection.write_ready.wait()
                try:
                    stream_id, frames = h2.open_stream(headers, end=end_stream)
                    break
                except TooManyStreamsError:
                    called = False
                    await places.wait()
                    called = True
        except BaseException as exc:
            if called:
                places.give()  # the next one has it
            if not isinstance(exc, ProtocolError):
                raise
            raise StreamRefused(f"the connection takes no more calls: {exc}") from None
        self.init_stream(stream_id, self.connection)
        release = _processor.register(self)
        if not self.connection.alive:  # it ended while this stream waited to be opened
            release()
            raise StreamTerminatedError("the connection ended before the call began")
        try:
            with self.connection.joined():
                self._transport.write(frames)
                self.connection.headers_send_process()
                self._begin(*begin())
        except BaseException:
            self.reset_now(ErrorCodes.CANCEL)
            release()
            raise
        return release

    def _begin(self, messages: Sequence[betterproto2.Message], end: bool) -> None:
        for message in messages:
            last = end and self.sent_at_once == len(messages) - 1
            if not self.send_now(encode_pieces(message), end=last):
                return
            self.sent_at_once += 1
            self.ended_at_once = last

    async def send_headers(self, headers: Any, end_stream: bool = False) -> None:
        if end_stream:
            self.status = dict(headers).get("grpc-status", "")
        await self.connection.write_ready.wait()
        h2 = self._h2_connection
        if h2.state_machine.state is ConnectionState.CLOSED:  # h2 would take it for our error
            raise StreamTerminatedError("the connection has ended")
        block = CODED.get(tuple(headers))
        if block is None or h2.encoder.table_size_changes:  # a new size must be said first (RFC 7541 section 4.2)
            return await super().send_headers(headers, end_stream)
        assert self.id is not None
        stream = h2.streams.get(self.id)
        if stream is None:
            raise StreamClosedError(self.id)
        h2.state_machine.process_input(ConnectionInputs.SEND_HEADERS)
        stream.state_machine.process_input(StreamInputs.SEND_HEADERS)
        if end_stream:
            stream.state_machine.process_input(StreamInputs.SEND_END_STREAM)
        self._transport.write(headers_head(len(block), self.id, end=end_stream) + block)
        self.connection.headers_send_process()

    @property
    def came(self) -> int:
        """Changes as payload comes, however little; of a frame under way also what the system keeps for now
        (`Socket.wait_for`).
        """
        return self.inbox.received + (self.connection.unread if self.inbox.owed > 0 else 0)

    async def recv_data(self, size: int) -> Any:
        # grpclib reads a prefix and then a body; both are ready when the first is asked for.
        if self._body is not None:
            body, self._body = self._body, None
            return body
        message = await self.inbox.read()
        if message is None:
            return b""
        self._body = message
        self.rpc.received += 1
        return struct.pack(">BL", 0, len(message))

    async def send_message(self, pieces: Sequence[bytes], *, end: bool = False) -> None:
        """Send one message, given as pieces to be sent one after the other; with `end`, end this side.

        Waits for the peer's window and for this sender's turn. Raises StreamTerminatedError or StreamClosedError when
        the call is over, PeerStalled when the peer took nothing for `send_stall` seconds. Cancelled in the middle of
        the message, it resets the stream. This is an asyncio-flavored function.
        """
        size = sum(map(len, pieces))
        prefix = struct.pack(">BL", 0, size)
        await self._send_whole([prefix, *pieces], PREFIX + size, end=end)

    def send_now(self, pieces: Sequence[bytes], *, end: bool = False) -> bool:
        """As `send_message`, of one that has to wait for nothing; else False, and nothing was sent."""
        turns, size = self.connection.turns, PREFIX + sum(map(len, pieces))
        may = turns.free or (size <= SMALL and turns.has_credit and self.connection.has_room)
        if not may or size > _AT_ONCE or size > self._window():
            return False
        prefix = struct.pack(">BL", 0, size - PREFIX)
        self._send_frame(collections.deque(memoryview(piece) for piece in (prefix, *pieces)), size, end=end)
        turns.next()
        self.rpc.sent += 1
        return True

    def joined(self) -> contextlib.AbstractContextManager[None]:
        """Have what is sent in the block go out in one write, where it can go out at all without a wait."""
        connection = self.connection
        if not connection.alive or not connection.write_ready.is_set():
            return contextlib.nullcontext()
        return connection.joined()

    async def send_data(self, data: bytes, end_stream: bool = False) -> None:
        """What grpclib's own stubs send by: a message with its prefix. Else as `send_message`."""
        await self._send_whole([data], len(data), end=end_stream)

    async def _send_whole(self, pieces: Sequence[bytes], size: int, *, end: bool) -> None:
        rest = collections.deque(memoryview(piece) for piece in pieces)
        try:
            await self._send(rest, size, small=size <= SMALL, end=end)
            self.rpc.sent += 1
        except BaseException:
            if 0 < sum(map(len, rest)) < size:
                self.reset_now(ErrorCodes.CANCEL)  # nothing may follow half a message
            raise
        finally:
            self.blocked_since = None

    async def _send(self, rest: collections.deque[memoryview], left: int, *, small: bool, end: bool) -> None:
        turns, unbroken = self.connection.turns, 0
        while True:
            if not turns.free and not (small and turns.has_credit and self.connection.has_room):
                await turns.wait(self, small=small)
                unbroken = 0
            try:
                window = self._window()
                if window > 0:
                    size = min(window, left)
                    self._send_frame(rest, size, end=end and size == left)
                    left -= size
                    unbroken += size
            finally:
                turns.next()
            if not left:
                return
            if window <= 0:
                await self._wait_for_window()
                unbroken = 0
            elif unbroken > _SLICE:
                await let_others_run()
                unbroken = 0

    def _window(self) -> int:
        """How many bytes the next frame may have. Raises where nothing can be sent any more."""
        if self.finished_by_peer:
            raise StreamTerminatedError("the server has finished the call")
        if self.given_up:
            raise StreamTerminatedError("the call has ended")
        if not self.connection.alive:
            raise StreamTerminatedError("the connection has ended")
        assert self.id is not None
        stream = self._h2_connection.streams.get(self.id)
        if stream is None or stream.state_machine.state not in SENDING:
            raise StreamClosedError(self.id)
        h2 = self._h2_connection
        return min(
            stream.outbound_flow_control_window,
            h2.outbound_flow_control_window,
            h2.max_outbound_frame_size,
            self.connection.settings.max_frame,
        )

    def _send_frame(self, rest: collections.deque[memoryview], size: int, *, end: bool) -> None:
        """One DATA frame with the first `size` bytes of `rest`, which lose them. Nothing is copied that is large."""
        assert self.id is not None
        h2 = self._h2_connection
        stream = h2.streams[self.id]
        buffers = [memoryview(data_head(size, self.id, end=end))]
        left = size
        while left:
            piece = rest.popleft()
            if len(piece) > left:
                rest.appendleft(piece[left:])
                piece = piece[:left]
            left -= len(piece)
            buffers.append(piece)
        stream.outbound_flow_control_window -= size
        h2.outbound_flow_control_window -= size
        if not h2.outbound_flow_control_window:
            self.connection.starve()
        self.connection.owed = min(self.connection.owed + size, _MOST_OWED)
        if end:
            h2.state_machine.process_input(ConnectionInputs.SEND_DATA)
            stream.state_machine.process_input(StreamInputs.SEND_END_STREAM)
        self.connection.write(buffers)
        self.connection.data_send_process()

    async def _wait_for_window(self) -> None:
        """Wait for the stream's own window; the connection's is a matter of turns."""
        assert self.id is not None
        self.window_updated.clear()
        if self.blocked_since is None:
            self.blocked_since = time.monotonic()
        await self.window_updated.wait()
        if self.stalled:
            raise PeerStalled(Status.UNAVAILABLE, "the peer does not take data")
        stream = self._h2_connection.streams.get(self.id)
        if stream is None or stream.outbound_flow_control_window > 0:  # new settings wake too
            self.blocked_since = None

    @property
    def owes_an_end(self) -> bool:
        """Whether the peer still waits for this side to end."""
        stream = self._h2_connection.streams.get(self.id or 0)
        return self.connection.alive and stream is not None and stream.state_machine.state in SENDING

    def stall(self) -> None:
        """End the stream, and a sender's wait for the window."""
        self.stalled = True
        self.window_updated.set()
        self.reset_now(ErrorCodes.CANCEL)

    def reset_now(self, code: ErrorCodes) -> None:
        """Send RST_STREAM, where the stream has not ended."""
        if self.id is not None and self.connection.alive and self.closable:
            self.reset_nowait(code)

    async def end(self) -> None:
        await self.connection.write_ready.wait()  # before the question: meanwhile the server may finish the call
        if not self.finished_by_peer:
            await super().end()

    def __ended__(self) -> None:
        self.inbox.eof()
        if self.connection.client and self.trailers is None:
            # Else grpclib waits for them for ever.
            self.headers, self.trailers = self.headers or [*_RESPONSE, *_NO_STATUS], _NO_STATUS
            self.headers_received.set()
            self.trailers_received.set()

    def __terminated__(self, reason: str) -> None:
        if self.connection.client and self.inbox.ended:
            self.finish()  # a proxy that drains closes the connection right behind its last response
        else:
            self._fail(StreamTerminatedError(reason))

    def finish(self) -> None:
        """Client: nothing more is sent; the response has arrived whole and can still be read."""
        self.finished_by_peer = True
        # Both wake a blocked sender.
        self.window_updated.set()
        self.connection.turns.skip(self)

    def give_up(self, error: Exception) -> None:
        """Client: wake all who wait for this stream; nothing more comes, because of `error`, and nothing is sent."""
        self.given_up = True
        if self.id is None:
            return  # not opened yet
        self.inbox.fail(error)
        for event in (self.headers_received, self.trailers_received, self.window_updated):
            event.set()
        self.connection.turns.skip(self)

    def refuse(self, why: str) -> None:
        """Client: end the call as one that was not processed, whatever becomes of the connection."""
        self.refused = True
        self._fail(StreamRefused(why))

    def _fail(self, error: StreamTerminatedError) -> None:
        """End the call with `error`, unless it has one already, whatever it is doing."""
        if self.wrapper is not None and self.wrapper._error is None:
            self.wrapper._error = error  # if it goes on before it is woken, that ends it as well
            self.connection.wakes.add(functools.partial(self.wrapper.cancel, error))


# Of a call, on either side


def expect(call: Call, size: int) -> None:
    """So many bytes are about to come: as many of them may come at once as one call may have."""
    cast(H2Stream, call._stream).inbox.window.widen(size)


def came(call: Call) -> int:
    """As `H2Stream.came`."""
    return cast(H2Stream, call._stream).came


def held(call: Call) -> int:
    """Bytes that its connection was given and the peer's system has not acknowledged."""
    return cast(H2Stream, call._stream).connection.waiting
