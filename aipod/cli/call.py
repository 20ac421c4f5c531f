"""`aipod call METHOD [FILE|-]`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from aipod.cli import Flags, end_on_signals, run_async
from aipod.cli.answer import STDOUT, deliver, limited
from aipod.cli.options import Server, output_option, server_options, take_server, timeout_option
from aipod.cli.progress import Progress
from aipod.cli.request import Asked, request_options, take_request
from aipod.cli.ticket import check_ticket_file, telling, ticket_option
from aipod.client import Client, Event, Job
from aipod.client.sink import make_durable
from aipod.client.ticket import TicketFile
from aipod.errors import AipodError, JobFailed

RPCS = ("train", "predict", "log")
# Seconds for telling the server that its answer is here.
RELEASE = 2.0


@click.command(short_help="Call a method with a file and write its answer.")
@request_options
@timeout_option("Time for the whole call.")
@output_option
@ticket_option("Keep in FILE what the same command needs to continue the job.", required=False)
@server_options("level")
@click.pass_context
def call(
    context: click.Context, /, timeout: float | None, output: Path | None, ticket: Path | None, **options: Any
) -> None:
    """Call a method with a file (- is stdin) and write its answer.

    A JSON answer is one line on stdout; bytes go to -o or a pipe.

    Ctrl-C cancels the job. With --ticket it goes on, also after --timeout and when this command is killed: the same
    command continues the upload, the wait or the download, until it has written the answer, or the error that the job
    has ended with, and removes FILE. FILE is as secret as the job. What comes on stdin must come again while its upload
    is not complete, the same bytes.
    """
    end_on_signals()
    asked = take_request(options)
    server = take_server(options)
    if ticket is None:
        run_async(_call(server, asked, timeout, output, context.obj))
        return
    check_ticket_file(ticket, from_stdin=asked.from_stdin)
    with telling(context, str(ticket)):
        run_async(_call_with_ticket(server, asked, timeout, output, ticket))


async def _call(server: Server, asked: Asked, timeout: float | None, output: Path | None, flags: Flags) -> None:
    metadata = list(server.metadata)
    if asked.method not in RPCS:
        metadata.append(("x-func-name", asked.method))
    with Progress(sys.stderr) as progress:
        async with Client(server.to, config=server.config) as client:
            method = getattr(client, asked.method if asked.method in RPCS else "chaos")

            async def ask(save_to: Path | None, on_event: Callable[[Event], None]) -> Any:
                def heard(event: Event) -> None:
                    if event.phase not in ("CONNECTING", "WAITING"):  # before, there may be no job, nor a server
                        flags.left = "; the job was asked to stop"
                    on_event(event)

                return await method(
                    asked.payload,
                    version=asked.version,
                    metadata=metadata,
                    timeout=timeout,
                    save_to=save_to,
                    on_event=heard,
                    kwargs=asked.kwargs,
                )

            await deliver(ask, progress, output)


async def _call_with_ticket(
    server: Server, asked: Asked, timeout: float | None, output: Path | None, ticket: Path
) -> None:
    """The job is let go of when its answer is written, not when it has arrived: a pipe may break."""
    file, job = TicketFile(ticket), None
    with Progress(sys.stderr) as progress:
        async with Client(server.to, config=server.config) as client:

            async def ask(save_to: Path | None, on_event: Callable[[Event], None]) -> Any:
                nonlocal job
                job = await hand_over(client, server, asked, ticket, progress)
                try:
                    return await job.wait(save_to=save_to, on_event=on_event, keep=True)
                except JobFailed:
                    await asyncio.to_thread(file.remove, job.ticket)  # asked again it would say the same
                    raise

            async with limited(timeout):
                await deliver(ask, progress, output, kept=True)
                if output is not None and output not in STDOUT:
                    await asyncio.to_thread(make_durable, output)
            assert job is not None
            await asyncio.to_thread(file.remove, job.ticket)
            with contextlib.suppress(AipodError, TimeoutError):  # the server forgets it by itself, later
                async with asyncio.timeout(RELEASE):
                    await job.release()


async def hand_over(client: Client, server: Server, asked: Asked, ticket: Path, progress: Progress) -> Job:
    """Submit the job, or continue the one of the ticket file. This is an asyncio-flavored function."""

    def show(event: Event) -> None:
        progress.show(dataclasses.replace(event, log=""))  # whoever waits is told all of it

    return await client.submit(
        asked.method,
        asked.payload,
        version=asked.version,
        metadata=server.metadata,
        on_event=show,
        ticket_file=ticket,
        kwargs=asked.kwargs,
    )
