"""Which data a version has: one directory per version under the server's data directory.

    data/<version>           what a method wrote into `context.new_version`
    data/.new-<spool><job id>            being written; becomes data/<version> when the method returns; then the former
                                         data, until it is removed
    data/.old-<spool><job id>-<version>  the former data, for the moment in which it is replaced, on a system that
                                         cannot exchange two directories in one step

<spool> names the spool that the job lives in, "<id>.": servers with other spools may use the same data directory, and
only a job's own spool knows whether it lives.

All functions block: call them from a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from aipod.errors import Refused
from aipod.models import DEFAULT_VERSION, VERSION
from aipod.trash import remove

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


def check_version(version: str) -> str:
    """`version`, or the default for an empty one. Raises `Refused(BAD_VERSION)`: it becomes a directory's name."""
    version = version or DEFAULT_VERSION
    if not VERSION.match(version):
        raise Refused(
            "BAD_VERSION", f"version {version[:80]!r} is not 1 to 64 letters, digits, '.', '_' or '-', beginning alike"
        )
    return version


def exchange(one: Path, other: Path) -> bool:
    """Each gets the other's name, in one step; False where the system, or the file system, cannot, or one is gone."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


class Data(Protocol):
    """What a version's data was when an instance began to load it."""

    @property
    def replaced(self) -> bool:
        """It has other data now. Asked for every job, so it must not take long."""

    def close(self) -> None: ...


class Fixed:
    """Data that nobody replaces."""

    replaced = False

    def close(self) -> None: ...


class Present:
    """The data that a version has at one moment, to be told from what it has later. Quick: it does not read it.

    The open descriptor keeps the kernel from giving the directory's number to a later one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._known = True
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            pass
        except OSError:
            self._known = False  # no descriptor is left, say: an old answer is better than none

    @property
    def replaced(self) -> bool:
        """The version has other data now. One that has none at this moment may be in the middle of `publish`."""
        if not self._known:
            return False
        try:
            now = os.stat(self._path)
        except OSError:
            return False
        return self._fd < 0 or not os.path.samestat(now, os.fstat(self._fd))

    def close(self) -> None:
        """Let go of the descriptor. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self._known = -1, False


class Versions:
    """The data directory, for the jobs of the spool `owner` (its id and a dot)."""

    def __init__(self, path: Path, owner: str = "", exchange: Callable[[Path, Path], bool] = exchange) -> None:
        self.path = path
        self._owner = owner
        self._exchange = exchange

    def data_dir(self, version: str) -> Path:
        """Where the version's data is, whether it exists yet or not."""
        return self.path / version

    def present(self, version: str) -> Present:
        """The data that the version has now."""
        return Present(self.data_dir(version))

    def is_known(self, version: str) -> bool:
        """Whether it has data, or is the default."""
        return version == DEFAULT_VERSION or self.data_dir(version).is_dir()

    def fresh(self, job_id: str) -> Path:
        """Where a job may write a new version; not made until it does."""
        return Path(self.fresh_name(job_id))

    def fresh_name(self, job_id: str) -> str:
        """As `fresh`, for the many jobs that write none."""
        return f"{self.path}/.new-{self._owner}{job_id}"

    def publish(self, job_id: str, version: str) -> bool:
        """Make what the job wrote the version's data; False where it wrote nothing."""
        if not os.path.isdir(self.fresh_name(job_id)):
            return False
        fresh, target = self.fresh(job_id), self.data_dir(version)
        if target.is_dir() and self._exchange(fresh, target):
            remove(fresh)
            return True
        old = self.path / f".old-{self._owner}{job_id}-{version}"
        while True:
            with contextlib.suppress(FileNotFoundError):
                target.rename(old)
            try:
                fresh.rename(target)
            except OSError as exc:
                # Another job of this version has published since the line above: its data is the former now.
                if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    with contextlib.suppress(FileNotFoundError):
                        old.rename(target)
                    raise
                remove(old)
            else:
                remove(old)
                return True

    def discard(self, job_id: str) -> None:
        """Forget what the job wrote."""
        if os.path.lexists(self.fresh_name(job_id)):
            remove(self.fresh(job_id))

    def sweep(self, is_held: Callable[[str], bool]) -> None:
        """Finish what a killed server left: half-written versions go, one that was being replaced comes back."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self.path.glob(f".old-{self._owner}*"):
            job_id, _, version = path.name.removeprefix(f".old-{self._owner}").partition("-")
            if is_held(job_id):
                continue
            if self.data_dir(version).exists():
                remove(path)
            else:
                path.rename(self.data_dir(version))
        for path in self.path.glob(f".new-{self._owner}*"):
            if not is_held(path.name.removeprefix(f".new-{self._owner}")):
                remove(path)
