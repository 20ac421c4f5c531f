"""Ended jobs whose answers have arrived: what they keep is forgotten before their time."""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Callable

import trio

from aipod.job.job import KEEP_ANSWERED, KEEP_RELEASED, Job, Told
from aipod.spool import ENDED, Entry, Spool

log = logging.getLogger("aipod.job")

# Seconds between two removals.
EVERY = 5.0


class Forgetter:
    """Releases answers that have arrived, and removes small jobs soon afterwards.

    The mutable state is when (monotonic) which job is removed, in order; bounded by the small jobs of that many
    seconds.
    """

    def __init__(self, spool: Spool, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._spool = spool
        self._clock = clock
        self._answered: collections.deque[tuple[float, str]] = collections.deque()
        self._released: collections.deque[tuple[float, str]] = collections.deque()

    def answered(self, watched: Job | Told) -> None:
        """The whole answer was sent to the call that brought the job: a small one is not kept for long."""
        if watched.small:
            self._answered.append((self._clock() + KEEP_ANSWERED, watched.look.id))

    async def release(self, job_ids: list[str]) -> None:
        """Forget the answers of ended jobs. This is a trio-flavored async function."""
        for job_id in job_ids:
            if await trio.to_thread.run_sync(self._release, job_id):
                self._released.append((self._clock() + KEEP_RELEASED, job_id))

    async def run(self) -> None:
        """Remove jobs in time. This is a trio-flavored async function; it never returns."""
        while True:
            await trio.sleep(EVERY)
            await trio.to_thread.run_sync(self.remove_due)

    def remove_due(self) -> None:
        """Remove the jobs whose time has come. Blocks."""
        for waiting in (self._answered, self._released):
            while waiting and waiting[0][0] <= self._clock():
                self._remove(waiting.popleft()[1])

    def _release(self, job_id: str) -> bool:
        try:
            with self._spool.holding(job_id) as entry:
                if entry is None or entry.read().get("phase") not in ENDED:
                    return False
                forget_answer(entry)
                return True
        except Exception as exc:  # one broken entry must not end the server
            log.warning("job %s: it could not be released; it stays until its time is over: %s", job_id, exc)
            return False

    def _remove(self, job_id: str) -> None:
        try:
            with self._spool.holding(job_id) as entry:
                if entry is not None and entry.read().get("phase") in ENDED:
                    entry.destroy()
        except Exception as exc:  # one broken entry must not end the server
            log.warning("job %s: it could not be removed; it stays until its time is over: %s", job_id, exc)


def forget_answer(entry: Entry) -> None:
    """Release a job that has ended; what it tells from now on is that. Blocks."""
    if entry.read().get("phase") != "RELEASED":
        entry.release()
