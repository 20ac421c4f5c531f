"""What --help shows: of a command with many options those that are needed often; --help-all has every one.

A screen is 24 to 40 lines. What is left out says so itself: it is an option of class `More`.
"""

from __future__ import annotations

from typing import Any

import click

COMMANDS = {
    "attach": "Watch a job and write its answer.",
    "call": "Call a method with a file and write its answer.",
    "cancel": "Stop a job, or forget its answer.",
    "completion": "Print what completes commands in a shell.",
    "demo": "Serve, train, predict and send a large file, all here.",
    "doctor": "Say what proxies on the way to a server do to calls.",
    "health": "Print whether a server takes jobs.",
    "jobs": "List the jobs of a server.",
    "methods": "List the methods of a server.",
    "nginx-conf": "Write or check a configuration of nginx.",
    "serve": "Serve a class.",
    "submit": "Hand a job over and do not wait for its answer.",
    "token": "Make a token for a caller.",
}

_ALL = "aipod.cli.help.all"


class More(click.Option):
    """An option that only --help-all shows, below the heading `section`."""

    def __init__(self, *args: Any, section: str = "More options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A command with options of class `More`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--help-all"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_show_all,
                help="Show all options.",
            )
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            if isinstance(param, click.Argument) or (isinstance(param, More) and not ctx.meta.get(_ALL)):
                continue
            if (record := param.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


def _show_all(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        context.meta[_ALL] = True
        click.echo(context.get_help(), color=context.color)
        context.exit()
