"""One model three times, for the contract of runners: plain, trio- and asyncio-flavored; and some that do not load.

Each marks in its data directory what has happened to it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import aipod
from aipod import Context
from tests.lazily import trio
from tests.marks import say

LONG = 100_000  # characters: over what travels inline


class Mute(Exception):
    """An exception without a text."""

    def __str__(self) -> str:
        raise RuntimeError


def talk(context: Context) -> str:
    for n in range(100):
        context.progress(n / 100, f"step {n}")
        context.log(f"line {n}")
    return context.job_id


def give(context: Context, path: Path, kind: str) -> Any:
    (context.work_dir / "file").write_bytes(b"in a file")
    return {
        "json": {"payload": path.read_text(), "top": 5},
        "long json": "x" * LONG,
        "bytes": b"\xff\x00",
        "long bytes": b"x" * LONG,
        "file": context.work_dir / "file",
        "payload": path,
        "object": object(),
        "missing": Path("/no/such/file"),
    }[kind]


def straggle(context: Context, data: Path) -> None:
    """Leave threads behind that ask until they hear that they are not wanted."""

    def ask() -> None:
        while not context.cancelled:
            time.sleep(0)
        (data / "heard").touch()

    for _ in range(3):
        threading.Thread(target=ask, daemon=True).start()


class Plain(aipod.Model):
    def load(self) -> None:
        (self.data_dir / "loaded").write_text(self.version)

    def close(self) -> None:
        (self.data_dir / "closed").touch()

    def give(self, context: Context, path: Path, *, kind: str) -> Any:
        return give(context, path, kind)

    def talk(self, context: Context, path: Path) -> str:
        return talk(context)

    def straggle(self, context: Context, path: Path) -> None:
        straggle(context, self.data_dir)

    def boom(self, context: Context, path: Path) -> None:
        raise KeyError("no such word")

    def exit(self, context: Context, path: Path) -> None:
        sys.exit(3)

    def interrupt(self, context: Context, path: Path) -> None:
        raise KeyboardInterrupt

    def mute(self, context: Context, path: Path) -> None:
        raise Mute

    def forever(self, context: Context, path: Path) -> None:
        """Ends when it is asked to, a moment later."""
        say(self.data_dir / "running", str(os.getpid()))
        while not context.cancelled:
            time.sleep(0.01)
        time.sleep(0.1)
        (self.data_dir / "stopped").touch()

    def stubborn(self, context: Context, path: Path) -> None:
        say(self.data_dir / "running", str(os.getpid()))
        time.sleep(60)

    def deaf(self, context: Context, path: Path) -> None:
        """Ends when there is a file, and no earlier."""
        say(self.data_dir / "running", str(os.getpid()))
        while not (self.data_dir / "enough").exists():
            time.sleep(0.01)

    def crash(self, context: Context, path: Path) -> None:
        os.kill(os.getpid(), 9)

    def fork(self, context: Context, path: Path) -> None:
        """Crash, and leave behind a process that has everything this one had."""
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
        say(self.data_dir / "running", str(pid))
        os.kill(os.getpid(), 9)

    def detach(self, context: Context, path: Path) -> None:
        """Leave a process behind that nobody ends who ends this one's group."""
        pid = os.fork()
        if pid == 0:
            os.setsid()
            say(self.data_dir / "running", str(os.getpid()))
            time.sleep(60)
            os._exit(0)
        time.sleep(60)


