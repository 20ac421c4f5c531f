"""`aipod attach TICKET-FILE`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from aipod.cli import end_on_signals, run_async
from aipod.cli.answer import calling, check_output, deliver
from aipod.cli.help import Command
from aipod.cli.leaving import parting
from aipod.cli.lines import json_option
from aipod.cli.options import Server, output_option, server_options, take_server, timeout_option
from aipod.cli.question import is_asked_for
from aipod.cli.ticket import read_ticket, telling, ticket_argument
from aipod.client import Event
from aipod.client.ticket import TicketFile


@click.command(cls=Command)
@ticket_argument
@timeout_option("Time to wait, as 90, 1.5min or 2h.")
@output_option
@json_option
@server_options()
@click.pass_context
def attach(context: click.Context, /, ticket: str, timeout: float | None, output: Path | None, **options: Any) -> None:
    """Watch a job and write its answer, as call does; with - the ticket comes on stdin, in hexadecimal.

    \b
    aipod attach job.ticket -o answer

    TICKET-FILE is what submit or call --ticket has written. It stays, so that the answer can be had as often as it is
    asked for, until `aipod cancel --release` or until it expires. Ctrl-C leaves the job alone, unless you answer
    otherwise.
    """
    end_on_signals()
    check_output(output, context.obj.lines)
    server = take_server(options)
    with telling(context, ticket):
        run_async(_attach(context, server, ticket, read_ticket(ticket), timeout, output))


async def _attach(
    context: click.Context, server: Server, name: str, ticket: bytes, timeout: float | None, output: Path | None
) -> None:
    file = None if name == "-" else TicketFile(name)
    asks = is_asked_for(stdin_is_payload=file is None, as_json=context.obj.lines is not None)
    async with calling(server, timeout, context.obj.lines) as (client, progress):
        job = client.attach(ticket, metadata=server.metadata)

        async def ask(save_to: Path | None, on_event: Callable[[Event], None]) -> Any:
            return await job.wait(save_to=save_to, on_event=on_event)

        async with parting(context, client, server, progress, file, output, asks=asks):
            await deliver(ask, progress, output, context.obj.lines)
