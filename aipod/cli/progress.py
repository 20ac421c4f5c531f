"""What a call is doing, for a person: one live line on a terminal, elsewhere a note when it must be tried again.

rich is imported for a terminal only: it costs a command a fifth of its start.
"""

from __future__ import annotations

import collections
import os
from types import TracebackType
from typing import IO, TYPE_CHECKING

import click

from aipod.cli import plain
from aipod.cli.amounts import sizes
from aipod.cli.tally import Tally, amounts, detail
from aipod.client.event import Event
from aipod.config import KIB

if TYPE_CHECKING:
    from aipod.cli.bar import Bar

_PHASES = {
    "CONNECTING": "connect",
    "WAITING": "retry",
    "RECEIVING": "upload",
    "QUEUED": "queue",
    "RUNNING": "run",
    "DONE": "download",
    "FAILED": "failed",
    "CANCELLED": "cancelled",
    "RELEASED": "released",
}
# Phases in which nobody has heard of the job over this connection.
_UNHEARD = ("CONNECTING", "WAITING")

# Seconds for which a method may be quiet before that is told: many have nothing to say.
QUIET = 10

# Reasons of which a command tells: in some there are numbers, which differ each time.
_NOTES = 5
# Lines that are kept while a question is on the screen.
_KEPT = 1000
# Characters of a line of the log that may wait for its end.
_LONGEST = 64 * KIB


class Progress:
    """Shows events on `stream` where it is a terminal; log lines of the model above the bar.

    `to`: who is called. `quiet`: as where it is none. `heard`: whether a server has told of the job; `why`: why it was
    tried again at last.
    """

    def __init__(self, stream: IO[str], to: str = "", *, quiet: bool = False) -> None:
        # Only what the stream says: FORCE_COLOR and the like make rich write to pipes.
        self._live: Bar | None = None
        self._bar: Bar | None = None
        self._stream = stream
        self._to = to
        self.is_terminal = stream.isatty() and not quiet
        if self.is_terminal and can_draw(stream):
            from aipod.cli.bar import Bar

            self._bar = self._live = Bar(stream)
        self._told = set[str]()  # why it was tried again
        self._tally = Tally()
        self._kept: collections.deque[str] | None = None  # lines for after a question
        self._rest = ""  # of the log: a line that has no end yet
        self.is_json = self.heard = False
        self.why = self.phase = ""

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the line away."""
        self.resume()
        self._log("\n" if self._rest else "")
        if self._live is not None:
            self._live.stop()
            self._live = None

    def pause(self) -> None:
        """Take the line away until `resume`; what is to be shown meanwhile waits."""
        if self._kept is None:
            self._kept = collections.deque(maxlen=_KEPT)
            if self._live is not None:
                self._live.stop()

    def resume(self, *, new_line: bool = True) -> None:
        """Show the line again, below what was written meanwhile; `new_line`: that has not ended its line."""
        kept, self._kept = self._kept, None
        if kept is None:
            return
        if new_line:
            click.echo(file=self._stream)
        if self._live is not None:
            self._live.start()
        for line in kept:
            self.say(line)

    def say(self, text: str) -> None:
        """One line for a person at a terminal."""
        if self._kept is not None:
            self._kept.append(text)
        elif self._bar is not None:
            self._bar.print(text)
        elif self.is_terminal:
            click.echo(text, file=self._stream)

    def sum_up(self) -> None:
        """Say what went up and down, and how long it took."""
        self.say(self._tally.summary())

    def show(self, event: Event) -> None:
        """Called with every event of the call."""
        self.is_json = event.content_type == "application/json"
        self.heard = self.heard or event.phase not in _UNHEARD
        self.phase = event.phase
        if event.phase == "WAITING":
            self.why = " ".join(event.message.split())
            if self._bar is None:
                self._note(self.why)
        self._log(event.log)
        is_new = self._tally.see(event)
        if self._live is None or self._kept is not None:
            return
        done, total = amounts(event)
        self._live.update(
            _PHASES.get(event.phase, event.phase.lower()),
            done,
            total,
            self._detail(event, done, total),
            refresh=is_new,  # at once: a phase may be shorter than the pause between two pictures
        )

    def _log(self, text: str) -> None:
        """Show whole lines: what comes is cut anywhere."""
        if not text or not self.is_terminal:
            return
        *lines, self._rest = (self._rest + text).split("\n")
        if len(self._rest) > _LONGEST:
            lines, self._rest = [*lines, self._rest], ""
        for line in lines:
            self.say(_shown(line))

    def _note(self, why: str) -> None:
        """One line for each reason, not one for each try."""
        if why not in self._told and len(self._told) < _NOTES:
            self._told.add(why)
            click.echo(f"aipod: note: {plain(why)}; trying again", err=True)

    def _detail(self, event: Event, done: int, total: float | None) -> str:
        message = plain(" ".join(event.message.split()))
        if event.phase in _UNHEARD:
            if event.connection == 1:
                return self._to
            # Once the server has been heard of only time counts.
            of = "" if event.heartbeats else f" of {event.connections}"
            return f"connection {event.connection}{of}" + (f": {message}" if message else "")
        if event.phase == "QUEUED":
            return f"{event.place} before it in line" if event.place else ""
        if event.phase == "RUNNING":
            again = f"run {event.runs}" if event.runs > 1 else ""  # a restartable method
            said = f"{event.progress:.0%} {message}" if event.progress or message else ""
            return " ".join(filter(None, (again, said, silence(event.quiet))))
        if event.phase not in ("RECEIVING", "DONE"):
            return ""
        return "  ".join(filter(None, (sizes(done, total), detail(event))))


def can_draw(stream: IO[str]) -> bool:
    """Whether a line can be drawn anew there: not in editors, nor where the terminal's kind is not known."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def _shown(line: str) -> str:
    """A line of a model's log as a terminal shows it: without what would move its cursor or change its colors."""
    drawn = [part for part in line.split("\r") if part]  # of a bar that is drawn again and again
    return plain(drawn[-1].expandtabs()) if drawn else ""


def silence(quiet: int) -> str:
    """What to say of a method that has said nothing for `quiet` seconds."""
    return f"quiet for {quiet} s" if quiet >= QUIET else ""
