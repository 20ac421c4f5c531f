"""The ticket file: what a caller needs to continue a job after it was killed.

One JSON object, mode 0600, replaced as a whole: {"ticket": hex, "epoch": microseconds, "spool": the spool that `last`
was (or is about to be) sent to, "sent": seconds since 1970 when that was, or null, "request": a fingerprint, "payload":
the digest in hex of what was sent, where that is to be compared}. Whoever can read it owns the job.

Of two callers who begin with one new file at once, one creates it and the other finds it: both have the same job. A
caller replaces and removes only a file with the ticket of its own job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from aipod.codec import TICKET_MAX, TICKET_MIN
from aipod.config import KIB
from aipod.errors import UsageError

# Bytes; a ticket file has some 300.
_LARGEST = 16 * KIB
# Times that a file is created which another caller creates, and removes, in that moment.
_ROUNDS = 5
# What a file system says that has no hard links: vfat and exFAT; network disks, and what a program mounts.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
# Seconds that another caller may take to create a file on one, and between two looks whether it has.
_TURN, _LOOK = 2.0, 0.01
# Epochs are microseconds on the wire's uint64, counted on from here; 2**63 of them are 290,000 years.
_NUMBERS = 2**63


@dataclasses.dataclass(frozen=True)
class Saved:
    """What is in a ticket file. `sent`: seconds since 1970 when `last` was about to go out to `spool`. `payload`: the
    digest of what was sent then; empty where `request` tells it, or nothing does.
    """

    ticket: bytes
    epoch: int
    spool: str
    sent: float | None
    request: str
    payload: str = ""


class TicketFile:
    """One file. Its methods block: call them from a thread, but for `remove`. They raise `UsageError` and OSError."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def load(self) -> Saved | None:
        """What was saved; None where there is no such file. Raises `UsageError` where it is something else."""
        try:
            text = self._read()
            if text is None:
                return None
            fields = json.loads(text)
            ticket, sent, payload = bytes.fromhex(fields["ticket"]), fields["sent"], fields.get("payload", "")
            saved = Saved(ticket, fields["epoch"], fields["spool"], sent, fields["request"], payload)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(self._wrong()) from None
        if not _is_sound(saved):
            raise UsageError(self._wrong())
        check_ticket(saved.ticket)
        return saved

    def _read(self) -> bytes | None:
        """What is in the file; None where there is none. Raises ValueError for what is too long."""
        try:
            # O_NONBLOCK: a FIFO would wait for its other end.
            fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise UsageError(f"the ticket file {str(self.path)!r} cannot be read: {exc}") from None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UsageError(f"{str(self.path)!r} is no regular file, as a ticket file is; name another one")
            text = os.read(fd, _LARGEST + 1)
        finally:
            os.close(fd)
        if len(text) > _LARGEST:
            raise ValueError(len(text))
        return text

    def _wrong(self) -> str:
        return f"{str(self.path)!r} is no ticket file; name another one, or remove it if no job of it is awaited"

    def check(self, saved: Saved, request: str) -> None:
        """Raises `UsageError` where `saved` belongs to another request."""
        if saved.request != request:
            raise self.other()

    def other(self) -> UsageError:
        """What to raise where the file belongs to another request."""
        return UsageError(
            f"the ticket file {str(self.path)!r} belongs to another request (other method, arguments, version or "
            "payload); repeat that request, or remove the file to give its job up"
        )

    def create(self, saved: Saved) -> Saved:
        """Create the file, unless there is one. What is in it then: `saved` itself, and on the disk, or another's."""
        for _ in range(_ROUNDS):
            if (found := self.load()) is not None:
                return found
            try:
                self._put(saved, _move_new)
            except FileExistsError:
                continue
            except (FileNotFoundError, PermissionError):
                parent = str(self.path.parent)
                raise UsageError(
                    f"{parent!r} is no directory that can be written to; the ticket file was to go there"
                ) from None
            return saved
        raise UsageError(f"the ticket file {str(self.path)!r} comes and goes, or is a broken link; name another one")

    def save(self, saved: Saved) -> None:
        """Bring the file up to date; when this returns it is on the disk.

        Raises `UsageError` where it belongs to another job by now: whoever began that one needs it.
        """
        found = self.create(saved)
        if found == saved:
            return
        if saved.ticket not in (found.ticket, next_ticket(found.ticket)):
            raise UsageError(
                f"the ticket file {str(self.path)!r} belongs to another job now; give each job a file of its own"
            )
        self._put(saved, os.replace)

    def remove(self, ticket: bytes) -> None:
        """The job of `ticket` needs the file no more; one that is another job's, or no ticket file, stays."""
        with contextlib.suppress(FileNotFoundError, UsageError):
            found = self.load()
            if found is not None and found.ticket == ticket:
                self.path.unlink()

    def _put(self, saved: Saved, move: Callable[[Path, Path], None]) -> None:
        """Write it beside the file and `move` it there, as a whole. Raises what that raises."""
        fields = {**dataclasses.asdict(saved), "ticket": saved.ticket.hex()}
        part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.part")
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump(fields, file)
                file.flush()
                os.fsync(file.fileno())
            move(part, self.path)
        finally:
            part.unlink(missing_ok=True)
        self._sync_directory()

    def _sync_directory(self) -> None:
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _move_new(part: Path, path: Path) -> None:
    """Give a file the name `path`. Raises `FileExistsError` where there is one, `UsageError` where that is unsafe."""
    try:
        os.link(part, path)
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        with _turn(path):
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            part.rename(path)


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """One caller at a time in the directory of `path`; a kill frees it. Raises `UsageError`."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        until = time.monotonic() + _TURN
        while True:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as exc:
                if not isinstance(exc, BlockingIOError) or time.monotonic() >= until:
                    raise UsageError(
                        f"the ticket file {str(path)!r} cannot be created safely: its file system has no hard links, "
                        f"and its directory cannot be locked ({exc.strerror}); name one on another disk"
                    ) from None
            time.sleep(_LOOK)
        yield
    finally:
        os.close(directory)


def _is_sound(saved: Saved) -> bool:
    """Whether its fields are of their kinds, and can be sent."""
    kinds = (type(saved.epoch), type(saved.spool), type(saved.request), type(saved.payload))
    if kinds != (int, str, str, str) or not (saved.sent is None or type(saved.sent) in (int, float)):
        return False
    numbers = (saved.epoch, saved.sent or 0)
    return all(0 <= number < _NUMBERS for number in numbers) and saved.spool.isascii()


def next_ticket(ticket: bytes) -> bytes:
    """The ticket under which a job that never started under `ticket` is run anew.

    It follows from the first, and tells nothing of it: two callers who both learn that nothing has started, or ever
    will, begin the same job, and not one each.
    """
    return hashlib.sha256(b"anew " + ticket).digest()[:TICKET_MIN]


def check_ticket(ticket: bytes) -> bytes:
    """`ticket`. Raises `UsageError` where it can own no job."""
    if not TICKET_MIN <= len(ticket) <= TICKET_MAX:
        raise UsageError(f"a ticket has {TICKET_MIN} to {TICKET_MAX} bytes, not {len(ticket)}")
    return ticket


def parse_ticket(ticket: bytes | str) -> bytes:
    """A ticket as bytes or as the hex text of `str(job)`. Raises `UsageError`."""
    if isinstance(ticket, str):
        try:
            ticket = bytes.fromhex(ticket)
        except ValueError:
            raise UsageError("the ticket is not hexadecimal; give what str(job) or job.ticket was") from None
    if not isinstance(ticket, bytes | bytearray):
        raise UsageError(f"a ticket is bytes or hexadecimal text, not {type(ticket).__name__}")
    return check_ticket(bytes(ticket))
