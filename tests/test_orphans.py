"""Jobs whose server was killed go on although nobody asks for them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from aipod.codec import job_id
from aipod.spool import Journal, Spool
from aipod.wire.ai import Phase
from tests.conftest import Served, run, wait_until
from tests.pairs import MODEL, Work, left, running, work_in
from tests.spools import TICKETED, A, B, Broom, C, claimed, left_empty
from tests.wire import Client, Lost, attach, sync

spool = pytest.fixture(left_empty)
work = pytest.fixture(work_in)
OPTIONS = ("--tick", "0.2", "--drain", "0", "--cancel-grace", "1")


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Served]]:
    """Servers of one spool, one instance each."""
    started: list[Served] = []
    yield started
    for served in started:
        if served.process.poll() is None:
            assert served.stop() == 0, served.log_text()
            assert "a bug of aipod" not in served.log_text()


def phase(spool: Path, client: Client) -> str:
    return str(Journal(spool / job_id(client.ticket) / "state").read().get("phase"))


@pytest.mark.parametrize("name", ["wait", "wait_again"])
def test_a_job_in_line_is_run_and_one_that_ran_begins_again_or_has_failed(
    servers: list[Served], work: Work, tmp_path: Path, name: str
) -> None:
    """Nobody calls the next server. Mutant: the server adopts nothing at its start."""

    def start() -> Served:
        servers.append(Served(MODEL, tmp_path, OPTIONS, "127.0.0.1:0", forked=True))
        return servers[-1]

    client, waiting = work.client(name), work.client(size=10)

    async def leave() -> None:
        first = start()
        task = await running(work, client, first.address)
        queued = asyncio.create_task(waiting.visit(first.address))
        async with asyncio.timeout(20):
            while phase(first.spool, waiting) != "QUEUED":
                await asyncio.sleep(0.02)
        first.process.kill()
        first.process.communicate()
        for one in (task, queued):
            with contextlib.suppress(Lost):
                await left(one)

    run(leave)
    second = start()
    again = name == "wait_again"
    if again:
        wait_until(lambda: work.lines.count("start") >= 2)  # the one in line may have been first
        work.until.touch()
    wait_until(lambda: phase(second.spool, waiting) == "DONE")
    wait_until(lambda: phase(second.spool, client) == ("DONE" if again else "FAILED"))
    assert work.lines.count("start") == (3 if again else 2)

    async def ask() -> None:
        outcome = await attach(second.address, client.ticket)
        assert outcome.phase == (Phase.DONE if again else Phase.FAILED)
        assert (await attach(second.address, waiting.ticket)).phase == Phase.DONE

    run(ask)


def test_no_more_of_them_are_taken_up_than_there_may_be_jobs(servers: list[Served], work: Work, tmp_path: Path) -> None:
    """Each takes a descriptor. Mutant seen: all are taken up."""

    def start(*options: str) -> Served:
        servers.append(Served(MODEL, tmp_path, (*OPTIONS, *options), "127.0.0.1:0", forked=True))
        return servers[-1]

    waiting = [work.client("wait", b"%d" % number) for number in range(5)]

    def phases(served: Served) -> list[str]:
        return sorted(phase(served.spool, client) for client in waiting)

    async def leave() -> None:
        first = start()
        tasks = [asyncio.create_task(client.visit(first.address)) for client in waiting]
        async with asyncio.timeout(20):
            while phases(first) != ["QUEUED"] * 4 + ["RUNNING"]:
                await asyncio.sleep(0.02)
        await work.started()
        first.process.kill()
        first.process.communicate()
        for task in tasks:
            with contextlib.suppress(Lost):
                await left(task)

    run(leave)
    second = start("--max-jobs", "2")
    wait_until(lambda: second.log_text().count("taken over") == 2 and work.lines == ["start"] * 2)
    work.until.touch()
    wait_until(lambda: phases(second).count("DONE") == 2)
    assert second.log_text().count("taken over") == 2


def test_a_job_that_ends_each_server_is_left_to_who_asks_for_it(servers: list[Served], tmp_path: Path) -> None:
    """A supervisor would start servers for ever. A drain is no such end.

    Mutants seen: it is taken up each time; nobody counts; a drain counts.
    """
    job = Client("chaos", b"", {"version": "bad"})
    go = tmp_path / "data" / "bad" / "go"
    go.parent.mkdir(parents=True)

    def start() -> Served:
        servers.append(Served("tests.models_hostile:KillsServer", tmp_path, OPTIONS, "127.0.0.1:0", forked=True))
        return servers[-1]

    def taken_over(served: Served) -> bool:
        return f"job {job_id(job.ticket)} chaos@bad: taken over" in served.log_text()

    def dies(served: Served) -> None:
        go.touch()
        served.process.communicate(timeout=30)
        go.unlink()

    async def submit() -> None:
        task = asyncio.create_task(job.visit(start().address))
        async with asyncio.timeout(20):
            while phase(servers[-1].spool, job) != "QUEUED":
                await asyncio.sleep(0.02)
        dies(servers[-1])
        with contextlib.suppress(Lost):
            await task

    run(submit)
    for end in (dies, dies, Served.stop, dies, dies, dies):
        served = start()
        wait_until(functools.partial(taken_over, served))
        end(served)
    assert "taken up 3 times" in served.log_text()
    served = start()
    other = Client("chaos", b"", {})
    assert sync(other.visit, served.address).json == 0
    assert phase(served.spool, job) == "QUEUED"
    assert not taken_over(served)
    go.touch()
    with pytest.raises(Lost):
        sync(job.visit, served.address)
    assert taken_over(served)
    served.process.communicate(timeout=30)


def test_a_sweep_tells_of_jobs_whose_process_has_died_meanwhile(spool: Spool) -> None:
    """Nothing in the entry has changed since the last sweep. Mutant: only what is new is looked at."""
    broom = Broom(spool)
    entries = [claimed(spool, name, TICKETED) for name in (A, B, C)]
    for entry, state in zip(entries, ("QUEUED", "RUNNING", "RECEIVING"), strict=True):
        entry.record({"phase": state})
    assert broom.sweep() == 0
    assert broom.orphans() == []
    for entry in entries:
        entry.let_go()
    assert broom.sweep() == 0
    assert sorted(broom.orphans()) == [A, B]
    held = spool.hold(A)
    assert held is not None
    assert broom.orphans() == [B]
    held.store({"phase": "DONE"})
    held.let_go()
    assert broom.sweep() == 0
    assert broom.orphans() == [B]
    for name in (A, B, C):
        with spool.holding(name) as entry:
            assert entry is not None
            entry.destroy()
    assert broom.sweep() == 0
    assert broom.orphans() == []
