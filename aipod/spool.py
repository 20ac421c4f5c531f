"""The directory where jobs live: entries, their locks, their journals, and what is swept away.

    spool/                 0700
      app                  MODULE.CLASS that this spool belongs to
      spool-id             random, made once; with the boot id behind it, it names this spool on the wire
      workers/<name>.lock  held by a worker process for as long as it lives
      <id>.lock            held by the server process that works on the entry; unlinked only by who holds it
      <id>/                0700
        state              the journal: one line per step, "crc32 json\\n"; the fold of all whole lines is the truth
        in                 the decompressed payload
        kw                 kwargs JSON, where it is longer than `INLINE` (else in the journal)
        res                the result, uncompressed, where it is longer than `INLINE` (else in the journal)
        log                what the model logged
        work/              the model's scratch directory
      .trash-*             being removed

Nothing here is async and nothing but this module writes below `spool/` (a worker writes `res` and `work/` of its own
job): callers hop to a thread. Page cache survives a killed process, so only a power cut asks for fsync: the first
`SYNC_AFTER` seconds of an entry are never synced, which is why small jobs cost no flush.

Locks are `flock`s through filelock, one object per holder and `thread_local=False`: with its default, a release in
another thread than the acquire does nothing, silently (tox-dev/filelock#404). The lock file lies outside the entry,
because a renamed directory would take a waiter's lock file with it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import time
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import filelock

from aipod.codec import new_hasher
from aipod.config import GIB, MIB
from aipod.errors import AipodError, Refused, refused_when_exhausted
from aipod.results import INLINE
from aipod.trash import remove

logger = logging.getLogger("aipod.spool")

SYNC_AFTER = 1.0  # seconds: the first tick
SYNC_BYTES = 64 * MIB  # at most this much is ever written again after a power cut
MAX_LOG = 16 * MIB  # a model that logs in a loop must not fill the disk; what is over it is dropped and said so
READ = 1 * MIB
CLAIM_PATIENCE = 0.1  # seconds


class SpoolError(AipodError):
    """The spool directory cannot be used; the text says why and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__("SPOOL_UNUSABLE", message)


_ENTRY = re.compile(r"([0-9a-f]{32})(?:\.lock)?\Z")


def _lock(path: Path) -> filelock.BaseFileLock:
    # No soft fallback: on a file system without flock an error is right, a lock that a kill leaves behind is not.
    return filelock.FileLock(path, thread_local=False, fallback_to_soft=False, mode=0o600)


def _try_lock(path: Path, *, patience: float = 0.0) -> filelock.BaseFileLock | None:
    lock = _lock(path)
    try:
        lock.acquire(timeout=patience, poll_interval=0.01)
    except filelock.Timeout:
        return None
    return lock


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    lock = _try_lock(path)
    if lock is not None:
        lock.release()
    return lock is None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    except OSError:
        return "0" * 32  # no boot id on this system: a reboot is then not noticed, as on every other spool software


