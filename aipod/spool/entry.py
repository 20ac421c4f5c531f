"""A job's directory in the hands of the one process that works on it."""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from aipod.codec import cut, new_hasher
from aipod.config import MIB
from aipod.errors import Refused, refused_when_exhausted
from aipod.results import INLINE
from aipod.spool.joblog import append_log
from aipod.spool.locks import Lock
from aipod.spool.look import Look, sync, tombstone
from aipod.spool.quota import Quota
from aipod.spool.regular import NotKept, keep, not_kept, open_regular
from aipod.spool.report import Report
from aipod.trash import remove, remove_at_once

logger = logging.getLogger("aipod.spool")

SYNC_AFTER = 1.0  # seconds: the first tick
SYNC_BYTES = 64 * MIB  # at most this much is ever sent again after a power cut
PREALLOCATE = 1 * MIB  # smaller payloads are not worth the system call
SLOW = 64 * MIB  # to free so much takes a disk 10 ms and more
_KEPT = frozenset({"state", "seen", "in"})  # of an entry's files, when its job has ended


class Home(Protocol):
    """What an entry needs of its spool."""

    @property
    def path(self) -> Path: ...

    def lock_path(self, job_id: str) -> str: ...

    def holding(self, job_id: str) -> AbstractContextManager[Entry | None]: ...

    @property
    def boot(self) -> str: ...

    quota: Quota

    def check_growth(self, job_id: str, size: int) -> None: ...


