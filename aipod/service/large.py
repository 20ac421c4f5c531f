"""How many calls with large keyword arguments there may be at once: each is megabytes in memory."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

import trio

from aipod.errors import Refused
from aipod.job.request import Request

# Calls at once whose large kwargs are in memory, from their decompression until the job's entry has them; how many more
# wait for that with what has arrived (16 MiB each, where it could not be compressed); and how many of them are parsed:
# that holds the GIL, and with it every heartbeat, and one emoji among ASCII makes each character take 4 bytes.
LARGE_KWARGS = 2
LARGE_WAITING = 64
PARSING = 1


class LargeKwargs:
    """The mutable state is who has room, and who waits for it."""

    def __init__(self, patience: float) -> None:
        """`patience`: seconds that a call waits for room."""
        self._patience = patience
        self._room = trio.CapacityLimiter(LARGE_KWARGS)
        self._parsing = trio.CapacityLimiter(PARSING)

    @contextlib.asynccontextmanager
    async def room(self, large: bool) -> AsyncIterator[Callable[[], None]]:
        """The block may have `large` kwargs in memory until it calls what it is given, or ends.

        This is a trio-flavored async context manager. Raises `Refused(OVERLOADED)`.
        """
        if not large:
            yield lambda: None
            return
        full = Refused("OVERLOADED", "the server has many calls with large keyword arguments at once; try again later")
        if self._room.statistics().tasks_waiting >= LARGE_WAITING:
            raise full
        with trio.move_on_after(self._patience) as patience:
            await self._room.acquire()
        if patience.cancelled_caught:
            raise full
        with contextlib.ExitStack() as stack:
            stack.callback(self._room.release)
            yield stack.close

    async def parse(self, parse: Callable[[], Request]) -> Request:
        """`parse()` in a thread: 16 MiB of JSON take a while. This is a trio-flavored async function."""
        return await trio.to_thread.run_sync(parse, limiter=self._parsing)
