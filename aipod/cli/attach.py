"""`aipod attach TICKET-FILE`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from aipod.cli import end_on_signals, run_async
from aipod.cli.answer import deliver, limited
from aipod.cli.options import Server, output_option, server_options, take_server, timeout_option
from aipod.cli.progress import Progress
from aipod.cli.ticket import read_ticket, telling, ticket_argument
from aipod.client import Client, Event


@click.command(short_help="Watch a job and write its answer.")
@ticket_argument
@timeout_option("Time to wait.")
@output_option
@server_options()
@click.pass_context
def attach(context: click.Context, /, ticket: str, timeout: float | None, output: Path | None, **options: Any) -> None:
    """Watch a job and write its answer, as call does; with - the ticket comes on stdin, in hexadecimal.

    TICKET-FILE is what submit or call --ticket has written. It stays, so that the answer can be had as often as it is
    asked for, until `aipod cancel --release` or until it expires. Ctrl-C leaves the job alone.
    """
    end_on_signals()
    server = take_server(options)
    with telling(context, ticket):
        run_async(_attach(server, read_ticket(ticket), timeout, output))


async def _attach(server: Server, ticket: bytes, timeout: float | None, output: Path | None) -> None:
    with Progress(sys.stderr) as progress:
        async with Client(server.to, config=server.config) as client, limited(timeout):
            job = client.attach(ticket, metadata=server.metadata)

            async def ask(save_to: Path | None, on_event: Callable[[Event], None]) -> Any:
                return await job.wait(save_to=save_to, on_event=on_event)

            await deliver(ask, progress, output, kept=True)
