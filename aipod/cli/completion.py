"""`aipod completion bash`, and what a shell then asks for."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from aipod.cli import COMPLETE, plain

# Seconds for a server to name its methods: who has pressed Tab waits for them.
PATIENCE = 0.5


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what has a shell complete commands, options, files, and the methods of the server that --to names.

    \b
    ~/.bashrc:   eval "$(aipod completion bash)"
    ~/.zshrc:    eval "$(aipod completion zsh)"
    fish, once:  aipod completion fish > ~/.config/fish/completions/aipod.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "aipod", COMPLETE).source())


def complete_file(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shell's own names of files."""
    return [CompletionItem(incomplete, type="file")]


def complete_method(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What the server offers that the command line, the environment or a file names; nothing where it does not say so
    within `PATIENCE`.
    """
    found: list[CompletionItem] = []

    def ask() -> None:
        # Whatever is wrong is told by the command itself, once it is run.
        with contextlib.suppress(Exception):
            for name, method in _methods(context).items():
                first = (method["doc"].splitlines() or [""])[0]
                found.append(CompletionItem(name, help=plain(first or method["signature"])))

    # A thread, which ends with the process: a name server that is silent would be waited for.
    thread = threading.Thread(target=ask, daemon=True, name="aipod-completion")
    thread.start()
    thread.join(PATIENCE)
    return [one for one in list(found) if one.value.startswith(incomplete) and one.value.isidentifier()]


def _methods(context: click.Context) -> dict[str, Any]:
    """As `aipod methods`. Blocks."""
    import asyncio

    from aipod.cli.options import SERVER, take_server
    from aipod.client import Client

    async def ask() -> dict[str, Any]:
        async with Client(server.to, config=server.config) as client:
            told = await client.chaos(metadata=[*server.metadata, ("x-func-name", "aipod.methods")])
            methods: dict[str, Any] = told["methods"]
            return methods

    with context:
        server = take_server({name: context.params[name] for name in SERVER})
    return asyncio.run(ask())
