"""The command line: `serve`, `call`, `health`, `demo`.

Exit status: 0; 1 job failed or refused; 2 usage; 3 unreachable, given up or lost; 130 Ctrl-C. The last line of stderr
on failure is `aipod: REASON: text`; a traceback comes only with --debug.
"""

from __future__ import annotations

import os
import sys
import traceback

import click

from aipod import __version__
from aipod.errors import AipodError, ConnectionLost, Unreachable, UsageError, leaves

OK, FAILED, USAGE, LOST, INTERRUPTED = 0, 1, 2, 3, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="aipod")
@click.option("--debug", is_flag=True, help="Show tracebacks and debug logs.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Large inputs to Python model code and the answer back, over one gRPC stream.

    Every option of a command is also AIPOD_<NAME> in the environment and a key in table [aipod] of a TOML file
    (--config): command line, then environment, then file, then default.
    """
    context.obj = debug


def _register() -> None:
    # Imported here, so that `call` never loads trio and `serve` imports it before grpclib (transport/bridge).
    from aipod.cli.call import call
    from aipod.cli.demo import demo
    from aipod.cli.health import health
    from aipod.cli.serve import serve

    for command in (serve, call, health, demo):
        cli.add_command(command)


def run(arguments: list[str]) -> int:
    """Run a command; its exit status."""
    _register()
    debug = "--debug" in arguments
    try:
        status = cli.main(arguments, prog_name="aipod", standalone_mode=False)
        return status if isinstance(status, int) else OK
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail("INTERRUPTED", "stopped by Ctrl-C", INTERRUPTED)
    except click.ClickException as exc:
        exc.show(file=sys.stderr)
        return _fail("USAGE", f"{exc.format_message()}", USAGE)
    except BrokenPipeError:
        # Whoever read our stdout is gone; the interpreter must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (Exception, BaseExceptionGroup) as exc:
        if debug:
            traceback.print_exc()
        if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves(exc)):
            return _fail("INTERRUPTED", "stopped by Ctrl-C", INTERRUPTED)
        return _explain(exc)


def _explain(exc: BaseException) -> int:
    for leaf in leaves(exc):
        if isinstance(leaf, UsageError):
            return _fail(leaf.reason, leaf.message, USAGE)
        if isinstance(leaf, Unreachable | ConnectionLost):
            return _fail(leaf.reason, leaf.message, LOST)
        if isinstance(leaf, AipodError):
            kind = leaf.metadata.get("type")
            return _fail(leaf.reason, f"{kind}: {leaf.message}" if kind else leaf.message, FAILED)
    first = next(leaves(exc))
    return _fail("ERROR", f"{type(first).__name__}: {first} (--debug shows where)", FAILED)


def _fail(reason: str, text: str, status: int) -> int:
    line = " ".join(text.split())
    click.echo(f"aipod: {reason}: {line}", err=True)
    return status
