"""Ended jobs whose answers have arrived, or may have: what they keep is forgotten before their time.

Nothing but the client's own word proves that it has an answer: one of `Open.released`, or a RELEASE. What was written
to a connection may have gone to a dead one, a proxy takes and acknowledges what no client ever sees, and the half-close
came long before the answer. So an answer that was sent, and of which its client has said nothing, is kept as any other;
but not every client says something, and small ones come by the thousand: the oldest of them go where there are too many
or the disk has no room left, after `KEEP_ANSWERED` at the earliest.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable

import trio

from aipod import hands
from aipod.identity import ANYONE, Caller
from aipod.job.job import Job
from aipod.job.watched import KEEP_ANSWERED, KEEP_RELEASED, Told
from aipod.spool import ENDED, Entry, Spool
from aipod.wire.ai import Op, Open

log = logging.getLogger("aipod.job")

# Seconds between two removals.
EVERY = 5.0
# Small answers that were sent and of which nothing was heard, before the oldest of them go. With a page each for
# directory and journal that is 83 MB (ext4); in memory 1.3 MB.
UNSAID = 10_000
# Removed by one call in a thread. Where the loop is busy each such call waits for it, and one for each job would let
# them end faster than they go. It takes 0.1 s at most on a disk that is not slow.
AT_ONCE = 100
# Seconds in which what calls have brought is gathered, to be released in one go; and how many at most, 3 MB: a call
# brings up to 64, and a disk that stands still takes none.
_GATHER = 0.02
WAITING = 10_000
# Times that a release is tried again, and the seconds between them.
_TRIES, _AGAIN = 10, 0.05


class Forgetter:
    """Releases answers that have arrived, and removes small jobs soon afterwards.

    The mutable state is when (monotonic) which job may be removed, in order: `UNSAID` small jobs and those of so many
    seconds at most; and what is about to be released.
    """

    def __init__(self, spool: Spool, *, unsaid: int = UNSAID, clock: Callable[[], float] = time.monotonic) -> None:
        self._spool = spool
        self._unsaid = unsaid
        self._clock = clock
        self._answered: dict[str, float] = {}  # in order: dicts are
        self._released: dict[str, float] = {}
        self._asked: dict[str, Caller] = {}  # to be released, and by whom
        self._asked_for = trio.Event()

    def told(self, watched: Job | Told, open_: Open) -> None:
        """The end of the job was told to a call, and all of the answer that it wanted was sent.

        Only the caller that brought the job is done with it then: who attaches may ask as often as it likes, and who
        wants something else (to submit the job, to hear of its end) says that it has more of the answer than there is.
        The seconds that a call is told as `State.ttl` begin now, also where the answer was sent before.
        """
        job_id = watched.look.id
        sent = open_.op != Op.ATTACH and open_.have <= (watched.answer.size if watched.answer is not None else 0)
        if watched.small and (self._answered.pop(job_id, None) is not None or sent):
            self._answered[job_id] = self._clock() + KEEP_ANSWERED

    def release_soon(self, job_ids: list[str], caller: Caller) -> None:
        """Have `run` forget these answers; more than `WAITING` at once stay for their time."""
        for job_id in job_ids:
            if len(self._asked) < WAITING:
                self._asked[job_id] = caller
        self._asked_for.set()

    async def release(self, job_ids: list[str], caller: Caller = ANYONE) -> None:
        """Forget the answers of ended jobs that are the caller's. This is a trio-flavored async function."""
        await self._release_all(dict.fromkeys(job_ids, caller))

    async def _release_all(self, asked: dict[str, Caller]) -> None:
        for _ in range(1 + _TRIES):
            ids, held = list(asked), dict[str, Caller]()
            for start in range(0, len(ids), AT_ONCE):
                some = {job_id: asked[job_id] for job_id in ids[start : start + AT_ONCE]}
                released = await hands.do(self._release_some, some)
                for job_id, done in released.items():
                    if done is None:
                        held[job_id] = asked[job_id]
                    elif done:
                        self._answered.pop(job_id, None)
                        self._released.setdefault(job_id, self._clock() + KEEP_RELEASED)
            if not held:
                break
            asked = held
            await trio.sleep(_AGAIN)

    async def run(self) -> None:
        """Release and remove jobs in time. This is a trio-flavored async function; it never returns."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._release_in_time)
            while True:
                await trio.sleep(EVERY)
                await self.remove_due()

    async def _release_in_time(self) -> None:
        while True:
            await self._asked_for.wait()
            await trio.sleep(_GATHER)
            self._asked_for = trio.Event()
            asked, self._asked = self._asked, {}
            await self._release_all(asked)

    async def remove_due(self) -> None:
        """Remove the jobs whose time has come. This is a trio-flavored async function."""
        has_room = await trio.to_thread.run_sync(self._has_room)
        while due := self._next_due(has_room):
            has_room = await trio.to_thread.run_sync(self._remove, due)

    def _next_due(self, has_room: bool) -> list[str]:
        """The next jobs to be removed, which are not thought of any more; none where none is due."""
        surplus = max(len(self._answered) - self._unsaid, 0 if has_room else 1)
        return self._take(self._released, AT_ONCE) or self._take(self._answered, min(surplus, AT_ONCE))

    def _take(self, waiting: dict[str, float], most: int) -> list[str]:
        now = self._clock()
        due = [job_id for job_id, when in itertools.islice(waiting.items(), most) if when <= now]
        for job_id in due:
            del waiting[job_id]
        return due

    def _release_some(self, asked: dict[str, Caller]) -> dict[str, bool | None]:
        return {job_id: self._release(job_id, caller) for job_id, caller in asked.items()}

    def _release(self, job_id: str, caller: Caller = ANYONE) -> bool | None:
        """Whether it is released now; None where somebody has an ended job for a moment, to make its answer durable."""
        try:
            with self._spool.holding(job_id) as entry:
                fields = entry.found if entry is not None else self._spool.look(job_id).read()
                if fields.get("phase") not in ENDED or not caller.owns(fields):
                    return False
                if entry is None:
                    return None
                if fields["phase"] == "DONE" and fields.get("inline") is None:
                    entry.release()
                elif fields["phase"] != "RELEASED":
                    entry.release_short()  # `_remove` is about to do the rest
                return True
        except Exception as exc:  # one broken entry must not end the server
            log.warning(
                "job %s: it could not be released; it stays until its time is over: %s",
                job_id,
                exc,
                extra={"job": job_id},
            )
            return False

    def _has_room(self) -> bool:
        try:
            return self._spool.has_room()
        except OSError as exc:
            log.warning("the spool's disk does not say how much room it has: %s", exc)
            return True

    def _remove(self, job_ids: list[str]) -> bool:
        """Remove the jobs; whether the disk has room then. Blocks."""
        for job_id in job_ids:
            try:
                with self._spool.holding(job_id) as entry:
                    if entry is not None and entry.found.get("phase") in ENDED:
                        entry.destroy()
            except Exception as exc:  # one broken entry must not end the server
                log.warning(
                    "job %s: it could not be removed; it stays until its time is over: %s",
                    job_id,
                    exc,
                    extra={"job": job_id},
                )
        return self._has_room()


def forget_answer(entry: Entry) -> None:
    """Release a job that has ended; what it tells from now on is that. Blocks."""
    if entry.read().get("phase") != "RELEASED":
        entry.release()
