"""`aipod doctor HOST:PORT`."""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import click

from aipod.cli import OK, end_on_signals, plain, run_async
from aipod.cli.help import Command
from aipod.cli.lines import in_json
from aipod.cli.options import (
    CONNECTION,
    Seconds,
    config_options,
    meta_option,
    take_server,
    to_option,
    token_option,
    upstream_option,
)
from aipod.cli.progress import can_draw
from aipod.config import SECONDS
from aipod.doctor import Chain, Finding, Level, examine
from aipod.doctor.finding import is_well, worst_first
from aipod.transport.channel import split_target

# Longer than aipod's client is patient (15 s) and than Envoy's default for a whole call.
WAIT = 20 * SECONDS
QUICK = 4 * SECONDS
# A server gives up a peer that takes nothing after two minutes, by itself.
MOST = 110 * SECONDS

_WORDS = {Level.BROKEN: "BROKEN", Level.CHANGE: "CHANGE", Level.NOTE: "note", Level.FINE: "ok", Level.UNCHECKED: "?"}


@click.command(cls=Command)
@click.argument("target", metavar="[HOST:PORT]", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--quick", is_flag=True, help=f"As --wait {QUICK:g}s.")
@click.option("--wait", type=Seconds(), envvar="AIPOD_WAIT", help=f"Time to watch silent calls for [{WAIT:g}s].")
@to_option
@upstream_option
@token_option
@meta_option
@config_options(("tls", "tls_ca", "tls_cert", "tls_key", "connect_timeout"), text="client", section=CONNECTION)
@click.pass_context
def doctor(
    context: click.Context, /, target: str | None, as_json: bool, quick: bool, wait: float | None, **options: Any
) -> None:
    """Look at what is between here and a server, and say which directive to change.

    Measured are: limits of payloads, headers and errors; what cuts a silent call or connection, each way; round trips
    and rates, and whether windows bound them; what becomes of calls when a connection is told to go. No job begins.
    A silence that is not cut within --wait is well: a job's heartbeats come every second. With --wait 80s also nginx's
    default of 75 s is seen.

    Exit status: 0 all is well, 1 something is to be changed, 2 wrong usage, 3 nobody answers.
    """
    end_on_signals()
    if target is not None:
        options["to"] = target
    if quick and wait is not None:
        raise click.UsageError("--quick and --wait say the same thing; give one")
    wait = QUICK if quick else WAIT if wait is None else wait
    if not 1 <= wait <= MOST:
        raise click.UsageError(f"--wait must be between 1s and {MOST:g}s")
    server = take_server(options)
    try:
        split_target(server.to)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from None
    found: list[Finding] = []
    whole = False
    try:
        with _progress(wait) as tell:
            run_async(examine(Chain(server.to, server.config, server.metadata), wait, found, tell))
        whole = True
    finally:
        if found:
            _print(server.to, worst_first(found), whole=whole, as_json=as_json)
    context.exit(OK if is_well(found) else 1)


@contextlib.contextmanager
def _progress(wait: float) -> Iterator[Any]:
    """A live line on a terminal; nothing elsewhere."""
    if not can_draw(sys.stderr):
        yield lambda done, of: None
        return
    from aipod.cli.bar import Bar

    bar = Bar(sys.stderr)
    bar.start()
    try:
        detail = f"checks; silence is watched for {wait:g} s"
        yield lambda done, of: bar.update("examine", done, of, f"{done} of {of} {detail}", refresh=True)
    finally:
        bar.stop()


def _print(to: str, found: list[Finding], *, whole: bool, as_json: bool) -> None:
    if as_json:
        told = {"to": to, "well": is_well(found), "whole": whole, "findings": [one.as_dict() for one in found]}
        click.echo(in_json(told))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    names = max(len(finding.what) for finding in found)
    for finding in found:
        start = f"{_WORDS[finding.level]:6}  {finding.what:{names}}  "
        lines = [finding.found]
        if finding.level <= Level.NOTE:
            lines += [
                f"{where}: {what}" for where, what in (("nginx", finding.nginx), ("elsewhere", finding.others)) if what
            ]
        for line in lines:
            for piece in textwrap.wrap(line, max(30, width - len(start))) or [""]:
                click.echo(plain(start + piece).rstrip())
                start = " " * len(start)
    if not whole:
        click.echo("(this is not all: it was ended before everything was checked)")
