"""The listening side: which connections get in, and how they end."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import grpclib.const
import grpclib.server
import trio
from grpclib.const import Cardinality
from grpclib.encoding.proto import ProtoStatusDetailsCodec

from aipod.config import Config
from aipod.metrics import OTHER, Metrics
from aipod.transport.bridge import Spawner
from aipod.transport.codec import Codec
from aipod.transport.listeners import BACKLOG
from aipod.transport.protocol import FAREWELL, H2Protocol
from aipod.transport.requests import Handler
from aipod.transport.stream import H2Stream
from aipod.transport.tls import Followed, TLSError, server_context
from aipod.transport.wakes import Wakes

log = logging.getLogger("aipod.transport")

# Seconds that a new connection has for its first call before it may have to make room: else peers that come at the same
# moment would push each other out.
_SETTLING = 1.0

# Seconds between two looks at the files of TLS.
TLS_LOOK = 2.0

# As metrics call them.
_KINDS = {
    Cardinality.UNARY_UNARY: "unary",
    Cardinality.UNARY_STREAM: "server_stream",
    Cardinality.STREAM_UNARY: "client_stream",
    Cardinality.STREAM_STREAM: "bidi_stream",
}
# Seconds after which a connection that was told to go takes no more requests, also where its peer has not answered.
_FAREWELL_TIME = 1.0


class Server(grpclib.server.Server):
    """grpclib's server with hardened connections. asyncio-flavored, but for what its TrioHandlers do in `spawner`."""

    def __init__(
        self,
        services: Sequence[Any],
        config: Config,
        spawner: Spawner | None = None,
        metrics: Metrics | None = None,
        *,
        knows: Callable[[str], bool] = lambda authorization: True,
    ) -> None:
        """Reads the files of TLS. Raises TLSError. `knows` says whether a call with this header is somebody's."""
        super().__init__(services, codec=Codec(config), status_details_codec=ProtoStatusDetailsCodec())
        self.spawner = spawner
        self.knows = knows
        self.settings = config
        self.metrics = metrics or Metrics()
        for path, handler in self._mapping.items():
            kind = handler.cardinality if isinstance(handler, grpclib.const.Handler) else None
            self.metrics.offer(path, _KINDS.get(kind, OTHER))
        self.wakes = Wakes()
        self.protocols: set[ServerProtocol] = set()
        self._arriving: dict[ServerProtocol, asyncio.Task[Any]] = {}  # accepted; their TLS handshakes are under way
        self._listeners: dict[socket.socket, asyncio.AbstractServer] = {}
        self._taking: set[asyncio.Task[None]] = set()  # connections that were accepted last, until they are made
        self._stopped = False
        self._tls = Followed(server_context, config)
        self.authorities = 0  # how often those that clients' certificates must come from have changed

    async def listen(self, sockets: Sequence[socket.socket]) -> None:
        """Accept connections on listening sockets, with TLS where the settings say so; they stay the caller's."""
        for sock in sockets:
            is_unix, options = sock.family == socket.AF_UNIX, dict(self._tls_options)
            if is_unix and sys.version_info >= (3, 13):
                options["cleanup_socket"] = False  # its file belongs to who has made it
            create = self._loop.create_unix_server if is_unix else self._loop.create_server
            # A duplicate: asyncio closes what it is given. Its `backlog` is also how often it calls accept() in a row,
            # and it goes on after an error: a thousand times where there is no descriptor left.
            self._listeners[sock] = await create(self._protocol_factory, sock=sock.dup(), backlog=1, **options)
            sock.listen(BACKLOG)

    @property
    def _tls_options(self) -> dict[str, Any]:
        """What a loop wants to know for each connection."""
        if self._tls.context is None:
            return {}
        return {"ssl": self._tls.context, "ssl_handshake_timeout": self.settings.handshake_timeout}

    async def watch_tls(self) -> None:
        """Have new connections see certificate, key and authorities as they are on the disk, within `TLS_LOOK` seconds.

        Connections that there are keep theirs. But where the authorities have changed they are told to go (GOAWAY):
        calls under way finish, and the next one needs a certificate of the new ones. Files that cannot be used are an
        error in the log, once, and what was read before stays. This is a trio-flavored function; it never returns.
        """
        said = ""
        while True:
            await trio.sleep(TLS_LOOK if self._tls.context is not None else math.inf)
            try:
                new_authorities = await trio.to_thread.run_sync(self._tls.renew)
            except TLSError as exc:
                if exc.message != said:
                    log.error("the files of TLS have changed, and %s; what was read before stays", exc.message)
                said = exc.message
                continue
            if new_authorities is not None:
                said = ""
                log.info("the files of TLS have changed and are read again")
            if new_authorities:
                self.authorities += 1
                for protocol in list(self.protocols):
                    protocol.drain()

    def _protocol_factory(self, *, leaving: bool = False) -> H2Protocol:
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
        protocol.leaving = leaving
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
        # First those that nobody who is known has ever called on.
        for protocol in sorted(quiet, key=lambda protocol: (protocol.answered > -math.inf, protocol.last_call)):
            if protocol in self._arriving:
                self._arriving.pop(protocol).cancel()
                return True
            if protocol.is_idle:
                self.protocols.discard(protocol)
                protocol.make_room()
                return True
        return False

    async def leave(self, sockets: Sequence[socket.socket]) -> None:
        """Tell the open connections to bring no more requests (GOAWAY), and accept no new ones on `sockets`.

        What waits there to be accepted is taken first. Calls under way go on, and so does whatever a peer has sent
        before it heard of the end. This is an asyncio-flavored function; it waits for the loop's next turns only.
        """
        for sock in sockets:
            listener = cast(asyncio.Server, self._listeners.pop(sock))
            # First no more, then a turn for what was accepted this moment: it stumbles over a listener that is closed.
            self._loop.remove_reader(listener.sockets[0].fileno())
            await asyncio.sleep(0)
            listener.close()
            for _ in range(2 * BACKLOG):
                try:
                    connection, _ = sock.accept()
                except OSError as exc:  # BlockingIOError: there is none
                    if not isinstance(exc, BlockingIOError):
                        log.error("connections that waited to be accepted are lost: %s", exc.strerror)
                    break
                task = self._loop.create_task(self._take(connection))
                self._taking.add(task)
                task.add_done_callback(self._taking.discard)
        for protocol in self._arriving:
            protocol.leaving = True
        for protocol in list(self.protocols):
            protocol.leave()

    async def _take(self, sock: socket.socket) -> None:
        """Serve an accepted connection, which hears at once that it is to go."""
        factory = functools.partial(self._protocol_factory, leaving=True)
        try:
            sock.setblocking(False)
            await self._loop.connect_accepted_socket(factory, sock, **self._tls_options)
        except OSError as exc:
            log.info("a connection that waited to be accepted was lost: %s", exc)
            sock.close()

    def stop_listening(self) -> None:
        """Accept no more connections, and tell the open ones to bring no more requests (GOAWAY)."""
        self._stopped = True
        for listener in self._listeners.values():
            listener.close()
        for protocol in list(self.protocols):
            protocol.drain()

    def abort(self) -> None:
        """Cancel what still runs, all of it now, and drop every connection."""
        self.wakes.hurry()
        for protocol in list(self.protocols):
            protocol.processor.close("the server is gone")
            protocol.transport.abort()


