"""The model of `python -m bench faults`: it writes down each of its starts."""

from __future__ import annotations

import hashlib
import os
import random
import time
from pathlib import Path

import aipod
from aipod import Context


def answer_to(sha256: str, length: int) -> bytes:
    """The right answer for the payload with that sha256: nobody else's, and zstd cannot make it smaller."""
    return random.Random(sha256).randbytes(length)


class Counted(aipod.Model):
    def work(self, context: Context, path: Path, *, name: str, starts: str, seconds: float, length: int) -> Path:
        """Takes `seconds`. `starts`: a file that gets a line with `name`."""
        fd = os.open(starts, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, f"{name}\n".encode())  # one write: whole, whoever else writes
        os.close(fd)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if context.cancelled:
                raise InterruptedError
            context.progress(1 - left / seconds)
            time.sleep(min(left, 0.05))
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        target = context.work_dir / "answer"
        target.write_bytes(answer_to(sha256, length))
        return target

    @aipod.method(restartable=True)
    def again(self, context: Context, path: Path, *, name: str, starts: str, seconds: float, length: int) -> Path:
        return self.work(context, path, name=name, starts=starts, seconds=seconds, length=length)
