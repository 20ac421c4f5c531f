"""`aipod call METHOD [FILE|-]`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import stat
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import click

from aipod.cli import end_on_signals
from aipod.cli.options import Seconds, config_options, make_config
from aipod.cli.progress import Progress
from aipod.client import Event
from aipod.config import CHUNK, MIB, Config
from aipod.errors import AipodError

RPCS = ("train", "predict", "log")
# Where -o may point and still mean what the shell has opened: opened anew, a file would be written from its start.
STDOUT = (None, Path("-"), Path("/dev/stdout"))


@click.command(short_help="Call a method with a file and write its answer.")
@click.argument("method")
@click.argument("file", required=False, metavar="[FILE|-]")
@click.option("--to", default="127.0.0.1:50051", envvar="AIPOD_TO", show_default=True, help="HOST:PORT or unix:PATH.")
@click.option(
    "-k", "kwargs", multiple=True, metavar="NAME=JSON", help="A keyword argument; what is no JSON is a string."
)
@click.option("--version", default="", envvar="AIPOD_VERSION", help="Version of the model.")
@click.option(
    "--upstream", default="", envvar="AIPOD_UPSTREAM", help="Which servers, for a proxy that asks (header x-upstream)."
)
@click.option("--meta", multiple=True, metavar="K=V", envvar="AIPOD_META", help="Call metadata.")
@click.option("--timeout", type=Seconds(), envvar="AIPOD_TIMEOUT", help="Time for the whole call.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    envvar="AIPOD_OUTPUT",
    help="Write the answer to this file; - is stdout.",
)
@config_options(("tls", "tls_ca", "tls_cert", "tls_key", "silence", "connect_timeout", "attempts", "level"))
def call(
    method: str,
    file: str | None,
    to: str,
    kwargs: tuple[str, ...],
    version: str,
    upstream: str,
    meta: tuple[str, ...],
    timeout: float | None,
    output: Path | None,
    **options: Any,
) -> None:
    """Call a method with a file (- is stdin) and write its answer.

    A JSON answer is one line on stdout; bytes go to -o or a pipe.
    """
    config = make_config(options)
    end_on_signals()
    metadata = [_split(pair, "--meta") for pair in meta]
    if upstream:
        metadata.append(("x-upstream", upstream))
    if method not in RPCS:
        metadata.append(("x-func-name", method))
    arguments = {
        "kwargs": {name: _json_or_text(text) for name, text in (_split(pair, "-k") for pair in kwargs)},
        "version": version,
        "metadata": metadata,
        "timeout": timeout,
    }
    payload: Any = b"" if file is None else _stdin() if file == "-" else Path(file)
    if file is None and _stdin_has_data():
        click.echo("aipod: note: what is on stdin is not sent; give - as FILE to send it", err=True)
    to_stdout = _to_terminal if sys.stdout.isatty() else _to_pipe
    deliver: Callable[..., Any] = to_stdout if output in STDOUT else _to_file
    asyncio.run(_call(to, config, method if method in RPCS else "chaos", payload, arguments, deliver, output))


def _split(pair: str, option: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals or not name:
        raise click.UsageError(f"{option} {pair!r} is not NAME=VALUE")
    return name, value


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


async def _call(
    to: str,
    config: Config,
    rpc: str,
    payload: Any,
    arguments: dict[str, Any],
    deliver: Callable[..., Any],
    output: Path | None,
) -> None:
    from aipod.client import Client

    with Progress(sys.stderr) as progress:
        async with Client(to, config=config) as client:

            async def ask(save_to: Path | None, on_event: Callable[[Event], None] = progress.show) -> Any:
                answer = await getattr(client, rpc)(payload, save_to=save_to, on_event=on_event, **arguments)
                progress.close()
                return answer

            await deliver(ask, progress, output)


async def _to_file(ask: Callable[..., Any], progress: Progress, output: Path) -> None:
    await ask(output)
    progress.say(f"wrote {output}")


async def _to_terminal(ask: Callable[..., Any], progress: Progress, _: None) -> None:
    def show(event: Event) -> None:
        progress.show(event)
        if event.phase == "DONE" and not progress.is_json:
            # Nothing tells before the run; but what a terminal cannot show need not come.
            text = (
                f"the method has run, but its answer, {event.answer_size} bytes, is nothing for a terminal and is lost"
            )
            raise AipodError("NOT_SHOWN", f"{text}; call again with -o FILE, or with a pipe, to have it")

    answer = await ask(None, show)
    click.echo(json.dumps(answer, ensure_ascii=False))


async def _to_pipe(ask: Callable[..., Any], progress: Progress, _: None) -> None:
    """The answer may be of any size and of either kind: it goes through a file, and out once it is checked."""
    with tempfile.TemporaryDirectory(prefix="aipod-") as directory:
        out = sys.stdout.buffer
        with (await ask(Path(directory) / "answer")).open("rb") as file:
            while piece := file.read(MIB):
                out.write(piece)
        if progress.is_json:
            out.write(os.linesep.encode())
        out.flush()


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