class Trio(aipod.Model):
    async def load(self) -> None:
        await trio.sleep(0)
        (self.data_dir / "loaded").write_text(self.version)

    async def close(self) -> None:
        await trio.sleep(0)
        (self.data_dir / "closed").touch()

    async def give(self, context: Context, path: Path, *, kind: str) -> Any:
        return give(context, path, kind)

    async def talk(self, context: Context, path: Path) -> str:
        return talk(context)

    async def straggle(self, context: Context, path: Path) -> None:
        straggle(context, self.data_dir)

    async def boom(self, context: Context, path: Path) -> None:
        raise KeyError("no such word")

    async def exit(self, context: Context, path: Path) -> None:
        sys.exit(3)

    async def interrupt(self, context: Context, path: Path) -> None:
        raise KeyboardInterrupt

    async def mute(self, context: Context, path: Path) -> None:
        raise Mute

    async def forever(self, context: Context, path: Path) -> None:
        (self.data_dir / "running").touch()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.1)
            (self.data_dir / "stopped").touch()

    async def grouped(self, context: Context, path: Path) -> None:
        """Cancelled, it raises a group of Cancelled and something else."""

        async def fails_at_the_end() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("in a cleanup")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails_at_the_end)
            nursery.start_soon(trio.sleep_forever)
            (self.data_dir / "running").touch()

    async def unheeding(self, context: Context, path: Path) -> None:
        """Cancelled, it raises something else."""
        (self.data_dir / "running").touch()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            raise RuntimeError("told to stop") from None


class Asyncio(aipod.Model):
    @aipod.method(flavor="asyncio")
    async def load(self) -> None:
        await asyncio.sleep(0)
        (self.data_dir / "loaded").write_text(self.version)

    @aipod.method(flavor="asyncio")
    async def close(self) -> None:
        await asyncio.sleep(0)
        (self.data_dir / "closed").touch()

    @aipod.method(flavor="asyncio")
    async def give(self, context: Context, path: Path, *, kind: str) -> Any:
        return give(context, path, kind)

    @aipod.method(flavor="asyncio")
    async def talk(self, context: Context, path: Path) -> str:
        return talk(context)

    @aipod.method(flavor="asyncio")
    async def straggle(self, context: Context, path: Path) -> None:
        straggle(context, self.data_dir)

    @aipod.method(flavor="asyncio")
    async def boom(self, context: Context, path: Path) -> None:
        raise KeyError("no such word")

    @aipod.method(flavor="asyncio")
    async def exit(self, context: Context, path: Path) -> None:
        sys.exit(3)

    @aipod.method(flavor="asyncio")
    async def interrupt(self, context: Context, path: Path) -> None:
        raise KeyboardInterrupt

    @aipod.method(flavor="asyncio")
    async def mute(self, context: Context, path: Path) -> None:
        raise Mute

    @aipod.method(flavor="asyncio")
    async def forever(self, context: Context, path: Path) -> None:
        (self.data_dir / "running").touch()
        try:
            await asyncio.sleep(60)
        finally:
            (self.data_dir / "stopped").touch()


class PlainFails(aipod.Model):
    def load(self) -> None:
        raise OSError("no weights here")

    def chaos(self, context: Context, path: Path) -> None: ...


class PlainDies(aipod.Model):
    def load(self) -> None:
        if (self.data_dir / "how").read_text() == "kill":
            os.kill(os.getpid(), 9)
        os._exit(7)

    def chaos(self, context: Context, path: Path) -> None: ...


class TrioFails(aipod.Model):
    async def load(self) -> None:
        raise OSError("no weights here")

    async def chaos(self, context: Context, path: Path) -> None: ...


class AsyncioFails(aipod.Model):
    @aipod.method(flavor="asyncio")
    async def load(self) -> None:
        raise OSError("no weights here")

    async def chaos(self, context: Context, path: Path) -> None: ...


class PlainSlow(aipod.Model):
    def load(self) -> None:
        say(self.data_dir / "loading", str(os.getpid()))
        time.sleep(60)

    def chaos(self, context: Context, path: Path) -> None: ...


class TrioSlow(aipod.Model):
    async def load(self) -> None:
        (self.data_dir / "loading").touch()
        await trio.sleep_forever()

    async def chaos(self, context: Context, path: Path) -> None: ...


class AsyncioSlow(aipod.Model):
    @aipod.method(flavor="asyncio")
    async def load(self) -> None:
        (self.data_dir / "loading").touch()
        await asyncio.sleep(60)

    async def chaos(self, context: Context, path: Path) -> None: ...
