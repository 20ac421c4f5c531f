"""Locks of the spool: `flock`s through filelock, which the kernel frees when their process ends.

One object per holder, and `thread_local=False`: with its default, a release in another thread than the acquire does
nothing, silently (tox-dev/filelock#404). A lock file lies outside what it guards, because a renamed directory would
take a waiter's lock file with it; it is unlinked only while held: filelock looks at st_nlink after every acquire, so a
waiter notices and tries anew.
"""

from __future__ import annotations

from pathlib import Path

import filelock

Lock = filelock.BaseFileLock


def try_lock(path: Path, *, patience: float = 0.0) -> Lock | None:
    """The lock, held; None where another holds it for longer than `patience` seconds."""
    # No soft fallback: on a file system without flock an error is right, a lock that a kill leaves behind is not.
    lock = filelock.FileLock(path, thread_local=False, fallback_to_soft=False, mode=0o600)
    try:
        lock.acquire(timeout=patience, poll_interval=0.01)
    except filelock.Timeout:
        return None
    return lock


def is_locked(path: Path) -> bool:
    """Whether a living process holds it."""
    if not path.exists():
        return False
    lock = try_lock(path)
    if lock is not None:
        lock.release()
    return lock is None
