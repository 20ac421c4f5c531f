"""Models for servers that are part of an application."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import aipod
from aipod import Context
from tests.marks import say

log = logging.getLogger("embedded.model")


class Upper(aipod.Model):
    """In worker processes."""

    def predict(self, context: Context, path: Path) -> str:
        return path.read_text().upper()

    def wait(self, context: Context, path: Path, *, begun: str, until: str) -> str:
        """Tell who runs it, and wait for a file; stops where nobody wants it any more."""
        say(begun, str(os.getpid()))
        while not Path(until).exists():
            if context.cancelled:
                raise RuntimeError("stopped")
            time.sleep(0.02)
        return "waited"

    def hang(self, context: Context, path: Path, *, begun: str) -> None:
        say(begun, str(os.getpid()))
        time.sleep(1000)


class Reverse(aipod.Model):
    """In the server's process."""

    async def predict(self, context: Context, path: Path) -> str:
        print("printed by Reverse")
        log.warning("logged by Reverse")
        return path.read_text()[::-1]

    async def fail(self, context: Context, path: Path) -> None:
        os.write(1, b"native\n")
        raise ValueError("no good")

    async def block(self, context: Context, path: Path, *, begun: str) -> None:
        """The loop stands still, as long as the process lives."""
        say(begun, str(os.getpid()))
        time.sleep(1000)


if begun := os.environ.get("AIPOD_TEST_SLOW_IMPORT"):
    say(begun, str(os.getpid()))
    time.sleep(1000)
