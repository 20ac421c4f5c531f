"""`aipod methods`."""

from __future__ import annotations

from typing import Any

import click

from aipod.cli import end_on_signals, plain, run_async
from aipod.cli.answer import calling
from aipod.cli.help import Command
from aipod.cli.lines import in_json
from aipod.cli.options import Server, server_options, take_server, timeout_option


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@timeout_option("Time for the answer.", 30.0)
@server_options()
def methods(as_json: bool, timeout: float, **options: Any) -> None:
    """List what a server's class offers: each method with its keyword arguments (-k) and what its author says of it."""
    end_on_signals()
    told = run_async(_ask(take_server(options), timeout))
    for name, method in sorted(told["methods"].items()):
        if as_json:
            click.echo(in_json({"name": name, **method}))
            continue
        click.echo(plain(f"{name}{method['signature']}"))
        for line in [*method["doc"].splitlines(), *_notes(method)]:
            click.echo(f"    {plain(line)}".rstrip())


async def _ask(server: Server, timeout: float) -> dict[str, Any]:
    async with calling(server) as (client, progress):
        metadata = [*server.metadata, ("x-func-name", "aipod.methods")]
        told: dict[str, Any] = await client.chaos(metadata=metadata, timeout=timeout, on_event=progress.show)
        return told


def _notes(method: dict[str, Any]) -> list[str]:
    notes = []
    if method["timeout"] is not None:
        notes.append(f"Ends after {method['timeout']:g} s at the latest.")
    if method["restartable"]:
        notes.append("Is run once more where its server was killed.")
    return notes
