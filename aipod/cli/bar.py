"""The live line of a terminal; nothing else draws."""

from __future__ import annotations

import time
from typing import IO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# Columns: the name of a phase, and the shortest and longest bar.
_NAME, _SHORTEST, _LONGEST = 9, 12, 40
_FREE = 4


class Bar:
    """What is done, of how much, and a detail; other lines go above it."""

    def __init__(self, stream: IO[str]) -> None:
        # rich itself leaves colors out where NO_COLOR is set.
        self._console = Console(file=stream, force_terminal=True, highlight=False)
        self._name, self._done, self._detail = "connect", 0.0, ""
        self._total: float | None = None
        self._began = time.monotonic()
        self._live = self._new()

    def _new(self) -> Live:
        return Live(get_renderable=self._line, console=self._console, refresh_per_second=8, transient=True)

    def start(self) -> None:
        self._live = self._new()
        self._live.start(refresh=True)

    def stop(self) -> None:
        """Take the line away, until `start`."""
        self._live.stop()

    def print(self, text: str) -> None:
        """A line above it. The terminal itself breaks one that is long, so that it is copied as one."""
        self._console.print(Text(text), soft_wrap=True)

    def update(self, name: str, done: float, total: float | None, detail: str, *, refresh: bool) -> None:
        self._name, self._done, self._total, self._detail = name, done, total, detail
        if refresh:
            self._live.refresh()

    def _line(self) -> Table:
        """It must stay one line however narrow the terminal is: the bar gives way, then the end of the detail.

        Some columns are left free: there a terminal shows ^C, which would begin a new line at the end of this one.
        """
        width = self._console.width - _FREE
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        clock = Text(f"{minutes // 60}:{minutes % 60:02}:{seconds:02}", style="progress.elapsed")
        if width < _NAME + clock.cell_len + _SHORTEST:
            clock = Text()
        name = Text(f"{self._name:<{_NAME}}")
        room = max(width - _NAME - clock.cell_len - 2, 0)
        detail = Text(self._detail)
        bar = 0
        if self._total and room >= 4 * _SHORTEST:
            bar = min(max(room - detail.cell_len - 1, _SHORTEST), _LONGEST)
        detail.truncate(room - bar - 1 if bar else room, overflow="ellipsis", pad=True)
        row = [name, ProgressBar(self._total, min(self._done, self._total or 0), width=bar)] if bar else [name]
        line = Table.grid(padding=(0, 1, 0, 0))
        for _ in range(len(row) + 2):
            line.add_column(no_wrap=True)
        line.add_row(*row, detail, clock)
        return line
