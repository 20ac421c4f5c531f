"""Servers as real processes, the plain-asyncio client, and outside programs that may be missing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from aipod.spool import ENDED, Journal
from tests.starter import ROOT, Started, starter

# A shell ignores Ctrl-C in what it starts with `&`, and what it starts inherits that: no test of Ctrl-C would end.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # so does nohup with HUP

# What tests look for in a server's log is easier to read as text; tests/test_logs.py reads JSON.
os.environ["AIPOD_LOG_FORMAT"] = "text"

T = TypeVar("T")

# What costs much and is the same on every Python is done in full by the first of those that are supported.
FIRST = sys.version_info < (3, 12)


def first_only(reason: str) -> pytest.MarkDecorator:
    """For a test whose outcome is not Python's to change; what else it walks through, another test does on each."""
    return pytest.mark.skipif(not FIRST, reason=f"{reason}: Python 3.11 runs it")


# `--dist loadfile` hands files out in the order in which they were collected. By itself xdist takes those with the
# fewest tests last, which are some of the longest: then three of four workers have nothing to do at the end.
LONGEST = (
    "test_h2spec", "test_bounds", "test_hardening", "test_bad_input", "test_kill_points", "test_transport",
    "test_nginx", "test_windows", "test_cli", "test_client", "test_nginx_jobs", "test_download", "test_strangers",
    "test_bench", "test_interop", "test_survive", "test_churn", "test_output", "test_isolation", "test_hostile",
    "test_resume_restarts", "test_cli_jobs", "test_nginx_matrix",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def require(program: str) -> str:
    """The path of an outside program; skips, or fails where CI says that it must be there."""
    path = shutil.which(program)
    if path is None:
        missing(f"{program} is not installed")
    assert path is not None
    return path


def missing(reason: str) -> None:
    if os.environ.get("AIPOD_TEST_REQUIRE") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def run(main: Callable[[], Awaitable[T]], *, timeout: float = 60) -> T:
    """Run an asyncio-flavored function on a loop of its own.

    With an explicit loop class: a test module that imports the server has replaced asyncio's default by trio_asyncio's.
    """

    async def bounded() -> T:
        try:
            async with asyncio.timeout(timeout):
                return await main()
        finally:
            for _ in range(10):  # what was closed or aborted last ends in the loop's next turns
                await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(bounded())


def wait_until(condition: Callable[[], Any], *, seconds: float = 30) -> Any:
    """Poll until `condition()` is true; its value. Fails the test after `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.02)
    return pytest.fail(f"not within {seconds} s")


def children(pid: int) -> list[int]:
    """All living descendants of `pid`."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if stat[0] != "Z":
            parents.setdefault(int(stat[1]), []).append(int(path.name))
    found, todo = [], [pid]
    while todo:
        mine = parents.get(todo.pop(), [])
        found += mine
        todo += mine
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def left_in(spool: Path, *, uploads: bool = True) -> list[str]:
    """What is in a spool besides what is always there, and what ended jobs with a ticket keep for who asks again.

    `uploads`: also uploads that wait for their client. Not by rglob: it raises when a directory goes meanwhile.
    """
    fixed = {"app", "spool-id", "workers", ".probe"}
    kept = {path.name for path in spool.iterdir() if is_kept(path, uploads)} if spool.exists() else set()
    found = []
    for base, directories, files in os.walk(spool):
        if base == str(spool):
            directories[:] = (name for name in directories if name not in kept)
            files = [name for name in files if name.removesuffix(".lock") not in kept]
        found += [os.path.relpath(f"{base}/{name}", spool) for name in (*directories, *files) if name not in fixed]
    return sorted(found)


def is_kept(entry: Path, uploads: bool) -> bool:
    """Whether this is the entry of a ticketed job that has ended, without anything that it needed for its run."""
    state = Journal(entry / "state").read()
    if not state.get("ticketed"):
        return False
    if state.get("phase", "RECEIVING") == "RECEIVING":
        return not uploads
    # want-*: somebody has taken the upload over
    files = {path.name for path in entry.iterdir() if not path.name.startswith("want-")}
    return state["phase"] in ENDED and files <= {"state", "res", "log", "seen"}


def peak_memory(pid: int) -> float:
    """Peak resident memory in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far: unlike the clock, it does not count what else the machine does."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Served:
    """A `python -m aipod serve` process: a new one or, `forked`, a child of the starter, which says what differs."""

    process: subprocess.Popen[str] | Started

    def __init__(
        self,
        model: str,
        directory: Path,
        options: tuple[str, ...],
        bind: str,
        program: tuple[str, ...] = ("aipod",),
        *,
        forked: bool = False,
    ) -> None:
        self.spool = directory / "spool"
        self.data = directory / "data"
        self.log = directory / f"server-{time.monotonic_ns()}.log"
        command = [*program, "serve", model, "--bind", bind, "--spool", str(self.spool)]
        command += ["--data", str(self.data), "--reserve", "0", *options]
        with self.log.open("a") as stderr:
            if forked and (ready := starter("server")) is not None:
                self.process = ready.start(command, stderr)
            else:
                command = [sys.executable, "-m", *command]
                self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("aipod listening on "), self.log.read_text()
        self.address = line.split()[-1]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def log_text(self) -> str:
        return self.log.read_text()

    def stop(self, *, number: int = signal.SIGTERM, timeout: float = 30) -> int:
        """Signal the server and wait for its end; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.communicate(timeout=timeout)
        return self.process.returncode


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers: `serve("Plain", "--drain", "5")` or `serve("module:Class")`. They are forked.

    At the end each must drain cleanly, and leave neither an entry in its spool nor a process, unless the test has
    ended it itself.
    """
    started: list[Served] = []

    def start(model: str, *options: str, bind: str = "127.0.0.1:0", directory: Path | None = None) -> Served:
        spec = model if ":" in model else f"tests.models_under_test:{model}"
        started.append(Served(spec, directory or tmp_path, options, bind, forked=True))
        return started[-1]

    try:
        yield start
    finally:
        problems = []
        for served in started:
            if served.process.poll() is not None:
                continue
            below = children(served.process.pid)
            try:
                if served.stop() != 0:
                    problems.append(f"exit status {served.process.returncode}\n{served.log_text()}")
            except subprocess.TimeoutExpired:
                served.process.kill()
                served.process.communicate()
                problems.append(f"did not stop\n{served.log_text()}")
            if left_in(served.spool, uploads=False):
                problems.append(f"left in the spool: {left_in(served.spool, uploads=False)}")
            problems += [f"process {pid} is left" for pid in below if alive(pid)]
        assert not problems, "\n".join(problems)


def free_port() -> int:
    """A port that nobody has, below those of outgoing connections, one of which could else have it by then."""
    for _ in range(100):
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    return pytest.fail("no port is free")
