"""`aipod call METHOD [FILE|-]`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from aipod.cli.options import config_options, make_config
from aipod.cli.progress import Progress
from aipod.config import Config

RPCS = ("train", "predict", "log")


@click.command()
@click.argument("method")
@click.argument("file", required=False, metavar="[FILE|-]")
@click.option("--to", default="127.0.0.1:50051", envvar="AIPOD_TO", show_default=True, help="HOST:PORT or unix:PATH.")
@click.option(
    "-k", "kwargs", multiple=True, metavar="NAME=JSON", help="A keyword argument; what is no JSON is a string."
)
@click.option("--version", "version", default="", help="Version of the model.")
@click.option("--upstream", default="", help="Which servers, for a proxy that asks (header x-upstream).")
@click.option("--meta", multiple=True, metavar="K=V", help="Call metadata.")
@click.option("--timeout", type=float, help="Seconds for the whole call.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the answer to this file.")
@config_options(("silence", "connect_timeout", "attempts", "level"))
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
    config_file: Path | None,
    **options: Any,
) -> None:
    """Call a method with a file (- is stdin) and write its answer.

    A JSON answer is one line on stdout; bytes go to -o or a pipe.
    """
    config = make_config(config_file, options)
    metadata = [_split(pair, "--meta") for pair in meta]
    if upstream:
        metadata.append(("x-upstream", upstream))
    if method not in RPCS:
        metadata.append(("x-func-name", method))
    named = {name: _json_or_text(text) for name, text in (_split(pair, "-k") for pair in kwargs)}
    output_kind = "file" if output is not None else "terminal" if sys.stdout.isatty() else "pipe"
    asyncio.run(_call(to, config, method, file, named, version, metadata, timeout, output, output_kind))


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
    method: str,
    file: str | None,
    kwargs: dict[str, Any],
    version: str,
    metadata: list[tuple[str, str]],
    timeout: float | None,
    output: Path | None,
    output_kind: str,
) -> None:
    from aipod.client import Client

    payload: Any = b"" if file is None else sys.stdin.buffer if file == "-" else Path(file)
    with Progress(sys.stderr) as progress:
        async with Client(to, config=config) as client:
            call = getattr(client, method if method in RPCS else "chaos")
            common = {"version": version, "metadata": metadata, "timeout": timeout, "kwargs": kwargs}
            if output_kind == "pipe":
                # The answer may be of any size and of either kind: it goes through a file.
                with tempfile.TemporaryDirectory(prefix="aipod-") as directory:
                    saved = Path(directory) / "answer"
                    await call(payload, save_to=saved, on_event=progress.show, **common)
                    progress.close()
                    _pour(saved, json_line=progress.is_json)
                return
            answer = await call(payload, save_to=output, on_event=progress.show, **common)
    if output_kind == "file":
        click.echo(f"wrote {answer}", err=True)
    elif isinstance(answer, bytes):
        raise click.UsageError(f"the answer is {len(answer)} bytes; write it to a file with -o, or to a pipe")
    else:
        click.echo(json.dumps(answer, ensure_ascii=False))


def _pour(saved: Path, *, json_line: bool) -> None:
    out = sys.stdout.buffer
    with saved.open("rb") as file:
        while piece := file.read(1 << 20):
            out.write(piece)
    if json_line:
        out.write(os.linesep.encode())
    out.flush()
