"""What `call` and `submit` hand over: a method, its keyword arguments, and a payload that may come on stdin."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import select
import stat
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import click

from aipod.cli.completion import complete_file, complete_method
from aipod.cli.options import split_pair
from aipod.config import CHUNK


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked for. `payload` is one of `aipod.Client`'s, `version` may be empty."""

    method: str
    payload: Any
    kwargs: dict[str, Any]
    version: str
    from_stdin: bool


def request_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds METHOD, FILE and what goes with them; see `take_request`."""
    for add in (
        click.option("--version", default="", envvar="AIPOD_VERSION", help="Version of the model."),
        click.option(
            "-k", "kwargs", multiple=True, metavar="NAME=JSON", help="A keyword argument; what is no JSON is a string."
        ),
        click.argument("file", required=False, metavar="[FILE|-]", shell_complete=complete_file),
        click.argument("method", shell_complete=complete_method),
    ):
        function = add(function)
    return function


def take_request(options: dict[str, Any]) -> Asked:
    """Take what `request_options` added out of `options`. Raises click.UsageError."""
    file = options.pop("file")
    payload: Any = b"" if file is None else _stdin() if file == "-" else Path(file)
    if file is None and _stdin_has_data():
        click.echo("aipod: note: what is on stdin is not sent; give - as FILE to send it", err=True)
    pairs = (split_pair(pair, "-k") for pair in options.pop("kwargs"))
    kwargs = {name: _json_or_text(text) for name, text in pairs}
    return Asked(options.pop("method"), payload, kwargs, options.pop("version"), file == "-")


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _stdin_has_data() -> bool:
    """Whether there is something in the pipe or file that is stdin."""
    try:
        status = os.fstat(0)
        if stat.S_ISREG(status.st_mode):
            return os.lseek(0, 0, os.SEEK_CUR) < status.st_size
        if stat.S_ISFIFO(status.st_mode):
            poll = select.poll()
            poll.register(0, select.POLLIN)
            return any(event & select.POLLIN for _, event in poll.poll(0))
    except OSError:  # it is closed
        pass
    return False


async def _stdin() -> AsyncIterator[bytes]:
    """What comes on stdin. This is an asyncio-flavored generator."""
    loop = asyncio.get_running_loop()
    while True:
        arrived: asyncio.Future[bytes] = loop.create_future()
        # Nobody waits for this thread, unlike for asyncio.to_thread's: Ctrl-C ends a call whose input never comes.
        threading.Thread(target=_read_stdin, args=(loop, arrived), daemon=True).start()
        if not (piece := await arrived):
            return
        yield piece


def _read_stdin(loop: asyncio.AbstractEventLoop, arrived: asyncio.Future[bytes]) -> None:
    def settle() -> None:
        if arrived.cancelled():
            return
        arrived.set_result(data) if isinstance(data, bytes) else arrived.set_exception(data)

    data: bytes | OSError
    try:
        data = os.read(0, CHUNK)
    except OSError as exc:
        data = exc
    with contextlib.suppress(RuntimeError):  # the loop has gone
        loop.call_soon_threadsafe(settle)
