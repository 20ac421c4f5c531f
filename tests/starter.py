"""Servers for tests that are forked from a process which has imported what they import.

Why: the tests start hundreds of servers, and most of what a start costs is imports. Each process that runs tests has
one starter, from its first such server on: single-threaded, no event loop, nothing open, no model imported. For each
server it forks a child that runs `python -m MODULE ARGUMENT...` as the interpreter would: as `__main__`, with the
environment and descriptors that it was given and no others, signals as in a new process, new random numbers. How it
ends is how the interpreter ends.

What differs from a new process: the parent is the starter, not the one that runs the test; /proc/PID/cmdline is the
starter's; peak memory counts from the starter's; hashes of strings and addresses of memory are alike in all children of
a starter; a traceback begins with lines of this file. Therefore forked are the servers that a test starts for itself
(the fixture `serve`, the kill points and the like). What a test module shares (`Served`), and all that tests of the
command line, of peaks of memory and of what is imported start, is the real command; with AIPOD_TEST_FRESH=1, or where a
test has changed what Python reads when it starts, every server is.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = ("aipod.cli.serve", "aipod.server")
# A message of a socket pair: the arguments and the environment.
LARGEST = 128 * 1024
STATUS = 4  # bytes: the exit status, as of `Popen.returncode`


class Started:
    """A child of the starter, with the parts of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, handle: int, status: int, stdout: TextIO) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdout = stdout
        self._handle = handle  # a pidfd: no signal reaches another process that has got the same pid
        self._number = status
        self._status = open(status, "rb", buffering=0)  # noqa: SIM115 - warns where nobody waits for the child
        self._lock = threading.Lock()

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

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What else it writes is little, and fits into the pipe until it has ended."""
        self.wait(timeout)
        text = "" if self.stdout.closed else self.stdout.read()
        self.stdout.close()
        return text, None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Starter:
    """This process's starter; `start` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.starter", str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL, cwd=ROOT)
        atexit.register(self._end)

    def start(self, arguments: list[str], stderr: TextIO) -> Started:
        """Run `python -m` with `arguments`, its stdout a pipe."""
        read_end, write_end = os.pipe()
        status, tell = os.pipe()
        request = json.dumps({"arguments": arguments, "environment": dict(os.environ)}).encode()
        assert len(request) < LARGEST
        with self._lock:
            socket.send_fds(self._link, [request], [0, write_end, stderr.fileno(), tell])
            os.close(write_end)
            os.close(tell)
            pid, (handle,), _, _ = socket.recv_fds(self._link, STATUS, 1)
        return Started(int.from_bytes(pid, "big"), handle, status, open(read_end))

    def _end(self) -> None:
        self._link.close()
        self.process.wait(10)


def inherited() -> dict[str, Any]:
    """What a new process would have from this one, and a child of the starter has not."""
    names = ("PYTHON", "LANG", "LC_", "LD_", "TZ")
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}
    return {**limits, **{name: value for name, value in os.environ.items() if name.startswith(names)}}


_INHERITED = inherited()
_the_starter = functools.cache(Starter)


def starter() -> Starter | None:
    """This process's; None where only the real command is right."""
    fresh = os.environ.get("AIPOD_TEST_FRESH") == "1" or inherited() != _INHERITED
    return None if fresh else _the_starter()


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
    for name in IMPORTS:
        importlib.import_module(name)
    import trio._core._run

    gc.collect()
    gc.freeze()  # else each child searches, and so copies, all that was imported: most of what it costs to end
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, and for the servers
    request = fork_on_request(socket.socket(fileno=int(sys.argv[1])))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    trio._core._run._r.seed()  # `random` itself takes new numbers after a fork
    os.environ.clear()
    os.environ.update(request["environment"])
    module, *sys.argv[1:] = request["arguments"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
