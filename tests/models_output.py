"""Models that print, log and report, for tests/test_output.py."""

from __future__ import annotations

import asyncio
import ctypes
import logging
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

log = logging.getLogger("model")


def say(child: bool) -> None:
    print("printed")
    sys.stderr.write("in two ")
    sys.stderr.writelines(["parts\n", "\n", "10 %\r", "20 %\r\n"])
    log.info("logged %d", 1)
    log.debug("not this")
    if child:
        subprocess.run(["echo", "by a child"], check=True)
    print("\x1b[1mbold ü", end="")


SAID = ["printed", "in two parts", "10 %", "20 %", "INFO model: logged 1"]


def both(context: Context) -> None:
    """Says what it says in two ways, in turn."""
    for n in range(20):
        context.log(f"logged {n}")
        print(f"printed {n}")
    print("half", end="")
    context.log("two\nlines")
    print(" a line", end="")


BOTH = [f"{how} {n}" for n in range(20) for how in ("logged", "printed")]


class Worker(aipod.Model):
    def load(self) -> None:
        print("loading")

    def predict(self, context: Context, path: Path) -> None:
        say(child=True)

    def crash(self, context: Context, path: Path) -> None:
        print("last words")
        context.log("and what is about to happen")
        ctypes.string_at(0)

    def in_turn(self, context: Context, path: Path) -> None:
        both(context)

    def later(self, context: Context, path: Path, *, until: str) -> None:
        """A thread prints once this is over."""

        def wait() -> None:
            while not Path(until).exists():
                time.sleep(0.01)
            print("from a thread")
            Path(until).unlink()

        threading.Thread(target=wait, daemon=True).start()

    def flood(self, context: Context, path: Path, *, megabytes: int) -> str:
        for _ in range(megabytes):
            os.write(1, (b"x" * 99 + b"\n") * 10_000)
        print("the end")
        return "done"

    def report(self, context: Context, path: Path, *, times: int) -> str:
        for n in range(times):
            context.progress((n + 1) / times, f"step {n}")
            if n % 100 == 0:
                context.log(f"line {n}")
        return "done"


class Resource:
    """Garbage that only the collector finds, and that says when it does."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        print("closed")
        log.warning("closed")


class Loop(aipod.Model):
    def load(self) -> None:
        print("loading")
        self.here = 0
        self.both = trio.Event()

    async def predict(self, context: Context, path: Path) -> None:
        await trio.sleep(0)
        say(child=False)

    @aipod.method(flavor="asyncio")
    async def with_asyncio(self, context: Context, path: Path) -> None:
        await asyncio.to_thread(say, False)

    def in_thread(self, context: Context, path: Path) -> None:
        say(child=False)

    def garbage(self, context: Context, path: Path) -> str:
        for n in range(5000):
            Resource()
            context.log(f"line {n}")
        return "done"

    async def both_at_once(self, context: Context, path: Path, *, name: str) -> None:
        print("first", name)
        self.here += 1
        if self.here == 2:
            self.both.set()
        await self.both.wait()
        print("second", name)

    def by_itself(self, context: Context, path: Path) -> None:
        """A thread of its own, of which nobody knows whose it is."""
        thread = threading.Thread(target=print, args=("from a thread",))
        thread.start()
        thread.join()

    def in_turn(self, context: Context, path: Path) -> None:
        both(context)

    def report(self, context: Context, path: Path, **kwargs: Any) -> str:
        return Worker.report(self, context, path, **kwargs)  # type: ignore[arg-type]


class Thread(aipod.Model):
    garbage = Loop.garbage
