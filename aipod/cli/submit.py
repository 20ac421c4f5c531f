"""`aipod submit METHOD [FILE|-] --ticket FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from aipod.cli import end_on_signals, run_async
from aipod.cli.answer import calling
from aipod.cli.call import hand_over
from aipod.cli.help import Command
from aipod.cli.leaving import parting
from aipod.cli.lines import json_option
from aipod.cli.options import Server, repeat_server, server_options, take_server, timeout_option
from aipod.cli.question import is_asked_for
from aipod.cli.request import Asked, request_options, take_request
from aipod.cli.ticket import check_ticket_file, come_back, telling, ticket_option
from aipod.client.ticket import TicketFile


@click.command(cls=Command)
@request_options
@timeout_option("Time for the upload, as 90, 1.5min or 2h.")
@ticket_option("Write what attach and cancel need to FILE.", required=True)
@json_option
@server_options("level")
@click.pass_context
def submit(context: click.Context, /, timeout: float | None, ticket: Path, **options: Any) -> None:
    """Hand a job over and print its id, once the server has the whole payload.

    \b
    aipod submit train big.csv --ticket job.ticket
    aipod attach job.ticket

    The id may be shown to anybody; FILE is as secret as the job, and stays: `aipod attach FILE` gives the answer. After
    Ctrl-C, --timeout or a kill the same command continues the upload.
    """
    end_on_signals()
    asked = take_request(options)
    server = take_server(options)
    check_ticket_file(ticket, from_stdin=asked.from_stdin)
    with telling(context, str(ticket)):
        job_id = run_async(_submit(context, server, asked, timeout, ticket))
    if context.obj.lines is not None:
        context.obj.lines.submitted(job_id, ticket)
    else:
        click.echo(job_id)


async def _submit(context: click.Context, server: Server, asked: Asked, timeout: float | None, ticket: Path) -> str:
    lines = context.obj.lines
    asks = is_asked_for(stdin_is_payload=asked.from_stdin, as_json=lines is not None)
    async with calling(server, timeout, lines) as (client, progress):
        async with parting(context, client, server, progress, TicketFile(ticket), None, asks=asks):
            job = await hand_over(client, server, asked, ticket, progress, lines)
        progress.close()
        progress.sum_up()
        progress.say(f"the server has it: {come_back(str(ticket) + repeat_server(context))}")
        return job.id
