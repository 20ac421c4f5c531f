"""Servers and client commands for tests, forked from a process which has imported what they import.

Why: the tests start hundreds of them, and most of what a start costs is imports. Each process that runs tests has one
starter of a kind, from the first that it needs on: single-threaded, no event loop, nothing open, no model imported. For
each request it forks a child that runs `python -m MODULE ARGUMENT...` as the interpreter would: as `__main__`, with the
environment and descriptors that it was given and no others, signals as in a new process, new random numbers. How it
ends is how the interpreter ends.

What differs from a new process: the parent is the starter, not the one that runs the test; /proc/PID/cmdline is the
starter's; peak memory counts from the starter's; hashes of strings and addresses of memory are alike in all children of
a starter; stdout is buffered as for a pipe, also where it is a terminal; a traceback begins with lines of this file.
Therefore forked are the servers that a test starts for itself (the fixture `serve`, the kill points and the like), the
commands in test_cli_jobs.py that are on no terminal, and in test_cli.py most that end with a mistake, and helps. What a
test module shares (`Served`), all other tests of the command line, and all of peaks of memory and of what is imported
start the real command; with AIPOD_TEST_FRESH=1, or where a test has changed what Python reads when it starts, every
test does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import resource
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
# By kind: a client must not find what importing the server does to asyncio.
IMPORTS = {
    "server": ("aipod.cli.serve", "aipod.server"),
    "client": tuple(f"aipod.cli.{name}" for name in ("attach", "call", "cancel", "health", "jobs", "submit")),
}
# A message of a socket pair: the arguments and the environment.
LARGEST = 128 * 1024
STATUS = 4  # bytes: the exit status, as of `Popen.returncode`


class Started:
    """A child of a starter, with the parts of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, handle: int, status: int, ours: list[IO[Any] | None]) -> None:
        """`ours`: our ends of its stdin, stdout and stderr, where they are pipes."""
        self.pid = pid
        self.returncode: int | None = None
        self.stdin, self.stdout, self.stderr = ours
        self._handle = handle  # a pidfd: no signal reaches another process that has got the same pid
        self._number = status
        self._status = open(status, "rb", buffering=0)  # noqa: SIM115 - warns where nobody waits for the child
        self._lock = threading.Lock()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *args: object) -> None:
        for end in (self.stdout, self.stderr, self.stdin):
            if end is not None:
                with contextlib.suppress(BrokenPipeError):
                    end.close()
        self.wait()

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None and self._ended(0):
                told = self._status.read(STATUS)
                assert told, "the starter has ended"
                self.returncode = int.from_bytes(told, "big", signed=True)
                self._status.close()
                os.close(self._handle)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises `subprocess.TimeoutExpired`."""
        until = float("inf") if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() >= until:
                raise subprocess.TimeoutExpired("tests.starter", timeout or 0)
            # Not with the lock: meanwhile other threads may send signals. A second: the number may be closed by one.
            self._ended(min(until - time.monotonic(), 1))
        return status

    def _ended(self, seconds: float) -> bool:
        ready = select.poll()
        ready.register(self._number, select.POLLIN)
        return bool(ready.poll(max(seconds, 0) * 1000))

    def communicate(self, data: bytes | None = None, timeout: float | None = None) -> tuple[Any, Any]:
        """Send `data`, read what is left of both streams, wait. Raises `subprocess.TimeoutExpired`."""
        if isinstance(self.stdout, io.TextIOBase):  # a server's: what else it writes is little, and fits into the pipe
            self.wait(timeout)
            text = "" if self.stdout.closed else self.stdout.read()
            self.stdout.close()
            return text, None
        until = float("inf") if timeout is None else time.monotonic() + timeout
        found: dict[Any, list[bytes]] = {end: [] for end in (self.stdout, self.stderr) if end is not None}
        with selectors.DefaultSelector() as ends:
            for end in found:
                if not end.closed:
                    ends.register(end, selectors.EVENT_READ)
            if self.stdin is not None and not self.stdin.closed:
                with contextlib.suppress(BrokenPipeError):
                    self.stdin.flush()
                os.set_blocking(self.stdin.fileno(), False)
                ends.register(self.stdin, selectors.EVENT_WRITE)
            left = memoryview(data or b"")
            while ends.get_map():
                ready = ends.select(None if timeout is None else max(until - time.monotonic(), 0))
                if not ready:
                    raise subprocess.TimeoutExpired("tests.starter", timeout or 0)
                for key, _ in ready:
                    end: Any = key.fileobj
                    if end is self.stdin:
                        left = _write(key.fd, left)
                        more = bool(left)
                    else:
                        found[end].append(os.read(key.fd, 65536))
                        more = bool(found[end][-1])
                    if not more:
                        ends.unregister(end)
                        end.close()
        self.wait(None if timeout is None else until - time.monotonic())
        out, err = (None if end is None else b"".join(found[end]) for end in (self.stdout, self.stderr))
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _write(number: int, data: memoryview) -> memoryview:
    """What is left of `data`; nothing where nobody reads it."""
    try:
        return data[os.write(number, data) :]
    except BrokenPipeError:
        return data[:0]


class Starter:
    """This process's starter of one kind; its methods may be called from any thread."""

    def __init__(self, kind: str) -> None:
        self._lock = threading.Lock()
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.starter", str(theirs.fileno()), kind]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL, cwd=ROOT)
        atexit.register(self._end)

    def start(self, arguments: list[str], stderr: TextIO) -> Started:
        """Run `python -m` with `arguments`, its stdout a pipe that is read as text."""
        return self.open(arguments, dict(os.environ), 0, subprocess.PIPE, stderr, text=True)

    def open(
        self,
        arguments: list[str],
        environment: dict[str, str],
        stdin: int | IO[Any],
        stdout: int | IO[Any],
        stderr: int | IO[Any],
        *,
        text: bool = False,
    ) -> Started:
        """Run `python -m` with `arguments`. A number is a descriptor, or DEVNULL or PIPE of `subprocess`."""
        request = json.dumps({"arguments": arguments, "environment": environment}).encode()
        assert len(request) < LARGEST
        theirs: list[int] = []
        ours: list[IO[Any] | None] = []
        with contextlib.ExitStack() as stack:
            for number, what in enumerate((stdin, stdout, stderr)):
                mine = None
                if what == subprocess.PIPE:
                    read_end, write_end = os.pipe()
                    end, kept = (write_end, read_end) if number else (read_end, write_end)
                    mine = os.fdopen(kept, ("r" if number else "w") + ("" if text else "b"))
                    stack.callback(os.close, end)
                elif what == subprocess.DEVNULL:
                    end = os.open(os.devnull, os.O_RDWR)
                    stack.callback(os.close, end)
                else:
                    end = what if isinstance(what, int) else what.fileno()
                theirs.append(end)
                ours.append(mine)
            status, tell = os.pipe()
            stack.callback(os.close, tell)
            with self._lock:
                socket.send_fds(self._link, [request], [*theirs, tell])
                pid, (handle,), _, _ = socket.recv_fds(self._link, STATUS, 1)
        return Started(int.from_bytes(pid, "big"), handle, status, ours)

    def _end(self) -> None:
        self._link.close()
        self.process.wait(10)


