"""One connection: bytes in, frames out, and the watch over both; hardened for the open network.

All settings go into the first SETTINGS frame; a GOAWAY is sent before a connection is closed for a protocol error; no
exception of one connection leaves it. Memory per connection: see `window`, plus the headers of each stream
(max_headers), the write buffer (twice `WRITE_BUFFER`, and the answers to one read), a frame of `MAX_CONTROL_FRAME`, a
read (512 KiB) where frames come too fast, a header table of 4 KiB in each direction, and how streams ended (1.3 MiB,
see `H2`). Of the peer's settings only those are kept that h2 knows.

Written against grpclib 0.4.9 and h2 4.4: the private names used are listed in tests/test_contract.py.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import socket
import time
from typing import TYPE_CHECKING, cast

import grpclib.protocol as base
from grpclib.config import Configuration
from h2.config import H2Configuration
from h2.connection import ConnectionState
from h2.errors import ErrorCodes
from h2.events import PingAckReceived, RemoteSettingsChanged, StreamReset
from h2.exceptions import InvalidBodyLengthError, ProtocolError
from h2.settings import SettingCodes, Settings
from h2.stream import H2Stream as BaseH2Stream
from h2.stream import StreamInputs

from aipod.config import KIB, MIB, Config
from aipod.transport.connection import WRITE_BUFFER, H2Connection, Processor
from aipod.transport.frames import (
    HEAD,
    HEADERS,
    MAX_CONTROL_FRAME,
    SETTINGS,
    WINDOW_UPDATE,
    FrameReader,
    Take,
    empty_data,
)
from aipod.transport.http2 import H2, RECEIVING
from aipod.transport.inbox import Inbox
from aipod.transport.limits import Bucket
from aipod.transport.scratch import READ_FRAMES, READ_PAYLOAD, scratch
from aipod.transport.stream import H2Stream
from aipod.transport.wakes import Wakes

log = logging.getLogger("aipod.transport")

# So many DATA frames of fewer bytes than that count as one: 20,000 a second cost a fifth of a core, and more calls than
# come with them nobody could serve.
_SMALL_PER_FRAME, _SMALL_DATA = 20, 64
# Bytes sent for which a peer may say once that it took them. With windows of 64 KiB, as they are where nothing else was
# said, stock clients do so for each quarter of them at most, twice: for the stream and for the connection.
_SENT_PER_CREDIT = 4 * KIB
# The PING behind a first GOAWAY: who answers it has heard that one (`server.ServerProtocol.leave`).
FAREWELL = b"farewell"
# A DATA frame for nobody that is shorter costs more for being a frame than for its payload.
_SMALL_FOR_NOBODY = 1 * KIB
_REST = 0.1  # seconds without reading where frames come too fast, at least; at most one
# Streams to which a change in SETTINGS costs as much as a frame; and bytes of them that do.
_STREAMS_PER_FRAME = 20
_SETTINGS_PER_FRAME = 128
# A peer may open streams before it has seen our SETTINGS. h2 ends the connection above its limit, so h2 gets this
# many times ours and the server refuses the excess stream by stream.
STREAM_SLACK = 4
# Bytes that a peer may have on their way when its connection is closed.
_UNWANTED = 1 * MIB
# PINGs that measure round trips: their content, and the seconds between them while no window grows (first, most).
_MEASURE = b"roundtrp"
_PAUSES = (0.1, 10.0)


def configuration(config: Config) -> Configuration:
    """grpclib's settings for `config`: PINGs in both directions, with and without calls, and never a strike."""
    return Configuration(
        _keepalive_time=config.ping_interval,
        _keepalive_timeout=config.ping_timeout,
        _keepalive_permit_without_calls=True,
        _http2_max_pings_without_data=0,
        # Its default of 300 s would let only one PING in five minutes out (grpclib/protocol.py, _is_need_send_ping).
        _http2_min_sent_ping_interval_without_data=min(1.0, config.ping_interval),
        http2_stream_window_size=config.stream_window,
        http2_connection_window_size=config.connection_window,
    )


def h2_configuration(*, client: bool) -> H2Configuration:
    # latin-1 never fails to decode: a header value that is not ASCII is then refused with a status, where 'ascii'
    # raised UnicodeDecodeError out of the connection (it passes through nginx).
    return H2Configuration(
        client_side=client,
        header_encoding="latin-1",
        # The server looks at them itself (`headers.check_headers`): h2 would end the connection, with its other calls.
        validate_inbound_headers=False,
        normalize_inbound_headers=False,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
    )


