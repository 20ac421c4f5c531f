"""A model for tests of servers that relieve each other: many jobs run at once, and each start is written down."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import aipod
from aipod import Context
from tests.lazily import trio
from tests.models_resume import note


class Rolling(aipod.Model):
    async def predict(self, context: Context, path: Path, *, mark: str, seconds: float) -> str:
        note(mark, f"start {os.getpid()}")
        await trio.sleep(seconds)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    async def chaos(self, context: Context, path: Path, *, mark: str, gate: str) -> str:
        """Runs until the file `gate` is there; the mark gets a line for each start."""
        note(mark, f"start {os.getpid()}")
        while not Path(gate).exists():
            await trio.sleep(0.3)
        return "done"
