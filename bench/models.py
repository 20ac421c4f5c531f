"""What `python -m bench small` calls: the same work in a worker process and on the loop."""

from __future__ import annotations

from pathlib import Path

import aipod


def size(path: Path) -> int:
    return path.stat().st_size


class InWorker(aipod.Model):
    def chaos(self, context: aipod.Context, path: Path) -> int:
        return size(path)


class OnLoop(aipod.Model):
    async def chaos(self, context: aipod.Context, path: Path) -> int:
        return size(path)
