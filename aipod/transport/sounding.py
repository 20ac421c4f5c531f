"""A channel that remembers what the next hop does besides answering: for `aipod doctor`."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any, cast

import grpclib.client

from aipod.config import Config
from aipod.transport.channel import Channel, reset
from aipod.transport.connection import Processor
from aipod.transport.frames import Take
from aipod.transport.protocol import H2Protocol
from aipod.transport.stream import H2Stream
from aipod.transport.wakes import Wakes

# Bytes of what came first that are kept: enough to tell HTTP/1.1.
_FIRST = 64
# Characters of a GOAWAY's own text.
_DEBUG = 200
# What a PING that is waited for carries; the transport's own carry something else.
_SOUND = b"sounding"


@dataclasses.dataclass
class Hop:
    """One connection to the next hop, as it went. Times are monotonic."""

    began: float = dataclasses.field(default_factory=time.monotonic)
    first: bytes = b""  # the beginning of what it has sent
    alpn: str | None = None  # None also without TLS
    tls: str = ""  # the version of TLS
    expires: str = ""  # the certificate's notAfter
    ended_at: float = 0.0  # when it was told to go, or was closed; 0 where neither has happened
    goaway: tuple[int, str] | None = None  # its code, and its text
    resets: dict[int, tuple[int, float]] = dataclasses.field(
        default_factory=dict
    )  # codes and when they came, by stream
    data_frames: int = 0
    data_bytes: int = 0
    answered: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)  # a PING of ours
    changed: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)  # a stream was reset, or this is the end

    def end(self) -> None:
        self.ended_at = self.ended_at or time.monotonic()
        self.changed.set()


class Sounding(Channel):
    """A connection whose `hop` tells how it went. asyncio-flavored."""

    hop: Hop | None = None  # of the newest connection

    def _protocol_factory(self) -> H2Protocol:
        self.hop = Hop()
        return _Protocol(self.hop, grpclib.client.Handler(), self._settings, Wakes(), client=True)

    async def connect(self) -> tuple[Hop, dict[str, int]]:
        """Connect: the connection, and the peer's SETTINGS. This is an asyncio-flavored function.

        Raises OSError, which ssl.SSLError is, TimeoutError, and StreamTerminatedError once closed.
        """
        await self.__connect__()
        protocol = cast(_Protocol, self._protocol)
        remote = protocol.h2.remote_settings
        return protocol.hop, {
            "initial_window_size": remote.initial_window_size,
            "max_concurrent_streams": remote.max_concurrent_streams,
            "max_frame_size": remote.max_frame_size,
        }

    async def ping(self) -> float:
        """Seconds of a round trip to the next hop, which answers a PING itself. Raises as `connect`, and TimeoutError.

        This is an asyncio-flavored function.
        """
        hop, _ = await self.connect()
        protocol = cast(_Protocol, self._protocol)
        hop.answered.clear()
        started = time.monotonic()
        protocol.h2.ping(_SOUND)
        protocol.connection.flush()
        async with asyncio.timeout(self._settings.connect_timeout):
            await hop.answered.wait()
        return time.monotonic() - started


class _Protocol(H2Protocol):
    def __init__(
        self, hop: Hop, handler: grpclib.client.Handler, config: Config, wakes: Wakes, *, client: bool
    ) -> None:
        super().__init__(handler, config, wakes, client=client)
        self.hop = hop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        tls = transport.get_extra_info("ssl_object")
        if tls is not None:
            self.hop.alpn = tls.selected_alpn_protocol()
            self.hop.tls = tls.version() or ""
            self.hop.expires = str((tls.getpeercert() or {}).get("notAfter", ""))
        super().connection_made(transport)
        self.processor = _Processor(self.hop, self.handler, self.connection)

    def buffer_updated(self, nbytes: int) -> None:
        if len(self.hop.first) < _FIRST:
            self.hop.first += bytes(self.get_buffer(-1)[: min(nbytes, _FIRST)])
        super().buffer_updated(nbytes)

    def begin_data(self, stream_id: int, length: int, size: int, end: bool) -> Take | None:
        self.hop.data_frames += 1
        self.hop.data_bytes += size
        return super().begin_data(stream_id, length, size, end)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.hop.end()
        super().connection_lost(exc)


class _Processor(Processor):
    def __init__(self, hop: Hop, *args: Any) -> None:
        super().__init__(*args)
        self._hop = hop

    def process_ping_ack_received(self, event: Any) -> None:
        if event.ping_data == _SOUND:
            self._hop.answered.set()
        super().process_ping_ack_received(event)

    def process_stream_reset(self, event: Any) -> None:
        if event.remote_reset:
            self._hop.resets[event.stream_id] = int(event.error_code), time.monotonic()
            self._hop.changed.set()
        super().process_stream_reset(event)

    def process_connection_terminated(self, event: Any) -> None:
        if self._hop.goaway is None:
            text = (event.additional_data or b"")[:_DEBUG].decode("latin-1")
            self._hop.goaway = int(event.error_code), text
            self._hop.end()
        super().process_connection_terminated(event)


@dataclasses.dataclass(frozen=True)
class Heard:
    """What has come on one stream besides its messages."""

    http: str = ""  # :status; empty where no headers have come
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    reset: tuple[int, float] | None = None  # the code of its RST_STREAM, and when it came (monotonic)
    window: int = 0  # bytes that may be sent on it now


def leave(stream: grpclib.client.Stream[Any, Any]) -> None:
    """End a call, however far it has come: what it would still be owed is not waited for."""
    reset(stream)
    stream._cancel_done = True


def heard(stream: grpclib.client.Stream[Any, Any], hop: Hop | None) -> Heard:
    """What has come so far on a call of the connection `hop`."""
    if not stream._send_request_done or hop is None:
        return Heard()
    inner = cast(H2Stream, stream._stream)
    headers = dict(inner.headers or [])
    state = inner._h2_connection.streams.get(inner.id or 0)
    window = state.outbound_flow_control_window if state is not None else 0
    return Heard(headers.get(":status", ""), headers, hop.resets.get(inner.id or 0), window)
