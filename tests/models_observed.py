"""Models whose server is looked at: what it counts and what it logs."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import aipod
from aipod import Context
from tests.lazily import trio

# What would make a line of its own, paint a terminal, end a JSON string, or turn the direction of text.
FORGED = 'x\n{"level": "ERROR", "message": "forged"}\r\x1b[2J\x9b1m"} \\ \u2028\u202e grüße \U0001f600\x00'


def log_all(context: Context, length: int) -> None:
    print("printed", FORGED)
    print("y" * length)
    logging.getLogger("their.model").warning("logged %s", FORGED)
    context.log("told " + FORGED)


class Worker(aipod.Model):
    def say(self, context: Context, path: Path, *, length: int = 0) -> str:
        log_all(context, length)
        subprocess.run([sys.executable, "-c", f"print('by a child', {FORGED!a})"], check=True)
        return "said"

    def fail(self, context: Context, path: Path) -> None:
        raise ValueError(FORGED)

    def wait(self, context: Context, path: Path) -> None:
        while not context.cancelled:
            time.sleep(0.01)

    def size(self, context: Context, path: Path, **kwargs: Any) -> int:
        return path.stat().st_size


class Loop(aipod.Model):
    async def say(self, context: Context, path: Path, *, length: int = 0) -> str:
        await trio.to_thread.run_sync(log_all, context, length)
        logging.getLogger("their.model").error("with fields", extra={"nan": float("nan"), "of": {1: self}, "s": FORGED})
        logging.getLogger("their.model").error("%d of them", "no number")
        return "said"

    async def fail(self, context: Context, path: Path) -> None:
        raise ValueError(FORGED)

    async def block(self, context: Context, path: Path, *, seconds: float) -> None:
        """Keeps the loop, and all heartbeats with it."""
        await trio.sleep(seconds)
        time.sleep(seconds)
        await trio.sleep(seconds)

    def warn(self, context: Context, path: Path) -> None:
        warnings.warn(FORGED, UserWarning, stacklevel=1)
        thread = threading.Thread(target=logging.getLogger("their.model").error, args=("of nobody's thread",))
        thread.start()
        thread.join()
