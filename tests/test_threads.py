"""`--runner thread`: several instances in the server's process, one job at a time each."""

from __future__ import annotations

from pathlib import Path

import pytest

import aipod
from aipod.client import Event
from tests.calls import calls, marked, own
from tests.conftest import Serve, children, run, wait_until
from tests.test_cli import aipod as command


def test_each_instance_runs_one_job_in_a_thread_of_the_server(serve: Serve, tmp_path: Path) -> None:
    """Mutants seen: one instance has all jobs at once; worker processes."""
    served = serve("tests.models_lifecycle:Work", "--runner", "thread", "--instances", "2")
    until, events = tmp_path / "until", list[Event]()
    marks = [tmp_path / "one", tmp_path / "two"]
    with calls() as threads:
        both = [
            threads.submit(own, served.address, "predict", kwargs={"mark": str(mark), "until": str(until)})
            for mark in marks
        ]
        assert [marked(mark) for mark in marks] == [str(served.process.pid)] * 2
        third = threads.submit(own, served.address, "turn", on_event=events.append)
        wait_until(lambda: third.done() or any(event.phase == "QUEUED" and event.heartbeats for event in events))
        assert not third.done()
        assert children(served.process.pid) == []
        until.touch()
        assert [job.result() for job in both] == ["done"] * 2
        assert third.result() == 0
    assert served.stop() == 0
    assert (served.data / f"closed-{served.process.pid}").exists()


def test_what_is_cancelled_in_a_thread_is_asked_to_stop_and_over_when_it_has(serve: Serve, tmp_path: Path) -> None:
    """One that does not look says so in its job's log, and is RUNNING until it ends. Mutant seen: it is told as
    cancelled while its thread goes on."""
    served = serve("tests.models_lifecycle:Taught", "--runner", "thread", "--cancel-grace", "0.2")
    mark, until = tmp_path / "mark", tmp_path / "until"
    heard, phases = "", list[str]()

    async def main() -> None:
        nonlocal heard
        async with aipod.Client(served.address) as client:
            job = await client.submit("train", b"new", version="v", kwargs={"mark": str(mark), "until": str(until)})
            async for event in job.events():
                phases.append(event.phase)
                heard += event.log
                if event.phase == "RUNNING" and mark.exists():
                    await job.cancel()
                if "train was asked to stop 0.2 s ago and goes on" in heard:
                    until.touch()
            with pytest.raises(aipod.JobCancelled):
                await job.wait()

    run(main)
    assert list(dict.fromkeys(phases))[-2:] == ["RUNNING", "CANCELLED"]
    assert "goes on" in heard
    assert not (served.data / "v").exists()
    assert own(served.address, "predict", version="v")[1] == served.process.pid


def test_one_that_looks_ends_by_itself(serve: Serve, tmp_path: Path) -> None:
    served = serve("tests.models_lifecycle:Work", "--runner", "thread")
    mark = tmp_path / "mark"
    with pytest.raises(aipod.JobCancelled):
        own(served.address, "predict", timeout=0.5, kwargs={"mark": str(mark), "until": str(tmp_path / "never")})
    wait_until(lambda: mark.read_text() == "cancelled")
    assert "goes on" not in served.log_text()


@pytest.mark.parametrize("runner", ["process", "thread"])
def test_async_methods_run_on_the_loop_only(tmp_path: Path, runner: str) -> None:
    where = ("--bind", "127.0.0.1:0", "--spool", str(tmp_path / "spool"), "--data", str(tmp_path / "data"))
    done = command("serve", "tests.models_lifecycle:Together", *where, "--runner", runner)
    assert (done.status, done.out) == (1, b"")
    assert done.last.startswith("aipod: BAD_RUNNER: tests.models_lifecycle:Together has async methods; ")
