"""How `call`, `submit` and `attach` reach a server, and where an answer is written: a file, a terminal, or whatever
else stdout is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import click

from aipod.cli.amounts import size
from aipod.cli.lines import Lines, in_json
from aipod.cli.options import Server
from aipod.cli.progress import Progress
from aipod.client import Client, Event
from aipod.config import MIB
from aipod.errors import AipodError, JobCancelled, Unreachable, UsageError, job_failed

# Where -o may point and still mean what the shell has opened: opened anew, a file would be written from its start.
STDOUT = (None, Path("-"), Path("/dev/stdout"))

# Gives the answer, or writes it to the path and gives that; the callable wants every event.
Ask = Callable[[Path | None, Callable[[Event], None]], Awaitable[Any]]


@contextlib.asynccontextmanager
async def calling(
    server: Server, timeout: float | None = None, lines: Lines | None = None
) -> AsyncIterator[tuple[Client, Progress]]:
    """A client, and what shows how it fares, unless `lines` do so here. The body has `timeout` seconds, if any.

    This is an asyncio-flavored context manager. Raises what the body does, `JobCancelled` (DEADLINE_EXCEEDED) where its
    time is up, and `Unreachable` where it is up before any server has answered.
    """
    quiet = lines is not None and sys.stdout.isatty()
    with Progress(sys.stderr, server.to, quiet=quiet) as progress, _unheard(progress, server.to):
        async with Client(server.to, config=server.config) as client, _limited(timeout):
            yield client, progress


@contextlib.asynccontextmanager
async def _limited(seconds: float | None) -> AsyncIterator[None]:
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        raise job_failed("DEADLINE_EXCEEDED", "not done within --timeout") from None


@contextlib.contextmanager
def _unheard(progress: Progress, to: str) -> Iterator[None]:
    try:
        yield
    except JobCancelled as exc:
        if exc.reason != "DEADLINE_EXCEEDED" or progress.heard:
            raise
        why = f": {progress.why}" if progress.why else ""
        raise Unreachable(f"no server answers at {to} within --timeout{why}") from exc


def check_output(output: Path | None, lines: Lines | None) -> None:
    """Raises `UsageError` for one that --json does not go with."""
    if lines is not None and output is not None and output in STDOUT:
        raise UsageError("with --json stdout has the events: give -o FILE, or leave -o out for an answer that is JSON")


def shows_json_only(output: Path | None, lines: Lines | None) -> bool:
    """Whether an answer that is no JSON has nowhere to go."""
    return output in STDOUT and (lines is not None or sys.stdout.isatty())


async def deliver(ask: Ask, progress: Progress, output: Path | None, lines: Lines | None = None) -> None:
    """Ask, and write the answer, or a line that says where it is.

    This is an asyncio-flavored function. Raises what `ask` does, `AipodError` (NOT_SHOWN) and OSError.
    """
    last: Event | None = None

    def show(event: Event) -> None:
        nonlocal last
        last = event
        progress.show(event)
        if lines is not None:
            lines.event(event)
        if event.phase == "DONE" and not progress.is_json and shows_json_only(output, lines):
            # Nothing tells before the run; but what cannot be shown need not come.
            where = "--json" if lines is not None else "a terminal"
            raise AipodError("NOT_SHOWN", f"the answer is binary ({size(event.answer_size)}), nothing for {where}")

    if output not in STDOUT:
        await ask(output, show)
        progress.close()
        assert output is not None
        assert last is not None
        if lines is not None:
            lines.saved(output, last.content_type, last.answer_size)
        progress.sum_up()
        progress.say(f"wrote {output}")
    elif shows_json_only(output, lines):
        answer = await ask(None, show)
        progress.close()
        progress.sum_up()
        if lines is not None:
            lines.answer(answer)
        else:
            click.echo(in_json(answer))
    else:
        await _to_pipe(ask, progress, show)


async def _to_pipe(ask: Ask, progress: Progress, show: Callable[[Event], None]) -> None:
    """The answer may be of any size and of either kind: it goes through a file, and out once it is checked."""
    with tempfile.TemporaryDirectory(prefix="aipod-") as directory:
        out = sys.stdout.buffer
        path = await ask(Path(directory) / "answer", show)
        progress.close()
        progress.sum_up()
        with path.open("rb") as file:
            while piece := file.read(MIB):
                out.write(piece)
        if progress.is_json:
            out.write(os.linesep.encode())
        out.flush()
