"""Peers as processes: servers that stay, clients that run once, and what the system says of them.

All have the read end of one pipe as their stdin, whose only write end is this process's: they end with it, however it
ends. A server prints its port when it answers; a client prints what it has measured, as JSON. What takes longer than
`SLOWEST` ends the benchmark.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.peers.common import cpu_times, peak_memory

ROOT = Path(__file__).resolve().parent.parent
SLOWEST = 900  # seconds of one run: 1 GiB at 10 Mbit/s
START = 120  # seconds until a server answers, on a machine that does other things
STOP = 60  # seconds for it to end: aipod drains for 30

Run = dict[str, Any]


class Failed(SystemExit):
    """A peer did not do what it should; there is nothing to compare."""


@functools.cache
def _lifeline() -> int:
    """The stdin of all peers. Its other end is open for as long as this process is."""
    reading, _ = os.pipe()
    return reading


class Server:
    """A peer's server, or what is between (a hop)."""

    def __init__(self, name: str, options: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  until `stop`
        command = [sys.executable, "-m", f"bench.peers.{name}", "serve", *options]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=_lifeline(), stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START)
        line = self._process.stdout.readline() if ready else ""
        if not line.strip():
            log = self.stop()
            raise Failed(f"{name} does not start: {' '.join(command)}\n{log}")
        self.port = line.split()[-1].rpartition(":")[2]

    @property
    def pid(self) -> int:
        return self._process.pid

    def times(self) -> dict[str, float]:
        """CPU seconds so far: its own, user and system apart, and of what it has started. Empty where not known."""
        own = _times(self.pid)
        if own is None:
            return {}
        below = [_times(pid) or (0.0, 0.0) for pid in descendants(self.pid)]
        return {"user": own[0], "sys": own[1], "workers": sum(map(sum, below))}

    def peaks(self) -> dict[str, float | None]:
        """MB, its own and the largest of what it has started."""
        below = [peak_memory(pid) or 0.0 for pid in descendants(self.pid)]
        return {"peak_mb": peak_memory(self.pid), "worker_peak_mb": max(below, default=0.0)}

    def stop(self) -> str:
        """End it; what it has logged."""
        self._process.terminate()
        try:
            self._process.communicate(timeout=STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._log.seek(0)
        log = self._log.read()
        self._log.close()
        return log


def run_client(name: str, arguments: Sequence[str], *, seconds: float = SLOWEST) -> Run:
    """Run one command of a peer's client. Raises `Failed`, also where it takes longer than that."""
    line = [sys.executable, "-m", f"bench.peers.{name}", *arguments]
    try:
        done = subprocess.run(line, cwd=ROOT, stdin=_lifeline(), capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Failed(f"longer than {seconds:g} s: {' '.join(line)}") from None
    if done.returncode:
        raise Failed(f"status {done.returncode}: {' '.join(line)}\n{done.stderr}")
    run: Run = json.loads(done.stdout)
    return run


def _times(pid: int) -> tuple[float, float] | None:
    with contextlib.suppress(OSError):
        return cpu_times(pid)
    return None


def descendants(pid: int) -> list[int]:
    """What `pid` has started, and what that has; empty where the system does not tell."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found, todo = [], [pid]
    while todo:
        mine = children.get(todo.pop(), [])
        found += mine
        todo += mine
    return found
