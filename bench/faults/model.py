"""The model of `python -m bench faults`: it writes down when each of its runs began and ended, and in which server."""

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
    def load(self) -> None:
        self._server = os.getppid()

    def _note(self, runs: str, what: str, name: str) -> None:
        """One line of `bench.faults.runs`."""
        fd = os.open(runs, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(
            fd, f"{what} {name} {self._server} {time.monotonic()}\n".encode()
        )  # one write: whole, whoever else writes
        os.close(fd)

    def work(self, context: Context, path: Path, *, name: str, runs: str, seconds: float, length: int) -> Path:
        """Takes `seconds`. `runs`: a file that gets lines with `name`."""
        self._note(runs, "start", name)
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
        self._note(runs, "end", name)
        return target

    @aipod.method(restartable=True)
    def again(self, context: Context, path: Path, *, name: str, runs: str, seconds: float, length: int) -> Path:
        return self.work(context, path, name=name, runs=runs, seconds=seconds, length=length)
