"""What Ctrl-C asks where there is a person to answer, while a command has a job: leave it running, cancel it, or go on.

The answer is a line, so the terminal stays as it is and Ctrl-Z works. A second Ctrl-C does not wait for it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from types import TracebackType

import click

from aipod.cli import Flags
from aipod.cli.progress import Progress

LEAVE, CANCEL = "leave", "cancel"
_WORDS = {
    **dict.fromkeys(("l", "leave", "d", "detach"), LEAVE),
    **dict.fromkeys(("c", "cancel"), CANCEL),
    **dict.fromkeys(("", "g", "go on"), ""),
}
# Bytes of an answer; what else is typed is for the next question.
_LONGEST = 256


class Question:
    """In its block Ctrl-C asks, unless no server has told of the job yet; `flags.choice` is what was answered.

    asyncio-flavored. `again`: what another Ctrl-C means.
    """

    def __init__(self, flags: Flags, progress: Progress, again: str) -> None:
        self._flags = flags
        self._progress = progress
        self._again = again
        self._loop = asyncio.get_running_loop()
        self._is_open = False

    def __enter__(self) -> Question:
        self._flags.ask = self.begin
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flags.ask = None
        if self._is_open:  # the job has ended, or there was another Ctrl-C
            self._close()

    def begin(self) -> bool:
        """Ask, if that makes sense. Called by the signal's handler, wherever the program is."""
        if self._is_open or not self._progress.heard or not _is_in_foreground():
            return False
        self._is_open = True
        self._loop.call_soon_threadsafe(self._ask)
        return True

    def _ask(self) -> None:
        if self._flags.ask is None or not self._is_open:  # the job has ended meanwhile
            return
        self._progress.pause()
        self._prompt()
        self._loop.add_reader(0, self._heard)

    def _prompt(self) -> None:
        leave = "keep the upload for later" if self._progress.phase == "RECEIVING" else "leave it running"
        keys = {LEAVE: "(l)", CANCEL: "(c)"}
        keys[self._again] += " or Ctrl-C"
        click.echo(f"\r{keys[LEAVE]} {leave}, {keys[CANCEL]} cancel it, Enter go on: ", nl=False, err=True)

    def _heard(self) -> None:
        try:
            line = os.read(0, _LONGEST)
        except OSError:  # the terminal has gone
            line = b""
        choice = _WORDS.get(line.decode(errors="replace").strip().lower())
        if line and choice is None:
            self._prompt()
            return
        self._close(answered=bool(line))
        if choice or not line:  # Ctrl-D is as another Ctrl-C
            self._flags.choice = choice or ""
            self._flags.end("Ctrl-C")

    def _close(self, *, answered: bool = False) -> None:
        self._is_open = False
        self._loop.remove_reader(0)
        self._progress.resume(new_line=not answered)  # with the answer Enter has begun one


def is_asked_for(*, stdin_is_payload: bool, as_json: bool) -> bool:
    """Whether a person is there to ask: at a terminal, which is not read for anything else."""
    return sys.stdin.isatty() and sys.stderr.isatty() and not stdin_is_payload and not as_json


def _is_in_foreground() -> bool:
    """Else the shell has the terminal, and reading it would stop this process."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False