def inherited(environment: Mapping[str, str]) -> dict[str, Any]:
    """What a new process would have from this one, and a child of a starter has not."""
    names = ("PYTHON", "LANG", "LC_", "LD_", "TZ")
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}
    return {**limits, **{name: value for name, value in environment.items() if name.startswith(names)}}


_INHERITED = inherited(os.environ)
_the_starter = functools.cache(Starter)


def starter(kind: str, environment: Mapping[str, str] = os.environ) -> Starter | None:
    """This process's, of a kind of IMPORTS; None where only the real command is right."""
    fresh = os.environ.get("AIPOD_TEST_FRESH") == "1" or inherited(environment) != _INHERITED
    return None if fresh else _the_starter(kind)


def fork_on_request(link: socket.socket) -> dict[str, Any]:
    """Returns in each child with what it is to run; ends in the starter when nobody can ask any more."""
    children: dict[int, tuple[int, int]] = {}  # by pidfd: pid, and where to tell its status
    ready = select.poll()
    ready.register(link, select.POLLIN)
    while True:
        for number, _ in ready.poll():
            if number != link.fileno():
                pid, tell = children.pop(number)
                ready.unregister(number)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(BrokenPipeError):
                    os.write(tell, status.to_bytes(STATUS, "big", signed=True))
                os.close(tell)
                os.close(number)
                continue
            request, files, _, _ = socket.recv_fds(link, LARGEST, 4)
            if not request:
                sys.exit()
            pid = os.fork()
            if pid == 0:
                link.detach()  # its number belongs to somebody else from now on
                for number, file in enumerate(files[:3]):
                    os.dup2(file, number)
                os.closerange(3, 1024)
                return json.loads(request)  # type: ignore[no-any-return]
            handle = os.pidfd_open(pid)
            children[handle] = pid, files.pop()
            ready.register(handle, select.POLLIN)
            for file in files:
                os.close(file)
            socket.send_fds(link, [pid.to_bytes(STATUS, "big")], [handle])


def main() -> None:
    for name in IMPORTS[sys.argv[2]]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else each child searches, and so copies, all that was imported: most of what it costs to end
    # Ctrl-C is for the tests and for the children, which get also one that comes before they run.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    request = fork_on_request(socket.socket(fileno=int(sys.argv[1])))
    if "trio" in sys.modules:
        sys.modules["trio._core._run"]._r.seed()  # `random` itself takes new numbers after a fork
    os.environ.clear()
    os.environ.update(request["environment"])
    module, *sys.argv[1:] = request["arguments"]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
