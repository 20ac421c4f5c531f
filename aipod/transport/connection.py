"""What a connection does between its streams and its socket, either side.

H2Connection  writes in turns; aborts instead of closing a dead peer (close() waits for a write buffer that nobody
              reads)
Processor     unknown frames and events are ignored (RFC 9113 section 5.5); RST_STREAM(NO_ERROR) after a complete
              response is no error (section 8.1)
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import grpclib.protocol as base
from grpclib.config import Configuration
from grpclib.exceptions import StreamTerminatedError
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RequestReceived,
    ResponseReceived,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from hyperframe.frame import GoAwayFrame

from aipod.config import KIB, MIB, Config
from aipod.transport.headers import Headers, apart, response_is_readable, trailers_are_readable
from aipod.transport.http2 import H2
from aipod.transport.limits import Bucket
from aipod.transport.socket import Socket
from aipod.transport.stream import SMALL, H2Stream
from aipod.transport.turns import Places, Turns
from aipod.transport.wakes import Wakes
from aipod.transport.window import Budget

log = logging.getLogger("aipod.transport")

# Small messages are written behind what the socket has not taken yet, up to here.
WRITE_BUFFER = 1 * MIB
# Where asyncio pauses those who write.
_HIGH_WATER = 64 * KIB
# The last stream that a GOAWAY names: none is said not to have been processed. grpcio's core sends such a call again by
# itself, and of one that has crossed the GOAWAY it loses messages (1 in 100 to 1000, seen in 1.66 to 1.85): the server
# sees a request that is whole, and lacks its payload. What RST_STREAM refuses it tells its caller of.
_ANY_STREAM = 2**31 - 1


class TooManyResets(ProtocolError):
    """The peer resets streams, or makes this side reset them, faster than it may."""

    error_code = ErrorCodes.ENHANCE_YOUR_CALM


# Seconds in which the peer of a server that drains may close the connection itself when its last call has ended. nginx
# does at once; where it still has a PING to answer, it takes an end right behind the trailers for a lost call.
_PEER_FIRST = 0.5
# Looks at what has come, in the time for which the answer to a PING may keep everybody waiting.
_LOOKS = 8


class H2Connection(base.Connection):
    """A connection that can be aborted, and whose peer may ping as often as it likes."""

    def __init__(
        self,
        h2: H2,
        transport: asyncio.Transport,
        wakes: Wakes,
        *,
        config: Configuration,
        settings: Config,
        client: bool,
    ) -> None:
        self._socket = Socket(transport, lingers=not client)
        super().__init__(h2, cast(asyncio.Transport, self._socket), config=config)
        self.settings = settings
        self.client = client
        self.wakes = wakes
        self.turns = Turns()
        self.places = Places()
        self.growth = Budget(settings.connection_window)
        self.long_messages = Budget(settings.message_limit)
        self.inflating = Budget(1)
        self._resets = Bucket(settings.reset_rate, settings.reset_burst)
        self.paused_since: float | None = None  # the socket takes nothing since then (monotonic)
        self._taken = 0  # what the last look found that the peer had taken
        self.starved_since: float | None = None  # its window has no room since then, and somebody waits (monotonic)
        self.owed = 0  # bytes that were sent, for which the peer may send WINDOW_UPDATE frames
        self.read = 0  # bytes
        self._arrived = 0  # of them, to give back to the connection's window

    def create_stream(self, *, stream_id: int | None = None, wrapper: Any = None) -> H2Stream:
        if not self.alive:  # it ended between being chosen and being used
            raise StreamTerminatedError("the connection has ended")
        h2 = cast(H2, self._connection)
        return H2Stream(self, h2, self._transport, stream_id=stream_id, wrapper=wrapper)

    @property
    def alive(self) -> bool:
        return hasattr(self, "_transport")

    @property
    def waiting(self) -> int:
        """Bytes that the peer's system has not acknowledged."""
        return self._socket.waiting

    @property
    def unread(self) -> int:
        """As `Socket.unread`."""
        return self._socket.unread

    @property
    def came(self) -> int:
        """A number that changes when something comes from the peer, also a part of what is waited for."""
        return self.read + self.unread

    # Receiving

    def wait_for(self, size: int) -> None:
        """As `Socket.wait_for`."""
        self._socket.wait_for(size)

    def arrived(self, size: int) -> None:
        """DATA of `size` bytes came: its room in the connection's window is given back, in halves of the window."""
        self._arrived += size
        if self._arrived * 2 >= self.settings.connection_window:
            self._connection.increment_flow_control_window(self._arrived)
            self._arrived = 0

    def count_reset(self) -> None:
        """A stream was reset by the peer, or for what it did. Raises TooManyResets."""
        if not self._resets.take():
            raise TooManyResets("too many streams were opened and reset")

    def credit_stream(self, stream_id: int, size: int) -> None:
        """The peer may send `size` more bytes on a stream."""
        stream = self._connection.streams.get(stream_id)
        if self.alive and stream is not None and stream.open:
            self._connection.increment_flow_control_window(size, stream_id)
            self.flush()

    def ack(self, stream_id: int, size: int) -> None:
        """Nothing: what arrives is given back by `arrived` and by the stream's window."""

    # Sending

    @property
    def has_room(self) -> bool:
        """A small message may be written at once."""
        return not self.alive or self._transport.get_write_buffer_size() < WRITE_BUFFER

    def joined(self) -> contextlib.AbstractContextManager[None]:
        """As `Socket.joined`."""
        return self._socket.joined()

    def flush(self) -> None:
        if not self.is_closing():
            super().flush()

    def write(self, buffers: list[memoryview]) -> None:
        """Hand `buffers` to the socket as they are; they must not change any more."""
        if self.is_closing():
            return  # writelines() would register the descriptor again, which the next connection may have (3.12, 3.13)
        if sys.version_info >= (3, 12):
            self._transport.writelines(buffers)  # sendmsg
            if self.paused_since is None and self._transport.get_write_buffer_size() > _HIGH_WATER:
                # Up to 3.12.8 and 3.13.1 writelines() does not pause its protocol (CVE-2024-12254); this does.
                self._transport.set_write_buffer_limits(_HIGH_WATER)
            return
        small = b""  # before 3.12 writelines joins everything; here only what is small
        for buffer in buffers:
            if len(buffer) <= SMALL:
                small += buffer
                continue
            self._transport.write(small)
            self._transport.write(buffer)
            small = b""
        if small:
            self._transport.write(small)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.turns.pause()
        self.paused_since = time.monotonic()
        self._taken = self._socket.taken

    def resume_writing(self) -> None:
        self.paused_since = None
        super().resume_writing()
        self.turns.resume()

    def starve(self) -> None:
        """The peer's window for the connection is used up."""
        self.turns.starve()
        self.starved_since = time.monotonic()

    def credited(self) -> None:
        """The peer has given the connection credit."""
        self.starved_since = None
        self.turns.feed()

    def check_stall(self, now: float) -> bool:
        """Whether the peer has taken nothing for `send_stall` seconds, though there is something for it.

        By its window, or because the socket is full.
        """
        if self.starved_since is not None:
            if not self.turns.awaited:
                self.starved_since = now
            if now - self.starved_since > self.settings.send_stall:
                return True
        if self.paused_since is None or not self.alive:
            return False
        taken = self._socket.taken
        if taken > self._taken:
            self.paused_since = now
        self._taken = taken
        return now - self.paused_since > self.settings.send_stall

    def goaway(self, code: ErrorCodes = ErrorCodes.NO_ERROR) -> None:
        """Announce the end; streams that come nevertheless are refused one by one (RFC 9113 section 8.7).

        Not h2's close_connection(), which forbids every later frame of open streams.
        """
        if not self.is_closing():
            frame = GoAwayFrame(0)
            frame.last_stream_id = _ANY_STREAM
            frame.error_code = int(code)
            self._transport.write(frame.serialize())

    def close(self) -> None:
        super().close()
        # Nobody else wakes those who wait to open a stream on it, or to write.
        self.told_to_go()
        self.turns.end(self.wakes)
        self.wakes.add(self.write_ready.set)

    def told_to_go(self) -> None:
        """No stream can be opened any more: those who wait for a place go elsewhere."""
        cast(H2, self._connection).told_to_go = True
        self.places.end(self.wakes)

    def abort(self, why: str) -> None:
        if self.alive:
            log.info("connection aborted: %s", why)
            self._transport.abort()

    def _ping(self) -> None:
        super()._ping()
        timer = self._close_by_ping_handler
        if timer is not None and not isinstance(timer, _PingTimer):
            timer.cancel()
            self._close_by_ping_handler = cast(Any, _PingTimer(self, self._config._keepalive_timeout))


