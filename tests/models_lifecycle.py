"""Models for tests of what a server outlives: kills, drains, cancels, crowds. `mark` is a file that tells the test."""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import aipod
from aipod import Context
from tests.lazily import trio
from tests.marks import say


class Work(aipod.Model):
    """Plain methods: a worker process."""

    def load(self) -> None:
        self.turns = 0

    def close(self) -> None:
        (self.data_dir.parent / f"closed-{os.getpid()}").touch()

    def chaos(self, context: Context, path: Path) -> int:
        return os.getpid()

    def predict(self, context: Context, path: Path, *, mark: str, until: str) -> str:
        """Work until the file `until` is there or the job is cancelled."""
        say(mark, str(os.getpid()))
        while not Path(until).exists():
            if context.cancelled:
                say(mark, "cancelled")
                raise InterruptedError
            time.sleep(0.01)
        return "done"

    def train(self, context: Context, path: Path, *, mark: str = "") -> str:
        (context.new_version / "data").write_bytes(path.read_bytes())
        if mark:
            say(mark, str(os.getpid()))
            time.sleep(60)
        return "trained"

    def log(self, context: Context, path: Path) -> bytes:
        return (self.data_dir / "data").read_bytes()

    def turn(self, context: Context, path: Path) -> int:
        self.turns += 1
        return self.turns - 1

    def hold(self, context: Context, path: Path, *, mark: str, seconds: int) -> str:
        """A C call that does not release the GIL."""
        say(mark, str(os.getpid()))
        ctypes.PyDLL(None).sleep(seconds)
        return "held"

    def burn(self, context: Context, path: Path, *, mark: str, seconds: float) -> str:
        say(mark, str(os.getpid()))
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass
        return "burnt"

    def forks(self, context: Context, path: Path, *, mark: str) -> None:
        """A process of the model's own, and both of them busy."""
        pid = os.fork()
        if pid:
            say(mark, f"{os.getpid()} {pid}")
        time.sleep(60)

    def stubborn(self, context: Context, path: Path, *, mark: str) -> None:
        say(mark, str(os.getpid()))
        time.sleep(60)

    def deaf(self, context: Context, path: Path, *, mark: str) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.stubborn(context, path, mark=mark)


class Taught(aipod.Model):
    """It reads its data once, when it is loaded."""

    def load(self) -> None:
        data = self.data_dir / "data"
        self.data = data.read_text() if data.exists() else ""

    def predict(self, context: Context, path: Path) -> tuple[str, int]:
        return self.data, os.getpid()

    def train(self, context: Context, path: Path, *, mark: str, until: str) -> int:
        """Train until the file `until` is there."""
        (context.new_version / "data").write_bytes(path.read_bytes())
        say(mark, str(os.getpid()))
        while not Path(until).exists():
            time.sleep(0.01)
        return os.getpid()


class Together(aipod.Model):
    """Async methods: one instance in the server's process."""

    def __init__(self) -> None:
        self.here = 0
        self.peak = 0
        self.all_here = trio.Event()

    async def close(self) -> None:
        await trio.sleep(0)
        (self.data_dir.parent / f"closed-{os.getpid()}").touch()

    async def chaos(self, context: Context, path: Path) -> int:
        return os.getpid()

    async def predict(self, context: Context, path: Path, *, count: int) -> dict[str, Any]:
        """Wait until `count` jobs are here."""
        self.here += 1
        self.peak = max(self.peak, self.here)
        if self.here == count:
            self.all_here.set()
        await self.all_here.wait()
        self.here -= 1
        return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "peak": self.peak}

    async def with_trio(self, context: Context, path: Path, *, mark: str) -> None:
        say(mark, "running")
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            say(mark, "cancelled" if context.cancelled else "not told")
            raise

    @aipod.method(flavor="asyncio")
    async def with_asyncio(self, context: Context, path: Path, *, mark: str) -> None:
        say(mark, "running")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            say(mark, "cancelled" if context.cancelled else "not told")
            raise

    def in_thread(self, context: Context, path: Path, *, mark: str) -> None:
        say(mark, "running")
        while not context.cancelled:
            time.sleep(0.01)
        say(mark, "cancelled")

    def stuck(self, context: Context, path: Path, *, mark: str) -> None:
        say(mark, "running")
        time.sleep(60)


class Gated(aipod.Model):
    """Goes on until there is the file `gate`, cancelled or not."""

    def predict(self, context: Context, path: Path, *, mark: str, gate: str) -> str:
        say(mark, "running")
        while not Path(gate).exists():
            time.sleep(0.01)
        return "done"

    @aipod.method(timeout=0.2)
    def chaos(self, context: Context, path: Path, *, mark: str, gate: str) -> None:
        self.predict(context, path, mark=mark, gate=gate)


class SlowLoad(aipod.Model):
    def load(self) -> None:
        say(self.data_dir.parent / "loading", str(os.getpid()))
        time.sleep(60)

    def chaos(self, context: Context, path: Path) -> None: ...
