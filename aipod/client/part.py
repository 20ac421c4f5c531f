"""The file in which an answer is collected, beside the one that it becomes.

Where a later process may ask for the same answer, its name is made of the job's id, `.NAME.ID.part`: that process goes
on with what it finds. Otherwise, and where another process has that file or it is not ours alone, the name is one that
nobody looks for, `.NAME.RANDOM.part`. Mode 0600, and flocked for as long as it is written: a kill frees it.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import secrets
import stat
import threading
from io import FileIO
from pathlib import Path

from aipod.codec import cut, new_hasher
from aipod.config import MIB

# Times that a file is opened which its writer makes the answer of, or removes, in that moment.
_TRIES = 5
# Characters of the answer's name in the part's: together they stay below the 255 bytes that a name may have.
_NAME = 50


def is_special(path: Path) -> bool:
    """Whether it is written to and never replaced: a FIFO, a device, a pipe such as /dev/stdout."""
    return path.exists() and not path.is_file()


def followed(path: Path) -> Path:
    """The file to replace where `path` is a symbolic link: a link stays one."""
    return Path(os.path.realpath(path))


class Part:
    """Nothing is opened before it is needed. The methods block: call them from a thread.

    `leave` and `remove` may be called while another thread is in one of the others, which then ends soon.
    """

    def __init__(self, target: Path, job_id: str = "") -> None:
        self._target = target
        self._job_id = job_id
        self._path = Path()
        self._file: FileIO | None = None
        self._is_shared = False
        self._lock = threading.Lock()
        self._left = threading.Event()
        self.hasher = new_hasher()
        self.size = 0  # bytes that an earlier process has left, all in `hasher`

    def find(self, *, read: bool = True) -> None:
        """Take up what an earlier process has left; nothing where there is none. Reads it all, unless it is only found
        to be removed. Raises OSError.
        """
        with self._lock:
            if self._left.is_set() or not self._job_id or is_special(self._target):
                return
            path = self._beside(self._job_id)
            self._file = _open_ours(path, 0)
            if self._file is None:
                return
            self._path, self._is_shared = path, True
            while read and not self._left.is_set() and (piece := self._file.read(MIB)):
                self.hasher.update(piece)
                self.size += len(piece)

    def write(self, *pieces: bytes | memoryview) -> None:
        """Raises OSError."""
        with self._lock:
            if self._left.is_set():
                return
            fd = self._opened().fileno()
            rest = collections.deque(memoryview(piece) for piece in pieces if piece)
            while rest and not self._left.is_set():
                for _ in cut(rest, os.writev(fd, rest)):
                    pass

    def deliver(self) -> bool:
        """Make it the answer; False where it was left meanwhile. Raises OSError."""
        with self._lock:
            if self._left.is_set():
                return False
            file = self._opened()
            mode = _usual_mode(self._path)
            self._path.replace(followed(self._target))
            # Not before: a process killed in between would leave a part that others may read, and none takes up.
            with contextlib.suppress(OSError):  # as for want of room: better one that only its owner can read than none
                os.fchmod(file.fileno(), mode)
            # Not before: who gets the lock then must not find the file under its old name.
            self._close()
            return True

    def leave(self) -> None:
        """Let a later process go on with it, if one may; harmless after `deliver`."""
        self._end(keep=True)

    def remove(self) -> None:
        """Leave nothing behind; harmless after `deliver`."""
        self._end(keep=False)

    def _end(self, *, keep: bool) -> None:
        self._left.set()
        with self._lock:
            if self._file is None:
                return
            if not (keep and self._is_shared and os.fstat(self._file.fileno()).st_size):
                self._path.unlink(missing_ok=True)
            self._close()

    def _opened(self) -> FileIO:
        if self._file is None:
            if self._job_id:
                self._path = self._beside(self._job_id)
                self._file = _open_ours(self._path, os.O_CREAT)
            self._is_shared = self._file is not None
            if self._file is None:
                self._path = self._beside(secrets.token_hex(8))
                self._file = FileIO(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+")
            # The server was told that nothing is here.
            self._file.truncate(0)
        return self._file

    def _beside(self, name: str) -> Path:
        target = followed(self._target)
        return target.with_name(f".{target.name[:_NAME]}.{name}.part")

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _open_ours(path: Path, flags: int) -> FileIO | None:
    """The file, locked; None where there is none, another process has it, or it is not a file of ours alone.

    Whoever may write to the directory may have put something else there, whose name or content is not ours to touch.
    """
    for _ in range(_TRIES):
        with contextlib.ExitStack() as stack:
            try:
                # O_NONBLOCK: a FIFO would wait for its other end.
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | flags, 0o600)
                file = stack.enter_context(FileIO(fd, "r+"))
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return None
            found = os.fstat(fd)
            theirs = found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077 or found.st_nlink > 1
            if theirs or not stat.S_ISREG(found.st_mode):
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(found, os.lstat(path)):
                    stack.pop_all()
                    return file
    return None


def _usual_mode(path: Path) -> int:
    """The permissions that a new file beside `path` gets: what the umask and the directory leave of 0666."""
    probe = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError:  # no room for another file: better one that only its owner can read than none
        return 0o600
    try:
        return stat.S_IMODE(os.fstat(fd).st_mode)
    finally:
        os.close(fd)
        probe.unlink()
