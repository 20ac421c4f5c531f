"""Jobs that outlive their connections, seen from the wire: two servers on one spool, and clients that come and go.

Which tests show what (the mutants that were seen stand at each):

    I1   what was told durable stays               test_disk.py; test_resume_uploads.py, test_spool_entry.py
    I2   a method starts at most once              test_kill_points.py, test_job.py; test_resume_uploads.py
    I3   DONE stays DONE with the same bytes       test_disk.py, test_kill_points.py; test_resume_ends.py
    I4   an answer is whole and right, or absent   test_disk.py, test_kill_points.py; test_resume_kept.py
    I5   every cut is survived                     test_resume_uploads.py (messages), test_resume_cuts.py (frames)
    I6   the newest connection has the upload      test_resume_uploads.py, test_spool_holders.py, test_survive.py
    I7   RUNNING and free means died               test_resume_deaths.py, test_kill_points.py; test_spool_sweep.py
    I8   one holder though lock files are removed  test_spool_holders.py
    I9   bad input changes nothing                 test_resume_bad_input.py
    I10  a full disk is a pause                    test_resume_deaths.py, test_spool_room.py
    I11  no wall clock decides                     test_spool_sweep.py
    I12  held entries are not collected            test_spool_sweep.py
    I13  a commit goes to one spool only           test_resume_bad_input.py, test_resume_restarts.py, test_nginx_jobs.py
    I14  outcomes stay                             test_resume_ends.py, test_kill_points.py, test_job.py
    I15  plain clients work                        test_strangers.py, test_cancel.py, test_bad_input.py
    I16  abandoned jobs stop after the grace       test_resume_ends.py, test_job.py
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from aipod.wire.ai import Op
from tests import wire
from tests.conftest import Served, children
from tests.wire import Client, Outcome, Refusal, call

MODEL = "tests.models_resume:Jobs"
TICK, GRACE = 0.5, 2.0
OPTIONS = ("--tick", str(TICK), "--grace", str(GRACE), "--cancel-grace", "1", "--drain", "0", "--instances", "3")
PAYLOAD = os.urandom(3500)


class Pair:
    """Two servers on one spool."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.a, self.b = (Served(MODEL, directory, OPTIONS, "127.0.0.1:0") for _ in range(2))
        self.spool = self.a.spool

    def of(self, names: str) -> list[str]:
        return [getattr(self, name).address for name in names]


def two_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A module's fixture. They end cleanly, leave no process and have met no bug of their own."""
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    for served in (pair.a, pair.b):
        below = children(served.process.pid)
        assert served.stop() == 0, served.log_text()
        assert not [pid for pid in below if pid in children(os.getpid())]
        assert "a bug of aipod" not in served.log_text()


class Work:
    """A client with files of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts, self.until = path / "starts", path / "until"

    def client(self, name: str = "count", payload: bytes = PAYLOAD, **kwargs: Any) -> Client:
        if name.startswith("wait"):
            kwargs["until"] = str(self.until)
        return Client(name, payload, {"starts": str(self.starts), **kwargs}, restartable=name == "wait_again")

    @property
    def lines(self) -> list[str]:
        return self.starts.read_text().splitlines() if self.starts.exists() else []

    async def started(self, count: int = 1) -> None:
        async with asyncio.timeout(20):
            while self.lines.count("start") < count:
                await asyncio.sleep(0.01)


def work_in(tmp_path: Path) -> Work:
    """A test's fixture."""
    return Work(tmp_path)


@contextlib.asynccontextmanager
async def opened(client: Client, address: str, op: Op = Op.RUN, **fields: Any) -> AsyncIterator[wire.Call]:
    """A connection of the client's, whose first state has come."""
    client.epoch += 1
    async with call(address, client.ticket, op, client.name, client.kwargs, **client.fields | fields) as one:
        one.on_state = client.check
        await one.state()
        yield one


async def begun(client: Client, address: str, end: int = 1000) -> None:
    """A connection that has brought the payload's beginning, durably, and was cut."""
    async with opened(client, address) as one:
        await one.chunk(client.payload[:end], 0, sync=True)
        await one.until(lambda state: state.offset == end)


async def refused(function: Any, *args: Any, **kwargs: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await function(*args, **kwargs)
    return caught.value


async def running(work: Work, client: Client, address: str) -> asyncio.Task[Outcome]:
    """A client's visit whose method runs."""
    before = work.lines.count("start")
    task = asyncio.create_task(client.visit(address))
    await work.started(before + 1)
    return task


async def left(task: asyncio.Task[Any]) -> None:
    """Cut a client's connection."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def entries(spool: Path) -> set[str]:
    return {path.name for path in spool.iterdir() if path.is_dir() and path.name != "workers"}


BOTH = pytest.mark.parametrize("way", ["aa", "ab"], ids=["same process", "other process"])
