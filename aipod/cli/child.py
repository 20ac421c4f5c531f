"""What `aipod.serving` starts: `python -m aipod.cli.child FD`, a server that belongs to the process which started it.

Over the socket FD come lines. First a JSON object: `config` (the fields of `Config`), `path` (sys.path), `parent` (a
pid), `debug`; later `stop`, which begins the drain. What is told back is one JSON object: `addresses` once health
answers, or `error` (`kind`, `reason`, `message`, `metadata`). The log goes to stderr, in JSON. When the socket is
closed, or the parent has ended, whatever has ended it, this ends at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

from aipod.cli import lasting_imports
from aipod.cli.logs import set_up_logging
from aipod.cli.process import prepare_process
from aipod.cli.serve import AT_ONCE, end_after_drain
from aipod.cli.tracing import exported_spans
from aipod.config import Config
from aipod.errors import AipodError, leaves
from aipod.systemd import ServiceManager

log = logging.getLogger("aipod.server")

STOP = b"stop\n"
# Bytes of the first line: some hundred settings and paths. This only stops a confused peer.
_MAX_HELLO = 1024 * 1024


def main() -> None:
    """Serve until the parent wants the end; the exit status is 0 then, 1 where the server has failed."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)  # else a model's own processes would keep it open
    os.dup2(2, 1)  # what a model prints in this process
    with sock, sock.makefile("rb") as lines:
        if not (line := lines.readline(_MAX_HELLO)):
            sys.exit(1)  # nobody wants it any more
        hello = json.loads(line)
        set_up_logging("json", debug=hello["debug"])
        sys.path[:] = hello["path"]
        # What the service manager and the parent tell each other is not for this process, nor for workers.
        ServiceManager()
        try:
            with exported_spans():
                _serve(sock, hello)
        except (Exception, BaseExceptionGroup) as exc:
            error = next((leaf for leaf in leaves(exc) if isinstance(leaf, AipodError)), None)
            if error is None:
                log.error("the server has failed", exc_info=exc)
                leaf = next(leaves(exc))
                error = AipodError("SERVER_FAILED", f"{type(leaf).__name__}: {leaf}")
            told = {name: getattr(error, name) for name in ("reason", "message", "metadata")}
            _tell(sock, {"error": {"kind": type(error).__name__, **told}})
            sys.exit(1)


def _serve(sock: socket.socket, hello: dict[str, Any]) -> None:
    with lasting_imports():
        import trio

        from aipod.server import serve

    config = Config.from_mapping(hello["config"])
    files = prepare_process()

    async def run() -> None:
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            ending = trio.CancelScope()
            in_trio = trio.lowlevel.current_trio_token().run_sync_soon
            threading.Thread(
                target=_obey,
                args=(
                    sock,
                    hello["parent"],
                    functools.partial(in_trio, stop.set),
                    functools.partial(in_trio, ending.cancel),
                ),
                daemon=True,
                name="aipod-parent",
            ).start()
            await nursery.start(_leave_signals_to_parent)
            nursery.start_soon(end_after_drain, stop, config.longest_stop, ServiceManager({}))
            with ending:
                async with trio.open_nursery() as server:
                    addresses: list[str] = await server.start(functools.partial(serve, config, stop=stop, files=files))
                    _tell(sock, {"addresses": addresses})
            nursery.cancel_scope.cancel()

    trio.run(run)


async def _leave_signals_to_parent(*, task_status: Any) -> None:
    """A service manager signals all processes of a service at once; the parent says when this one is to drain.

    Not ignored: what a process ignores, its children ignore too.
    """
    import trio

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            log.info("%s: it is for the process that has started this server", signal.Signals(number).name)


def _obey(sock: socket.socket, parent: int, drain: Any, end: Any) -> None:
    """Do what the parent says, until it is gone. In a thread: the loop may stand still, in a model's code."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    # A process that the parent has forked has the socket as well: its end is not enough.
    with contextlib.suppress(AttributeError, OSError):
        poll.register(os.pidfd_open(parent), select.POLLIN)
    buffer = b""
    while os.getppid() == parent and (ready := poll.poll()) and any(number == sock.fileno() for number, _ in ready):
        with contextlib.suppress(ConnectionError):
            if data := sock.recv(4096):
                buffer = (buffer + data)[-len(STOP) :]
                if buffer == STOP:
                    with contextlib.suppress(RuntimeError):  # trio's run is over
                        drain()
                continue
        break
    with contextlib.suppress(RuntimeError):  # trio's run is over
        end()
    time.sleep(AT_ONCE)
    os._exit(1)  # the kernel ends the workers, the next start sweeps the spool


def _tell(sock: socket.socket, told: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the parent has gone; `_obey` sees it too
        sock.sendall(json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    main()
