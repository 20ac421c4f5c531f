"""What all entries of a spool take together, and that it stays below a limit.

Nobody can ask a directory for its size, and to walk through it for each job would take longer than most jobs. So it is
measured when the spool is opened and with each sweep, and of the entries that this process holds what happens to them
is known at once: what was announced at their begin, what is written of an upload, what is left at their end. What a run
writes, and what other servers on the same spool take and give back, is known after a sweep (half a minute); an upload
whose size nobody has told may exceed the limit by what comes between two of its checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from aipod.errors import Refused


class Quota:
    """Bytes on the disk by entry; `limit` 0 is none, and nothing is measured then unless somebody wants to `know`.

    The mutable state is the two maps and their sum; any thread may change it. A hundred thousand entries take 20 MB.
    """

    def __init__(self, spool_path: Path, limit: int, *, know: bool = False) -> None:
        self.limit = limit
        self._measures = know or limit > 0
        self._path = spool_path
        self._lock = threading.Lock()  # guards what follows
        self._found: dict[str, int] = {}
        self._promised: dict[str, int] = {}  # of held ones: what they will take at least
        self._total = 0

    @property
    def total(self) -> int | None:
        """Bytes of all together, those that were announced included; None where nothing is measured."""
        return self._total if self._measures else None

    def check(self, wanted: int) -> None:
        """Raises `Refused(SPOOL_FULL)` where `wanted` more bytes are too many."""
        if not self.has_room(wanted):
            free = max(0, self.limit - self._total)
            room = {"free": str(free), "wanted": str(wanted), "limit": str(self.limit)}
            text = f"{free} of {self.limit} bytes are free (--max-spool), {wanted} more are wanted"
            raise Refused("SPOOL_FULL", f"the server's spool has no room for this payload: {text}; try later", room)

    def has_room(self, wanted: int) -> bool:
        """Whether there may be `wanted` more bytes."""
        return not self.limit or self._total + wanted <= self.limit

    def promise(self, job_id: str, size: int) -> None:
        """A held entry will take `size` bytes. Raises as `check`, and has changed nothing then."""
        if self._measures:
            with self._lock:
                more = size - self._of(job_id)
                if more > 0:
                    self.check(more)
                self._put(job_id, promised=size)

    def grown(self, job_id: str, size: int) -> None:
        """A held entry has `size` bytes of payload now, promised or not. Raises as `check` where those are too many."""
        if self._measures:
            with self._lock:
                if size > self._promised.get(job_id, 0):
                    self._put(job_id, promised=size)
                    self.check(0)

    def resume(self, job_id: str, size: int | None, written: int) -> None:
        """Somebody goes on with an upload of `size` bytes, or of nobody knows how many. Raises as the two above."""
        if size is None:
            self.grown(job_id, written)
        else:
            self.promise(job_id, size)

    def measure(self, job_id: str, *, held: bool = True) -> None:
        """Look what an entry takes. `held`: who holds it may be one of this process, and may have promised more."""
        if self._measures:
            found = _size_of(self._path / job_id)
            with self._lock:
                self._put(job_id, found=found, promised=None if held else 0)

    def swept(self, job_ids: Iterable[str]) -> None:
        """These are all entries that there were a moment ago: of others it is time to see that they are gone."""
        with self._lock:
            gone = set(self._found).difference(job_ids)
        for job_id in gone:
            self.measure(job_id)

    def _of(self, job_id: str) -> int:
        return max(self._found.get(job_id, 0), self._promised.get(job_id, 0))

    def _put(self, job_id: str, *, found: int | None = None, promised: int | None = None) -> None:
        before = self._of(job_id)
        for sizes, size in ((self._found, found), (self._promised, promised)):
            if size:
                sizes[job_id] = size
            elif size == 0:
                sizes.pop(job_id, None)
        self._total += self._of(job_id) - before


def _size_of(path: Path) -> int:
    """Bytes on the disk of a tree; not of what has gone meanwhile, or cannot be looked at. Links are not followed."""
    total, todo = 0, [str(path)]
    while todo:
        with contextlib.suppress(OSError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
    return total
