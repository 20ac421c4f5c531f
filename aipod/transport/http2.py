"""What both sides of a connection share: settings, frames, flow control and messages, hardened.

Subclasses of grpclib's and h2's own classes; each overrides one thing that strangers would otherwise break:

  _H2           no repr() of DATA frames; a graceful GOAWAY lets open streams finish (h2 would forbid every later send)
  H2Stream      message length checked before the body is read; gzip and deflate messages, bounded; sends that a peer
                does not take for `send_stall` seconds end the call
  H2Connection  aborts instead of closing a dead peer (close() waits for a write buffer that nobody reads)
  Processor     unknown frames and events are ignored (RFC 9113 section 5.5); RST_STREAM(NO_ERROR) after a complete
                response is no error (section 8.1)
  H2Protocol    all settings in the first SETTINGS frame; GOAWAY is sent before a connection is closed for a protocol
                error; no exception of one connection leaves it

Written against grpclib 0.4.9 and h2 4.4: the private names used are listed in tests/test_contract.py.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import struct
import zlib
from typing import Any, cast

import grpclib.protocol as base
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from h2.config import H2Configuration
from h2.connection import H2Connection as BaseH2
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, Event, StreamReset
from h2.exceptions import NoAvailableStreamIDError, ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import DataFrame, Frame, GoAwayFrame

from aipod.config import KIB, Config
from aipod.transport.codec import BadMessage

log = logging.getLogger("aipod.transport")

# Per-frame work in Python dominates: 16 KiB frames carry 0.6 GB/s where 512 KiB ones carry 1.6 and more.
MAX_FRAME = 512 * KIB
HEADER_LIST = 64 * KIB
# A peer may open streams before it has seen our SETTINGS. h2 ends the connection above its limit, so h2 gets this
# many times ours and the server refuses the excess stream by stream.
STREAM_SLACK = 4


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
        validate_inbound_headers=not client,
        normalize_inbound_headers=False,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
    )


class PeerStalled(GRPCError):
    """The peer took no data for `send_stall` seconds."""


class StreamRefused(StreamTerminatedError):
    """The server has done nothing for this call and says so (RFC 9113 section 8.7): it may be made again."""


class _QuietDataFrame(DataFrame):
    """A DATA frame whose repr() is cheap: h2 builds one per frame for a trace log, and hexlifies the whole body."""

    __repr__ = object.__repr__


class _H2(BaseH2):
    told_to_go = False  # the peer has sent GOAWAY: it would ignore a new stream (RFC 9113 section 6.8)

    def __init__(self, config: H2Configuration) -> None:
        super().__init__(config=config)
        self._frame_dispatch_table[_QuietDataFrame] = self._frame_dispatch_table[DataFrame]
        self._frame_dispatch_table[GoAwayFrame] = self._receive_goaway

    def get_next_available_stream_id(self) -> int:
        if self.told_to_go:
            raise NoAvailableStreamIDError("the peer has sent GOAWAY")
        return super().get_next_available_stream_id()

    def _receive_frame(self, frame: Frame) -> list[Event]:
        if frame.__class__ is DataFrame:
            frame.__class__ = _QuietDataFrame
        return super()._receive_frame(frame)

    @staticmethod
    def _receive_goaway(frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        event = ConnectionTerminated()
        known = {int(code) for code in ErrorCodes}
        event.error_code = ErrorCodes(frame.error_code) if frame.error_code in known else frame.error_code
        event.last_stream_id = frame.last_stream_id
        event.additional_data = frame.additional_data or None
        return [], [event]


class H2Stream(base.Stream):
    """A stream that reads bounded messages and gives up on a peer that takes nothing."""

    connection: H2Connection
    encoding = "identity"  # the peer's grpc-encoding
    timeout: float | None = None  # server: seconds of the call's grpc-timeout
    finished_by_peer = False  # client: the server has completed its response and wants no more of the request
    refused = False  # client: the server has said that it has not processed the call
    _body: bytes | None = None  # a decompressed body that recv_data(length) will be asked for
    _in_body = False  # grpclib reads a 5-byte prefix, then the body, which may be 5 bytes long as well

    async def send_request(self, headers: Any, end_stream: bool = False, *, _processor: Any) -> Any:
        try:
            release = await super().send_request(headers, end_stream, _processor=_processor)
        except ProtocolError as exc:
            raise StreamRefused(f"the connection takes no more calls: {exc}") from None
        if not self.connection.alive:  # it ended while this stream waited to be opened
            release()
            raise StreamTerminatedError("the connection ended before the call began")
        return release

    async def recv_data(self, size: int) -> bytes:
        if self._in_body:
            self._in_body = False
            body, self._body = self._body, None
            return await self._read(size) if body is None else body
        prefix = await self._read(5)
        if not prefix:
            return prefix
        self._in_body = True
        flag, length = prefix[0], int.from_bytes(prefix[1:5], "big")
        limit = self.connection.settings.message_limit
        if length > limit:
            raise BadMessage(Status.RESOURCE_EXHAUSTED, f"a message of {length} bytes; the limit is {limit}")
        if flag == 0:
            return prefix
        if flag != 1 or self.encoding == "identity":
            raise BadMessage(Status.INTERNAL, "a compressed message without grpc-encoding, or a bad message flag")
        self._body = _inflate(await self._read(length), self.encoding, limit)
        return struct.pack(">BI", 0, len(self._body))

    async def _read(self, size: int) -> bytes:
        try:
            return await self.buffer.read(size)
        except AssertionError:
            raise BadMessage(Status.INTERNAL, "the stream ended inside a message") from None

    async def send_data(self, data: bytes, end_stream: bool = False) -> None:
        view, end, pos = memoryview(data), len(data), 0
        h2 = self._h2_connection
        while True:
            if self.finished_by_peer:
                raise StreamTerminatedError("the server has finished the call")
            if not self.connection.alive:
                raise StreamTerminatedError("the connection has ended")
            if not self.connection.write_ready.is_set():
                await self._wait(self.connection.write_ready, abort=True)
                continue
            assert self.id is not None
            window = h2.local_flow_control_window(self.id)
            if window <= 0 and pos < end:
                self.window_updated.clear()
                await self._wait(self.window_updated, abort=False)
                continue
            size = min(window, h2.max_outbound_frame_size, end - pos) if pos < end else 0
            last = pos + size == end
            h2.send_data(self.id, view[pos : pos + size].tobytes(), end_stream=end_stream and last)
            self._transport.write(h2.data_to_send())
            pos += size
            self.connection.data_send_process()
            if last:
                return

    async def end(self) -> None:
        if not self.finished_by_peer:
            await super().end()

    def __terminated__(self, reason: str) -> None:
        if self.connection._connection.config.client_side and self.buffer._eof:
            self.finish()  # a proxy that drains closes the connection right behind its last response
        elif not self.refused:
            super().__terminated__(reason)

    def finish(self) -> None:
        """Client: nothing more is sent; the response has arrived whole and can still be read."""
        self.finished_by_peer = True
        self.window_updated.set()  # wakes a blocked sender

    def refuse(self, why: str) -> None:
        """Client: end the call as one that was not processed, whatever becomes of the connection."""
        self.refused = True
        if self.wrapper is not None:
            self.wrapper.cancel(StreamRefused(why))

    async def _wait(self, event: asyncio.Event, *, abort: bool) -> None:
        """Wait for `event` for at most `send_stall` seconds, then end the call, and the connection with `abort`.

        Not asyncio.wait_for: that needs a current asyncio task on Python 3.12+, and a trio task may be waiting here.
        """
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            if abort:
                self.connection.abort("the peer does not read")
            event.set()

        timer = asyncio.get_running_loop().call_later(self.connection.settings.send_stall, expire)
        try:
            await event.wait()
        finally:
            timer.cancel()
        if expired:
            raise PeerStalled(Status.UNAVAILABLE, "the peer does not take data")


def _inflate(data: bytes, encoding: str, limit: int) -> bytes:
    decoder = zlib.decompressobj(31 if encoding == "gzip" else 15)
    try:
        out = decoder.decompress(data, limit + 1)
    except zlib.error as exc:
        raise BadMessage(Status.INTERNAL, f"a message that is not {encoding}: {exc}") from None
    if len(out) > limit:
        raise BadMessage(Status.RESOURCE_EXHAUSTED, f"a message over the limit of {limit} bytes after decompression")
    if not decoder.eof:
        raise BadMessage(Status.INTERNAL, f"a truncated {encoding} message")
    return out


class H2Connection(base.Connection):
    """A connection that can be aborted, and whose peer may ping as often as it likes."""

    settings: Config

    def create_stream(self, *, stream_id: int | None = None, wrapper: Any = None) -> H2Stream:
        return H2Stream(self, self._connection, self._transport, stream_id=stream_id, wrapper=wrapper)

    @property
    def alive(self) -> bool:
        return hasattr(self, "_transport")

    def flush(self) -> None:
        if self.alive:
            super().flush()

    def goaway(self, last_stream: int, code: ErrorCodes = ErrorCodes.NO_ERROR) -> None:
        """Announce the end. Not h2's close_connection(), which forbids every later frame of open streams."""
        if self.alive and not self._transport.is_closing():
            frame = GoAwayFrame(0)
            frame.last_stream_id = last_stream
            frame.error_code = int(code)
            self._transport.write(frame.serialize())

    def close(self) -> None:
        super().close()
        # Nobody else wakes those who wait to open a stream on it.
        self.write_ready.set()
        self.stream_close_waiter.set()

    def abort(self, why: str) -> None:
        if self.alive:
            log.info("connection aborted: %s", why)
            self._transport.abort()

    def _ping(self) -> None:
        super()._ping()
        timer = self._close_by_ping_handler
        if timer is not None and not isinstance(timer, _AbortTimer):
            timer.cancel()
            loop = asyncio.get_running_loop()
            self._close_by_ping_handler = cast(
                Any, _AbortTimer(loop.call_later(self._config._keepalive_timeout, self.abort, "no answer to PING"))
            )


