"""Removal of what nobody can want any more, and a look for jobs that nobody works on."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from aipod.errors import Refused
from aipod.spool.directory import Spool, is_job_id
from aipod.spool.locks import try_lock
from aipod.spool.look import ENDED, Look
from aipod.trash import remove

logger = logging.getLogger("aipod.spool")

# Entries per step: the caller lets other threads run in between.
BATCH = 500


class Sweeper:
    """Looks at all entries of a spool, again and again.

    No wall clock decides: an entry's age is how long its modification times have stayed the same by the monotonic
    clock of this process. So a restart makes entries live longer, never shorter.
    """

    def __init__(
        self, spool: Spool, *, upload_ttl: float, ttl: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._spool = spool
        self._upload_ttl = upload_ttl
        self._ttl = ttl
        self._clock = clock
        # What each entry looked like, and since when (monotonic); and how long it is kept.
        self._seen: dict[str, tuple[tuple[int, ...], float, float]] = {}
        self._unended: dict[str, int] = {}  # jobs in line or running, and when (nanoseconds) that was written

    def orphans(self) -> list[str]:
        """Jobs of the last sweep whose process has died before their end, the oldest first. Blocks."""
        ids = sorted(self._unended, key=self._unended.__getitem__)
        return [job_id for job_id in ids if not self._spool.is_held(job_id)]

    def sweep(self) -> Iterator[int]:
        """Sweep once, in steps; each gives how many entries it has removed. Blocks.

        Held entries belong to a living process and are left alone. Entries of plain clients go as soon as nobody holds
        them: no ticket can claim them.
        """
        for trash in self._spool.path.glob(".trash-*"):
            remove(trash)
        for path in self._spool.workers.glob("*.lock"):
            _remove_if_free(path)
        names = {name.removesuffix(".lock") for name in os.listdir(self._spool.path)}
        ids = [name for name in names if is_job_id(name)]
        yield 0
        for start in range(0, len(ids), BATCH):
            yield sum(map(self._look_at, ids[start : start + BATCH]))
        kept = set(ids)
        self._seen = {job_id: seen for job_id, seen in self._seen.items() if job_id in kept}
        self._unended = {job_id: since for job_id, since in self._unended.items() if job_id in kept}

    def _look_at(self, job_id: str) -> bool:
        try:
            return self._sweep_one(job_id)
        except (Refused, OSError) as exc:
            logger.error("job %s: its entry could not be swept: %s", job_id, exc)
        except Exception as exc:  # whatever is wrong with one entry must cost neither the others nor the server
            logger.error("job %s: a bug of aipod, or its entry is damaged", job_id, exc_info=exc)
        return False

    def _sweep_one(self, job_id: str) -> bool:
        look = self._spool.look(job_id)
        times = _times(look.path)
        now = self._clock()
        looked, since, keep = self._seen.get(job_id, ((), now, 0.0))
        if looked == times and now - since < keep:
            return False
        self._unended.pop(job_id, None)
        hold = self._spool.hold
        try:
            state = look.read()
        except Refused:  # damaged: it is told so to who asks, for as long as an upload is kept
            state, hold = {"ticketed": True}, self._spool.hold_damaged
        if state.get("ticketed"):
            ended = state.get("phase") in ENDED
            if state.get("phase") in ("QUEUED", "RUNNING"):
                self._unended[job_id] = times[1]
            if looked != times:
                since, keep = now, self._ttl if ended else self._upload_ttl
                self._seen[job_id] = times, since, keep
            if now - since < keep:
                if ended and (_exists(look, "in") or (state["phase"] == "RELEASED" and _exists(look, "res"))):
                    self._tidy(job_id)
                return False
        self._seen.pop(job_id, None)
        entry = hold(job_id)
        if entry is None:
            return self._remove_lock(job_id)
        if _times(entry.path) != times:  # somebody was here meanwhile
            entry.let_go()
            return False
        entry.destroy()
        return True

    def _tidy(self, job_id: str) -> None:
        """Do what the process that ended the job has not come to: it was killed, or is about to do it."""
        with self._spool.holding(job_id) as entry:
            if entry is not None:
                entry.tidy(entry.read()["phase"])

    def _remove_lock(self, job_id: str) -> bool:
        """Remove a lock file without an entry, if nobody holds it."""
        if (self._spool.path / job_id).exists():
            return False
        lock = try_lock(self._spool.lock_path(job_id))
        if lock is not None:
            if not (self._spool.path / job_id).exists():
                self._spool.lock_path(job_id).unlink(missing_ok=True)
            lock.release()
        return False


def _remove_if_free(path: Path) -> None:
    """Remove the lock file of a worker that is gone."""
    try:
        lock = try_lock(path)
        if lock is not None:
            path.unlink(missing_ok=True)
            lock.release()
    except OSError as exc:
        logger.error("%s could not be swept: %s", path, exc)


def _exists(look: Look, name: str) -> bool:
    return os.path.exists(f"{look.path}/{name}")


def _times(path: Path) -> tuple[int, ...]:
    """The modification times of an entry and of the files that tell of life in it."""
    found = []
    for one in (path, f"{path}/state", f"{path}/seen"):  # a path object for each takes longer than to ask the disk
        try:
            found.append(os.stat(one).st_mtime_ns)
        except OSError:
            found.append(0)
    return tuple(found)
