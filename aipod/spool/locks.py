"""Locks of the spool: `flock`s through filelock, which the kernel frees when their process ends.

filelock's `lock_descriptor`, not its `FileLock`: with what that one does besides, a lock takes 145 us, here 8, of which
the system calls are 5 (the quickest of 5000; filelock 4.2, Python 3.11). What of it is needed is here: a process that a
model forks in ours closes its copies of the descriptors, so that it does not go on holding jobs when we are killed; and
a lock that nobody refers to any more is released.

A lock file lies outside what it guards, because a renamed directory would take a waiter's lock file with it. It is
unlinked only while held, so whoever gets the lock looks whether the file still has a name, and else tries anew.
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

import filelock

POLL = 0.01  # seconds between two attempts of one who waits


class Lock:
    """A lock that is held by this process, whichever of its threads does what, until `release`."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    @property
    def is_locked(self) -> bool:
        """False once it was released."""
        return self._fd is not None

    def release(self) -> None:
        """Let go of it. Idempotent."""
        with _gate:
            fd, self._fd = self._fd, None
            if fd is None:
                return
            try:
                # A process that is being started has a copy of the descriptor until it runs its program.
                filelock.unlock_descriptor(fd)
            finally:
                os.close(fd)

    def __del__(self) -> None:
        self.release()


# Held while a lock is made or ends, and by who forks: every descriptor is known to the child. Reentrant, because a
# collection of garbage may release a lock at any moment.
_gate = threading.RLock()
_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _close_copies() -> None:
    """In a forked child: a release would free the parent's locks, a close does not."""
    for lock in _held:
        fd, lock._fd = lock._fd, None
        if fd is not None:
            os.close(fd)
    _gate.release()


os.register_at_fork(before=_gate.acquire, after_in_parent=_gate.release, after_in_child=_close_copies)


def try_lock(path: Path | str) -> Lock | None:
    """The lock, held; its file is made. None where another holds it.

    Raises `OSError`: no flock on this file system, no descriptor left.
    """
    return _attempt(path, os.O_CREAT)


def is_locked(path: Path | str) -> bool:
    """Whether a living process holds it."""
    try:
        lock = _attempt(path, 0)
    except FileNotFoundError:
        return False
    if lock is not None:
        lock.release()
    return lock is None


def _attempt(path: Path | str, flags: int) -> Lock | None:
    with _gate:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | flags, 0o600)
        try:
            if filelock.lock_descriptor(fd, blocking=False) and os.fstat(fd).st_nlink:
                lock = Lock(fd)
                _held.add(lock)
                return lock
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None