class Entry(Look):
    """A job, held by its lock until `destroy` or `let_go`. Every method blocks: call it from a thread.

    The mutable state is the open payload file and how much of it is written and synced, which only the one uploader of
    the job touches; and whether the entry has settled, which happens in one thread while the run's end is stored in
    another.
    """

    def __init__(self, home: Home, job_id: str, lock: Lock) -> None:
        super().__init__(home.path, job_id, home.boot)
        self._journal.stays_open = True
        self._home = home
        self._lock = lock
        self._fd: int | None = None
        self._rest: int | None = None  # the payload that has no name any more, and is not freed yet
        self._hasher: Any = new_hasher()  # None: it has not seen the payload from its beginning
        self.written = 0  # bytes in the payload file
        self.durable = 0  # bytes of it that have been synced
        # It survives a power cut: its files have their names on disk, and what is recorded is there before it is told.
        self.settled = False
        self._lost = False  # a sync has failed: none that comes later is believed; see `_note_loss`
        self._settling = threading.RLock()  # what is recorded meanwhile would count as on disk, and not be there
        self._synced_at = time.monotonic()
        self._space_until = SYNC_BYTES  # the next size at which to look whether the disk's reserve is untouched
        self.found: dict[str, Any] = {}  # what its journal told when it was taken
        self._recorded = False  # the last line was written, so there is a journal
        self._log_size = 0
        self.report = Report(f"{self.path}/live")

    # The beginning

    def create(
        self,
        fields: dict[str, Any],
        kwargs: bytes,
        size: int | None,
        payload: bytes | None = None,
        begin: dict[str, Any] | None = None,
    ) -> None:
        """Make the directory, the journal's first line, the kwargs and the empty payload file, with room for `size`.

        With a `payload` that is complete, and the job in line, or as `begin` tells. Raises `FileExistsError` where
        there is a directory, and has changed nothing then.
        """
        os.mkdir(self.path, 0o700)
        fields = {**fields, "boot": self._boot}
        if len(kwargs) <= INLINE:
            fields = {**fields, "kwargs": kwargs.decode()}
        else:
            (self.path / "kw").write_bytes(kwargs)
        self._fd = os.open(self.payload, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if payload is None else 0o400)
        if payload is None:
            self._reserve(size)
        else:
            self.write(payload)
            self._close()
            fields |= {"offset": self.written, **(begin or {"phase": "QUEUED"})}
        self.record(fields)

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Somebody else has made this entry, and come so far."""
        self.settled = bool(state.get("settled"))
        self._lost = bool(state.get("lost"))
        self.found = state
        self.written = self.durable = state.get("offset", 0)
        self._hasher = new_hasher() if self.written == 0 else None

    def resume(self) -> bool:
        """Go on with the upload at its durable offset; False where it is complete, or must be begun anew.

        Raises `Refused` (DAMAGED, …).
        """
        state = self.read()
        if state.get("phase", "RECEIVING") != "RECEIVING":
            return False
        if self._lost:
            self.destroy()  # it has not settled, so nothing of it was told to be durable
            return False
        with refused_when_exhausted():
            with contextlib.suppress(FileNotFoundError):
                self.payload.chmod(0o600)  # it was sealed, and its server killed before the job was queued
            self._fd, found = open_regular(self.payload, os.O_WRONLY | os.O_CREAT)
            if found.st_size < self.written:
                raise Refused("DAMAGED", f"the server has lost what it had of this payload below byte {self.written}")
            os.lseek(self._fd, self.written, os.SEEK_SET)
            self._home.quota.resume(self.id, state.get("size"), self.written)
            self._reserve(state.get("size"))
        if self.written:
            # The offset is about to be told, and a killed process may have written it without having synced it.
            self.settle()
            self.make_sure()
        return True

    def _reserve(self, size: int | None) -> None:
        """Have the disk set the payload's room aside, so that of two uploads which fit alone one is refused at once."""
        if size is None or size < PREALLOCATE or self._fd is None:
            return
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # this file system cannot
                raise

    # The upload

    def write(self, *pieces: bytes | memoryview) -> None:
        """Append payload bytes, in one go. Raises `Refused` (SPOOL_FULL); then what had room is written."""
        assert self._fd is not None, "the payload is sealed"
        if self.written >= self._space_until:
            self._home.check_growth(self.id, self.written)
            self._space_until = self.written + SYNC_BYTES
        left = collections.deque(memoryview(piece) for piece in pieces if piece)
        with refused_when_exhausted():
            while left:
                count = os.writev(self._fd, left)
                self.written += count
                for piece in cut(left, count):
                    if self._hasher is not None:
                        self._hasher.update(piece)

    def checkpoint(self, *, now: bool = False) -> None:
        """Make what was written before durable: `now`, or where a tick has passed or half of `SYNC_BYTES` are at stake.

        Another thread may write meanwhile. Raises `Refused` (SPOOL_FULL, BUSY); what was durable before stays it. Where
        the disk has failed, that is so as long as this holder has the entry: the next one writes what follows anew.
        """
        if not now:
            if time.monotonic() - self._synced_at < SYNC_AFTER and self.written - self.durable < SYNC_BYTES // 2:
                return
            self._home.check_growth(self.id, self.written)
        if self._fd is not None and self.written > self.durable:
            if self._lost:
                raise not_kept()
            written = self.written
            with self._noticing():
                keep(os.fdatasync, self._fd)
            self.record({"offset": written}, sync=True)
            self.settle()
            self.durable = written
        self._synced_at = time.monotonic()

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        """Remember that a sync has failed. Turns the disk's errors into `Refused` (SPOOL_FULL, BUSY, OVERLOADED)."""
        try:
            with refused_when_exhausted():
                try:
                    yield
                except NotKept:
                    self._note_loss()
                    raise
        except NotKept as exc:
            raise not_kept() from exc

    def _note_loss(self) -> None:
        """Have no later sync believed, by the next holders neither, in whose hands it would succeed.

        One that has settled needs no note: each of its lines, and what lies below its offset, was synced by itself, and
        the rest is written anew. The note is not synced: without power nothing is believed of an entry that has not
        settled.
        """
        self._lost = True
        if not self.settled and self._lock.is_locked:
            with contextlib.suppress(Refused, OSError):
                self._journal.append({"lost": True})

    def start_over(self) -> None:
        """Have the next one that holds this upload begin anew: what has arrived is not the payload.

        `durable` stays what it was, for the caller of this connection was told so. Raises `Refused` (SPOOL_FULL).
        """
        assert self._fd is not None, "the payload is sealed"
        self.record({"offset": 0}, sync=True)
        os.ftruncate(self._fd, 0)
        self._close()

    def seal(self) -> None:
        """Close the payload and make it read-only: it is complete."""
        if self._fd is not None:
            if os.fstat(self._fd).st_size != self.written:
                os.ftruncate(self._fd, self.written)  # what was noise, or set aside for more
            if self.settled:
                with self._noticing():
                    keep(os.fdatasync, self._fd)
            os.fchmod(self._fd, 0o400)
            self._close()

    def stop_writing(self) -> None:
        """Make what has arrived of the payload durable, for whoever goes on with it, and close it. Idempotent."""
        if self._fd is not None:
            with contextlib.suppress(Refused):  # the disk is full: what was told to be durable is
                self.checkpoint(now=True)
            self._close()

    @property
    def digest(self) -> bytes | None:
        """Of the payload; None where it must be read for that."""
        return None if self._hasher is None else bytes(self._hasher.digest())

    def _close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    # The journal

    def record(self, fields: dict[str, Any], *, sync: bool = False) -> None:
        """Append a line to the journal; on disk when this returns, once the entry has settled.

        Raises `Refused` (SPOOL_FULL, OVERLOADED, BUSY).
        """
        self._recorded = False
        with self._settling, self._noticing():
            self._journal.append(fields, sync=sync or self.settled)
        self._recorded = True

    def settle(self) -> None:
        """Make the whole entry survive a power cut, once; never, where the disk has failed to keep a part of it.

        Raises `Refused` (SPOOL_FULL, OVERLOADED, BUSY).
        """
        with self._settling, self._noticing():
            if self.settled or self._lost:
                return
            for path in (self.payload, self.path / "kw", self.path / "state", self.path, self._home.path):
                sync(path)
            # Only now: whoever reads it relies on the names above being on disk.
            self._journal.append({"settled": True}, sync=True)
            self.settled = True

    def settle_answer(self) -> bool:
        """Make an answer survive a power cut whose job had not settled when it ended; False where another holds it.

        For an entry that was let go of: whoever wants to release the answer need not wait for a slow disk.
        Raises `Refused` (SPOOL_FULL, OVERLOADED, BUSY). Does nothing once it has failed: see `regular.NotKept`.
        """
        if self._lost:
            return True
        with self._noticing():
            sync(self.result)
        with self._home.holding(self.id) as entry:
            if entry is not None and entry.read().get("phase") == "DONE":
                try:
                    entry.settle()
                finally:
                    self._lost = entry._lost
            return entry is not None or not self.read()

    # The run

    @property
    def log_size(self) -> int:
        """Bytes of the log, of an adopted job once `find_log` was called. Does not block."""
        return self._log_size

    def find_log(self) -> None:
        """Go on with the log where an earlier process has left it."""
        self._log_size = super().log_size

    def append_log(self, text: str) -> int:
        """Append to the job's log, up to `MAX_LOG` and a line that says so. How long it is then."""
        try:
            self._log_size += append_log(f"{self.path}/log", text, self._log_size)
        except (Refused, OSError) as exc:
            # A full disk costs the log, not the job.
            logger.warning("job %s: its log could not be written: %s", self.id, exc, extra={"job": self.id})
        return self._log_size

    def forget_run(self) -> None:
        """Remove what a run that was killed has left: the next one begins where it began."""
        remove(self.work)
        self.result.unlink(missing_ok=True)

    # The end

    def store(self, fields: dict[str, Any]) -> None:
        """Record the job's outcome and give back what it needed to get there; a long payload's room with the entry.

        Raises `Refused` (SPOOL_FULL, OVERLOADED).
        """
        with self._settling:
            if self.settled and self.result.exists():
                with refused_when_exhausted():
                    sync(self.result)
                    sync(self.path)
            try:
                self.record(fields)
            except Refused:
                self._drop_payload()  # it may be what the disk is full of
                self.free()
                self.record(fields)
        self.tidy(fields.get("phase", ""))

    def release(self) -> None:
        """Forget the answer, and the arguments and headers of the request; what stays tells that there was a job.

        Raises `Refused` (SPOOL_FULL, OVERLOADED); then perhaps only the answer is forgotten.
        """
        left = tombstone(self.read() | {"phase": "RELEASED"})
        with self._settling, refused_when_exhausted():
            try:
                self._journal.replace(left, sync=self.settled)
            except OSError:
                # The answer may be what the disk is full of. A line takes no room of its own.
                self.store({"phase": "RELEASED"})
                self._journal.replace(left, sync=self.settled)
        self.tidy("RELEASED")

    def release_short(self) -> None:
        """As `release`, of a job whose answer is in the journal, and whose entry is removed within a minute: until then
        what nobody is told any more stays. To write another journal takes ten times as long.
        """
        self.record({"phase": "RELEASED"})
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.path}/log")

    def tidy(self, phase: str) -> None:
        """Remove what a job that has ended in `phase` does not need any more. Idempotent."""
        try:
            names = os.listdir(self.path)
        except OSError:
            return  # a model has removed its own job; or there is no descriptor left: a sweep comes back to it
        kept = {"DONE": _KEPT | {"log", "res"}, "RELEASED": _KEPT}.get(phase, _KEPT | {"log"})
        for name in names:
            if name not in kept:
                remove(self.path / name)
        # The last: by it a sweep sees that this is still to be done.
        self._drop_payload()
        self._home.quota.measure(self.id, held=False)

    def _drop_payload(self) -> None:
        self._close()
        if self.written >= SLOW and self._rest is None:
            with contextlib.suppress(Refused, OSError):
                self._rest = open_regular(self.payload, os.O_RDONLY)[0]
        try:
            self.payload.unlink(missing_ok=True)
        except OSError:
            remove(self.payload)  # never raises: the outcome is written down, and stays

    @property
    def has_rest(self) -> bool:
        """To give its room back takes the disk a while: whoever wants the outcome had better have it first."""
        return self._rest is not None

    def free(self) -> None:
        """Give the room of a long payload back, where that is still to be done. Idempotent."""
        rest, self._rest = self._rest, None
        if rest is not None:
            os.close(rest)

    def let_go(self, *, free: bool = True) -> None:
        """Make what there is durable, and let go of the entry: others may go on with it. Idempotent.

        One without a journal, as a model can leave it, is nobody's: it is removed. `free`: or do that afterwards.
        """
        try:
            if self._lock.is_locked and not self._recorded and self._is_nothing():
                self.destroy()
            self.stop_writing()
        finally:
            self._journal.close()
            if free:
                self.free()
            if self._lock.is_locked:
                self._home.quota.measure(self.id, held=False)
            self._lock.release()

    def _is_nothing(self) -> bool:
        try:
            return not self.read()
        except Refused:
            return False  # there is something, though it cannot be read

    def destroy(self) -> None:
        """Remove the entry, then its lock file, then let go of the lock. Idempotent."""
        if not self._lock.is_locked:
            return  # whatever has this name now is somebody else's
        try:
            self._close()
            self.free()
            self._journal.close()
            # Most of those that have ended are a journal and nothing else. What stays is swept later.
            remove_at_once(self.path, "state", self._home.path / ".trash-")
            # Unlinked while held: see locks.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._home.lock_path(self.id))
        except OSError as exc:
            # A disk that has become read-only, say: the other jobs must not pay for it. A sweep comes back to it.
            logger.error("job %s: its entry could not be removed: %s", self.id, exc, extra={"job": self.id})
        finally:
            self._home.quota.measure(self.id, held=False)
            self._lock.release()
