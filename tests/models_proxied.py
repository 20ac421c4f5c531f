"""Three models that tests serve behind nginx, two servers each."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import aipod
from aipod import Context
from tests.lazily import trio


class Segment(aipod.Model):
    """Plain methods: a worker process, whose parent is the server."""

    def chaos(self, context: Context, path: Path, *, seconds: float = 0.0) -> dict[str, Any]:
        time.sleep(seconds)
        return {"model": "segment", "server": os.getppid(), "size": path.stat().st_size}

    def echo(self, context: Context, path: Path) -> Path:
        return path

    def wait_for(self, context: Context, path: Path, *, file: str) -> str:
        """Works until `file` is there."""
        context.log("working")
        while not Path(file).exists():
            time.sleep(0.02)
        return "waited"


class Classify(aipod.Model):
    """Async methods: one instance in the server's process, many jobs at once."""

    def __init__(self) -> None:
        self.here = 0

    async def chaos(self, context: Context, path: Path, *, seconds: float = 0.0) -> dict[str, Any]:
        await trio.sleep(seconds)
        return {"model": "classify", "server": os.getpid(), "size": path.stat().st_size}

    async def meet(self, context: Context, path: Path, *, meeting: str, count: int) -> int:
        """Wait until `count` jobs, in whatever server, have come to the directory `meeting`; the payload's size."""
        (Path(meeting) / context.job_id).touch()
        while len(os.listdir(meeting)) < count:
            await trio.sleep(0.05)
        return path.stat().st_size

    async def fail(self, context: Context, path: Path, *, length: int) -> None:
        raise ValueError("x" * length)

    async def blob(self, context: Context, path: Path, *, length: int) -> Path:
        """Random: what can be compressed would be little."""
        found = context.work_dir / "blob"
        found.write_bytes(os.urandom(length))
        return found


class Report(aipod.Model):
    """Async methods again."""

    async def chaos(self, context: Context, path: Path) -> dict[str, Any]:
        return {"model": "report", "server": os.getpid(), "size": path.stat().st_size}

    async def title(self, context: Context, path: Path, *, of: str) -> str:
        return f"A report on {of}"
