"""The calling side: a channel that survives a graceful GOAWAY and never waits for ever to connect."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import logging
import os
import ssl
import warnings
from collections.abc import Sequence
from typing import Any, cast

import grpclib.client
from google.protobuf.message import DecodeError
from grpclib.const import Cardinality, Status
from grpclib.encoding.proto import ProtoStatusDetailsCodec
from grpclib.exceptions import ProtocolError, StreamTerminatedError
from grpclib.metadata import Deadline
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError as H2ProtocolError

from aipod.config import Config
from aipod.transport.call import Call
from aipod.transport.codec import Codec, encode_pieces
from aipod.transport.protocol import H2Protocol, configuration
from aipod.transport.stream import H2Stream
from aipod.transport.tls import Followed, TLSError, client_context, disagreement
from aipod.transport.wakes import Wakes

log = logging.getLogger("aipod.transport")

# What sending raises once the call is over; what is received tells why.
CALL_OVER = (StreamTerminatedError, ProtocolError, H2ProtocolError, asyncio.TimeoutError)

# Seconds that the peer has to say goodbye.
_GOODBYE = 1.0


class _Details(ProtoStatusDetailsCodec):
    """What a status says besides its text; nothing where that cannot be read."""

    def decode(self, status: Status, message: str | None, data: bytes) -> Sequence[Any]:
        try:
            return super().decode(status, message, data)
        except DecodeError:
            return []


class Channel(grpclib.client.Channel):
    """A connection to one address, made when it is first needed. asyncio-flavored. Raises TLSError.

    `ip`: one of those that the host in `target` stands for, by whose name it is called all the same.
    """

    _pid = 0  # of who has made it; of one that could not be made there is nothing to close

    def __init__(self, target: str, config: Config, ip: str | None = None) -> None:
        host, port, path = split_target(target)
        grpc = configuration(config)
        if path is not None:  # with TLS the other end of a unix socket is "localhost", as for gRPC's C core
            grpc = dataclasses.replace(grpc, ssl_target_name_override="localhost")
        elif ip is not None:
            grpc = dataclasses.replace(grpc, ssl_target_name_override=host)
        self.name = target if ip is None else f"{target} ({ip})"
        self._tls = Followed(client_context, config)
        super().__init__(
            host,
            port,
            path=path,
            codec=Codec(config),
            status_details_codec=_Details(),
            config=grpc,
            ssl=self._tls.context,
        )
        if ip is not None:
            self._host = ip
        self._settings = config
        self._closed = False
        self._pid = os.getpid()
        self._latest: H2Protocol | None = None  # the newest connection, closed or not

    def request(
        self,
        name: str,
        cardinality: Cardinality,
        request_type: type[Any],
        reply_type: type[Any],
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Any = None,
    ) -> Call:
        """A call, not opened yet. `deadline` goes before `timeout`, in seconds."""
        if timeout is not None and deadline is None:
            deadline = Deadline.from_timeout(timeout)
        return Call(
            *(self, name, cast(Any, metadata or ()), cardinality, request_type, reply_type),
            codec=self._codec,
            status_details_codec=self._status_details_codec,
            dispatch=self.__dispatch__,
            deadline=deadline,
        )

    def _protocol_factory(self) -> H2Protocol:
        return H2Protocol(grpclib.client.Handler(), self._settings, Wakes(), client=True)

    @property
    def _connected(self) -> bool:
        # Not one that has announced its end: nginx does at every reload; its streams finish, new ones go elsewhere.
        protocol = cast(H2Protocol | None, self._protocol)
        return super()._connected and protocol is not None and not protocol.processor.draining

    @property
    def connected(self) -> bool:
        """Whether there is a connection that takes calls."""
        return self._connected

    def retire(self, stream: grpclib.client.Stream[Any, Any]) -> None:
        """Use the connection of `stream`, which has fallen silent, for no further call; others on it go on.

        Nothing for a stream that was never opened, and for a connection that has been replaced.
        """
        protocol = cast(H2Protocol | None, self._protocol)
        if protocol is None or not stream._send_request_done or stream._stream.connection is not protocol.connection:
            return
        protocol.processor.draining = True
        if not protocol.processor.streams:
            protocol.connection.abort("no word from the server")

    async def _create_connection(self) -> Any:
        if self._closed:
            raise StreamTerminatedError("the client was closed")
        try:
            self._tls.renew()
        except TLSError as exc:
            log.warning("the files of TLS have changed, and %s; what was read before stays", exc.message)
        try:
            protocol = await self._connect()
        except ssl.SSLError as exc:
            if (why := disagreement(exc)) is None:
                raise
            raise why from exc
        if not protocol.connection.alive:
            perhaps = (
                "the server wants TLS, or a certificate, or has as many connections as it takes (--max-connections)"
                if self._tls.context is None
                else "the server wants a certificate that it can verify (--tls-cert)"  # or it is leaving
            )
            raise disagreement(protocol.lost, protocol.instead) or ConnectionResetError(
                f"the connection was closed before a word of HTTP/2; perhaps {perhaps}"
            )
        if self._closed:
            protocol.processor.close("closed while it was connecting")
            raise StreamTerminatedError("the client was closed")
        return protocol

    async def _connect(self) -> H2Protocol:
        async with asyncio.timeout(self._settings.connect_timeout):
            protocol = self._latest = cast(H2Protocol, await super()._create_connection())
            # A request goes to nobody but a server that has said so: else it would not be known whether it was seen.
            try:
                await protocol.greeted.wait()
            except BaseException:
                protocol.connection.abort("no HTTP/2 SETTINGS in time")
                raise
        return protocol

    def close(self) -> None:
        """Close the connection; calls under way raise StreamTerminatedError. For good, unlike grpclib's."""
        self._closed = True
        super().close()

    def __del__(self) -> None:
        if self._pid != os.getpid():  # in a forked child it is the parent's
            return
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if self._protocol is None or here is self._loop or self._loop.is_closed():
            super().__del__()
        else:  # in another thread, or where the loop stands still, as in a REPL that ends
            warnings.warn(f"Unclosed connection: {self!r}", ResourceWarning, stacklevel=2)
            self._loop.call_soon_threadsafe(self._protocol.processor.close)

    async def aclose(self) -> None:
        """`close`, and wait until the socket is closed, which with TLS takes an answer: for a second at most.

        This is an asyncio-flavored function. Cancelled, it is closed all the same, only not waited for.
        """
        self.close()
        if self._latest is None:
            return
        try:
            async with asyncio.timeout(_GOODBYE):
                await self._latest.ended.wait()
        except TimeoutError:
            self._latest.transport.abort()
            await self._latest.ended.wait()


