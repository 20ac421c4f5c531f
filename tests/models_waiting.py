"""Jobs on the loop that cost nothing themselves."""

from __future__ import annotations

from pathlib import Path

import trio

import aipod
from aipod import Context


class Waiting(aipod.Model):
    async def chaos(self, context: Context, path: Path, *, until: str = "") -> int:
        """The payload's size, once the file `until` is there."""
        while until and not Path(until).exists():
            await trio.sleep(0.2)
        return path.stat().st_size

    async def predict(self, context: Context, path: Path) -> int:
        return path.stat().st_size
