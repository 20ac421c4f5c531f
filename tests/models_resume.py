"""Methods for tests of jobs that outlive connections and servers. `starts` is a file with a line for each start."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import aipod
from aipod import Context

LONG = 70_000  # more than is kept in a journal


def note(starts: str, line: str = "start") -> None:
    """One line, whole, whoever else writes."""
    fd = os.open(starts, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{line}\n".encode())
    os.close(fd)


def answer_to(payload: bytes, size: int) -> bytes:
    """What `count` makes of a payload: as long as wanted, and nobody else's."""
    return (hashlib.sha256(payload).digest() * (size // 32 + 1))[:size]


class Jobs(aipod.Model):
    def count(self, context: Context, path: Path, *, starts: str, size: int = LONG, more: str = "") -> bytes:
        note(starts)
        context.log("counting")
        return answer_to(path.read_bytes(), size)

    @aipod.method(restartable=True)
    def again(self, context: Context, path: Path, *, starts: str, size: int = LONG) -> bytes:
        note(starts)
        return answer_to(path.read_bytes(), size)

    def wait(self, context: Context, path: Path, *, starts: str, until: str, lines: int = 0) -> str:
        """Until the file `until` is there, or the job is cancelled; logs its lines before."""
        note(starts)
        for n in range(lines):
            context.log(f"line {n}")
            context.progress(n / lines, f"step {n}")
        while not Path(until).exists():
            if context.cancelled:
                note(starts, "cancelled")
                raise InterruptedError
            time.sleep(0.01)
        return "done"

    @aipod.method(restartable=True)
    def wait_again(self, context: Context, path: Path, *, starts: str, until: str) -> str:
        note(starts)
        while not Path(until).exists():
            time.sleep(0.01)
        return "done"

    def boom(self, context: Context, path: Path, *, starts: str) -> None:
        note(starts)
        raise KeyError("no such word")
