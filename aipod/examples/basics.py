"""Small models: `Echo` in worker processes, `Gather` on the loop."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path
from typing import Any

import aipod
from aipod.models import Context, Model


class Echo(Model):
    """Gives the payload back, describes it, or takes its time."""

    def chaos(self, context: Context, path: Path, **kwargs: Any) -> dict[str, Any]:
        """What arrived."""
        return {"size": path.stat().st_size, "version": self.version, "kwargs": kwargs}

    def predict(self, context: Context, path: Path) -> str:
        """The payload's SHA-256."""
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def echo(self, context: Context, path: Path) -> Path:
        """The payload."""
        return path

    def sleep(self, context: Context, path: Path, *, seconds: float = 1.0) -> str:
        """Sleep, telling the progress; stops early where nobody waits any more."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            context.progress(1 - left / seconds, "asleep")
            if context.cancelled:
                raise RuntimeError("woken")
            time.sleep(min(left, 0.1))
        return f"slept {seconds:g} s"


class Gather(Model):
    """Async methods: all jobs share this one instance in the server's process."""

    def __init__(self) -> None:
        self.waiting = 0

    async def predict(self, context: Context, path: Path, *, seconds: float = 0.0) -> dict[str, Any]:
        """Trio-flavored."""
        import trio

        self.waiting += 1
        await trio.sleep(seconds)
        self.waiting -= 1
        return {"size": path.stat().st_size}

    @aipod.method(flavor="asyncio")
    async def chaos(self, context: Context, path: Path, *, seconds: float = 0.0) -> dict[str, Any]:
        """asyncio-flavored."""
        await asyncio.sleep(seconds)
        return {"size": path.stat().st_size}