def why_unconnected(exc: BaseException) -> str:
    """`exc` in words; asyncio's own do not say whether a connection was refused."""
    if isinstance(exc, ConnectionError) and exc.errno:
        return os.strerror(exc.errno)
    return str(exc)


async def open_call(stream: Call) -> None:
    """Send the request's headers. This is an asyncio-flavored function."""
    await stream.open()


async def send_message(stream: grpclib.client.Stream[Any, Any], message: Any, *, end: bool = False) -> None:
    """Send one message of a call that `open_call` has opened. This is an asyncio-flavored function."""
    with stream._wrapper:
        await cast(H2Stream, stream._stream).send_message(encode_pieces(message), end=end)
        stream._end_done = end


def reset(stream: grpclib.client.Stream[Any, Any]) -> None:
    """Send RST_STREAM(CANCEL) for a call that nobody wants; grpclib would say NO_ERROR, or wait for trailers.

    Also where the server has ended it meanwhile: grpclib would want this side ended too, and raise.
    """
    if stream._send_request_done:
        if stream._stream.closable:
            stream._stream.reset_nowait(ErrorCodes.CANCEL)
        stream._cancel_done = True


async def read_status(stream: grpclib.client.Stream[Any, Any]) -> None:
    """Wait for the trailers. Raises GRPCError for any status but OK. This is an asyncio-flavored function."""
    if not stream._end_done:
        # A server may end a call early; grpclib then wants our side ended before it tells why.
        await stream.end()
    if not stream._recv_trailing_metadata_done:
        await stream.recv_trailing_metadata()


def is_literal(host: str) -> bool:
    """Whether `host` is an IP address, which nobody needs to resolve."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def split_target(target: str) -> tuple[str | None, int | None, str | None]:
    """HOST:PORT, [::1]:PORT or unix:PATH as (host, port, path). Raises ValueError."""
    if target.startswith("unix:"):
        path = target.removeprefix("unix:")
        if not path:
            raise ValueError("unix: without a path; write unix:/run/aipod.sock")
        return None, None, path
    host, colon, port = target.rpartition(":")
    if not colon or not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{target!r} is not HOST:PORT, [::1]:PORT or unix:PATH")
    return host.removeprefix("[").removesuffix("]"), int(port), None