class ServerProtocol(H2Protocol):
    """A connection that its server knows."""

    def __init__(self, handler: Handler, server: Server) -> None:
        super().__init__(handler, server.settings, server.wakes, client=False)
        self._server = server
        self._authorities = server.authorities
        self.last_call = time.monotonic()  # when one ended; until then, when the connection was accepted
        self.answered = -math.inf  # when its last call ended
        self.leaving = False  # its peer is told, or about to be, that it is to go

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
        if self.leaving:
            self._say_farewell()
        if self._authorities != self._server.authorities:  # its handshake began under those of before
            self.drain()

    def leave(self) -> None:
        """Tell the peer to go elsewhere, so that nothing is lost that it sends meanwhile (RFC 9113 section 6.8).

        Behind a first GOAWAY calls are served, behind a second one, which follows when its PING is answered, or after
        `_FAREWELL_TIME`, they are refused. Not each peer tries those again: nginx tells its client that the upstream is
        dead.
        """
        if not self.leaving:
            self.leaving = True
            self._say_farewell()

    def _say_farewell(self) -> None:
        if self.connection.alive:
            self.connection.goaway()
            self.h2.ping(FAREWELL)
            self.connection.flush()
            asyncio.get_running_loop().call_later(_FAREWELL_TIME, self.drain)

    def make_room(self) -> None:
        """Say that nothing more is taken (GOAWAY) and close, without waiting for the peer to do so.

        For an idle connection: nothing is lost with it but an answer that was taken too slowly (who watches the
        server's health is told that the connection is gone), and what it asks for meanwhile it may ask for again.
        """
        log.info("a connection makes room for a new one (--max-connections)")
        self.connection.goaway()
        self.transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._server.protocols.discard(self)
        super().connection_lost(exc)
