"""The command line; `help.COMMANDS` lists the commands.

On failure the last line of stderr is `aipod: REASON: text`; a traceback comes only with --debug. The exit statuses are
in the group's help.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import functools
import gc
import importlib
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem

from aipod import __version__
from aipod.cli.advice import advice
from aipod.cli.help import COMMANDS, Command, More
from aipod.cli.tracing import exported_spans
from aipod.errors import AipodError, JobLost, Unreachable, UsageError, leaves
from aipod.heaps import share_heaps

if TYPE_CHECKING:
    from aipod.cli.lines import Lines

T = TypeVar("T")

# The variable with which a shell asks what could come next: click's own, of a program named aipod.
COMPLETE = "_AIPOD_COMPLETE"
OK, FAILED, USAGE, LOST, STOPPED = 0, 1, 2, 3, 130
# What ends a command, and how it is called.
SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


@dataclasses.dataclass
class Flags:
    """What holds for every command; the context's `obj`."""

    debug: bool = False
    command: str = ""
    left: str = ""  # what becomes of a job that a command leaves, and how to come back to it
    stopped_by: str = ""  # the first signal that ends it
    task: asyncio.Task[Any] | None = None  # what the command waits for
    ask: Callable[[], bool] | None = None  # whether Ctrl-C has begun a question, which then says how it goes on
    choice: str = ""  # what was answered
    lines: Lines | None = None  # for --json

    def end(self, name: str) -> bool:
        """Cancel what the command waits for, as asyncio does it on Ctrl-C; False where nobody does."""
        self.stopped_by = self.stopped_by or name
        return self.task is not None and not self.task.done() and self.task.cancel()


def _set_debug(context: click.Context, param: click.Parameter, value: bool) -> None:
    context.obj.debug = context.obj.debug or value


def _debug_option(kind: type[click.Option] = click.Option) -> click.Option:
    return kind(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        envvar="AIPOD_DEBUG",
        callback=_set_debug,
        help="Show tracebacks and debug logs.",
    )


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """What the block imports stays to the end: the collector looks for garbage in it neither now nor ever.

    Its looking would be a fifth of the time that a command takes to start and to end.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


# They make no spans: what looks at a server every few seconds needs no exporter, nor what only writes a file.
_UNTRACED = ("completion", "doctor", "health", "nginx-conf", "token")


class _Commands(click.Group):
    """Imports a command when it is needed: a server has no use for a client and a progress bar."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            found = super().resolve_command(ctx, args)
        except click.UsageError as exc:
            close = difflib.get_close_matches(args[0], COMMANDS, 1)
            if not close:
                raise
            raise click.UsageError(f"{exc.message.rstrip('.')}; did you mean {close[0]}?", ctx) from None
        ctx.obj.command = found[0] or ""
        if ctx.obj.command not in _UNTRACED and not ctx.resilient_parsing:  # which is how a shell completes
            ctx.with_resource(exported_spans())
        return found

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = cmd_name.replace("-", "_")
        if cmd_name not in self.commands and cmd_name in self.list_commands(ctx):
            with lasting_imports():
                command = getattr(importlib.import_module(f"aipod.cli.{name}"), name)
            # Accepted before and after the command's name.
            command.params.append(_debug_option(More if isinstance(command, Command) else click.Option))
            self.add_command(command)
            if callable(signal.getsignal(signal.SIGINT)):  # neither ignored nor the system's
                signal.signal(signal.SIGINT, signal.default_int_handler)
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, params=[_debug_option()])
@click.version_option(__version__, prog_name="aipod")
def cli() -> None:
    """Large inputs to Python model code and the answer back, over one gRPC stream.

    Every option of a command (but token and nginx-conf, and but -k, --json, --all, --quick, --release) is also
    AIPOD_<NAME> in the environment; those of serve and of what calls it are also keys in table [aipod] of a TOML file
    (--config). Command line, then environment, then file, then default. A client's certificates and authorities are
    AIPOD_CLIENT_<NAME>, as a server has its own.

    Exit status: 0; 1 the job failed, was cancelled or was refused, or its time was up; 2 wrong usage; 3 no server
    answers, or the job is lost; 130 Ctrl-C, TERM or HUP (with which a server drains, and ends with 0). The last line on
    stderr is then `aipod: REASON: text`.
    """


# What a program writes to make colors and move the cursor (ECMA-48 section 5.4).
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_])")


def plain(text: str) -> str:
    """What a model has said as one line that a terminal does nothing else with than to show it."""
    text = _ESCAPES.sub("", text)
    return "".join(letter if letter.isprintable() else " " for letter in text)


def end_on_signals() -> None:
    """Have Ctrl-C, TERM and HUP end a command: it tells the server, and cleans up.

    A signal that is ignored stays so: HUP under nohup, and Ctrl-C in what a script has started with `&`, which TERM
    ends all the same.
    """
    flags: Flags = click.get_current_context().obj
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, functools.partial(_end, flags))


