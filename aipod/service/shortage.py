"""What the log says of a disk that is full: once that calls are refused, or uploads wait, and once that it is over."""

from __future__ import annotations

import logging

import trio

from aipod.config import MIB
from aipod.errors import AipodError, leaves
from aipod.spool import Spool

log = logging.getLogger("aipod.service")

# Seconds between two looks whether there is room again.
LOOK_AGAIN = 5.0


class Shortage:
    """The mutable state is the bytes for which there was no room; None where there is."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._wanted: int | None = None

    def note(self, exc: BaseException) -> None:
        """A call has ended so: refused before its first byte, or an upload that waits for its client to come again."""
        full = next((one for one in leaves(exc) if isinstance(one, AipodError) and one.reason == "SPOOL_FULL"), None)
        if full is None:
            return
        wanted = int(full.metadata.get("wanted", 0))
        # Of a payload that never fits nobody else need hear; that the next one of half its size does not is news.
        if self._wanted is None or wanted <= self._wanted // 2 < self._wanted:
            self._wanted = wanted
            log.warning("calls are refused, or their uploads wait: %s", full.message)

    async def run(self) -> None:
        """Look whether there is room again. This is a trio-flavored async function; it never returns."""
        while True:
            await trio.sleep(LOOK_AGAIN)
            await self.look()

    async def look(self) -> None:
        """Say so where there is room again. This is a trio-flavored async function."""
        wanted = self._wanted
        if wanted is not None and await trio.to_thread.run_sync(self._has_room, max(wanted, MIB)):
            self._wanted = None
            log.info("the disk has room for uploads again")

    def _has_room(self, wanted: int) -> bool:
        try:
            return self._spool.has_room(wanted)
        except OSError:
            return False
