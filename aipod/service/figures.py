"""How a server is this moment, and the page of metrics that says so."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Mapping

import trio
from prometheus_client.metrics_core import Metric

from aipod import __version__
from aipod.metrics import Metrics, Now
from aipod.pool import Pool
from aipod.prometheus.families import families
from aipod.prometheus.page import Page, serve_page
from aipod.service.drain import Drain
from aipod.spool import Spool
from aipod.transport.listeners import name_of

log = logging.getLogger("aipod.metrics")

# Seconds that the disk has to tell what is free; without that the page comes all the same.
DISK = 2.0


class Figures:
    """Looks at the parts of a server."""

    def __init__(
        self,
        metrics: Metrics,
        jobs: Callable[[], Mapping[str, int]],
        drain: Drain,
        pool: Pool,
        spool: Spool,
        connections: Callable[[], int],
    ) -> None:
        self._metrics = metrics
        self._jobs = jobs
        self._drain = drain
        self._pool = pool
        self._spool = spool
        self._connections = connections
        self._is_told = False  # once is enough
        self._disk = trio.CapacityLimiter(1)  # a disk that hangs must not take one thread after the other

    async def collect(self) -> Iterable[Metric]:
        """All metrics as they are now. This is a trio-flavored async function."""
        free = await self._free()
        now = Now(
            jobs=self._jobs(),
            in_line=self._pool.in_line,
            instances=self._pool.states(),
            connections=self._connections(),
            draining=self._drain.begun,
            spool_bytes=self._spool.quota.total,
            spool_free=free,
        )
        return list(families(self._metrics, now, __version__))

    async def _free(self) -> int | None:
        with trio.move_on_after(DISK):
            try:
                return await trio.to_thread.run_sync(self._spool.free, abandon_on_cancel=True, limiter=self._disk)
            except OSError as exc:
                if not self._is_told:
                    log.warning("the spool's disk does not say how much room it has: %s", exc)
                self._is_told = True
        return None


async def serve_figures(sock: socket.socket, figures: Figures, until: trio.Event | None) -> None:
    """Answer who asks for metrics on a listening socket until `until` is set; then it is closed.

    This is a trio-flavored async function.
    """
    log.info("metrics are at http://%s/metrics", name_of(sock))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_page, sock, Page(figures.collect))
        if until is not None:
            await until.wait()
            nursery.cancel_scope.cancel()