def _end(flags: Flags, number: int, _frame: Any) -> None:
    """The first signal cancels what the command waits for, unless Ctrl-C asks first; another one does not wait."""
    if number == signal.SIGINT and not flags.stopped_by and flags.ask is not None and flags.ask():
        return
    first = not flags.stopped_by
    if not (flags.end(SIGNALS[signal.Signals(number)]) and first) or flags.task is None:
        raise KeyboardInterrupt
    flags.task.get_loop().call_soon_threadsafe(lambda: None)  # else the loop sleeps on


class Stopped(BaseException):
    """A signal has ended what a command waited for. click would write a line of its own for a KeyboardInterrupt."""


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` for a command that has called `end_on_signals`. Raises `Stopped`; on a second signal, or where
    there is nothing to be cancelled, `KeyboardInterrupt`.
    """
    flags: Flags = click.get_current_context().obj
    share_heaps()

    async def cancellable() -> T:
        flags.task = asyncio.current_task()
        return await main

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        if flags.stopped_by:
            raise Stopped from None
        raise
    finally:
        main.close()  # where a signal came before it began


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"aipod: note: {message}", err=True)


def run(arguments: list[str]) -> int:
    """Run a command; its exit status."""
    flags = Flags()
    warnings.showwarning = _note
    if os.environ.get(COMPLETE, "").endswith("_complete"):
        _complete(arguments, flags)
    try:
        status = cli.main(arguments, prog_name="aipod", standalone_mode=False, obj=flags)
        return status if isinstance(status, int) else OK
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt, Stopped):
        return _stopped(flags)
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        return _fail(flags, "USAGE", "a command is missing", USAGE)
    except click.ClickException as exc:
        path = f"aipod {flags.command}".rstrip()  # click does not always know
        if isinstance(exc, click.UsageError) and exc.ctx is not None:
            path = exc.ctx.command_path
        return _fail(flags, "USAGE", f"{exc.format_message().rstrip('.')} (see {path} --help)", USAGE)
    except BrokenPipeError:
        _leave_stdout()
        return FAILED
    except (Exception, BaseExceptionGroup) as exc:
        if flags.debug:
            traceback.print_exc()
            _show_traces(exc)
        if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves(exc)):
            return _stopped(flags)
        return _explain(exc, flags)


def _complete(arguments: list[str], flags: Flags) -> NoReturn:
    """Tell a shell what could come next: without a word on what is wrong, as somebody types, and without waiting."""
    try:
        cli.main(arguments, prog_name="aipod", standalone_mode=False, obj=flags)
    finally:
        sys.stdout.flush()
        os._exit(0)  # a thread may still wait for a name server


def _stopped(flags: Flags) -> int:
    for number in SIGNALS:  # another one must not put a traceback behind the last line
        signal.signal(number, signal.SIG_IGN)
    return _fail(flags, "STOPPED", f"by {flags.stopped_by or 'Ctrl-C'}{flags.left}", STOPPED)


def _show_traces(exc: BaseException) -> None:
    """The model's own, where the server has told it."""
    for leaf in leaves(exc):
        if isinstance(leaf, AipodError) and (trace := leaf.metadata.get("trace")):
            click.echo("\n".join(("\nIn the model:", *map(plain, trace.splitlines()))), err=True)


def _explain(exc: BaseException, flags: Flags) -> int:
    for leaf in leaves(exc):
        if isinstance(leaf, UsageError):
            return _fail(flags, leaf.reason, leaf.message, USAGE)
        if isinstance(leaf, Unreachable):
            return _fail(flags, leaf.reason, leaf.message + advice(leaf.reason, flags.command), LOST)
        if isinstance(leaf, JobLost):
            return _fail(flags, leaf.reason, leaf.message + flags.left, LOST)
        if isinstance(leaf, AipodError):
            kind = leaf.metadata.get("type")
            text = f"{kind}: {leaf.message}" if kind else leaf.message
            if leaf.reason in ("DEADLINE_EXCEEDED", "NOT_SHOWN"):
                text += flags.left
            text += advice(leaf.reason, flags.command)
            # An address that may not or cannot be bound on any machine is a wrong option, one in use is not.
            usage = leaf.reason == "BIND_FAILED" and isinstance(leaf.__cause__, ValueError)
            return _fail(flags, leaf.reason, text, USAGE if usage else FAILED)
    first = next(leaves(exc))
    if isinstance(first, OSError) and first.strerror:
        return _fail(flags, "ERROR", f"{first.strerror}: {first.filename or type(first).__name__}", FAILED)
    return _fail(flags, "ERROR", f"{type(first).__name__}: {first} (--debug shows where)", FAILED)


def _fail(flags: Flags, reason: str, text: str, status: int) -> int:
    line = plain(" ".join(text.split()))
    if flags.lines is not None:
        try:
            flags.lines.error(reason, line, status)
        except BrokenPipeError:
            _leave_stdout()
    click.echo(f"aipod: {reason}: {line}", err=True)
    return status


def _leave_stdout() -> None:
    """Whoever read it is gone; the interpreter must not complain about it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
