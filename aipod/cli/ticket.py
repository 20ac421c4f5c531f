"""Ticket files on the command line: how one is named, read, and told of to a person.

A ticket owns its job, and what is on a command line everybody on the machine can read: it comes in a file or on stdin.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from aipod.cli.options import repeat_server
from aipod.client.ticket import TicketFile, parse_ticket
from aipod.codec import TICKET_MAX
from aipod.errors import UsageError

# A ticket of 16 bytes or more in hexadecimal, or a job's id, which is as long.
_HEX = re.compile(r"[0-9a-fA-F]{32,}\Z")

ticket_argument = click.argument("ticket", metavar="TICKET-FILE|-")


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


@contextlib.contextmanager
def telling(context: click.Context, name: str) -> Iterator[None]:
    """Have the command's last line say what becomes of a job that the body leaves.

    `name` is what `read_ticket` takes.
    """
    try:
        yield
    finally:
        context.obj.left = _what_is_left(context, name)


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
    raise UsageError(f"there is no ticket file {name!r}; it goes once the answer was had, and with cancel")


def _what_is_left(context: click.Context, name: str) -> str:
    """What becomes of the job, and how to come back to it; nothing where there is none."""
    try:
        saved = None if name == "-" else TicketFile(name).load()
    except (UsageError, OSError):
        return ""
    if saved is None and name != "-":
        return ""
    options = shlex.quote(name) + repeat_server(context)
    if saved is not None and saved.sent is None:
        return (
            "; the server keeps what has arrived: the same command goes on with the upload, "
            f"`aipod cancel {options}` gives it up"
        )
    again = "the same command" if context.info_name == "attach" else f"the same command or `aipod attach {options}`"
    return (
        "; the server goes on with the job for its grace time and keeps the answer: "
        f"{again} comes back to it, `aipod cancel {options}` stops it"
    )
