"""The spool itself: opening it, its name on the wire, its room, and who gets which entry."""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aipod.codec import spool_name
from aipod.config import GIB
from aipod.errors import NEVER, Refused, ServeError, refused_when_exhausted
from aipod.spool.entry import Entry
from aipod.spool.locks import POLL, Lock, is_locked, try_lock
from aipod.spool.look import Look, sync
from aipod.spool.quota import Quota
from aipod.spool.regular import read_regular

# Seconds for which the lock file of a job without an entry may be held: a sweep holds it until it has seen that there
# is none, which takes a starved process a while.
CLAIM_PATIENCE = 5.0
# Times that a restartable method is started for one job.
MAX_ATTEMPTS = 2


# A job's directory; with `.lock` behind it, its lock. Nothing else is ours: somebody may have chosen a directory with a
# poetry.lock beside a poetry/.
_JOB_ID = re.compile(r"[0-9a-f]{32}\Z")


def is_job_id(name: str) -> bool:
    return _JOB_ID.match(name) is not None


class SpoolError(ServeError):
    """The spool directory cannot be used; the text says why and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__("SPOOL_UNUSABLE", message)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    except OSError:
        return "0" * 32  # no boot id on this system: a reboot is then not noticed, as on every other spool software


class Spool:
    """A spool directory, opened for one app. `open` it; methods block."""

    def __init__(self, path: Path, *, reserve: int, max_spool: int, measure: bool, boot: str) -> None:
        self.path = path
        self.boot = boot
        self.workers = path / "workers"
        self.id = ""
        self.reserve = reserve  # bytes that uploads leave free
        self.quota = Quota(path, max_spool, know=measure)

    @classmethod
    def open(
        cls,
        path: Path,
        app: str,
        *,
        reserve: int = GIB,
        max_spool: int = 0,
        measure: bool = False,
        boot: str | None = None,
    ) -> Spool:
        """Make or open `path` for `app`. Raises `SpoolError`.

        `measure`: know what all entries take, also without `max_spool`. `boot`: what names this run of the machine.
        """
        boot = _boot_id() if boot is None else boot
        spool = cls(path, reserve=reserve, max_spool=max_spool, measure=measure, boot=boot)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync(path.parent)
            names = {one.name for one in path.iterdir() if not one.name.startswith(".")}
            if names and "app" not in names:
                raise SpoolError(f"{path} is not empty and is no spool; give --spool a directory of its own")
            owner = spool._once("app", app)
            if owner != app:
                raise SpoolError(
                    f"spool {path} belongs to {owner}, not to {app}; choose another directory with --spool, "
                    f"or remove it if its jobs are not wanted"
                )
            spool.id = f"{spool._once('spool-id', secrets.token_hex(8))}-{spool.boot}"
            spool.workers.mkdir(mode=0o700, exist_ok=True)
            probe = try_lock(path / ".probe")
            if probe is not None:
                (path / ".probe").unlink(missing_ok=True)
                probe.release()
            for name in filter(is_job_id, names):
                spool.quota.measure(name)
        except OSError as exc:
            raise SpoolError(f"spool {path} cannot be used: {exc}; choose a local directory with --spool") from exc
        return spool

    def _once(self, name: str, value: str) -> str:
        """The content of file `name`, which is `value` where it did not exist: the same for all who race."""
        target = self.path / name
        if not target.exists():
            fresh = self.path / f".{name}-{secrets.token_hex(4)}"
            fresh.write_text(value)
            # Before it has its name: a power cut would else leave a spool without a name, and its jobs to nobody.
            sync(fresh)
            with contextlib.suppress(FileExistsError):
                os.link(fresh, target)
            fresh.unlink()
            sync(self.path)
        return read_regular(target).decode().strip()

    def is_named(self, name: str) -> bool:
        """Whether `name` is this spool's, before or after a reboot."""
        return spool_name(name) == spool_name(self.id)

    def lock_path(self, job_id: str) -> str:
        return f"{self.path}/{job_id}.lock"  # a path object for each takes longer than the lock

    def worker_lock(self, name: str) -> Path:
        """The lock file that a worker holds under `name` until its next run is over."""
        return self.workers / f"{name}.lock"

    def forget_worker(self, name: str) -> None:
        """Remove the lock file of a worker that has been waited for."""
        with contextlib.suppress(FileNotFoundError):
            self.worker_lock(name).unlink()

    def has_room(self, wanted: int = 0) -> bool:
        """Whether `wanted` more bytes would leave the reserve untouched, and keep to the quota."""
        return self.free() - wanted >= self.reserve and self.quota.has_room(wanted)

    def free(self) -> int:
        """Bytes that are free on its disk."""
        stat = os.statvfs(self.path)
        return stat.f_bavail * stat.f_frsize

    def check_space(self, wanted: int) -> None:
        """Raises `Refused(SPOOL_FULL)` where `wanted` more bytes would eat into the reserve, or exceed the quota."""
        self.quota.check(wanted)
        self._check_disk(wanted)

    def _check_disk(self, wanted: int) -> None:
        stat = os.statvfs(self.path)
        free, all_of_it = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
        if free - wanted < self.reserve:
            room = {"free": str(free), "wanted": str(wanted), "reserve": str(self.reserve)}
            text = f"{free} bytes are free, {wanted} more are wanted, {self.reserve} stay free for results (--reserve)"
            advice = "try later"
            if 0 < wanted > all_of_it - self.reserve:
                room[NEVER] = advice = f"it never has: all of it are {all_of_it} bytes"
            raise Refused("SPOOL_FULL", f"the server's disk has no room for this payload: {text}; {advice}", room)

    def check_growth(self, job_id: str, size: int) -> None:
        """As `check_space`, for the next bytes of an upload that has brought `size`."""
        self.quota.grown(job_id, size)
        self._check_disk(0)

    # Entries

    def look(self, job_id: str) -> Look:
        """The job, whether it exists or not, to be read."""
        return Look(self.path, job_id, self.boot)

    def newest(self, count: int) -> list[Look]:
        """At most `count` jobs, those to which something happened last first."""
        found = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                if is_job_id(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        found.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name))
        return [self.look(name) for _, name in heapq.nlargest(count, found)]

    def is_held(self, job_id: str) -> bool:
        """True while a living process works on the job."""
        return is_locked(self.lock_path(job_id))

    def claim(
        self,
        job_id: str,
        fields: dict[str, Any],
        kwargs: bytes = b"{}",
        *,
        size: int | None = None,
        payload: bytes | None = None,
        begin: dict[str, Any] | None = None,
    ) -> Entry | None:
        """Create the entry `job_id` and hold it; None where there is one, or somebody holds its lock for seconds.

        With all of its `payload`, the job is in line at once, or what `begin` tells instead.
        Raises `Refused` (SPOOL_FULL, OVERLOADED).
        """
        wanted = (size or 0) + len(kwargs)
        self.check_space(wanted)
        with refused_when_exhausted():
            lock = self._lock_new(job_id)
            if lock is None:
                return None
            entry = Entry(self, job_id, lock)
            self._promise(entry, wanted)
            try:
                entry.create(fields, kwargs, size, payload, begin)
                return entry
            except FileExistsError:
                pass
            except BaseException:
                entry.destroy()
                raise
            self.quota.measure(job_id, held=False)
            try:
                exists = bool(entry.read())
            except BaseException:
                lock.release()  # and nothing else: it may be somebody's answer
                raise
            if exists:
                lock.release()
                return None
        entry.destroy()  # whoever made it was killed before its first line
        return self.claim(job_id, fields, kwargs, size=size, payload=payload, begin=begin)

    def _promise(self, entry: Entry, wanted: int) -> None:
        """Have the quota count a new entry; of many that come at once too many have got here."""
        try:
            self.quota.promise(entry.id, wanted)
        except Refused:
            if entry.path.exists():
                entry._lock.release()
            else:
                entry.destroy()
            raise

    def _lock_new(self, job_id: str) -> Lock | None:
        until = time.monotonic() + CLAIM_PATIENCE
        while (lock := try_lock(self.lock_path(job_id))) is None:
            if os.path.exists(f"{self.path}/{job_id}") or time.monotonic() >= until:
                return None
            time.sleep(POLL)
        return lock

    def fence(self, job_id: str) -> bool:
        """Have it that no job can ever start under this ticket; False where there is one already."""
        entry = self.claim(job_id, {"ticketed": True, "phase": "RELEASED", "fenced": True})
        if entry is None:
            return False
        entry.store({"phase": "RELEASED"})
        entry.let_go()
        return True

    def hold(self, job_id: str) -> Entry | None:
        """The entry of a job that nobody holds; None where somebody does, or there is none.

        Raises `Refused` (OVERLOADED, DAMAGED).
        """
        with refused_when_exhausted():
            if not os.path.exists(f"{self.path}/{job_id}"):
                return None
            lock = try_lock(self.lock_path(job_id))
            if lock is None:
                return None
            entry = Entry(self, job_id, lock)
            try:
                state = entry.read()
                if not state:
                    entry.destroy()
                    return None
                entry.go_on_from(state)
                worker = state.get("worker")
                if state.get("phase") == "RUNNING" and worker and is_locked(self.worker_lock(worker)):
                    lock.release()  # the run is not over: its server is gone, the kernel is about to end the worker
                    return None
            except BaseException:
                lock.release()
                raise
        return entry

    def hold_damaged(self, job_id: str) -> Entry | None:
        """The entry of a job whose journal cannot be read, to be destroyed; None where somebody holds it."""
        lock = try_lock(self.lock_path(job_id))
        return None if lock is None else Entry(self, job_id, lock)

    @contextlib.contextmanager
    def holding(self, job_id: str) -> Iterator[Entry | None]:
        """`hold` for as long as the block lasts."""
        entry = self.hold(job_id)
        try:
            yield entry
        finally:
            if entry is not None:
                entry.let_go()

    def take_over(self, job_id: str, epoch: int) -> Entry | None:
        """The entry of an upload for the caller with `epoch`; None while another holds it, who has been asked for it.

        Raises `Refused(SUPERSEDED)` where somebody with a higher epoch has asked: that one is the newer connection,
        whichever arrives first.
        """
        look = self.look(job_id)
        with refused_when_exhausted():
            _check_newest(look, epoch)
            if look.wanted() < epoch:
                with contextlib.suppress(FileNotFoundError):
                    look.ask(epoch)
        entry = self.hold(job_id)
        if entry is None:
            return None
        try:
            _check_newest(entry, epoch)
        except BaseException:
            entry.let_go()
            raise
        return entry


def _check_newest(look: Look, epoch: int) -> None:
    won = look.wanted()
    if won > epoch:
        raise Refused("SUPERSEDED", "a newer call with the same ticket goes on with this upload", {"epoch": str(won)})
