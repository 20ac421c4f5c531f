"""`aipod serve MODULE:CLASS`."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import click

from aipod.cli import lasting_imports
from aipod.cli.help import Command
from aipod.cli.logs import set_up_logging
from aipod.cli.options import config_options, make_config
from aipod.cli.process import prepare_process
from aipod.config import Config
from aipod.systemd import ServiceManager, microseconds

log = logging.getLogger("aipod.server")

# Seconds after a second signal in which everything may still end in order.
AT_ONCE = 1.0
# Seconds that the service manager is asked for beyond the end of what a drain takes at most.
AIR = 5.0

OPTIONS = (
    "bind", "insecure", "tokens", "reuse_port", "spool", "data", "runner", "instances", "max_instances", "concurrency",
    "idle", "preload", "max_jobs", "max_queued", "drain", "tick", "cancel_grace", "load_timeout", "max_payload",
    "max_kwargs", "max_message", "reserve", "upload_stall", "upload_ttl", "grace", "ttl", "tls_cert", "tls_key",
    "tls_ca", "max_connections", "max_streams", "stream_window", "max_window", "connection_window", "max_frame",
    "max_headers", "max_fields", "frame_rate", "reset_burst", "reset_rate", "handshake_timeout", "max_age",
    "max_age_grace", "max_idle", "ping_interval", "ping_timeout", "send_stall", "level", "tracebacks", "max_spool",
    "metrics", "log_format", "reflection",
)  # fmt: skip
# Of them those that --help shows; --help-all shows all.
OFTEN = (
    "bind", "insecure", "tokens", "spool", "data", "runner", "instances", "drain", "tls_cert", "tls_ca", "metrics",
)  # fmt: skip


@click.command(cls=Command)
@click.argument("model", metavar="MODULE:CLASS", envvar="AIPOD_MODEL")  # with --config, it may be in the file
@config_options(OPTIONS, often=OFTEN)
@click.pass_context
def serve(context: click.Context, /, **options: Any) -> None:
    """Serve a class: its public methods can be called from anywhere that reaches the address.

    Writes one line per address to stdout once health answers; logs go to stderr. HUP (but not under nohup), INT
    and TERM drain it: no new jobs, running ones get --drain seconds; a second signal ends it at once.

    Under systemd it is of Type=notify; sockets that are handed down (LISTEN_FDS) replace --bind.
    """
    config = make_config(options)
    set_up_logging(config.log_format, debug=context.obj.debug)
    files = prepare_process()
    manager = ServiceManager()
    if manager.sockets and config.bind != Config().bind:
        log.warning("listening on the sockets that were handed down (LISTEN_FDS), not on %s", ", ".join(config.bind))
    # The class lies where the user is, as with `python -m`; the installed script would not look there.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    # Imported late: trio_asyncio changes asyncio for the whole process, and `call` wants none of it.
    with lasting_imports():
        import trio

        from aipod.server import serve as run_server

    def say(text: str) -> None:
        manager.tell(f"STATUS={text}")

    async def main(lines: TextIO) -> None:
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            ending = trio.CancelScope()
            # Before the start: a TERM while a model loads must end it, not be lost.
            await nursery.start(_listen_to_signals, stop, ending)
            nursery.start_soon(end_after_drain, stop, config.longest_stop, manager)
            if manager.watchdog is not None:
                nursery.start_soon(_show_life, manager, manager.watchdog / 2)
            # The class is looked at, then come the versions that are to be there, each within its time.
            manager.tell(f"EXTEND_TIMEOUT_USEC={microseconds((1 + len(config.preload)) * config.load_timeout)}")
            with ending:
                async with trio.open_nursery() as server:
                    run = functools.partial(
                        run_server, config, stop=stop, sockets=manager.sockets, files=files, say=say
                    )
                    addresses: list[str] = await server.start(run)
                    for address in addresses:
                        lines.write(f"aipod listening on {address}\n")
                    lines.flush()
                    if addresses:
                        manager.tell("READY=1", f"STATUS=serving {config.model} on {', '.join(addresses)}")
            nursery.cancel_scope.cancel()

    with _stdout() as lines:
        trio.run(main, lines)


@contextlib.contextmanager
def _stdout() -> Iterator[TextIO]:
    """For the listening lines alone: what a model prints in this process goes to stderr."""
    with os.fdopen(os.dup(1), "w") as lines:
        os.dup2(2, 1)
        try:
            yield lines
        finally:
            os.dup2(lines.fileno(), 1)


async def _listen_to_signals(stop: Any, scope: Any, *, task_status: Any) -> None:
    import trio

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it is to go on
        numbers.append(signal.SIGHUP)
    with trio.open_signal_receiver(*numbers) as signals:
        task_status.started()
        async for number in signals:
            name = signal.Signals(number).name
            if stop.is_set():
                log.warning("%s again: ending at once", name)
                scope.cancel()
                await trio.sleep(AT_ONCE)
                # A model does not let go. The kernel ends the workers, the next start sweeps the spool.
                os._exit(128 + number)
            log.info("%s: draining", name)
            stop.set()


async def _show_life(manager: ServiceManager, every: float) -> None:
    """Tell the service manager that the loop goes round."""
    import trio

    while True:
        manager.tell("WATCHDOG=1")
        await trio.sleep(every)


async def end_after_drain(stop: Any, seconds: float, manager: ServiceManager) -> None:
    """End the process where a drain does not: a method that runs in a thread of this process cannot be stopped."""
    import trio

    await stop.wait()
    # And not earlier: TimeoutStopSec= need not be set for a long drain.
    manager.tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={microseconds(seconds + AIR)}")
    await trio.sleep(seconds)
    log.error("after %g s there still runs %s; ending without it", seconds, _running())
    os._exit(1)


def _running() -> str:
    """What trio's threads do: it names each after its function and the task that waits for it."""
    return ", ".join(sorted(t.name for t in threading.enumerate() if " from " in t.name)) or "no thread, but a task"
