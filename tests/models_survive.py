"""A model for tests of jobs that survive: `mark` gets a line for each start, with the server's pid in it."""

from __future__ import annotations

import hashlib
import os
import random
import time
from pathlib import Path

import aipod
from aipod import Context
from tests.models_resume import note


def answer_to(payload: str, length: int) -> bytes:
    """What `work` makes of the payload with that sha256: bytes that zstd cannot make smaller, and nobody else's."""
    return random.Random(payload).randbytes(length)


class Survivor(aipod.Model):
    def load(self) -> None:
        names = ("first", "second") if self.data_dir.exists() else ()
        self.data = [(self.data_dir / name).read_text() for name in names]

    def work(self, context: Context, path: Path, *, mark: str, gate: str = "", length: int = 100) -> Path:
        """Runs until the file `gate` is there."""
        note(mark, f"start {os.getppid()}")
        context.log("started")
        while gate and not Path(gate).exists():
            if context.cancelled:
                note(mark, "cancelled")
                raise InterruptedError
            time.sleep(0.01)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        target = context.work_dir / "answer"
        target.write_bytes(answer_to(sha256, length))
        return target

    @aipod.method(restartable=True)
    def again(self, context: Context, path: Path, *, mark: str, gate: str = "", length: int = 100) -> Path:
        return self.work(context, path, mark=mark, gate=gate, length=length)

    def train(self, context: Context, path: Path, *, mark: str, gate: str = "") -> None:
        """Half of the version is there while it waits for `gate`."""
        (context.new_version / "first").write_bytes(path.read_bytes())
        note(mark, f"start {os.getppid()}")
        while gate and not Path(gate).exists():
            time.sleep(0.01)
        (context.new_version / "second").write_bytes(path.read_bytes())

    def read(self, context: Context, path: Path) -> list[str]:
        """What there was when this instance was loaded."""
        return self.data
