"""`aipod token`."""

from __future__ import annotations

from pathlib import Path

import click

from aipod.cli import end_on_signals
from aipod.identity import add_token


@click.command(short_help="Make a token for a caller.")
@click.argument("name")
@click.option(
    "--tokens",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    envvar="AIPOD_TOKENS",
    help="The file of `serve --tokens`; it is made where there is none.",
)
@click.option("--method", "methods", multiple=True, help="A method that the caller may use [all]; may be repeated.")
@click.option("--version", "versions", multiple=True, help="A version that it may use [all]; may be repeated.")
def token(name: str, tokens: Path, methods: tuple[str, ...], versions: tuple[str, ...]) -> None:
    """Make a token for the caller NAME, write its hash into the file, and the token itself to stdout.

    A server that has the file knows it within a second. The token is nowhere else: give it to the caller, who calls
    with --token-file FILE or AIPOD_TOKEN. To take it back, delete the caller's table from the file.
    """
    end_on_signals()
    click.echo(add_token(tokens, name, methods, versions))
