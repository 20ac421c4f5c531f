"""What the callers of tests/contract/test_client_faces.py call: async methods, so that many run at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aipod
from aipod import Context
from tests.lazily import trio
from tests.marks import say


class Faces(aipod.Model):
    async def predict(self, context: Context, path: Path, **kwargs: Any) -> dict[str, Any]:
        return {"size": path.stat().st_size, "kwargs": kwargs}

    async def echo(self, context: Context, path: Path) -> Path:
        return path

    async def steps(self, context: Context, path: Path, *, count: int) -> str:
        for n in range(count):
            context.progress((n + 1) / count, f"step {n}")
            context.log(f"line {n}")
            await trio.sleep(0.05)
        return "walked"

    async def forever(self, context: Context, path: Path, *, mark: str, until: str = "") -> str:
        """Says in the file `mark` that it runs, and that it was cancelled; ends when the file `until` is there."""
        try:
            say(mark, "running")
            while not (until and Path(until).exists()):
                await trio.sleep(0.05)
            return "ended"
        except BaseException:
            say(mark, "cancelled")
            raise

    async def boom(self, context: Context, path: Path) -> None:
        raise ValueError("the secret is 42")


class Copy(aipod.Model):
    """Answers with its payload, as a file."""

    async def predict(self, context: Context, path: Path) -> Path:
        return path