class Journal:
    """Append-only lines, each checksummed; a torn line (power cut, full disk) is as if never written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, fields: dict[str, Any], *, sync: bool = False) -> None:
        text = json.dumps(fields, separators=(",", ":"))
        line = f"{zlib.crc32(text.encode()):08x} {text}\n".encode()
        fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line  # the line before was torn; glued to it, this one would be lost too
            if os.write(fd, line) < len(line):
                os.ftruncate(fd, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fdatasync(fd)
        finally:
            os.close(fd)

    def read(self) -> dict[str, Any]:
        """The fold of all whole lines, later ones over earlier ones; empty where there is none."""
        state: dict[str, Any] = {}
        try:
            raw = self._path.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return state  # a model can do that to its job
        for line in raw.split(b"\n"):
            check, _, text = line.partition(b" ")
            if text and check == b"%08x" % zlib.crc32(text):
                state.update(json.loads(text))
        return state


class Entry:
    """One job's directory, held by its lock. Every method blocks: call it from a thread.

    The mutable state is the open payload file and how much of it is written and synced; only the one uploader of the
    job touches it.
    """

    def __init__(self, spool: Spool, job_id: str, lock: filelock.BaseFileLock) -> None:
        self.id = job_id
        self.path = spool.path / job_id
        self.payload = self.path / "in"
        self.result = self.path / "res"
        self.work = self.path / "work"
        self._spool = spool
        self._lock = lock
        self._journal = Journal(self.path / "state")
        self._fd: int | None = None
        self._hasher = new_hasher()
        self.written = 0  # bytes in the payload file
        self.durable = 0  # bytes of it that have been synced
        self._synced_at = time.monotonic()
        self._space_until = SYNC_BYTES  # the next size at which to look whether the disk's reserve is untouched
        self.log_size = 0  # bytes of the log

    def create(self, fields: dict[str, Any], kwargs: bytes) -> None:
        """Make the directory, the journal's first line, the kwargs and the empty payload file."""
        self.path.mkdir(mode=0o700)
        if len(kwargs) <= INLINE:
            fields = {**fields, "kwargs": kwargs.decode()}
        else:
            (self.path / "kw").write_bytes(kwargs)
        self.record(fields)
        self._fd = os.open(self.payload, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def record(self, fields: dict[str, Any], *, sync: bool = False) -> None:
        """Append a line to the journal. Raises `Refused` (SPOOL_FULL, OVERLOADED)."""
        with refused_when_exhausted():
            self._journal.append(fields, sync=sync)

    def write(self, data: bytes) -> None:
        """Append payload bytes. Raises `Refused` (SPOOL_FULL)."""
        assert self._fd is not None, "the payload is sealed"
        if self.written >= self._space_until:
            self._spool.check_space(0)
            self._space_until = self.written + SYNC_BYTES
        view = memoryview(data)
        with refused_when_exhausted():
            while view:
                view = view[os.write(self._fd, view) :]
        self._hasher.update(data)
        self.written += len(data)

    def checkpoint(self, *, now: bool = False) -> None:
        """Make what has been written durable: `now`, or where a tick has passed or `SYNC_BYTES` are at stake."""
        due = time.monotonic() - self._synced_at >= SYNC_AFTER or self.written - self.durable >= SYNC_BYTES
        if not due and not now:
            return
        self._spool.check_space(0)
        if self._fd is not None and self.written > self.durable:
            with refused_when_exhausted():
                os.fdatasync(self._fd)
            self.durable = self.written
            self.record({"offset": self.durable}, sync=True)
        self._synced_at = time.monotonic()

    def seal(self) -> bytes:
        """Close the payload, make it read-only, and return its digest."""
        if self._fd is not None:
            os.fchmod(self._fd, 0o400)
            os.close(self._fd)
            self._fd = None
        return self._hasher.digest()

    def drop_payload(self) -> None:
        """Remove the payload: the run is over, its space is better used by the result."""
        with contextlib.suppress(FileNotFoundError):
            self.payload.unlink()

    def read_result(self, offset: int) -> Generator[bytes, None, None]:
        """The bytes of `res` from `offset` on, in pieces of at most `READ`."""
        with self.result.open("rb", buffering=0) as file:
            file.seek(offset)
            while piece := file.read(READ):
                yield piece

    def append_log(self, text: str) -> None:
        """Append to the job's log, up to `MAX_LOG` and a line that says so."""
        data = text.encode("utf-8", "replace")
        room = MAX_LOG - self.log_size
        if room < 0:
            return
        if len(data) > room:
            # Cut at a character: `read_log` counts what it can decode.
            data = data[:room].decode("utf-8", "ignore").encode() + b"\n[the log is full; the rest is dropped]\n"
        try:
            with (self.path / "log").open("ab") as file:
                file.write(data)
        except OSError as exc:
            # A full disk costs the log, not the job.
            logger.warning("job %s: its log could not be written: %s", self.id, exc)
        else:
            self.log_size += len(data)

    def read_log(self, offset: int, limit: int) -> bytes:
        """At most `limit` bytes of the log from `offset` on, cut at a character; empty where there is no more."""
        try:
            with (self.path / "log").open("rb") as file:
                file.seek(offset)
                data = file.read(limit)
        except OSError:
            return b""  # none was written, or it cannot be read now: a heartbeat must not pay for that
        return data.decode("utf-8", "ignore").encode()

    def destroy(self) -> None:
        """Remove the entry, then its lock file, then let go of the lock. Idempotent."""
        if not self._lock.is_locked:
            return  # whatever has this name now is somebody else's
        trash = self._spool.path / f".trash-{secrets.token_hex(8)}"
        try:
            if self._fd is not None:
                fd, self._fd = self._fd, None
                os.close(fd)
            with contextlib.suppress(FileNotFoundError):
                self.path.rename(trash)
                remove(trash)  # what stays is swept later
            # Unlinked while held: filelock looks at st_nlink after every acquire, so a waiter notices and tries anew.
            self._spool.lock_path(self.id).unlink(missing_ok=True)
        except OSError as exc:
            # A disk that has become read-only, say: the other jobs must not pay for it. A sweep comes back to it.
            logger.error("job %s: its entry could not be removed: %s", self.id, exc)
        finally:
            self._lock.release()


class Spool:
    """A spool directory, opened for one app. `open` it; methods block."""

    def __init__(self, path: Path, *, reserve: int, ttl: float) -> None:
        self.path = path
        self.workers = path / "workers"
        self.id = ""
        self._reserve = reserve
        self._ttl = ttl
        self._seen: dict[str, tuple[float, float]] = {}  # job id -> (newest mtime, when first seen so, monotonic)

    @classmethod
    def open(cls, path: Path, app: str, *, reserve: int = GIB, ttl: float = 3600.0) -> Spool:
        """Make or open `path` for `app`, and sweep it. Raises `SpoolError`."""
        spool = cls(path, reserve=reserve, ttl=ttl)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            names = {one.name for one in path.iterdir() if not one.name.startswith(".")}
            if names and "app" not in names:
                raise SpoolError(f"{path} is not empty and is no spool; give --spool a directory of its own")
            owner = spool._once("app", app)
            if owner != app:
                raise SpoolError(
                    f"spool {path} belongs to {owner}, not to {app}; choose another directory with --spool, "
                    f"or remove it if its jobs are not wanted"
                )
            spool.id = f"{spool._once('spool-id', secrets.token_hex(8))}-{_boot_id()}"
            spool.workers.mkdir(mode=0o700, exist_ok=True)
            probe = _try_lock(path / ".probe")
            if probe is not None:
                (path / ".probe").unlink(missing_ok=True)
                probe.release()
        except (OSError, NotImplementedError) as exc:
            raise SpoolError(f"spool {path} cannot be used: {exc}; choose a local directory with --spool") from exc
        return spool

    def _once(self, name: str, value: str) -> str:
        """The content of file `name`, which is `value` where it did not exist: the same for all who race."""
        target = self.path / name
        if not target.exists():
            fresh = self.path / f".{name}-{secrets.token_hex(4)}"
            fresh.write_text(value)
            with contextlib.suppress(FileExistsError):
                os.link(fresh, target)
            fresh.unlink()
        return target.read_text().strip()

    def lock_path(self, job_id: str) -> Path:
        return self.path / f"{job_id}.lock"

    def worker_lock(self, name: str) -> Path:
        """The lock file that worker `name` holds for as long as it lives."""
        return self.workers / f"{name}.lock"

    def forget_worker(self, name: str) -> None:
        """Remove the lock file of a worker that has been waited for."""
        with contextlib.suppress(FileNotFoundError):
            self.worker_lock(name).unlink()

    def check_space(self, wanted: int) -> None:
        """Raises `Refused(SPOOL_FULL)` where `wanted` more bytes would eat into the reserve."""
        stat = os.statvfs(self.path)
        if stat.f_bavail * stat.f_frsize - wanted < self._reserve:
            raise Refused("SPOOL_FULL", "the server's disk has no room for this payload; try again later")

    def claim(self, job_id: str, fields: dict[str, Any], kwargs: bytes = b"{}", *, size: int | None) -> Entry:
        """Create the entry `job_id` and hold it. Raises `Refused` (SPOOL_FULL, OVERLOADED, JOB_EXISTS)."""
        self.check_space(size or 0)
        with refused_when_exhausted():
            # A sweep may hold the lock file of a new job for a moment, until it sees that there is no entry.
            lock = _try_lock(self.lock_path(job_id), patience=CLAIM_PATIENCE)
            if lock is None:
                raise Refused("JOB_EXISTS", "a job with this ticket is already under way; use a new ticket")
            entry = Entry(self, job_id, lock)
            try:
                entry.create(fields, kwargs)
            except FileExistsError:
                lock.release()
                raise Refused("JOB_EXISTS", "a job with this ticket already exists; use a new ticket") from None
            except BaseException:
                entry.destroy()
                raise
        return entry

    def is_held(self, job_id: str) -> bool:
        """True while a living process works on the job."""
        return _is_locked(self.lock_path(job_id))

    def sweep(self, now: Callable[[], float] = time.monotonic) -> int:
        """Remove what nobody can want: trash, entries that no ticket can claim, and those unchanged for the TTL.

        Held entries belong to a living process and are left alone. No wall clock decides: an entry's age is how long
        its newest modification time has stayed the same by the monotonic clock of this process. Returns how many
        entries were removed.
        """
        for trash in self.path.glob(".trash-*"):
            remove(trash)
        for path in self.workers.glob("*.lock"):
            lock = _try_lock(path)
            if lock is not None:
                path.unlink(missing_ok=True)
                lock.release()
        # Only what is named as ours: somebody may have chosen a directory with a poetry.lock beside a poetry/.
        ids = {match[1] for match in map(_ENTRY.match, os.listdir(self.path)) if match}
        self._seen = {job_id: seen for job_id, seen in self._seen.items() if job_id in ids}
        removed = 0
        for job_id in ids:
            try:
                removed += self._sweep_one(job_id, now())
            except OSError as exc:
                logger.error("job %s: its entry could not be swept: %s", job_id, exc)
        return removed

    def _sweep_one(self, job_id: str, now: float) -> bool:
        lock = _try_lock(self.lock_path(job_id))
        if lock is None:
            return False
        entry = Entry(self, job_id, lock)
        state = Journal(entry.path / "state").read()
        if state.get("phase") == "RUNNING" and state.get("worker") and _is_locked(self.worker_lock(state["worker"])):
            lock.release()  # its server is gone, and the kernel is about to end it: the next sweep finds it dead
            return False
        if state.get("ticketed"):
            newest = max(path.stat().st_mtime for path in (entry.path, *entry.path.iterdir()))
            if self._seen.get(job_id, (None, 0))[0] != newest:
                self._seen[job_id] = (newest, now)
            if now - self._seen[job_id][1] < self._ttl:
                lock.release()
                return False
        self._seen.pop(job_id, None)
        existed = entry.path.exists()
        entry.destroy()
        return existed
