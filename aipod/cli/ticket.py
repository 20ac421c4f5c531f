"""Ticket files on the command line: how one is named, read, and told of to a person.

A ticket owns its job, and what is on a command line everybody on the machine can read: it comes in a file or on stdin.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from aipod.cli.completion import complete_file
from aipod.cli.options import repeat_server
from aipod.client.ticket import Saved, TicketFile, parse_ticket
from aipod.codec import TICKET_MAX, job_id
from aipod.errors import AipodError, JobLost, UsageError

# A ticket of 16 bytes or more in hexadecimal, or a job's id, which is as long.
_HEX = re.compile(r"[0-9a-fA-F]{32,}\Z")

ticket_argument = click.argument("ticket", metavar="TICKET-FILE|-", shell_complete=complete_file)


def ticket_option(help: str, *, required: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--ticket FILE."""
    path = click.Path(dir_okay=False, path_type=Path)
    return click.option("--ticket", type=path, envvar="AIPOD_TICKET", metavar="FILE", required=required, help=help)


def check_ticket_file(file: Path, *, from_stdin: bool) -> None:
    """Raises `UsageError` where it could not be written: better now than in the middle of an upload.

    `from_stdin`: the payload comes from there, where nothing but its bytes tells it from another one.
    """
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"{str(file.parent)!r} is no directory that can be written to; the ticket file was to go there"
        )
    saved = TicketFile(file).load()
    if from_stdin and saved is not None and saved.sent is not None:
        text = "the payload's end was sent before: what is on stdin is not looked at if the server has all of it"
        click.echo(f"aipod: note: {text}", err=True)


class HeldTicket(TicketFile):
    """The ticket file of a job that was not asked to have one: in memory, until it is written because it is needed."""

    def __init__(self) -> None:
        super().__init__("")
        self._saved: Saved | None = None

    def load(self) -> Saved | None:
        return self._saved

    def create(self, saved: Saved) -> Saved:
        self._saved = self._saved or saved
        return self._saved

    def save(self, saved: Saved) -> None:
        self._saved = saved

    def remove(self, ticket: bytes) -> None:
        self._saved = None

    def write(self) -> Path:
        """Write it into the working directory, or where that may not be written to, into the one of temporary files.

        Raises OSError.
        """
        assert self._saved is not None
        name = f"aipod-{job_id(self._saved.ticket)[:12]}.ticket"
        here = os.access(".", os.W_OK | os.X_OK)
        path = Path(name) if here else Path(tempfile.gettempdir()) / name
        TicketFile(path).create(self._saved)
        return path


@contextlib.contextmanager
def telling(context: click.Context, name: str) -> Iterator[None]:
    """Have the command's last line say what becomes of a job that the body leaves.

    `name` is what `read_ticket` takes.
    """
    try:
        yield
    except BaseException as exc:
        lost, unshown = isinstance(exc, JobLost), isinstance(exc, AipodError) and exc.reason == "NOT_SHOWN"
        context.obj.left = context.obj.left or what_is_left(context, name, lost=lost, unshown=unshown)
        raise


def read_ticket(name: str) -> bytes:
    """The ticket in the ticket file `name`, or in hexadecimal on stdin for -. Raises `UsageError`."""
    if name == "-":
        try:
            return parse_ticket(sys.stdin.buffer.read(4 * TICKET_MAX).decode("ascii", "replace").strip())
        except UsageError:
            raise UsageError("what is on stdin is no ticket; give 32 or more hexadecimal digits") from None
    saved = TicketFile(name).load()
    if saved is not None:
        return saved.ticket
    if _HEX.match(name):
        raise UsageError(
            "a ticket does not belong on a command line, where everybody can read it: give it on stdin, with - as "
            "TICKET-FILE; a job's id is no ticket"
        )
    raise UsageError(
        f"there is no ticket file {name!r}: submit and call --ticket write one; it goes with its job's end"
    )


def what_is_left(
    context: click.Context, name: str, *, new: bool = False, lost: bool = False, unshown: bool = False
) -> str:
    """What becomes of the job, and how to come back to it; nothing where there is none.

    `name` is what `read_ticket` takes. `new`: the command was not given it. `lost`: the job is out of sight. `unshown`:
    its answer had nowhere to go.
    """
    try:
        saved = None if name == "-" else TicketFile(name).load()
    except (UsageError, OSError):
        return ""
    if saved is None and name != "-":
        return ""
    options = shlex.quote(name) + repeat_server(context)
    attach = f"`aipod attach {options}`"
    if unshown:
        return f"; it is kept: `aipod attach {options} -o FILE` writes it to a file"
    if lost:
        return "" if context.info_name == "attach" else f"; {attach} looks for it again"
    same = f"the same command with --ticket {shlex.quote(name)}" if new else "the same command"
    if saved is not None and saved.sent is None:
        return (
            f"; the server keeps what has arrived: {same} goes on with the upload, `aipod cancel {options}` gives it up"
        )
    again = attach if new else same if context.info_name == "attach" else f"{same} or {attach}"
    return (
        f"; the server goes on with the job for its grace time and keeps the answer: {again} comes back to it, "
        f"`aipod cancel {options}` stops it"
    )


def come_back(options: str) -> str:
    """How to come back to a job whose ticket file, and server, `options` name."""
    return f"`aipod attach {options}` watches it and gives its answer"
