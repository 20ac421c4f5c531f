"""An upload that its caller has left: for good it is ended, however slow the disk is; else it waits to go on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from aipod.codec import job_id
from aipod.config import Config
from aipod.errors import Refused
from aipod.job.job import Job
from aipod.job.request import Request
from aipod.metrics import Metrics
from aipod.service.drain import Drain
from aipod.service.jobs import Jobs
from aipod.spool import Spool
from aipod.versions import Versions
from aipod.wire.ai import Op, Open, Phase, Raw
from tests.conftest import left_in

TICKET = b"t" * 16
ID = job_id(TICKET)


class SlowSpool(Spool):
    """A disk that takes its time to say how much room there is, where `slow` is given."""

    slow: tuple[threading.Event, threading.Event] | None = None  # reached, passed

    def check_space(self, wanted: int) -> None:
        if self.slow is not None:
            reached, passed = self.slow
            reached.set()
            assert passed.wait(30)
        super().check_space(wanted)


@contextmanager
def slow_journal(job: Job) -> Iterator[None]:
    """Whatever is to be written into the job's journal waits until the block ends."""
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with job.entry._settling:
            held.set()
            assert over.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    try:
        yield
    finally:
        over.set()
        thread.join()


def jobs_of(spool: Spool, nursery: trio.Nursery) -> Jobs:
    methods = {"predict": {"restartable": False, "timeout": None}}
    return Jobs(Config(), methods, spool, Versions(spool.path.parent / "data"), None, nursery, Metrics())


def request() -> Request:
    return Request(ID, "predict", "", b"{}", None, Open(ticket=TICKET, op=Op.RUN, epoch=1), Raw(), {})


async def upload(jobs: Jobs) -> Job:
    """A job with a byte that is not durable yet."""
    job = await jobs.find(request(), lambda: None)
    assert isinstance(job, Job)
    await trio.to_thread.run_sync(job.entry.write, b"x")
    return job


async def test_a_job_that_was_let_go_of_and_is_still_known_here_is_not_adopted(tmp_path: Path) -> None:
    """A run lets go of its entry before its job leaves `held`. Mutant seen: an AssertionError (as it once was)."""
    spool = Spool.open(tmp_path / "spool", "app", reserve=0)
    async with trio.open_nursery() as nursery:
        jobs = jobs_of(spool, nursery)
        job = await upload(jobs)
        await trio.to_thread.run_sync(job.entry.record, {"phase": "QUEUED", "offset": 1})
        await trio.to_thread.run_sync(job.entry.let_go)
        await jobs.adopt(ID)
        assert jobs.held == {ID: job}
    assert not spool.is_held(ID)
    assert spool.look(ID).read()["phase"] == "QUEUED"


@pytest.mark.parametrize("release", [False, True])
async def test_a_cancel_that_comes_while_the_upload_is_let_go(tmp_path: Path, release: bool) -> None:
    """The call that brought it is gone and does not look at the job any more.

    Mutant: `end` returns at once where the job is held; the upload then stays for its whole time in the spool.
    """
    spool = Spool.open(tmp_path / "spool", "app", reserve=0)
    async with trio.open_nursery() as nursery:
        jobs = jobs_of(spool, nursery)
        job = await upload(jobs)
        ended: list[Phase] = []

        async def end() -> None:
            ended.append((await jobs.end(ID, release=release)).phase)

        async with trio.open_nursery() as calls:
            with slow_journal(job):
                calls.start_soon(jobs.leave_upload, job)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert ID in jobs.held
                calls.start_soon(end)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert ended == []
    assert ended == [Phase.CANCELLED]
    assert spool.look(ID).read()["phase"] == "CANCELLED"
    assert left_in(spool.path) == []
    assert not spool.is_held(ID)


