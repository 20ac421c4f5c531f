"""What a call is doing, for a person: one live line on a terminal, elsewhere a note when it must be tried again.

rich is imported for a terminal only: it costs a command a fifth of its start.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import IO, TYPE_CHECKING

import click

from aipod.client.event import Event

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

# Seconds for which a method may be quiet before that is told: many have nothing to say.
QUIET = 10

# Reasons of which a command tells: in some there are numbers, which differ each time.
_NOTES = 5


class Progress:
    """Shows events on `stream` where it is a terminal; log lines of the model above the bar."""

    def __init__(self, stream: IO[str]) -> None:
        # Only what the stream says: FORCE_COLOR and the like make rich write to pipes.
        self._live: Bar | None = None
        self._bar: Bar | None = None
        if stream.isatty():
            from aipod.cli.bar import Bar

            self._bar = self._live = Bar(stream)
        self._told = set[str]()  # why it was tried again
        self.is_json = False
        self._phase = ""
        self._since = (0.0, 0)

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
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """One line for a person."""
        if self._bar is not None:
            self._bar.print(text)

    def show(self, event: Event) -> None:
        """Called with every event of the call."""
        self.is_json = event.content_type == "application/json"
        if self._bar is None and event.phase == "WAITING":
            self._note(" ".join(event.message.split()))
        if self._live is None:
            return
        if event.log:
            self._live.print(event.log.rstrip("\n"))
        done, total = _amounts(event)
        is_new = event.phase != self._phase
        if is_new:
            self._phase = event.phase
            self._since = (time.monotonic(), done)
        self._live.update(
            _PHASES.get(event.phase, event.phase.lower()),
            done,
            total,
            self._detail(event, done, total),
            refresh=is_new,  # at once: a phase may be shorter than the pause between two pictures
        )

    def _note(self, why: str) -> None:
        """One line for each reason, not one for each try."""
        if why not in self._told and len(self._told) < _NOTES:
            self._told.add(why)
            click.echo(f"aipod: note: {why}; trying again", err=True)

    def _detail(self, event: Event, done: int, total: float | None) -> str:
        message = " ".join(event.message.split())
        if event.phase in ("CONNECTING", "WAITING") and event.connection > 1:
            # Once the server has been heard of only time counts.
            of = "" if event.heartbeats else f" of {event.connections}"
            return f"connection {event.connection}{of}" + (f": {message}" if message else "")
        if event.phase == "QUEUED":
            return f"{event.place} before" if event.place else ""
        if event.phase == "RUNNING":
            again = f"run {event.runs}" if event.runs > 1 else ""  # a restartable method
            said = f"{event.progress:.0%} {message}" if event.progress or message else ""
            return " ".join(filter(None, (again, said, silence(event.quiet))))
        if event.phase not in ("RECEIVING", "DONE"):
            return ""
        took, before = time.monotonic() - self._since[0], self._since[1]
        rate = (done - before) / took if took > 0.2 else 0
        text = amount(done, total)
        if event.ratio >= 1.05:
            text += f"  {event.ratio:.1f}:1"  # compressed
        if rate:
            text += f"  {rate / 1e6:.1f} MB/s"
            if total:
                text += f"  {(total - done) / rate:.0f} s left"
        return text


def silence(quiet: int) -> str:
    """What to say of a method that has said nothing for `quiet` seconds."""
    return f"quiet for {quiet} s" if quiet >= QUIET else ""


def amount(done: int, total: float | None) -> str:
    """Bytes for a person; `total` where it is known, and not 0."""
    return f"{done / 1e6:.1f}/{total / 1e6:.1f} MB" if total else f"{done / 1e6:.1f} MB"


def _amounts(event: Event) -> tuple[int, float | None]:
    """What is done of what, in the current phase."""
    if event.phase == "RECEIVING":
        return max(event.sent, event.offset), event.payload_size  # who attaches sends nothing
    if event.phase == "DONE":
        return event.received, event.answer_size
    if event.phase == "RUNNING" and event.progress:
        return int(event.progress * 1000), 1000
    return 0, None
