"""A job that comes whole while an instance is free: what comes between its first line, that it runs, and its start."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from aipod.codec import frame, job_id
from aipod.config import Config
from aipod.errors import Refused
from aipod.job.job import Job
from aipod.job.request import Request
from aipod.metrics import Metrics
from aipod.pool import Pool, open_pool
from aipod.results import INLINE
from aipod.runner.fake import FakeRunner
from aipod.service.jobs import Jobs
from aipod.service.place import Place
from aipod.spool import Spool
from aipod.versions import Versions
from aipod.wire.ai import Op, Open, Phase, Raw

TICKET, BEFORE = b"t" * 16, b"b" * 16
ID = job_id(TICKET)


class Gated(Spool):
    """A disk that stands still where a new entry asks for room, if `closed`."""

    closed = False

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.reached, self.passed = threading.Event(), threading.Event()

    def check_space(self, wanted: int) -> None:
        if self.closed:
            self.reached.set()
            assert self.passed.wait(30)
        super().check_space(wanted)


class Server:
    """The jobs of a server whose fake model answers with its payload, with one instance, which is free."""

    def __init__(self, home: Path, pool: Pool, runners: list[FakeRunner], nursery: trio.Nursery) -> None:
        self.spool = Gated.open(home / "spool", "app", reserve=0)
        self.pool, self.runners, self.nursery = pool, runners, nursery
        methods = {"predict": {"restartable": False, "timeout": None}}
        queue = functools.partial(Place, pool)
        self.jobs = Jobs(
            Config(tick=0.05), methods, self.spool, Versions(home / "data"), queue, nursery, Metrics(["predict"])
        )

    async def find(self, ticket: bytes = TICKET, kwargs: bytes = b"{}") -> Any:
        open_ = Open(ticket=ticket, op=Op.RUN, epoch=1, spool=self.spool.id)
        first = Raw(data=frame(b"payload", 3), last=True)
        request = Request(job_id(ticket), "predict", "", kwargs, 7, open_, first, {})
        return await self.jobs.find(request, lambda: None)

    def lines(self) -> list[tuple[str, int]]:
        """Phase and attempt behind each line of the job's journal."""
        attempt, told = 0, []
        for line in (self.spool.path / ID / "state").read_bytes().splitlines():
            fields = json.loads(line.partition(b" ")[2])
            attempt = fields.get("attempt", attempt)
            if "phase" in fields:  # else it is of a tick
                told.append((fields["phase"], attempt))
        return told

    @property
    def runs(self) -> int:
        return sum(runner.verbs.count("run predict") for runner in self.runners) - 1  # that of `BEFORE`

    async def settle(self) -> None:
        """Wait until nothing is under way, and the one instance is free again."""
        with trio.fail_after(20):
            while self.jobs.held or self.pool.states() != {"loading": 0, "idle": 1, "busy": 0, "closing": 0}:
                await trio.sleep(0.01)


@asynccontextmanager
async def open_server(home: Path) -> AsyncIterator[Server]:
    runners: list[FakeRunner] = []

    def make(version: str) -> FakeRunner:
        runners.append(FakeRunner({"predict": lambda context, path: path.read_text()}, lock_name="worker-1"))
        return runners[-1]

    (home / "data").mkdir()
    async with open_pool(make, shared=False, per_version=1, total=1) as pool, trio.open_nursery() as nursery:
        server = Server(home, pool, runners, nursery)
        await over(await server.find(BEFORE))
        await server.settle()
        yield server
        nursery.cancel_scope.cancel()


async def over(job: Any) -> Phase:
    assert isinstance(job, Job)
    with trio.fail_after(20):
        await job.over.wait()
    return job.phase


async def test_its_first_line_is_that_it_runs(tmp_path: Path) -> None:
    """Mutants seen: it is written by itself, or twice; the instance stays taken."""
    async with open_server(tmp_path) as server:
        assert await over(await server.find()) == Phase.DONE
        await server.settle()
        assert server.lines() == [("RUNNING", 1), ("DONE", 1)]
        assert server.runs == 1


