"""`aipod call METHOD [FILE|-]`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from aipod.cli import Flags, end_on_signals, run_async
from aipod.cli.answer import STDOUT, calling, check_output, deliver, shows_json_only
from aipod.cli.help import Command
from aipod.cli.leaving import STOPPED, parting
from aipod.cli.lines import Lines, json_option
from aipod.cli.options import Server, output_option, server_options, take_server, timeout_option
from aipod.cli.progress import Progress
from aipod.cli.question import is_asked_for
from aipod.cli.request import Asked, request_options, take_request
from aipod.cli.ticket import HeldTicket, check_ticket_file, telling, ticket_option
from aipod.client import Client, Event, Job
from aipod.client.prepare import named
from aipod.client.sink import make_durable
from aipod.client.ticket import TicketFile
from aipod.errors import AipodError, JobFailed

# Seconds for telling the server that its answer is here.
RELEASE = 2.0


@click.command(cls=Command)
@request_options
@timeout_option("Time for the whole call, as 90, 1.5min or 2h.")
@output_option
@ticket_option("Keep in FILE what the same command needs to continue.", required=False)
@json_option
@server_options("level")
@click.pass_context
def call(
    context: click.Context, /, timeout: float | None, output: Path | None, ticket: Path | None, **options: Any
) -> None:
    """Call a method with a file (- is stdin) and write its answer.

    \b
    aipod call predict scan.nii -k top=3
    aipod call train big.csv --ticket job.ticket -o model.bin

    A JSON answer is one line on stdout; bytes go to -o or a pipe.

    Ctrl-C asks on a terminal whether to leave the job running, and tells how to come back; else it cancels the job.
    With --ticket it goes on, also after --timeout and a kill: the same command continues the upload, the wait or the
    download, and removes FILE in the end. FILE is as secret as the job. What comes on stdin must come again while its
    upload is not complete, the same bytes.
    """
    end_on_signals()
    lines = context.obj.lines
    check_output(output, lines)
    asked = take_request(options)
    server = take_server(options)
    if ticket is None:
        run_async(_call(context, server, asked, timeout, output))
        return
    check_ticket_file(ticket, from_stdin=asked.from_stdin)
    with telling(context, str(ticket)):
        run_async(_call_with_ticket(context, server, asked, timeout, output, ticket))


async def _call(
    context: click.Context, server: Server, asked: Asked, timeout: float | None, output: Path | None
) -> None:
    flags: Flags = context.obj
    rpc, metadata = named(asked.method, server.metadata, server.config)
    asks = is_asked_for(stdin_is_payload=asked.from_stdin, as_json=flags.lines is not None)
    # Elsewhere nobody could use the ticket: the job ends with this command, which needs no more than one call then.
    held = HeldTicket() if asks or shows_json_only(output, flags.lines) else None
    async with calling(server, lines=flags.lines) as (client, progress):
        method = getattr(client, rpc)

        async def ask(save_to: Path | None, on_event: Callable[[Event], None]) -> Any:
            def heard(event: Event) -> None:
                on_event(event)
                if progress.heard and held is None:  # before, there may be no job, nor a server
                    flags.left = STOPPED

            return await method(
                asked.payload,
                version=asked.version,
                metadata=metadata,
                timeout=timeout,
                save_to=save_to,
                on_event=heard,
                ticket_file=held,
                kwargs=asked.kwargs,
            )

        async with parting(context, client, server, progress, held, output, asks=asks):
            await deliver(ask, progress, output, flags.lines)


async def _call_with_ticket(
    context: click.Context, server: Server, asked: Asked, timeout: float | None, output: Path | None, ticket: Path
) -> None:
    """The job is let go of when its answer is written, not when it has arrived: a pipe may break."""
    file, job, lines = TicketFile(ticket), None, context.obj.lines
    asks = is_asked_for(stdin_is_payload=asked.from_stdin, as_json=lines is not None)
    async with calling(server, timeout, lines) as (client, progress):

        async def ask(save_to: Path | None, on_event: Callable[[Event], None]) -> Any:
            nonlocal job
            job = await hand_over(client, server, asked, ticket, progress, lines)
            try:
                return await job.wait(save_to=save_to, on_event=on_event, keep=True)
            except JobFailed:
                await asyncio.to_thread(file.remove, job.ticket)  # asked again it would say the same
                raise

        async with parting(context, client, server, progress, file, output, asks=asks):
            await deliver(ask, progress, output, lines)
            if output is not None and output not in STDOUT:
                await asyncio.to_thread(make_durable, output)
        assert job is not None
        await asyncio.to_thread(file.remove, job.ticket)
        with contextlib.suppress(AipodError, TimeoutError):  # the server forgets it by itself, later
            async with asyncio.timeout(RELEASE):
                await job.release()


async def hand_over(
    client: Client, server: Server, asked: Asked, ticket: Path, progress: Progress, lines: Lines | None
) -> Job:
    """Submit the job, or continue the one of the ticket file. This is an asyncio-flavored function."""

    def show(event: Event) -> None:
        event = dataclasses.replace(event, log="")  # whoever waits is told all of it
        progress.show(event)
        if lines is not None:
            lines.event(event)

    return await client.submit(
        asked.method,
        asked.payload,
        version=asked.version,
        metadata=server.metadata,
        on_event=show,
        ticket_file=ticket,
        kwargs=asked.kwargs,
    )