async def test_a_cancel_whose_caller_does_not_wait_until_the_upload_is_let_go(tmp_path: Path) -> None:
    """`end` waits for `TAKE_OVER` at most, its caller perhaps less, and a disk may take longer.

    Mutant seen: `leave_upload` looks whether the job is to be stopped before it flushes, and not again.
    """
    spool = Spool.open(tmp_path / "spool", "app", reserve=0)
    async with trio.open_nursery() as nursery:
        jobs = jobs_of(spool, nursery)
        job = await upload(jobs)
        async with trio.open_nursery() as calls:
            with slow_journal(job):
                calls.start_soon(jobs.leave_upload, job)
                await trio.testing.wait_all_tasks_blocked(0.05)
                async with trio.open_nursery() as caller:
                    caller.start_soon(functools.partial(jobs.end, ID, release=False))
                    await trio.testing.wait_all_tasks_blocked(0.05)
                    caller.cancel_scope.cancel()
    assert spool.look(ID).read()["phase"] == "CANCELLED"
    assert left_in(spool.path) == []
    assert not spool.is_held(ID)


async def test_a_cancel_that_comes_before_the_upload_is_let_go(tmp_path: Path) -> None:
    """Mutant: `leave_upload` does not look whether the job was to be stopped."""
    spool = Spool.open(tmp_path / "spool", "app", reserve=0)
    async with trio.open_nursery() as nursery:
        jobs = jobs_of(spool, nursery)
        job = await upload(jobs)
        job.stop("it was cancelled by its client")
        await jobs.leave_upload(job)
    assert job.phase is Phase.CANCELLED
    assert spool.look(ID).read()["phase"] == "CANCELLED"
    assert left_in(spool.path) == []


async def test_a_caller_that_leaves_while_its_entry_is_made_leaves_nothing(tmp_path: Path) -> None:
    """A cancel that came meanwhile has found nothing, and will not come again.

    Mutant: the entry is let go and not removed.
    """
    spool = SlowSpool.open(tmp_path / "spool", "app", reserve=0)
    reached, passed = threading.Event(), threading.Event()
    async with trio.open_nursery() as nursery:
        jobs = jobs_of(spool, nursery)
        async with trio.open_nursery() as call:
            spool.slow = reached, passed
            call.start_soon(jobs.find, request(), lambda: None)
            assert await trio.to_thread.run_sync(reached.wait, 30)
            with pytest.raises(Refused) as refused:
                await jobs.end(ID, release=False)
            assert refused.value.reason == "NOT_FOUND"
            call.cancel_scope.cancel()
            passed.set()
        assert jobs.held == {}
    assert not spool.look(ID).path.exists()
    assert left_in(spool.path, uploads=True) == []


async def test_an_upload_whose_entry_is_made_as_the_drain_begins_is_left_to_the_next_server(tmp_path: Path) -> None:
    """Mutant seen: it goes on, and the drain waits for its end."""
    spool = SlowSpool.open(tmp_path / "spool", "app", reserve=0)
    spool.slow = reached, passed = threading.Event(), threading.Event()
    begun: list[Job] = []
    async with trio.open_nursery() as nursery:
        jobs = jobs_of(spool, nursery)

        async def begin() -> None:
            job = await jobs.find(request(), lambda: None)
            assert isinstance(job, Job)
            begun.append(job)

        async with trio.open_nursery() as calls:
            calls.start_soon(begin)
            assert await trio.to_thread.run_sync(reached.wait, 30)
            await Drain(jobs, 0).run(0, lambda text: None)
            passed.set()
        (job,) = begun
        assert (job.handed_over, job.upload.cancel_called) == (True, True)
        await jobs.leave_upload(job)
    assert spool.look(ID).read().get("phase", "RECEIVING") == "RECEIVING"


async def test_a_caller_that_comes_back_to_what_the_disk_has_not_kept_begins_anew(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path / "spool", "app", reserve=0)
    async with trio.open_nursery() as nursery:
        jobs = jobs_of(spool, nursery)
        job = await upload(jobs)
        job.entry.record({"offset": 1, "lost": True})
        await jobs.leave_upload(job)
        again = await jobs.find(request(), lambda: None)
        assert isinstance(again, Job)
        assert (again.phase, again.durable, again.entry.written) == (Phase.RECEIVING, 0, 0)
        assert jobs.held == {ID: again}
        await trio.to_thread.run_sync(again.entry.destroy)
    assert left_in(spool.path) == []


async def test_a_cancel_that_meets_an_entry_in_the_moment_of_its_removal(tmp_path: Path) -> None:
    """Mutant: the missing directory is an error, which the caller of CANCEL is told of as a bug."""
    spool = Spool.open(tmp_path / "spool", "app", reserve=0)
    spool.look(ID).ask_to_stop()
    assert left_in(spool.path) == []