class _PingTimer:
    """Aborts a connection from which nothing has come for `timeout` seconds, the answer to a PING for one.

    On a slow line that may wait for minutes behind data, which is a sign of life as well, and so are the PINGs of who
    waits for what proxies still hold (grpc-go counts all reads in the same way). Not what the peer takes: the system of
    a process that has stopped takes PINGs. grpclib's own timer would close(), and wait for a write buffer that nobody
    reads.
    """

    def __init__(self, connection: H2Connection, timeout: float) -> None:
        self._connection = connection
        self._step = timeout / _LOOKS
        self._came = connection.came
        self._quiet = 0  # looks that have found nothing new
        self._next = asyncio.get_running_loop().call_later(self._step, self._look)

    def _look(self) -> None:
        before, self._came = self._came, self._connection.came
        self._quiet = self._quiet + 1 if self._came == before else 0
        if self._quiet == _LOOKS:
            self._connection.abort("no answer to PING")
        else:
            self._next = asyncio.get_running_loop().call_later(self._step, self._look)

    def cancel(self) -> None:
        self._next.cancel()


class Processor(base.EventsProcessor):
    """grpclib's event table, without its habit of raising on what it does not know."""

    connection: H2Connection
    draining = False
    _closing: asyncio.TimerHandle | None = None
    _credited = False  # the connection's window has grown

    def close(self, reason: str = "Connection closed") -> None:
        """End the connection and all its streams, which hear of it in the next turns of the loop."""
        self.connection.close()
        if not hasattr(self, "processors"):
            return
        del self.processors  # as grpclib does: it refers to this
        self.handler.close()
        for stream in list(self.streams.values()):
            stream.__terminated__(reason)
            self.handler.cancel(stream)

    def process(self, event: Event) -> None:
        handle = getattr(self, "processors", {}).get(event.__class__)
        if handle is not None:
            handle(event)

    def process_request_received(self, event: RequestReceived) -> None:
        if self.connection.client:
            raise ProtocolError("a server has sent a request")
        super().process_request_received(event)

    def process_response_received(self, event: ResponseReceived) -> None:
        stream = cast(H2Stream | None, self.streams.get(event.stream_id or 0))
        if stream is not None:
            stream.inbox.encoding = dict(cast(Headers, event.headers)).get("grpc-encoding", "identity")
        self._take_headers(super().process_response_received, event, response_is_readable)

    def process_trailers_received(self, event: TrailersReceived) -> None:
        self._take_headers(super().process_trailers_received, event, trailers_are_readable)

    def _take_headers(self, take: Callable[[Any], None], event: Any, readable: Callable[[Headers], bool]) -> None:
        stream = self.streams.get(event.stream_id)
        event.headers = apart(event.headers)
        if stream is None or readable(event.headers):
            take(event)
            return
        self.reset_stream(event.stream_id, "the peer has sent headers that are malformed")

    def reset_stream(self, stream_id: int, why: str) -> None:
        """End one stream for an error that is its own. Raises TooManyResets."""
        self.connection.count_reset()
        stream = self.streams[stream_id]
        self.connection._connection.reset_stream(stream_id, ErrorCodes.PROTOCOL_ERROR)
        stream.__terminated__(why)
        self.handler.cancel(stream)

    def process_window_updated(self, event: WindowUpdated) -> None:
        if event.stream_id == 0:
            self._credited = True
        else:
            super().process_window_updated(event)

    def wake_senders(self) -> None:
        """At the end of a read: there may have been much credit for the connection in it, and many streams wait."""
        if self._credited:
            self._credited = False
            self.connection.credited()

    def process_data_received(self, event: DataReceived) -> None:
        """Nothing: h2 is shown no payload."""

    def process_stream_reset(self, event: StreamReset) -> None:
        stream = cast(H2Stream | None, self.streams.get(event.stream_id))
        client = self.connection.client
        if client and stream is not None and stream.inbox.ended and event.error_code == ErrorCodes.NO_ERROR:
            stream.finish()
            return
        if client and stream is not None and event.error_code == ErrorCodes.REFUSED_STREAM:
            stream.refuse("refused by the server: not processed")
            return
        super().process_stream_reset(event)

    def process_connection_terminated(self, event: ConnectionTerminated) -> None:
        if event.error_code != ErrorCodes.NO_ERROR:
            super().process_connection_terminated(event)
            return
        self.draining = True
        self.connection.told_to_go()
        for stream_id, stream in list(self.streams.items()):
            if stream_id > (event.last_stream_id or 0):
                cast(H2Stream, stream).refuse("refused by GOAWAY: not processed")
        self.close_if_drained()

    def register(self, stream: base.Stream) -> Any:
        assert stream.id is not None
        self.streams[stream.id] = stream
        return functools.partial(self._release, cast(H2Stream, stream))

    def _release(self, stream: H2Stream) -> None:
        """Forget a stream; nothing the second time."""
        assert stream.id is not None
        if self.streams.pop(stream.id, None) is not None:
            stream.inbox.close()
            cast(H2, self.connection._connection).forget(stream.id)
            self.connection.places.give()
            self.close_if_drained()

    def close_if_drained(self) -> None:
        if not self.draining or self.streams or not self.connection.alive:
            return
        if self.connection.client:
            self.connection.close()
        elif self._closing is None:
            self._closing = asyncio.get_running_loop().call_later(_PEER_FIRST, self._close_now)

    def _close_now(self) -> None:
        self._closing = None
        if not self.streams and self.connection.alive:
            self.connection.close()
