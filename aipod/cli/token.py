"""`aipod token`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from aipod.cli import end_on_signals
from aipod.identity import add_token


@click.command()
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
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the token to this file, which must be new; only you may read it. [stdout]",
)
def token(name: str, tokens: Path, methods: tuple[str, ...], versions: tuple[str, ...], output: Path | None) -> None:
    """Make a token for the caller NAME, write its hash into the file, and the token itself to -o or stdout.

    A server that has the file knows it within a second. The token is nowhere else: give it to the caller, who calls
    with --token-file FILE or AIPOD_TOKEN. To take it back, delete the caller's table from the file.
    """
    end_on_signals()
    if output is None:
        click.echo(add_token(tokens, name, methods, versions))
        return
    # Before: a token that could be written nowhere would be known to the server alone.
    with os.fdopen(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        try:
            file.write(add_token(tokens, name, methods, versions) + "\n")
        except BaseException:
            output.unlink()
            raise
