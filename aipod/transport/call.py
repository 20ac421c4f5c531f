"""The client's end of one call: grpclib's stream, whose headers and first messages go out together."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self, cast

import grpclib.client
from grpclib.encoding.base import GRPC_CONTENT_TYPE
from grpclib.exceptions import ProtocolError
from grpclib.metadata import USER_AGENT, encode_metadata, encode_timeout
from grpclib.utils import Wrapper

from aipod.transport.headers import Headers
from aipod.transport.protocol import H2Protocol
from aipod.transport.stream import Begin, H2Stream, StreamRefused, nothing_yet

# Connections in a row that may be told to go while a call waits for its turn; more mean a server that takes none.
MOVES = 10


class _Guard:
    """What `grpclib.utils.Wrapper` is to a call: around each wait for it, and how that ends with an error.

    That one cancels the tasks that wait. Here they are woken and look again: asyncio.timeout and TaskGroup count
    cancellations, and a cancelled caller must not be taken for a lost connection.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None
        self.stream: H2Stream | None = None

    def __enter__(self) -> None:
        if self._error is not None:
            raise self._error

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if self._error is not None and not isinstance(exc, asyncio.CancelledError):
            raise self._error

    def cancel(self, error: Exception) -> None:
        """Whoever waits, or is about to, gets `error`."""
        self._error = error
        if self.stream is not None:
            self.stream.give_up(error)


class Call(grpclib.client.Stream[Any, Any]):
    """grpclib's, without its events, to which nobody listens here. asyncio-flavored."""

    _stream: H2Stream
    _timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        guard = self._guard = _Guard()
        self._wrapper = cast(Wrapper, guard)
        if self._deadline is not None:
            error = TimeoutError("Deadline exceeded")
            if not (left := self._deadline.time_remaining()):
                raise error
            self._timer = asyncio.get_running_loop().call_later(left, guard.cancel, error)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await super().__aexit__(kind, exc, trace)

    async def open(self, begin: Begin = nothing_yet) -> int:
        """Send the request's headers, and behind them what `begin` gives; how many of its messages were sent.

        Those that would have to wait for the peer's window, and all behind them, are not: send them one by one. A call
        that waits because its connection has too many moves on, when that connection is told to go, to the next one.
        Cancelled, or where it raises, `begin` was not called, or the connection has ended since.
        """
        for _ in range(MOVES):
            try:
                return await self._open(begin)
            except StreamRefused:
                continue  # it was never opened, so the stream can be used again
        return await self._open(begin)

    async def send_request(self, *, end: bool = False) -> None:
        """As grpclib's; `open` does more."""
        await self._open(nothing_yet, end=end)

    async def _open(self, begin: Begin, *, end: bool = False) -> int:
        if self._send_request_done:
            raise ProtocolError("Request is already sent")

        # Who waits for a connection, or for a place on it, is no stream yet that the guard could wake.
        left = None if self._deadline is None else self._deadline.time_remaining()
        with self._wrapper:
            async with asyncio.timeout(left):
                protocol = cast(H2Protocol, await self._channel.__connect__())
                stream = self._guard.stream = protocol.connection.create_stream(wrapper=self._wrapper)
                release = await stream.send_request(self._headers(), end, _processor=protocol.processor, begin=begin)
            self._stream, self._release_stream = stream, release
            self.peer = protocol.connection.get_peer()
            self._send_request_done, self._end_done = True, end or stream.ended_at_once
        return stream.sent_at_once

    def _headers(self) -> Headers:
        headers = [
            (":method", "POST"),
            (":scheme", self._channel._scheme),
            (":path", self._method_name),
            (":authority", self._channel._authority),
            ("te", "trailers"),
            ("content-type", GRPC_CONTENT_TYPE),
            ("user-agent", USER_AGENT),
        ]
        if self._deadline is not None:
            headers.append(("grpc-timeout", encode_timeout(self._deadline.time_remaining())))
        return [*headers, *encode_metadata(self._metadata)]

    async def recv_message(self) -> Any:
        """The next message, None at the end. Raises what grpclib's does."""
        if not self._recv_initial_metadata_done:
            await self.recv_initial_metadata()
        with self._wrapper:
            message = await self._stream.inbox.read()
            return None if message is None else self._codec.decode(message, self._recv_type)  # type: ignore[arg-type]

    @property
    def has_status(self) -> bool:
        """Whether the server's last word has come, and waits for nothing of this side's."""
        return self._end_done and self._stream.trailers is not None

    def fail(self, error: Exception) -> None:
        """End the call with `error`, here: whoever waits for something of it hears that, now or next time."""
        self._guard.cancel(error)
