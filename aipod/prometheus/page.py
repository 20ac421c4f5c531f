"""The page that Prometheus asks for: HTTP/1.1, one request a connection, GET or HEAD /metrics.

Anybody who reaches the port may ask, and may try worse. So there is a bound on what is read, on the connections at
once, on the time of each, and on how often the page is made.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable

import h11
import trio
from prometheus_client import CollectorRegistry, ProcessCollector, exposition
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics

log = logging.getLogger("aipod.metrics")

# Bytes of a request: Prometheus sends 400. It may not have a body.
MAX_REQUEST = 8 * 1024
# Connections at once. One more ends the oldest: those that say nothing keep nobody out.
AT_ONCE = 8
# Seconds for all of a connection; Prometheus gives up after ten, too.
PATIENCE = 10.0
# This process, or its machine, has no more descriptors or memory; seconds until it is tried again.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
AGAIN = 1.0
# Seconds for which a page is good: who asks in a loop gets the same one again.
FRESH = 0.1

# What of a header `accept` asks for OpenMetrics; else it is the text format. The library's own choice would take over
# words of the peer's.
_OPENMETRICS = "application/openmetrics-text"

Collect = Callable[[], Awaitable[Iterable[Metric]]]


class Page:
    """The metrics of one server as text, in a registry of its own."""

    def __init__(self, collect: Collect) -> None:
        """`collect` is a trio-flavored async function."""
        self._collect = collect
        self._found: list[Metric] = []
        self._one = trio.Lock()  # guards what is above, and what follows
        self._made: dict[bool, tuple[float, bytes]] = {}  # whether it is OpenMetrics, when it was made, the text
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def collect(self) -> Iterable[Metric]:
        """What the registry asks for."""
        return self._found

    async def text(self, accept: str) -> tuple[str, bytes]:
        """Content type and text, as a header `accept` asks for. This is a trio-flavored async function."""
        is_open = _OPENMETRICS in accept
        form = openmetrics if is_open else exposition
        async with self._one:
            made, text = self._made.get(is_open, (-FRESH, b""))
            if trio.current_time() - made >= FRESH:
                self._found = list(await self._collect())
                text = await trio.to_thread.run_sync(form.generate_latest, self._registry)
                self._made[is_open] = trio.current_time(), text
        return openmetrics.CONTENT_TYPE_LATEST if is_open else exposition.CONTENT_TYPE_PLAIN_0_0_4, text


async def serve_page(sock: socket.socket, page: Page, *, patience: float = PATIENCE) -> None:
    """Answer who connects to a listening socket, until cancelled; then it is closed.

    This is a trio-flavored async function.
    """
    open_: dict[trio.CancelScope, None] = {}  # the oldest first

    async def handle(stream: trio.SocketStream) -> None:
        if len(open_) >= AT_ONCE:
            oldest = next(iter(open_))
            del open_[oldest]
            oldest.cancel()
        async with stream:
            with trio.move_on_after(patience) as scope:
                open_[scope] = None
                try:
                    await _answer(stream, page)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    log.debug("who asked for metrics has gone")
                except Exception as exc:  # whatever it is: it must not end the server
                    log.error("a request for metrics failed", exc_info=exc)
                finally:
                    open_.pop(scope, None)

    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    is_told = False
    async with listener, trio.open_nursery() as nursery:
        while True:
            try:
                nursery.start_soon(handle, await listener.accept())
                is_told = False
            except OSError as exc:  # as trio.serve_listeners does it, but for a traceback each tenth of a second
                if exc.errno not in EXHAUSTED:
                    raise
                if not is_told:
                    log.error("no request for metrics can be accepted for now: %s", exc.strerror)
                is_told = True
                await trio.sleep(AGAIN)


async def _answer(stream: trio.SocketStream, page: Page) -> None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST)
    head = False
    try:
        request = await _request(stream, connection)
        if request is None:
            return
        head = request.method == b"HEAD"
        status, kind, body = await _page_for(request, page)
    except h11.RemoteProtocolError as exc:
        status, kind, body = exc.error_status_hint, "text/plain", b"this is no request for /metrics\n"
    headers = [("content-type", kind), ("content-length", str(len(body))), ("connection", "close")]
    send: list[h11.Event] = [h11.Response(status_code=status, headers=headers)]
    send += [] if head else [h11.Data(data=body)]
    await stream.send_all(b"".join(filter(None, map(connection.send, [*send, h11.EndOfMessage()]))))
    await _wait_closed(stream)


async def _request(stream: trio.SocketStream, connection: h11.Connection) -> h11.Request | None:
    """The request's head; None where the peer has sent none. Raises `h11.RemoteProtocolError`."""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            return event
        if isinstance(event, h11.ConnectionClosed):
            return None
        connection.receive_data(await stream.receive_some(MAX_REQUEST))


async def _page_for(request: h11.Request, page: Page) -> tuple[int, str, bytes]:
    if request.target.partition(b"?")[0] != b"/metrics":
        return 404, "text/plain", b"only /metrics is here\n"
    if request.method not in (b"GET", b"HEAD"):
        return 405, "text/plain", b"only GET and HEAD are answered\n"
    accept = b",".join(value for name, value in request.headers if name == b"accept")
    return 200, *await page.text(accept.decode("latin-1"))


async def _wait_closed(stream: trio.SocketStream) -> None:
    """Let the peer take the answer: a socket that is closed with unread bytes in it resets the connection."""
    await stream.send_eof()
    left = MAX_REQUEST
    while left > 0 and (data := await stream.receive_some(left)):
        left -= len(data)