class _AbortTimer:
    """Marks a PING timer as ours: grpclib's own would close() and wait for a write buffer that nobody reads."""

    def __init__(self, handle: asyncio.TimerHandle) -> None:
        self.cancel = handle.cancel


class Processor(base.EventsProcessor):
    """grpclib's event table, without its habit of raising on what it does not know."""

    connection: H2Connection
    draining = False

    def process(self, event: Event) -> None:
        handle = getattr(self, "processors", {}).get(event.__class__)
        if handle is not None:
            handle(event)

    def process_stream_reset(self, event: StreamReset) -> None:
        stream = cast(H2Stream | None, self.streams.get(event.stream_id))
        client = self.connection._connection.config.client_side
        if client and stream is not None and stream.buffer._eof and event.error_code == ErrorCodes.NO_ERROR:
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
        cast(_H2, self.connection._connection).told_to_go = True
        self.connection.stream_close_waiter.set()  # those who wait to open a stream go elsewhere
        for stream_id, stream in list(self.streams.items()):
            if stream_id > (event.last_stream_id or 0):
                cast(H2Stream, stream).refuse("refused by GOAWAY: not processed")
        self._close_if_drained()

    def register(self, stream: base.Stream) -> Any:
        release = super().register(stream)

        def release_once() -> None:
            if stream.id in self.streams:
                release()
                self._close_if_drained()

        return release_once

    def _close_if_drained(self) -> None:
        if self.draining and not self.streams and self.connection.alive:
            self.connection.close()


