"""What a small job costs the server, counted: no time is taken, so any machine may be as busy as it likes.

A guard against a regression by a half. What the files of one job are is in `test_spool_entry`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aipod
from tests.conftest import ROOT, first_only, run

JOBS = 60


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.counted", "serve", "tests.counted:Counting", "--bind", "127.0.0.1:0"]
    command += ["--spool", str(tmp_path / "spool"), "--data", str(tmp_path / "data"), "--reserve", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0


@first_only("the same on every Python")
def test_what_a_small_job_costs_the_server(address: str) -> None:
    """Counted over some jobs, one after the other, each of which has its answer released by the next.

    Mutants seen: a hop of its own for each line of the journal; RUNNING has a line of its own; a task per heartbeat, or
    for who watches for the method's cancel; every phase is told at once; the outcome and the answer are two writes, or
    the status is one; the answer is made in a thread; the entry is let go of in a step of its own.
    """
    cost: dict[str, float] = {}

    async def main() -> None:
        async with aipod.Client(address) as client:
            for _ in range(5):
                assert await client.chaos(os.urandom(1024)) == 1024
            counts = []
            for _ in range(2):
                counts.append(await client.chaos(metadata=[("x-func-name", "cost")]))
                for _ in range(JOBS - 1):
                    assert await client.chaos(os.urandom(1024)) == 1024
            cost.update({name: (counts[1][name] - counts[0][name]) / JOBS for name in counts[0]})

    run(main)
    names = {"steps", "releases", "threads", "tasks", "turns", "messages", "lines", "pings", "files", "writes"}
    names |= {"calls", "scopes"}
    assert set(cost) == names
    # Steps on the disk: begin, end; those that release answers are shared, or one a job where it is slow.
    assert cost["steps"] - cost["releases"] == pytest.approx(2, abs=0.2)
    assert cost["releases"] <= 1.2
    # And none by another way than these.
    assert cost["threads"] <= cost["steps"] + 0.3
    # The call's, the job's.
    assert 2 <= cost["tasks"] <= 2.5
    # First heartbeat, outcome, answer.
    assert 3 <= cost["messages"] <= 4.5
    # The first heartbeat; the outcome, the answer, and the status with them. A later heartbeat is one more of both, and
    # each PING, ours or the client's, is one: how many there are depends on time.
    assert 1.5 <= cost["writes"] <= cost["messages"] - 1 + cost["pings"] + 0.5
    # Running, done, released.
    assert 2.5 <= cost["lines"] <= 3.5
    assert cost["files"] <= 45
    # Those of three nurseries, the connection, the call, the search, the job and the method.
    assert cost["scopes"] == pytest.approx(8, abs=0.2)
    # Of Python's functions, 2160 were counted: they are what a small job costs, in ten turns. Those that clocks make
    # besides have 82 each, and their number depends on time.
    assert cost["calls"] - 82 * max(0.0, cost["turns"] - 10) <= 2500
