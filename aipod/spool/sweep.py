"""Removal of what nobody can want any more, and a look for jobs that nobody works on."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
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

# An entry's id, a hash of its modification times, and until when (monotonic) it is kept if they stay the same.
_MARK = struct.Struct("16sqd")


class _Marks:
    """What a sweep remembers of the entries that it has kept, in the order of their ids: 32 bytes each."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._next = 0

    def add(self, job_id: str, times: tuple[int, ...], until: float) -> None:
        """Behind all others."""
        self._data += _MARK.pack(bytes.fromhex(job_id), hash(times), until)

    def rewind(self) -> None:
        """`find` begins anew."""
        self._next = 0

    def find(self, job_id: str, times: tuple[int, ...]) -> float | None:
        """Until when it is kept, None where it did not look so; behind all that were asked for before."""
        wanted = bytes.fromhex(job_id)
        while self._next < len(self._data):
            found, looked, until = _MARK.unpack_from(self._data, self._next)
            if found > wanted:
                break
            self._next += _MARK.size
            if found == wanted:
                return until if looked == hash(times) else None
        return None


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
        # Of the last sweep, and of the one under way: there may be a hundred thousand answers that nobody fetches.
        self._before, self._marks = _Marks(), _Marks()
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
        ids = sorted(name for name in names if is_job_id(name))
        del names
        self._before.rewind()
        self._marks = _Marks()
        yield 0
        for start in range(0, len(ids), BATCH):
            yield sum(map(self._look_at, ids[start : start + BATCH]))
        self._before = self._marks
        kept = set(self._unended).intersection(ids)
        self._unended = {job_id: since for job_id, since in self._unended.items() if job_id in kept}
        self._spool.quota.swept(ids)

    def _look_at(self, job_id: str) -> bool:
        try:
            removed = self._sweep_one(job_id)
            self._spool.quota.measure(job_id)
            return removed
        except (Refused, OSError) as exc:
            logger.error("job %s: its entry could not be swept: %s", job_id, exc, extra={"job": job_id})
        except Exception as exc:  # whatever is wrong with one entry must cost neither the others nor the server
            logger.error("job %s: a bug of aipod, or its entry is damaged", job_id, exc_info=exc, extra={"job": job_id})
        return False

    def _sweep_one(self, job_id: str) -> bool:
        look = self._spool.look(job_id)
        times = _times(look.path)
        now = self._clock()
        until = self._before.find(job_id, times)
        if until is not None and now < until:
            self._marks.add(job_id, times, until)
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
            if until is None:
                until = now + (self._ttl if ended else self._upload_ttl)
            if now < until:
                self._marks.add(job_id, times, until)
                if ended and look.has_secrets:
                    self._release(job_id)
                elif ended and (_exists(look, "in") or (state["phase"] == "RELEASED" and _exists(look, "res"))):
                    self._tidy(job_id)
                return False
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

    def _release(self, job_id: str) -> None:
        """Forget what a process that has died would have removed with the entry; it may be about to."""
        with self._spool.holding(job_id) as entry:
            if entry is not None:
                entry.release()

    def _remove_lock(self, job_id: str) -> bool:
        """Remove a lock file without an entry, if nobody holds it."""
        if (self._spool.path / job_id).exists():
            return False
        lock = try_lock(self._spool.lock_path(job_id))
        if lock is not None:
            if not (self._spool.path / job_id).exists():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._spool.lock_path(job_id))
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
