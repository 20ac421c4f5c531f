"""`aipod submit METHOD [FILE|-] --ticket FILE`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from aipod.cli import end_on_signals, run_async
from aipod.cli.answer import limited
from aipod.cli.call import hand_over
from aipod.cli.options import Server, server_options, take_server, timeout_option
from aipod.cli.progress import Progress
from aipod.cli.request import Asked, request_options, take_request
from aipod.cli.ticket import check_ticket_file, telling, ticket_option
from aipod.client import Client


@click.command(short_help="Hand a job over and do not wait for its answer.")
@request_options
@timeout_option("Time for the upload.")
@ticket_option("Write what attach and cancel need to FILE.", required=True)
@server_options("level")
@click.pass_context
def submit(context: click.Context, /, timeout: float | None, ticket: Path, **options: Any) -> None:
    """Hand a job over and print its id, once the server has the whole payload.

    The id may be shown to anybody; FILE is as secret as the job, and stays: `aipod attach FILE` gives the answer. After
    Ctrl-C, --timeout or a kill the same command continues the upload.
    """
    end_on_signals()
    asked = take_request(options)
    server = take_server(options)
    check_ticket_file(ticket, from_stdin=asked.from_stdin)
    with telling(context, str(ticket)):
        click.echo(run_async(_submit(server, asked, timeout, ticket)))


async def _submit(server: Server, asked: Asked, timeout: float | None, ticket: Path) -> str:
    with Progress(sys.stderr) as progress:
        async with Client(server.to, config=server.config) as client, limited(timeout):
            return (await hand_over(client, server, asked, ticket, progress)).id
