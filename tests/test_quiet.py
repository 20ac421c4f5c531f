"""What is told of a run that says nothing itself: for how long, that its worker is stopped, that it goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

import aipod
from aipod.client import Event
from aipod.job.job import STOPPED
from aipod.job.watched import Keep, Told
from aipod.runner import GOES_ON, STOPPING
from aipod.spool.report import HEARD_EVERY
from aipod.wire.ai import Phase
from tests import test_cli
from tests.conftest import Serve, Served, children, run, wait_until
from tests.phases import until
from tests.spools import TICKETED, A, claimed, opened
from tests.test_job import fake_job


async def test_a_job_is_heard_of_when_it_starts_reports_and_logs() -> None:
    """Mutants seen: a phase that is not RUNNING has the seconds too; a log line does not count."""
    job = fake_job()
    assert job.state().quiet == 0
    job.enter(Phase.RUNNING)
    for report in (("0.5", "half", None), (None, None, "a line")):
        job.heard -= 1000
        assert job.state().quiet >= 1000
        job.report(float(report[0]) if report[0] else None, report[1], report[2])
        assert job.state().quiet < 1000
    job.heard -= 1000
    job.enter(Phase.QUEUED)
    assert job.state().quiet == 0
    job.enter(Phase.RUNNING)
    assert job.state().quiet < 1000


async def test_what_the_runner_says_goes_before_what_the_model_says_until_the_run_is_over() -> None:
    job = fake_job()
    job.enter(Phase.RUNNING)
    job.report(0.5, "half", None)
    changed = job.changed
    job.remark(STOPPING)
    assert changed.is_set()
    job.report(0.6, "more", None)
    assert (job.state().progress, job.state().message) == (pytest.approx(0.6), STOPPING)
    job.enter(Phase.QUEUED)
    assert job.state().message == "more"


async def test_another_process_knows_it_from_the_files(tmp_path: Path) -> None:
    """Without any that is written for it. Mutants seen: the log does not count; the same progress does not."""
    entry = claimed(opened(tmp_path), A, TICKETED)
    entry.report.note(0.5, "half", 1.0)
    entry.append_log("a line")
    files = [entry.path / name for name in ("state", "live", "log")]
    for file in files:
        for one in files:
            os.utime(one, (time.time() - 1000,) * 2)
        assert entry.quiet() >= 1000
        os.utime(file)
        assert entry.quiet() < 1000
        os.utime(file, (time.time() - 1000,) * 2)
    before = entry.path.stat().st_mtime_ns
    entry.report.note(0.5, "half", 1.0 + HEARD_EVERY - 0.1)
    assert entry.quiet() >= 1000
    entry.report.note(0.5, "half", 1.0 + HEARD_EVERY)
    assert entry.quiet() < 1000
    assert entry.path.stat().st_mtime_ns == before, "by it lists are ordered"
    told = Told(entry, "", Keep())
    told.learn({"phase": "RUNNING"}, {"quiet": 40})
    assert told.state().quiet == 40
    entry.destroy()
    assert entry.quiet() == 0


class Watch:
    """A gated job, followed."""

    def __init__(self, directory: Path) -> None:
        self.mark, self.gate = directory / "mark", directory / "gate"
        self.events: list[Event] = []

    async def begin(self, client: aipod.Client) -> aipod.Job:
        job = await client.submit("predict", mark=str(self.mark), gate=str(self.gate))
        await until(self.mark.exists)
        return job

    async def follow(self, job: aipod.Job) -> None:
        async for event in job.events():
            self.events.append(event)

    def says(self, message: str) -> bool:
        return bool(self.events) and (self.events[-1].phase, self.events[-1].message) == ("RUNNING", message)


def listed(served: Served) -> str:
    """The row of the only job."""
    rows = test_cli.aipod("jobs", "--to", served.address, forked=True).out.decode().splitlines()[1:]
    return rows[0] if rows else ""


def test_a_worker_that_is_stopped_is_told_and_logged_and_may_go_on(serve: Serve, tmp_path: Path) -> None:
    """Mutants seen: heartbeats say RUNNING and nothing else; the word stays."""
    served = serve("tests.models_lifecycle:Gated", "--tick", "0.1")
    watch = Watch(tmp_path)

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            job = await watch.begin(client)
            following = asyncio.create_task(watch.follow(job))
            (worker,) = children(served.process.pid)
            os.kill(worker, signal.SIGSTOP)
            await until(lambda: watch.says(STOPPED))
            await until(lambda: STOPPED in served.log_text())
            await asyncio.to_thread(wait_until, lambda: STOPPED in listed(served))
            os.kill(worker, signal.SIGCONT)
            await until(lambda: watch.says(""))
            watch.gate.touch()
            await following
            assert await job.wait() == "done"

    run(main)
    assert served.log_text().count(STOPPED) == 1
    assert watch.events[-1].phase == "DONE"


@pytest.mark.parametrize(("options", "word"), [((), STOPPING), (("--runner", "loop"), GOES_ON)], ids=["worker", "loop"])
def test_a_run_that_was_cancelled_and_goes_on_says_so(
    serve: Serve, tmp_path: Path, options: tuple[str, ...], word: str
) -> None:
    """To who watches here, to `aipod jobs`, and once to the log. Mutant seen: nobody notes it for other processes."""
    served = serve("tests.models_lifecycle:Gated", "--tick", "0.1", "--cancel-grace", "60", *options)
    watch = Watch(tmp_path)

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            job = await watch.begin(client)
            following = asyncio.create_task(watch.follow(job))
            await job.cancel()
            await until(lambda: watch.says(word))
            await asyncio.to_thread(wait_until, lambda: word in listed(served))
            assert served.log_text().count(word) == 1
            watch.gate.touch()
            await following
            with pytest.raises(aipod.JobCancelled):
                await job.wait()
            assert watch.events[-1].phase == "CANCELLED"
            assert watch.events[-1].message == ""

    run(main)


def test_a_method_over_its_timeout_in_a_thread_says_so(serve: Serve, tmp_path: Path) -> None:
    """As a cancelled one; what it returns then is not its answer."""
    served = serve("tests.models_lifecycle:Gated", "--runner", "loop")
    gate = tmp_path / "gate"

    def note(event: Event) -> None:
        if event.message == GOES_ON:
            assert event.phase == "RUNNING"
            gate.touch()

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            with pytest.raises(aipod.JobCancelled) as caught:
                await client.chaos(mark=str(tmp_path / "mark"), gate=str(gate), on_event=note)
            assert caught.value.reason == "DEADLINE_EXCEEDED"

    run(main)
    assert served.log_text().count(GOES_ON) == 1