async def test_long_kwargs_and_no_instance_have_lines_of_their_own(tmp_path: Path) -> None:
    """Mutants seen: kwargs that are not in the journal do not matter; who waits for nothing is RUNNING."""
    async with open_server(tmp_path) as server:
        assert (
            await over(await server.find(kwargs=b'{"a": "%s"}' % (b"x" * INLINE))) == Phase.FAILED
        )  # no such argument
        assert server.lines()[:2] == [("QUEUED", 0), ("RUNNING", 1)]
        taken = Place(server.pool, "", "predict")
        assert taken.take() is not None
        job = await server.find(b"u" * 16)
        assert (job.phase, job.place, job.begun) == (Phase.QUEUED, 0, False)
        # Before its task has begun. Mutant seen: the place is taken there, and until then it is told to be the first.
        assert (await server.find(b"v" * 16)).place == 1
        taken.give_back()
        assert await over(job) == Phase.DONE
        await server.settle()


@pytest.mark.parametrize(
    "what",
    ["its server drains", "its caller leaves", "its caller cancels it", "the disk is full", "somebody else has it"],
)
async def test_what_comes_while_its_line_is_written(tmp_path: Path, what: str) -> None:
    """Whatever it is, the instance is free behind it, and nothing was run, but for a caller who leaves: the next call
    may have been told of the job by then. Who cancels it as well is heard, though there is no job yet.

    Mutants seen: the instance stays taken; what was not started is left as one that ran; the job goes with its caller;
    who cancels it is told that there is none.
    """
    async with open_server(tmp_path) as server:
        if what == "somebody else has it":
            other = server.spool.claim(ID, {"method": "predict"}, b"{}", size=7)
            assert other is not None
            other.let_go()
        server.spool.closed = what != "somebody else has it"
        found: list[Any] = []
        leaves = trio.CancelScope()

        async def find() -> None:
            with leaves:
                try:
                    found.append(await server.find())
                except Refused as exc:
                    found.append(exc.reason)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(find)
            if server.spool.closed:
                assert await trio.to_thread.run_sync(server.spool.reached.wait, 20)
                assert server.pool.states()["busy"] == 1
            match what:
                case "its server drains":
                    server.jobs.draining = True
                case "its caller leaves":
                    leaves.cancel()
                case "its caller cancels it":
                    leaves.cancel()
                    nursery.start_soon(functools.partial(server.jobs.end, ID, release=False))
                    with trio.fail_after(20):
                        while not server.jobs.room._awaited:
                            await trio.sleep(0.001)
                case "the disk is full":
                    server.spool.reserve = 1 << 62
            server.spool.passed.set()
        goes_on = what == "its caller leaves"
        match what:
            case "its server drains":
                assert await over(found[0]) == Phase.QUEUED
                assert server.lines() == [("RUNNING", 1), ("QUEUED", 0)]
            case "its caller leaves":
                (job,) = server.jobs.held.values()
                assert await over(job) == Phase.DONE
                assert server.lines() == [("RUNNING", 1), ("DONE", 1)]
            case "its caller cancels it":
                await server.settle()
                assert server.lines() in ([("RUNNING", 1), (phase, 1)] for phase in ("CANCELLED", "DONE"))
                goes_on = server.lines()[-1][0] == "DONE"  # it may have come too late
            case "the disk is full":
                assert found == ["SPOOL_FULL"]
            case _:
                assert found == ["OTHER_REQUEST"]
        await server.settle()
        assert server.runs == goes_on
        assert not server.spool.is_held(ID)


@pytest.mark.parametrize(
    ("what", "phase", "lines"),
    [
        ("its server ends", Phase.QUEUED, [("RUNNING", 1), ("QUEUED", 0)]),
        ("its client cancels it", Phase.CANCELLED, [("RUNNING", 1), ("CANCELLED", 1)]),
        ("its worker has died", Phase.DONE, [("RUNNING", 1), ("QUEUED", 0), ("RUNNING", 1), ("DONE", 1)]),
    ],
)
async def test_what_comes_before_its_start(
    tmp_path: Path, what: str, phase: Phase, lines: list[tuple[str, int]]
) -> None:
    """Mutants seen: what was not started is left as one that ran; a second start is not written down."""
    async with open_server(tmp_path) as server:
        job = await server.find()
        match what:
            case "its server ends":
                server.nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    assert await over(job) == phase
                    assert server.lines() == lines
                    assert server.runs == 0
                    return
            case "its client cancels it":
                job.stop("it was cancelled")
            case _:
                server.runners[0].crash()
        assert await over(job) == phase
        assert server.lines() == lines
        assert server.runs == (phase == Phase.DONE)
        await server.settle()
