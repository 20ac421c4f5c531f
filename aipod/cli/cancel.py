"""`aipod cancel TICKET-FILE`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import Any

import click

from aipod.cli import end_on_signals, run_async
from aipod.cli.answer import calling
from aipod.cli.help import Command
from aipod.cli.options import Server, server_options, take_server, timeout_option
from aipod.cli.progress import Progress
from aipod.cli.ticket import read_ticket, ticket_argument
from aipod.client import Job
from aipod.client.ticket import TicketFile

# What a job is that was stopped before it had an answer; its ticket is good for nothing more.
WITHOUT_ANSWER = ("FAILED", "CANCELLED", "RELEASED")


@click.command(cls=Command)
@ticket_argument
@click.option("--release", is_flag=True, help="Have the server forget the answer as well.")
@timeout_option("Time for the job's end.", 60.0)
@server_options()
def cancel(ticket: str, release: bool, timeout: float, **options: Any) -> None:
    """Stop a job and print what it is now: CANCELLED, or DONE or FAILED where it had ended before.

    With - the ticket comes on stdin, in hexadecimal. An answer that there is stays, and so does TICKET-FILE; it is
    removed where there is none, and with --release.
    """
    end_on_signals()
    server = take_server(options)
    owned = read_ticket(ticket)
    phase = run_async(_cancel(server, owned, release, timeout))
    click.echo(phase)
    if phase in WITHOUT_ANSWER and ticket != "-":
        TicketFile(ticket).remove(owned)
    if phase == "DONE":
        click.echo("aipod: note: it had ended before; attach gives its answer, --release forgets it", err=True)
    elif phase not in WITHOUT_ANSWER:
        click.echo("aipod: note: it was asked to stop and has not yet; the same command looks again", err=True)


async def _cancel(server: Server, ticket: bytes, release: bool, seconds: float) -> str:
    async with calling(server) as (client, progress):
        job = client.attach(ticket, metadata=server.metadata)
        await (job.release() if release else job.cancel())
        return await _end_of(job, progress, seconds)


async def _end_of(job: Job, progress: Progress, seconds: float) -> str:
    """The phase in which the job has ended, or the last one within so many seconds."""
    phase = "UNKNOWN"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), contextlib.aclosing(job.events()) as events:
            async for event in events:
                progress.show(dataclasses.replace(event, log=""))  # who cancels does not want its log
                phase = event.phase
    return phase
