"""The ticket file: what a caller needs to continue a job after it was killed.

One JSON object, mode 0600, replaced as a whole: {"ticket": hex, "epoch": microseconds, "spool": the spool that `last`
was (or is about to be) sent to, "sent": seconds since 1970 when that was, or null, "request": a fingerprint}. Whoever
can read it owns the job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

from aipod.codec import TICKET_MAX, TICKET_MIN
from aipod.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Saved:
    """What is in a ticket file. `sent`: seconds since 1970 when `last` was about to go out to `spool`."""

    ticket: bytes
    epoch: int
    spool: str
    sent: float | None
    request: str


class TicketFile:
    """One file. Its methods block: call them from a thread, but for `remove`. They raise `UsageError` and OSError."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def load(self) -> Saved | None:
        """What was saved; None where there is no such file. Raises `UsageError` where it is something else."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as exc:
            raise UsageError(f"the ticket file {str(self.path)!r} cannot be read: {exc}") from None
        try:
            fields = json.loads(text)
            saved = Saved(
                bytes.fromhex(fields["ticket"]), fields["epoch"], fields["spool"], fields["sent"], fields["request"]
            )
        except (ValueError, KeyError, TypeError):
            raise UsageError(self._wrong()) from None
        kinds = (type(saved.epoch), type(saved.spool), type(saved.request))
        if kinds != (int, str, str) or not isinstance(saved.sent, int | float | None):
            raise UsageError(self._wrong())
        check_ticket(saved.ticket)
        return saved

    def _wrong(self) -> str:
        return f"{str(self.path)!r} is no ticket file; name another one, or remove it if no job of it is awaited"

    def check(self, saved: Saved, request: str) -> None:
        """Raises `UsageError` where `saved` belongs to another request."""
        if saved.request != request:
            raise UsageError(
                f"the ticket file {str(self.path)!r} belongs to another request (other method, arguments, version or "
                "payload); repeat that request, or remove the file to give its job up"
            )

    def save(self, saved: Saved) -> None:
        """Replace the file; when this returns it is on the disk."""
        fields = {**dataclasses.asdict(saved), "ticket": saved.ticket.hex()}
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}-{id(self):x}.part")
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
                json.dump(fields, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        self._sync_directory()

    def remove(self) -> None:
        """The answer was delivered."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _sync_directory(self) -> None:
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


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
