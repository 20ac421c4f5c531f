"""What a call is doing, for a person: one live line on a terminal, nothing elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from aipod.client.call import Event

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


class Progress:
    """Shows events on `stream` where it is a terminal; log lines of the model above the bar."""

    def __init__(self, stream: IO[str]) -> None:
        # Only what the stream says: FORCE_COLOR and the like make rich write to pipes.
        self._live = self._terminal = stream.isatty()
        self._console = Console(file=stream, force_terminal=self._live)
        one_line = Column(no_wrap=True)
        self._bar = Bar(
            TextColumn("{task.description:<9}", table_column=one_line),
            # On a narrow terminal the bar gives way, then the end of the detail: it must stay one line.
            BarColumn(None, table_column=Column(max_width=min(40, max(4, self._console.width - 60)))),
            _Detail(),
            TimeElapsedColumn(table_column=one_line),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("connect", total=None, detail="")
        self.is_json = False
        self._phase = ""
        self._since = (0.0, 0)

    def __enter__(self) -> Progress:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the line away."""
        if self._live:
            self._bar.stop()
            self._live = False

    def say(self, text: str) -> None:
        """One line for a person."""
        if self._terminal:
            self._console.print(Text(text))

    def show(self, event: Event) -> None:
        """Called with every event of the call."""
        self.is_json = event.content_type == "application/json"
        if not self._live:
            return
        if event.log:
            self._console.print(Text(event.log.rstrip("\n")))
        done, total = _amounts(event)
        is_new = event.phase != self._phase
        if is_new:
            self._phase = event.phase
            self._since = (time.monotonic(), done)
        self._bar.update(
            self._task,
            description=_PHASES.get(event.phase, event.phase.lower()),
            total=total,
            completed=done,
            detail=self._detail(event, done, total),
            refresh=is_new,  # at once: a phase may be shorter than the pause between two pictures
        )

    def _detail(self, event: Event, done: int, total: float | None) -> str:
        message = " ".join(event.message.split())
        if event.phase in ("CONNECTING", "WAITING") and event.connection > 1:
            # Once the server has been heard of only time counts.
            of = "" if event.heartbeats else f" of {event.connections}"
            return f"connection {event.connection}{of}" + (f": {message}" if message else "")
        if event.phase == "QUEUED":
            return f"{event.place} before" if event.place else ""
        if event.phase == "RUNNING":
            return f"{event.progress:.0%} {message}" if event.progress or message else ""
        if event.phase not in ("RECEIVING", "DONE"):
            return ""
        took, before = time.monotonic() - self._since[0], self._since[1]
        rate = (done - before) / took if took > 0.2 else 0
        text = f"{done / 1e6:.1f} MB"
        if total:
            text = f"{done / 1e6:.1f}/{total / 1e6:.1f} MB"
        if rate:
            text += f"  {rate / 1e6:.1f} MB/s"
            if total:
                text += f"  {(total - done) / rate:.0f} s left"
        return text


class _Detail(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["detail"], no_wrap=True, overflow="ellipsis")


def _amounts(event: Event) -> tuple[int, float | None]:
    """What is done of what, in the current phase."""
    if event.phase == "RECEIVING":
        return max(event.sent, event.offset), event.payload_size  # who attaches sends nothing
    if event.phase == "DONE":
        return event.received, event.answer_size
    if event.phase == "RUNNING" and event.progress:
        return int(event.progress * 1000), 1000
    return 0, None