if TYPE_CHECKING:
    from grpclib.protocol import H2Protocol as _Grpclib
else:  # it is an asyncio.Protocol, which uvloop would give bytes instead of asking for a buffer, whatever else it is
    _Grpclib = object


class H2Protocol(asyncio.BufferedProtocol, _Grpclib):
    """One connection, either side. asyncio calls it; nothing in it waits."""

    connection: H2Connection
    processor: Processor
    transport: asyncio.Transport

    def __init__(self, handler: base.AbstractHandler, config: Config, wakes: Wakes, *, client: bool) -> None:
        grpc = configuration(config)
        self.handler = handler
        self.config = grpc.__for_client__() if client else grpc.__for_server__()
        self.h2_config = h2_configuration(client=client)
        self.settings = config
        self._wakes = wakes
        self._rest = b""  # the beginning of a frame; more where the reader is held
        self._into: Inbox | None = None  # where the payload under way goes
        self._straight: Inbox | None = None  # where the read under way goes
        self._small = 0  # DATA frames that were small
        self._read_size = READ_FRAMES
        self._frames = Bucket(config.frame_rate, config.frame_rate)
        self._resting: asyncio.TimerHandle | None = None
        self._block = 0  # bytes of the header block under way
        self._unwanted = 0  # bytes that came after the end
        self._choked = False  # not read from: too much waits to be written
        self.greeted = asyncio.Event()  # the peer's SETTINGS have come; or nothing more will
        self.ended = asyncio.Event()  # the socket is closed
        self.lost: BaseException | None = None  # why it was
        self.instead = b""  # what the peer began with in the place of HTTP/2
        self._watch: asyncio.TimerHandle | None = None
        self.last_busy = time.monotonic()  # when there was a stream, as far as is known
        self._measuring = False  # a PING that measures a round trip is under way
        self._next_ping = self._pause = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            # Whatever protocol number the socket was made with: asyncio and grpclib set it for IPPROTO_TCP alone.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = self.h2_config.client_side
        self.h2 = self._open_h2(client)
        self.connection = H2Connection(
            self.h2, self.transport, self._wakes, config=self.config, settings=self.settings, client=client
        )
        self.connection.flush()
        self.connection.initialize()
        self.processor = Processor(self.handler, self.connection)
        self._reader = FrameReader(self, self.settings.max_frame, preface=not client)
        self._began = time.monotonic()
        self._watch_again()
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self.connection.abort("the peer did not choose h2 by ALPN (RFC 9113 section 3.2)")

    def _open_h2(self, client: bool) -> H2:
        h2 = H2(self.h2_config)
        values = {
            SettingCodes.INITIAL_WINDOW_SIZE: self.settings.stream_window,
            SettingCodes.MAX_FRAME_SIZE: self.settings.max_frame,
            SettingCodes.MAX_HEADER_LIST_SIZE: self.settings.max_headers,
            SettingCodes.MAX_CONCURRENT_STREAMS: self.settings.stream_limit,
        }
        if client:
            values[SettingCodes.ENABLE_PUSH] = 0
        h2.local_settings = Settings(client=client, initial_values=values)
        h2.max_inbound_frame_size = self.settings.max_frame
        h2.decoder.max_header_list_size = self.settings.max_headers
        h2.initiate_connection()
        if not client:
            allowed = self.settings.stream_limit * STREAM_SLACK
            h2.local_settings._settings[SettingCodes.MAX_CONCURRENT_STREAMS] = collections.deque([allowed])
        h2.increment_flow_control_window(self.settings.connection_window - 65535)
        return h2

    # Reading

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next read goes: into its message, or behind the beginning of a frame that the last one left."""
        room = self._into.room(self._reader.owed) if self._into is not None and not self._rest else None
        self._straight = self._into if room is not None else None
        if room is not None:
            return room
        view = scratch.view
        kept = len(self._rest)
        view[:kept] = self._rest
        return view[kept : kept + self._read_size]

    def buffer_updated(self, nbytes: int) -> None:
        """`nbytes` have been read."""
        if not self.connection.alive:
            self._unwanted += nbytes
            if self._unwanted > _UNWANTED:
                self.transport.abort()
            return
        self.connection.read += nbytes
        if self._straight is not None:
            self._straight.filled(nbytes)
            self._reader.passed(nbytes)
            self._read_size = READ_FRAMES  # what follows is the head of a frame: the less of it is copied, the better
            self._deal_with(scratch.view[:0])
            return
        end = len(self._rest) + nbytes
        view = scratch.view[:end]
        # Payload fills a read; a flood of small frames sets the size back (`control`).
        if nbytes == self._read_size:
            self._read_size = min(2 * self._read_size, READ_PAYLOAD)
        self._deal_with(view)

    def _deal_with(self, view: memoryview) -> None:
        try:
            left = self._reader.feed(view)
            self._rest = bytes(view[len(view) - left :])
            self.processor.wake_senders()
            self.connection.flush()
            self.connection.wait_for(min(self._reader.owed, READ_PAYLOAD))
        except ProtocolError as exc:
            if not self.greeted.is_set():
                self.instead = bytes(view[:5])
            log.info("protocol error: %s", exc)
            self._end(exc.error_code)
        except Exception:
            log.exception("a frame that the HTTP/2 layer could not handle")
            self._end(ErrorCodes.INTERNAL_ERROR)
        else:
            if self.connection.alive and self.transport.get_write_buffer_size() > 2 * WRITE_BUFFER:
                # What is answered to frames is not held back by any window: stop reading until the peer reads.
                self._choked = True
                self.transport.pause_reading()

    def begin_data(self, stream_id: int, length: int, size: int, end: bool) -> Take | None:
        """A DATA frame begins: account for it, and say where its payload goes (`frames.Receiver`)."""
        h2 = self.h2
        self._small += length < _SMALL_DATA
        if (size == 0 and not end) or self._small == _SMALL_PER_FRAME:
            self._small = 0
            self.count_frames()
        stream = cast(H2Stream | None, self.processor.streams.get(stream_id))
        state = h2.streams.get(stream_id)
        if stream is None or state is None or state.state_machine.state not in RECEIVING or self._in_headers:
            # h2 knows what such a frame means; its payload goes nowhere.
            if 0 < size < _SMALL_FOR_NOBODY:
                self.count_frames()
            self._feed(empty_data(stream_id, end))
            self._into = None
            h2._inbound_flow_control_window_manager.window_consumed(length)
            self.connection.arrived(length)
            return None
        h2._inbound_flow_control_window_manager.window_consumed(length)
        state._inbound_window_manager.window_consumed(length)
        self.connection.arrived(length)
        self._measure()
        if not self._fits(state, size, False):
            self._into = None
            return None
        self._into = stream.inbox
        stream.inbox.arrived(length, size)
        return stream.inbox.feed

    def end_data(self, stream_id: int) -> None:
        """The last DATA frame of a stream is complete."""
        stream = self.h2.streams.get(stream_id)
        if stream is None or stream.state_machine.state not in RECEIVING:
            return  # reset since the frame began
        if not self._fits(stream, 0, True):
            return
        for event in stream.state_machine.process_input(StreamInputs.RECV_END_STREAM):
            self.processor.process(event)
        self._reader.closed = not self.connection.alive

    def _fits(self, stream: BaseH2Stream, size: int, end: bool) -> bool:
        """Whether `size` more bytes agree with a content-length; else the stream ends (RFC 9113 section 8.1.1)."""
        try:
            stream._track_content_length(size, end)
        except InvalidBodyLengthError:
            self.processor.reset_stream(stream.stream_id, "the payload is not as long as content-length says")
            return False
        return True

    def _measure(self) -> None:
        """Send a PING where it is time to: when its answer comes, a round trip has passed (`window`)."""
        if not self._measuring and time.monotonic() >= self._next_ping:
            self._measuring = True
            self.h2.ping(_MEASURE)
            self.connection.flush()

    def _measured(self) -> None:
        self._measuring = False
        grown = [cast(H2Stream, stream).inbox.window.sample() for stream in self.processor.streams.values()]
        # At once while windows grow; else seldom and seldomer.
        self._pause = 0.0 if any(grown) else min(max(2 * self._pause, _PAUSES[0]), _PAUSES[1])
        self._next_ping = time.monotonic() + self._pause

    def control(self, frame: bytes) -> None:
        """Any other frame, or a piece of the preface."""
        self._read_size = READ_FRAMES
        if len(frame) >= HEAD and frame[3] != HEADERS and not self._is_credit(frame):
            count = 1
            if frame[3] == SETTINGS:  # a new window is reckoned for every stream
                count += len(self.h2.streams) // _STREAMS_PER_FRAME + len(frame) // _SETTINGS_PER_FRAME
            self.count_frames(count)
        # h2 bounds the frames of a header block, not their bytes.
        self._block = self._block + len(frame) if self._in_headers else len(frame)
        if self._block > MAX_CONTROL_FRAME + HEAD:
            raise _HeadersTooLong("a header block in too many bytes")
        self._feed(frame)

    def _is_credit(self, frame: bytes) -> bool:
        """Whether it is a WINDOW_UPDATE for what was sent: an honest peer has no reason for more of them."""
        if frame[3] != WINDOW_UPDATE or self.connection.owed < _SENT_PER_CREDIT:
            return False
        self.connection.owed -= _SENT_PER_CREDIT
        return True

    @property
    def _in_headers(self) -> bool:
        return bool(self.h2.incoming_buffer._headers_buffer)

    def _feed(self, data: bytes) -> None:
        for event in self.h2.take(data):
            if isinstance(event, RemoteSettingsChanged):
                self.greeted.set()
            elif isinstance(event, PingAckReceived) and event.ping_data == _MEASURE:
                self._measured()
            elif isinstance(event, PingAckReceived) and event.ping_data == FAREWELL:
                asyncio.get_running_loop().call_soon(self.drain)  # after what has come with it
            if isinstance(event, StreamReset):
                self.connection.count_reset()
            self.processor.process(event)
        self._reader.closed = not self.connection.alive

    def count_frames(self, count: int = 1) -> None:
        """Count frames that are no payload; where they are too many, take nothing more for a while."""
        self._read_size = READ_FRAMES
        if not self._frames.take(count) and self._resting is None:
            self._reader.held = True
            self.transport.pause_reading()
            rest = max(_REST, self._frames.debt)
            self._resting = asyncio.get_running_loop().call_later(rest, self._rested)

    def _rested(self) -> None:
        self._resting = None
        self._reader.held = False
        self._go_on()

    def _go_on(self) -> None:
        """Deal with what was held, then read again; unless there is still a reason not to."""
        if self._is_stopped:
            return
        self._deal_with(memoryview(self._rest))
        if not self._is_stopped:
            self.transport.resume_reading()

    @property
    def _is_stopped(self) -> bool:
        return self._resting is not None or self._choked or not self.connection.alive

    def _end(self, code: ErrorCodes) -> None:
        """Send GOAWAY and close."""
        self._reader.closed = True
        if self.connection.alive:
            self.connection.flush()
            if self.h2.state_machine.state is not ConnectionState.CLOSED:  # else h2 has said it
                self.connection.goaway(code)
            self.processor.close("protocol error")

    # Writing

    def pause_writing(self) -> None:
        """The socket takes no more for now."""
        if self.connection.alive:
            self.connection.pause_writing()

    def resume_writing(self) -> None:
        """The socket takes data again."""
        self.connection.resume_writing()
        if self._choked:
            self._choked = False
            self._go_on()

    # Watching

    def _watch_again(self) -> None:
        self._watch = asyncio.get_running_loop().call_later(min(1.0, self.settings.send_stall / 4), self._look)

    def _look(self) -> None:
        """Once a second: whether the peer still does its part."""
        now, settings = time.monotonic(), self.settings
        age = now - self._began
        if self.processor.streams:
            self.last_busy = now
        if not self.greeted.is_set() and age > settings.handshake_timeout:
            self.connection.abort(f"no HTTP/2 SETTINGS within {settings.handshake_timeout:g} s")
        elif self.connection.check_stall(now):
            self.connection.abort("the peer does not read")
        elif 0 < settings.max_age < age - settings.max_age_grace:
            self.connection.abort("its calls have not ended within max_age and max_age_grace")
        elif 0 < settings.max_age < age or 0 < settings.max_idle < now - self.last_busy:
            self.leave()
        if not self.connection.alive:
            return
        for stream in self.processor.streams.values():
            blocked = cast(H2Stream, stream).blocked_since
            if blocked is not None and now - blocked > settings.send_stall:
                cast(H2Stream, stream).stall()
        self._watch_again()

    def leave(self) -> None:
        """End the connection when it suits its peer."""
        self.drain()

    def drain(self) -> None:
        """Send a graceful GOAWAY: open streams finish, then the connection closes. What comes is refused."""
        if self.connection.alive and not self.processor.draining:
            self.processor.draining = True
            self.connection.goaway()
            self.processor.close_if_drained()

    def connection_lost(self, exc: BaseException | None) -> None:
        for timer in (self._watch, self._resting):
            if timer is not None:
                timer.cancel()
        self._reader.closed = True
        self.lost = exc
        self.greeted.set()
        self.ended.set()
        self.processor.close(reason="Connection lost")


class _HeadersTooLong(ProtocolError):
    error_code = ErrorCodes.ENHANCE_YOUR_CALM
