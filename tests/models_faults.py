"""Models for tests that cut connections: they count their runs in the file that `mark` names."""

from __future__ import annotations

import hashlib
import os
import random
import time
from pathlib import Path

import aipod
from aipod import Context
from tests.marks import say


class Counted(aipod.Model):
    def chaos(self, context: Context, path: Path, *, mark: str = "") -> dict[str, object]:
        if mark:
            with open(mark, "a") as file:
                file.write("run\n")
        with path.open("rb") as file:
            return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    def patient(self, context: Context, path: Path, *, mark: str) -> str:
        """Runs until it is cancelled, and says so in `mark`."""
        say(mark, "running")
        while not context.cancelled:
            time.sleep(0.01)
        say(mark, "cancelled")
        return "cancelled"

    def gated(self, context: Context, path: Path, *, mark: str, gate: str, lines: int = 0) -> dict[str, object]:
        """Runs until the file `gate` is there; fails where "fail" is in it."""
        with open(mark, "a") as file:
            file.write("run\n")
        for number in range(lines):
            context.log(f"line {number} grüße")
        while not Path(gate).exists():
            if context.cancelled:
                raise RuntimeError("cancelled")
            time.sleep(0.01)
        context.log("the end")
        if Path(gate).is_file() and Path(gate).read_text() == "fail":
            raise ValueError("as it was told")
        return self.chaos(context, path)

    def gated_echo(self, context: Context, path: Path, *, mark: str, gate: str, lines: int = 0) -> Path:
        self.gated(context, path, mark=mark, gate=gate, lines=lines)
        return path

    def random(self, context: Context, path: Path, *, length: int) -> Path:
        target = context.work_dir / "random"
        target.write_bytes(os.urandom(length))
        return target

    def seeded(self, context: Context, path: Path, *, length: int) -> Path:
        """Bytes that zstd cannot make smaller, the same each time."""
        target = context.work_dir / "seeded"
        target.write_bytes(random.Random(0).randbytes(length))
        return target

    def kwargs(self, context: Context, path: Path, **kwargs: object) -> dict[str, object]:
        return {"kwargs": kwargs, "version": self.version}

    def echo(self, context: Context, path: Path) -> Path:
        return path

    def text(self, context: Context, path: Path) -> str:
        return "grüße"

    def slow_echo(self, context: Context, path: Path, *, seconds: float) -> Path:
        time.sleep(seconds)
        return path

    def metadata(self, context: Context, path: Path) -> dict[str, str]:
        return dict(context.metadata)
