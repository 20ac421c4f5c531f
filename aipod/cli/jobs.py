"""`aipod jobs`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Any

import click

from aipod.cli import end_on_signals, plain, run_async
from aipod.cli.amounts import sizes
from aipod.cli.answer import calling
from aipod.cli.help import Command
from aipod.cli.lines import in_json
from aipod.cli.options import Server, server_options, take_server, timeout_option
from aipod.cli.progress import silence

HEADINGS = ("ID", "METHOD", "VERSION", "PHASE", "PROGRESS", "MESSAGE")


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@timeout_option("Time for the answer.", 30.0)
@server_options()
def jobs(as_json: bool, timeout: float, **options: Any) -> None:
    """List the jobs of a server, the ended ones that it still has as well; what has changed last comes first.

    An id names a job to people and in logs; its ticket, which owns it, nobody is told. A job whose server was killed is
    listed as it was then, until the next server, or another one on the same spool, goes on with it (half a minute).
    """
    end_on_signals()
    listed = run_async(_ask(take_server(options), timeout))
    if not listed:
        click.echo("aipod: note: the server has no jobs", err=True)
        return
    if as_json:
        for job in listed:
            click.echo(in_json(job))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in table([HEADINGS, *(_row(job) for job in listed)], width):
        click.echo(line)


async def _ask(server: Server, timeout: float) -> list[dict[str, Any]]:
    async with calling(server) as (client, progress):
        metadata = [*server.metadata, ("x-func-name", "aipod.jobs")]
        listed: list[dict[str, Any]] = await client.chaos(metadata=metadata, timeout=timeout, on_event=progress.show)
        return listed


def _row(job: dict[str, Any]) -> tuple[str, ...]:
    cells = (job["id"], job["method"], job["version"], job["phase"], _progress(job), _message(job))
    return tuple(plain(str(cell)) for cell in cells)


def _progress(job: dict[str, Any]) -> str:
    """How far the job has come in its phase; of a payload what is durable, and all of it where that was announced."""
    if job["phase"] == "RECEIVING":
        return sizes(job["received"], job["size"])
    return f"{job['progress']:.0%}" if job["phase"] == "RUNNING" and job["progress"] else ""


def _message(job: dict[str, Any]) -> str:
    return " ".join(filter(None, (job["message"], silence(job.get("quiet", 0)))))


def table(rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Lines with their columns below each other, however wide their letters are, cut at `width`."""
    from rich.cells import cell_len, set_cell_size  # a command that shows no table needs none of it

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [line if width is None or cell_len(line) <= width else set_cell_size(line, width) for line in lines]
