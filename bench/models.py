"""The models that `aipod serve` has in these measurements, and what they do to a file, which all peers do."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import xxhash

import aipod

PIECE = 1 << 20


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a model does to a file that was uploaded, at every peer: read it all. Its size and digest (xxh3-128)."""
    digest, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return {"size": size, "digest": digest.hexdigest()}


class InWorker(aipod.Model):
    """Plain methods: in a worker process."""

    def chaos(self, context: aipod.Context, path: Path) -> bytes:
        """A small payload back."""
        return path.read_bytes()

    def predict(self, context: aipod.Context, path: Path) -> dict[str, Any]:
        """A large payload described."""
        return describe(path)

    def fetch(self, context: aipod.Context, path: Path, *, name: str) -> Path:
        """The file `name`, as if it had been made for this job: a link costs nothing."""
        made = context.work_dir / "made"
        os.link(name, made)
        return made


class OnLoop(aipod.Model):
    """Async methods: all jobs in the server's process."""

    async def chaos(self, context: aipod.Context, path: Path) -> bytes:
        """A small payload back: it is in the page cache, and a thread would take longer than to read it."""
        return path.read_bytes()  # noqa: ASYNC240

    async def hold(self, context: aipod.Context, path: Path, *, until: float) -> None:
        """A job that runs until then (`time.time()`), and does nothing."""
        import trio

        await trio.sleep(max(0.0, until - time.time()))
