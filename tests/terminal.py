"""A command on a terminal, as a person sees it: a pseudo-terminal, the command's controlling one, drawn by pyte."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pyte

from tests.starter import ROOT

# Nothing of the machine's own settings may leak in.
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("AIPOD_", "NO_COLOR", "FORCE_COLOR", "TTY_", "COLUMNS", "LINES"))
}


class Session:
    """`aipod ARGUMENT...` in `directory`; at the end of the block it is killed where it has not ended.

    `stdout`: where that goes instead. `seen` has every picture that was on the screen after a piece of output.
    """

    def __init__(
        self,
        *arguments: str,
        directory: Path,
        environ: dict[str, str] | None = None,
        stdout: IO[bytes] | None = None,
        columns: int = 90,
        lines: int = 30,
    ) -> None:
        self._master, slave = pty.openpty()
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.seen: list[str] = []
        self.resize(columns, lines)
        environment = {**CLEAN, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **(environ or {})}
        # It begins a session with this terminal, so that Ctrl-C is what the terminal makes of it.
        command = ["setsid", "--ctty", sys.executable, "-m", "aipod", *arguments]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=stdout or slave, stderr=slave, cwd=directory, env=environment
        )
        os.close(slave)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    @property
    def text(self) -> str:
        """What is on the screen."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def resize(self, columns: int, lines: int = 30) -> None:
        """The kernel tells whoever is in the foreground."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.resize(lines, columns)

    def until(self, wanted: str | Callable[[], object], *, seconds: float = 30) -> str:
        """Read until a text is on the screen, or something is true; the screen then."""
        until = time.monotonic() + seconds
        while not (wanted in self.text if isinstance(wanted, str) else wanted()):
            assert time.monotonic() < until, f"not within {seconds} s:\n{self.text}"
            if not self._read(0.05):
                assert self.process.poll() is None or self._read(0), f"{wanted!r} was not there:\n{self.text}"
        return self.text

    def rest(self, seconds: float) -> None:
        """Read for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._read(0.05)

    def end(self, *, seconds: float = 60) -> int:
        """Read until the command has ended; its exit status."""
        until = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < until, f"not within {seconds} s:\n{self.text}"
            self._read(0.05)
        while self._read(0):
            pass
        return self.process.returncode

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        try:
            piece = os.read(self._master, 65536)
        except OSError:  # nobody has it open any more
            return False
        self.raw += piece
        self._stream.feed(piece)
        self.seen.append(self.text)
        return bool(piece)