class H2Protocol(base.H2Protocol):
    """One connection, either side."""

    connection: H2Connection
    processor: Processor

    def __init__(self, handler: base.AbstractHandler, config: Config, *, client: bool) -> None:
        grpc = configuration(config)
        super().__init__(
            handler, grpc.__for_client__() if client else grpc.__for_server__(), h2_configuration(client=client)
        )
        self.settings = config

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        sock = transport.get_extra_info("socket")
        if sock is not None:
            base._set_nodelay(sock)
        client = self.h2_config.client_side
        h2 = _H2(self.h2_config)
        values = {
            SettingCodes.INITIAL_WINDOW_SIZE: self.settings.stream_window,
            SettingCodes.MAX_FRAME_SIZE: MAX_FRAME,
            SettingCodes.MAX_HEADER_LIST_SIZE: HEADER_LIST,
            SettingCodes.MAX_CONCURRENT_STREAMS: self.settings.stream_limit,
            SettingCodes.ENABLE_PUSH: 0,
        }
        if not client:
            del values[SettingCodes.ENABLE_PUSH]
        h2.local_settings = Settings(client=client, initial_values=values)
        h2.max_inbound_frame_size = MAX_FRAME
        h2.decoder.max_header_list_size = HEADER_LIST
        h2.initiate_connection()
        if not client:
            allowed = self.settings.stream_limit * STREAM_SLACK
            h2.local_settings._settings[SettingCodes.MAX_CONCURRENT_STREAMS] = collections.deque([allowed])
        h2.increment_flow_control_window(self.settings.connection_window - 65535)
        self.connection = H2Connection(h2, cast(asyncio.Transport, transport), config=self.config)
        self.connection.settings = self.settings
        self.connection.flush()
        self.connection.initialize()
        self.processor = Processor(self.handler, self.connection)

    def data_received(self, data: bytes) -> None:
        if not self.connection.alive:
            return
        try:
            events = self.connection.feed(data)
            self.connection.flush()
            for event in events:
                self.processor.process(event)
            self.connection.flush()
        except ProtocolError as exc:
            log.info("protocol error: %s", exc)
            self.connection.flush()  # the GOAWAY that h2 has queued
            self.processor.close("protocol error")
        except Exception:
            log.exception("a frame that the HTTP/2 layer could not handle")
            if self.connection.alive:
                self.connection.goaway(self.connection._connection.highest_inbound_stream_id, ErrorCodes.INTERNAL_ERROR)
            self.processor.close("internal error")

    def drain(self) -> None:
        """Send a graceful GOAWAY: open streams finish, then the connection closes."""
        if self.connection.alive and not self.processor.draining:
            self.processor.draining = True
            self.connection.goaway(self.connection._connection.highest_inbound_stream_id)
            self.processor._close_if_drained()
