"""What becomes of a job whose command ends before it has the answer, and what its last line says of that."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import click

from aipod.cli import Flags
from aipod.cli.options import Server
from aipod.cli.progress import Progress
from aipod.cli.question import CANCEL, LEAVE, Question
from aipod.cli.ticket import HeldTicket, what_is_left
from aipod.client import Client
from aipod.client.part import Part
from aipod.client.ticket import TicketFile
from aipod.codec import job_id
from aipod.errors import AipodError, JobLost

# Seconds for telling the server.
STOP = 2.0
STOPPED = "; the job was asked to stop"
UNTOLD = "; no server has said that it stopped the job: it ends when nobody has watched it for the server's --grace"


@contextlib.asynccontextmanager
async def parting(
    context: click.Context,
    client: Client,
    server: Server,
    progress: Progress,
    file: TicketFile | None,
    output: Path | None,
    *,
    asks: bool,
) -> AsyncIterator[None]:
    """Where the body ends early, cancel its job or leave it, as the person says who has pressed Ctrl-C (`asks`).

    Without a word of that person's a job with a ticket file goes on, and one with a `HeldTicket` is cancelled; but
    where it is lost, or has an answer that cannot be shown, the ticket is written. None: the client ends it itself.

    This is an asyncio-flavored context manager; cancelled, it takes `STOP` seconds at most. Raises what the body does.
    """
    flags: Flags = context.obj
    held = file if isinstance(file, HeldTicket) else None
    again = LEAVE if held is None else CANCEL
    try:
        with Question(flags, progress, again) if asks else contextlib.nullcontext():
            yield
    except BaseException as exc:
        saved = None if file is None else file.load()
        if file is None or saved is None or not progress.heard:
            raise
        lost, unshown = isinstance(exc, JobLost), isinstance(exc, AipodError) and exc.reason == "NOT_SHOWN"
        if flags.choice == CANCEL or (held is not None and flags.choice != LEAVE and not (lost or unshown)):
            flags.left = await _stop(client, server, saved.ticket, has_ended=progress.phase == "DONE")
            if flags.left == STOPPED:
                await asyncio.to_thread(file.remove, saved.ticket)
            if output is not None:
                await asyncio.to_thread(_drop_part, output, saved.ticket)
        elif held is not None:
            path = await asyncio.to_thread(held.write)
            flags.left = what_is_left(context, str(path), new=True, lost=lost, unshown=unshown)
        raise


async def _stop(client: Client, server: Server, ticket: bytes, *, has_ended: bool) -> str:
    """Tell the server; what the last line says of it."""
    job = client.attach(ticket, metadata=server.metadata)
    with contextlib.suppress(AipodError, TimeoutError):
        async with asyncio.timeout(STOP):
            await (job.release() if has_ended else job.cancel())
            return STOPPED
    return UNTOLD


def _drop_part(output: Path, ticket: bytes) -> None:
    """What has arrived of the answer is of no use to anybody."""
    part = Part(output, job_id(ticket))
    with contextlib.suppress(OSError):
        part.find(read=False)
        part.remove()
