"""Where `call` and `attach` write an answer: a file, a terminal, or whatever else stdout is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import click

from aipod.cli.progress import Progress
from aipod.client import Event
from aipod.config import MIB
from aipod.errors import AipodError, job_failed

# Where -o may point and still mean what the shell has opened: opened anew, a file would be written from its start.
STDOUT = (None, Path("-"), Path("/dev/stdout"))

# Gives the answer, or writes it to the path and gives that; the callable wants every event.
Ask = Callable[[Path | None, Callable[[Event], None]], Awaitable[Any]]


async def deliver(ask: Ask, progress: Progress, output: Path | None, *, kept: bool = False) -> None:
    """Ask, and write the answer. `kept`: one that is not written can be asked for again.

    This is an asyncio-flavored function. Raises what `ask` does, `AipodError` (NOT_SHOWN) and OSError.
    """
    if output not in STDOUT:
        await ask(output, progress.show)
        progress.close()
        progress.say(f"wrote {output}")
    elif sys.stdout.isatty():
        await _to_terminal(ask, progress, kept=kept)
    else:
        await _to_pipe(ask, progress)


async def _to_terminal(ask: Ask, progress: Progress, *, kept: bool) -> None:
    def show(event: Event) -> None:
        progress.show(event)
        if event.phase == "DONE" and not progress.is_json:
            # Nothing tells before the run; but what a terminal cannot show need not come.
            end = "" if kept else " and is lost"
            text = f"the method has run, but its answer, {event.answer_size} bytes, is nothing for a terminal{end}"
            raise AipodError("NOT_SHOWN", f"{text}; call again with -o FILE, or with a pipe, to have it")

    answer = await ask(None, show)
    progress.close()
    click.echo(json.dumps(answer, ensure_ascii=False))


async def _to_pipe(ask: Ask, progress: Progress) -> None:
    """The answer may be of any size and of either kind: it goes through a file, and out once it is checked."""
    with tempfile.TemporaryDirectory(prefix="aipod-") as directory:
        out = sys.stdout.buffer
        path = await ask(Path(directory) / "answer", progress.show)
        progress.close()
        with path.open("rb") as file:
            while piece := file.read(MIB):
                out.write(piece)
        if progress.is_json:
            out.write(os.linesep.encode())
        out.flush()


@contextlib.asynccontextmanager
async def limited(seconds: float | None) -> AsyncIterator[None]:
    """For --timeout: the body has so many seconds. Raises `JobCancelled` (DEADLINE_EXCEEDED) then.

    This is an asyncio-flavored context manager.
    """
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        raise job_failed("DEADLINE_EXCEEDED", "not done within --timeout") from None
