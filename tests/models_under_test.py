"""Models that tests serve as `tests.models_under_test:CLASS` (started in the checkout's root)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import aipod
from aipod import Context
from tests.lazily import trio
from tests.marks import say


class Base:
    def inherited(self, context: Context, path: Path) -> str:
        return "must not be reachable"


class Plain(aipod.Model, Base):
    """Plain methods: a worker process."""

    helper = 1

    def load(self) -> None:
        self.loaded_from = self.data_dir

    def close(self) -> None:
        (self.data_dir.parent / f"closed-{os.getpid()}").touch()

    def chaos(self, context: Context, path: Path, **kwargs: Any) -> dict[str, Any]:
        return {
            "size": path.stat().st_size,
            "kwargs": kwargs,
            "version": self.version,
            "metadata": context.metadata,
            "job_id": context.job_id,
            "method": context.method,
            "pid": os.getpid(),
        }

    def predict(self, context: Context, path: Path, **kwargs: Any) -> dict[str, Any]:
        with path.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "kwargs": kwargs}

    def train(self, context: Context, path: Path, *, fail: bool = False) -> str:
        (context.new_version / "data").write_bytes(path.read_bytes())
        if fail:
            raise RuntimeError("training failed")
        return "trained"

    def log(self, context: Context, path: Path) -> bytes:
        return (self.data_dir / "data").read_bytes()

    def hello(self, context: Context, path: Path, *, name: str = "world") -> str:
        return f"hello {name}"

    def echo(self, context: Context, path: Path) -> Path:
        return path

    def echo_bytes(self, context: Context, path: Path) -> bytes:
        return path.read_bytes()

    def text(self, context: Context, path: Path, *, length: int) -> str:
        """Random text as JSON, which zstd cannot make much smaller."""
        return os.urandom(length // 2).hex()

    def file(self, context: Context, path: Path, *, length: int) -> Path:
        target = context.work_dir / "result"
        with target.open("wb") as out:
            for _ in range(length >> 20):
                out.write(os.urandom(1 << 20))
            out.write(os.urandom(length & 0xFFFFF))
        return target

    def outside(self, context: Context, path: Path) -> Path:
        return Path(__file__)

    def report(self, context: Context, path: Path, *, lines: int = 3) -> str:
        for n in range(lines):
            context.progress(n / lines, f"step {n}")
            context.log(f"line {n}")
        return "reported"

    def sleep(self, context: Context, path: Path, *, seconds: float) -> str:
        time.sleep(seconds)
        return f"slept {seconds:g}"

    def patient(self, context: Context, path: Path, *, seconds: float, mark: str = "") -> str:
        """Sleeps, but looks at `cancelled`; says so in the file `mark`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if context.cancelled:
                say(mark, "cancelled")
                raise RuntimeError("cancelled")
            time.sleep(0.02)
        return "done"

    def stubborn(self, context: Context, path: Path, *, seconds: float, mark: str) -> str:
        say(mark, str(os.getpid()))
        time.sleep(seconds)
        return "done"

    def hold_gil(self, context: Context, path: Path, *, seconds: int, mark: str = "") -> str:
        """A C call that does not release the GIL."""
        if mark:
            say(mark, str(os.getpid()))
        ctypes.PyDLL(None).sleep(seconds)
        return "held"

    def burn(self, context: Context, path: Path, *, seconds: float) -> int:
        until, n = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            n += 1
        return n

    def boom(self, context: Context, path: Path) -> None:
        raise ValueError("the secret is 42")

    def exit(self, context: Context, path: Path) -> None:
        sys.exit(3)

    def crash(self, context: Context, path: Path) -> None:
        os.kill(os.getpid(), 9)

    def not_json(self, context: Context, path: Path) -> object:
        return object()

    def not_a_number(self, context: Context, path: Path) -> float:
        return float("nan")

    def no_file(self, context: Context, path: Path) -> Path:
        return Path("/no/such/file")

    def child(self, context: Context, path: Path) -> int:
        return subprocess.run(["true"], check=False).returncode

    def _private(self, context: Context, path: Path) -> str:
        return "must not be reachable"


class Async(aipod.Model):
    """Async methods: one instance in the server's process."""

    def __init__(self) -> None:
        self.here = 0
        self.peak = 0
        self.all_here = trio.Event()

    async def load(self) -> None:
        await trio.sleep(0)
        self.loaded = True

    async def predict(self, context: Context, path: Path, *, seconds: float = 0.0, **kwargs: Any) -> dict[str, Any]:
        await trio.sleep(seconds)
        return {"size": path.stat().st_size, "kwargs": kwargs, "loaded": self.loaded}

    @aipod.method(flavor="asyncio")
    async def chaos(self, context: Context, path: Path, *, seconds: float = 0.0) -> dict[str, Any]:
        import asyncio

        await asyncio.sleep(seconds)
        assert asyncio.current_task() is not None
        return {"size": path.stat().st_size}

    async def gather(self, context: Context, path: Path, *, count: int) -> dict[str, Any]:
        """Wait until `count` jobs are here."""
        self.here += 1
        self.peak = max(self.peak, self.here)
        if self.here == count:
            self.all_here.set()
        await self.all_here.wait()
        self.here -= 1
        return {"size": path.stat().st_size, "peak": self.peak}

    async def forever(self, context: Context, path: Path, *, mark: str) -> None:
        try:
            await trio.sleep_forever()
        finally:
            say(mark, "cancelled")

    async def boom(self, context: Context, path: Path) -> None:
        raise ValueError("the secret is 42")

    def plain(self, context: Context, path: Path, *, seconds: float = 0.0) -> str:
        time.sleep(seconds)
        context.log("from a thread")
        return threading.current_thread().name

    def log(self, context: Context, path: Path) -> bytes:
        return b"text"


class FailsToLoad(aipod.Model):
    def load(self) -> None:
        raise OSError("no weights here")

    def predict(self, context: Context, path: Path) -> None: ...
