"""The live line of a terminal: the only importer of rich."""

from __future__ import annotations

from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text


class Bar:
    """What is done, of how much, and a detail; other lines go above it."""

    def __init__(self, stream: IO[str]) -> None:
        self._console = Console(file=stream, force_terminal=True)
        one_line = Column(no_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description:<9}", table_column=one_line),
            # On a narrow terminal the bar gives way, then the end of the detail: it must stay one line.
            BarColumn(None, table_column=Column(max_width=min(40, max(4, self._console.width - 60)))),
            _Detail(),
            TimeElapsedColumn(table_column=one_line),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("connect", total=None, detail="")

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        """Take the line away."""
        self._progress.stop()

    def print(self, text: str) -> None:
        self._console.print(Text(text))

    def update(self, name: str, done: int, total: float | None, detail: str, *, refresh: bool) -> None:
        self._progress.update(self._task, description=name, total=total, completed=done, detail=detail, refresh=refresh)


class _Detail(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["detail"], no_wrap=True, overflow="ellipsis")
