"""What any process may do with a job without holding it: read it, and leave a word for its holder. Blocks."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

from aipod.config import MIB
from aipod.spool.journal import Journal

READ = 1 * MIB
# Phases that a job never leaves, but for RELEASED.
ENDED = ("DONE", "FAILED", "CANCELLED", "RELEASED")


class Look:
    """A job's directory, read."""

    def __init__(self, spool_path: Path, job_id: str) -> None:
        self.id = job_id
        self.path = spool_path / job_id
        self.payload = self.path / "in"
        self.result = self.path / "res"
        self.work = self.path / "work"
        self._journal = Journal(self.path / "state")

    def read(self) -> dict[str, Any]:
        """The fold of the journal; empty where there is no such job."""
        return self._journal.read()

    def kwargs(self) -> bytes:
        """The keyword arguments, as JSON."""
        inline = self.read().get("kwargs")
        return inline.encode() if inline is not None else (self.path / "kw").read_bytes()

    def live(self) -> dict[str, Any]:
        """What the model has reported last; empty where it has reported nothing."""
        try:
            told: dict[str, Any] = json.loads((self.path / "live").read_text())
        except (OSError, ValueError):
            return {}
        return told

    @property
    def log_size(self) -> int:
        """Bytes of the log."""
        try:
            return (self.path / "log").stat().st_size
        except OSError:
            return 0

    def read_log(self, offset: int, limit: int) -> bytes:
        """At most `limit` bytes of the log from `offset` on, cut at a character; empty where there is no more."""
        try:
            with (self.path / "log").open("rb") as file:
                file.seek(offset)
                data = file.read(limit)
        except OSError:
            return b""  # none was written, or it cannot be read now: a heartbeat must not pay for that
        return data.decode("utf-8", "ignore").encode()

    def read_result(self, offset: int) -> Generator[bytes, None, None]:
        """The bytes of `res` from `offset` on, in pieces of at most `READ`."""
        return _pieces(self.result, offset)

    def read_payload(self) -> Generator[bytes, None, None]:
        """The bytes of the payload, in pieces of at most `READ`."""
        return _pieces(self.payload, 0)

    # Words for the holder

    def ask(self, epoch: int) -> None:
        """Ask for the upload. Files with a number in their name, so that of two who ask at once the higher one stays."""
        (self.path / f"want-{epoch:020d}").touch(mode=0o600)
        for name in self._words("want-"):
            if int(name[5:]) < epoch:
                (self.path / name).unlink(missing_ok=True)

    def wanted(self) -> int:
        """The highest epoch that has asked for the upload."""
        asked = [int(name[5:]) for name in self._words("want-")]
        return max([*asked, self.read().get("epoch", 0)])

    def ask_to_stop(self) -> None:
        """Ask for the job to be cancelled."""
        (self.path / "cancel").touch(mode=0o600)

    @property
    def asked_to_stop(self) -> bool:
        return (self.path / "cancel").exists()

    def watch(self) -> None:
        """Tell that somebody watches."""
        with contextlib.suppress(OSError):  # it has gone, or the disk is full; that ends the grace, not the watching
            seen = self.path / "seen"
            seen.touch(mode=0o600)
            os.utime(seen)

    def watched_at(self) -> int:
        """When `watch` was last called, in nanoseconds of the file system's clock; 0 for never."""
        try:
            return (self.path / "seen").stat().st_mtime_ns
        except OSError:
            return 0

    def _words(self, prefix: str) -> list[str]:
        try:
            return [name for name in os.listdir(self.path) if name.startswith(prefix) and name[len(prefix) :].isdecimal()]
        except OSError:
            return []


def _pieces(path: Path, offset: int) -> Generator[bytes, None, None]:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while piece := file.read(READ):
            yield piece
