"""Models that strangers' clients call: the service's four methods, answers of every kind, and runs to cancel."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import aipod
from aipod import Context
from tests.lazily import trio
from tests.marks import say


def _seen(context: Context, path: Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "method": context.method,
        "version": context.version,
        "kwargs": kwargs,
        "sha256": sha256,
        "metadata": dict(context.metadata),
    }


def _until_cancelled(context: Context, mark: str) -> None:
    say(mark, "started")
    while not context.cancelled:
        time.sleep(0.01)
    say(mark, "cancelled")
    raise RuntimeError("stopped because nobody wants the answer")


class Stranger(aipod.Model):
    """Plain methods: worker processes."""

    def chaos(self, context: Context, path: Path, **kwargs: Any) -> dict[str, Any]:
        return _seen(context, path, kwargs)

    def train(self, context: Context, path: Path, **kwargs: Any) -> dict[str, Any]:
        return _seen(context, path, kwargs)

    def predict(self, context: Context, path: Path, **kwargs: Any) -> dict[str, Any]:
        return _seen(context, path, kwargs)

    def log(self, context: Context, path: Path, **kwargs: Any) -> dict[str, Any]:
        return _seen(context, path, kwargs)

    def sleep(self, context: Context, path: Path, *, seconds: float) -> str:
        context.log("a plain client hears nothing of this")
        time.sleep(seconds)
        return "slept"

    def text(self, context: Context, path: Path, *, length: int) -> str:
        """JSON that zstd can make only half as long."""
        return os.urandom(length // 2).hex()

    def none(self, context: Context, path: Path) -> None: ...

    def as_bytes(self, context: Context, path: Path) -> bytes:
        return path.read_bytes()

    def as_file(self, context: Context, path: Path) -> Path:
        return path

    def boom(self, context: Context, path: Path, *, mark: str = "") -> None:
        if mark:
            with Path(mark).open("a") as file:
                file.write("started\n")
        raise ValueError("the lever is at 42 – too far")

    def watch(self, context: Context, path: Path, *, mark: str) -> None:
        _until_cancelled(context, mark)


class Loop(aipod.Model):
    """Async methods, and one plain one in a thread; neither `train` nor `log`."""

    async def predict(self, context: Context, path: Path, **kwargs: Any) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return _seen(context, path, kwargs)

    async def watch(self, context: Context, path: Path, *, mark: str) -> None:
        say(mark, "started")
        try:
            await trio.sleep_forever()
        finally:
            assert context.cancelled
            say(mark, "cancelled")

    @aipod.method(flavor="asyncio")
    async def watch_asyncio(self, context: Context, path: Path, *, mark: str) -> None:
        say(mark, "started")
        try:
            await asyncio.Event().wait()
        finally:
            assert context.cancelled
            say(mark, "cancelled")

    def watch_thread(self, context: Context, path: Path, *, mark: str) -> None:
        _until_cancelled(context, mark)
