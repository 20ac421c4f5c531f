"""What every runner promises (`aipod.runner.Runner`), and what only some can."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from aipod.errors import AipodError, JobFailed, ModelError
from aipod.results import Result
from aipod.runner import GOES_ON, STOPPING, Runner, RunnerBroken, Task
from aipod.runner.fake import FakeRunner
from aipod.runner.loop import LoopRunner, ThreadRunner
from aipod.runner.process import ProcessRunner, _startable
from aipod.spool import Spool
from aipod.spool.locks import is_locked
from aipod.transport import bridge
from tests import models_runner
from tests.conftest import alive, children

# Kind of runner and the class in models_runner that it runs.
KINDS = {
    "process": "Plain",
    "thread": "Plain",
    "threads": "Plain",  # of the loop runner
    "trio": "Trio",
    "asyncio": "Asyncio",
    "fake": "Trio",
}
Make = Callable[..., Runner]


class Fixture:
    """Makes runners of one kind, and tasks for them."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        self.data = path / "data"
        self.spool = Spool.open(path / "spool", "app")
        self.job = path / "job"
        self.data.mkdir()
        self.job.mkdir()
        (self.job / "in").write_bytes(b"payload")

    def make(self, suffix: str = "", *, load_timeout: float = 60, grace: float = 5) -> Runner:
        name = KINDS[self.kind] + suffix
        if self.kind == "process":
            spec = f"tests.models_runner:{name}"
            return ProcessRunner(spec, "v1", self.data, self.spool, load_timeout=load_timeout, grace=grace)
        if self.kind != "fake":
            make = ThreadRunner if self.kind == "thread" else LoopRunner
            return make(f"tests.models_runner:{name}", "v1", self.data, load_timeout=load_timeout, grace=grace)
        model = getattr(models_runner, name)()
        model.version, model.data_dir = "v1", self.data
        names = [name for name in vars(type(model)) if not name.startswith("_") and name not in ("load", "close")]
        return FakeRunner({name: getattr(model, name) for name in names}, load=model.load, close=model.close)

    def task(self, method: str, **kwargs: Any) -> Task:
        return Task(
            job_id="0" * 32,
            method=method,
            version="v1",
            kwargs=json.dumps(kwargs).encode(),
            metadata={"x-custom": "yes"},
            payload=self.job / "in",
            work_dir=str(self.job / "work"),
            res=str(self.job / "res"),
            new_version=str(self.data / ".new"),
            timeout=None,
        )

    async def appears(self, name: str) -> None:
        with trio.fail_after(10):
            while not (self.data / name).exists():
                await trio.sleep(0.01)


@pytest.fixture(params=KINDS)
async def its(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Fixture]:
    before = set(children(os.getpid()))
    async with bridge.open_loop():
        its = Fixture(request.param, tmp_path)
        yield its
    assert set(children(os.getpid())) <= before
    assert list(its.spool.workers.iterdir()) == []


def ignore(*report: object) -> None: ...


async def test_start_describes_and_loads_and_shutdown_closes(its: Fixture) -> None:
    runner = its.make()
    description = await runner.start()
    assert {"give", "talk", "boom", "forever"} <= set(description.methods)
    assert not {"load", "close"} & set(description.methods)
    assert (its.data / "loaded").read_text() == "v1"
    assert not runner.broken
    await runner.shutdown()
    assert (its.data / "closed").exists()
    assert runner.broken
    assert await runner.wait() in (0, None)


@pytest.mark.parametrize(
    ("kind", "result", "content"),
    [
        ("json", Result("json", b'{"payload": "payload", "top": 5}'), None),
        ("long json", Result("json"), b'"' + b"x" * models_runner.LONG + b'"'),
        ("bytes", Result("bytes", b"\xff\x00"), None),
        ("long bytes", Result("bytes"), b"x" * models_runner.LONG),
        ("file", Result("file"), b"in a file"),
        ("payload", Result("file"), b"payload"),
    ],
)
async def test_results_of_every_kind(its: Fixture, kind: str, result: Result, content: bytes | None) -> None:
    runner = its.make()
    await runner.start()
    task = its.task("give", kind=kind)
    assert await runner.run(task, ignore) == result
    res = Path(task.res)
    assert (res.read_bytes() if res.exists() else None) == content
    await runner.shutdown()


async def test_what_a_method_raises_and_what_cannot_be_sent(its: Fixture) -> None:
    runner = its.make()
    await runner.start()
    with pytest.raises(ModelError, match="no such word") as model_error:
        await runner.run(its.task("boom"), ignore)
    assert model_error.value.metadata["type"] == "KeyError"
    assert "models_runner.py" in model_error.value.metadata["trace"]
    with pytest.raises(ModelError) as exited:
        await runner.run(its.task("exit"), ignore)
    assert exited.value.metadata["type"] == "SystemExit"
    for kind, reason in (("object", "RESULT_NOT_JSON"), ("missing", "RESULT_NO_FILE")):
        with pytest.raises(JobFailed) as bad:
            await runner.run(its.task("give", kind=kind), ignore)
        assert bad.value.reason == reason
    for method in ("interrupt", "mute"):
        with pytest.raises(ModelError) as caught:
            await runner.run(its.task(method), ignore)
        assert caught.value.metadata["type"] == {"interrupt": "KeyboardInterrupt", "mute": "Mute"}[method]
    # None of that is the runner's end.
    assert await runner.run(its.task("give", kind="bytes"), ignore) == Result("bytes", b"\xff\x00")
    await runner.shutdown()


async def test_reports_come_in_order_and_before_the_result(its: Fixture) -> None:
    runner = its.make()
    await runner.start()
    steps: list[tuple[float, str | None]] = []
    text = ""

    def report(progress: float | None, message: str | None, log: str | None) -> None:
        nonlocal text
        if progress is not None:
            steps.append((progress, message))
        if log is not None:
            text += log if log.endswith("\n") else log + "\n"

    await runner.run(its.task("talk"), report)
    assert text == "".join(f"line {n}\n" for n in range(100))
    assert steps == sorted(steps)
    assert steps[-1] == (0.99, "step 99")
    await runner.shutdown()


async def test_cancel_stops_the_method_and_returns_when_it_has_ended(its: Fixture) -> None:
    runner = its.make()
    await runner.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runner.run, its.task("forever"), ignore)
        await its.appears("running")
        nursery.cancel_scope.cancel()
    assert (its.data / "stopped").exists()
    assert not runner.broken
    assert await runner.run(its.task("give", kind="bytes"), ignore) == Result("bytes", b"\xff\x00")
    await runner.shutdown()


async def test_a_thread_that_outlives_its_run_hears_of_that_and_takes_nothing_from_the_next(its: Fixture) -> None:
    """Mutants seen: its looks read the next run's task, or its cancel."""
    runner = its.make()
    await runner.start()
    for turn in range(10):
        await runner.run(its.task("straggle"), ignore)
        if turn % 2:
            assert await runner.run(its.task("give", kind="bytes"), ignore) == Result("bytes", b"\xff\x00")
            continue
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.run, its.task("forever"), ignore)
            await its.appears("running")
            nursery.cancel_scope.cancel()
        assert not runner.broken
        (its.data / "running").unlink()
    await its.appears("heard")
    await runner.shutdown()


@pytest.mark.parametrize("its", ["thread", "threads"], indirect=True)
async def test_a_thread_that_does_not_obey_is_said_to_go_on_and_is_waited_for(
    its: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    """Mutants seen: the run is over when it is cancelled; nobody hears that it is not; that is said of every run."""
    runner = its.make(grace=0.1)
    await runner.start()
    ended = trio.Event()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def run() -> None:
            try:
                await runner.run(its.task("deaf"), ignore)
            finally:
                ended.set()

        await its.appears("running")
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True), trio.fail_after(10):
            while "deaf was asked to stop 0.1 s ago and goes on" not in caplog.text:
                await trio.sleep(0.01)
            assert not ended.is_set()
            (its.data / "enough").touch()
            await ended.wait()
    assert await runner.run(its.task("give", kind="bytes"), ignore) == Result("bytes", b"\xff\x00")
    await runner.shutdown()
    assert caplog.text.count("goes on") == 1


async def test_a_run_that_is_cancelled_says_so_and_whether_it_can_be_stopped(its: Fixture) -> None:
    """Before it has ended; one that ends by itself says nothing. Mutants seen: a thread is waited for; silence."""
    runner = its.make()
    await runner.start()
    said: list[str] = []
    task = dataclasses.replace(its.task("forever"), remark=said.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runner.run, task, ignore)
        await its.appears("running")
        assert said == []
        nursery.cancel_scope.cancel()
    assert said == [GOES_ON if its.kind in ("thread", "threads") else STOPPING]
    await runner.run(dataclasses.replace(its.task("give", kind="json"), remark=said.append), ignore)
    assert len(said) == 1
    await runner.shutdown()


async def test_whether_its_process_is_stopped(its: Fixture) -> None:
    """Mutants seen: it is asked of a process that has gone; a name with a T in it is taken for the state."""
    runner = its.make()
    assert not runner.stopped
    await runner.start()
    assert not runner.stopped
    if isinstance(runner, ProcessRunner):
        assert runner._process is not None
        os.kill(runner._process.pid, signal.SIGSTOP)
        with trio.fail_after(10):
            while not runner.stopped:
                await trio.sleep(0.01)
        os.kill(runner._process.pid, signal.SIGCONT)
        with trio.fail_after(10):
            while runner.stopped:
                await trio.sleep(0.01)
    await runner.shutdown()
    assert not runner.stopped


async def test_a_run_that_is_cancelled_before_it_starts_does_not_start(its: Fixture) -> None:
    runner = its.make()
    await runner.start()
    with trio.CancelScope() as scope:
        scope.cancel()
        await runner.run(its.task("forever"), ignore)
    assert scope.cancelled_caught
    assert not runner.broken
    assert not (its.data / "running").exists()
    await runner.shutdown()


async def test_a_runner_that_was_shut_down_is_broken(its: Fixture) -> None:
    runner = its.make()
    await runner.start()
    await runner.shutdown()
    with pytest.raises(RunnerBroken):
        await runner.run(its.task("talk"), ignore)


async def test_a_load_that_fails(its: Fixture) -> None:
    """No method has run, and none has raised. Mutant seen: it is MODEL_ERROR."""
    with pytest.raises(JobFailed, match=r"^while it loaded: no weights here$") as caught:
        await its.make("Fails").start()
    assert (type(caught.value), caught.value.reason) == (JobFailed, "LOAD_FAILED")
    assert caught.value.metadata["type"] == "OSError"
    assert "models_runner.py" in caught.value.metadata["trace"]


async def test_a_start_that_is_cancelled_leaves_nothing(its: Fixture) -> None:
    if its.kind in ("thread", "threads"):
        pytest.skip("a thread cannot be stopped")
    runner = its.make("Slow")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runner.start)
        await its.appears("loading")
        nursery.cancel_scope.cancel()
    if its.kind == "process":
        assert not alive(int((its.data / "loading").read_text()))


async def test_a_load_that_takes_too_long(its: Fixture) -> None:
    if its.kind == "fake":
        pytest.skip("has no such limit")
    with pytest.raises(JobFailed, match="did not load within 1 s") as caught:
        await its.make("Slow", load_timeout=1).start()
    assert caught.value.reason == "LOAD_FAILED"


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[Fixture]:
    its = Fixture("process", tmp_path)
    yield its
    assert list(its.spool.workers.iterdir()) == []


async def test_a_crash_is_told_and_the_runner_is_broken(process: Fixture) -> None:
    runner = process.make()
    await runner.start()
    with pytest.raises(JobFailed, match="SIGKILL") as caught:
        await runner.run(process.task("crash"), ignore)
    assert caught.value.reason == "WORKER_CRASHED"
    assert caught.value.metadata == {"signal": "SIGKILL"}
    assert runner.broken
    assert await runner.wait() == -9
    with pytest.raises(RunnerBroken):
        await runner.run(process.task("talk"), ignore)


@pytest.mark.parametrize(
    ("how", "text", "metadata"),
    [
        ("kill", "was killed by SIGKILL (out of memory?) while it loaded", {"signal": "SIGKILL"}),
        ("exit", "exited with status 7 while it loaded", {"exit": "7"}),
    ],
)
async def test_a_crash_in_load_interrupts_no_method(
    process: Fixture, how: str, text: str, metadata: dict[str, str]
) -> None:
    """Mutant seen: it is WORKER_CRASHED, and to the caller `Interrupted`."""
    (process.data / "how").write_text(how)
    with pytest.raises(JobFailed) as caught:
        await process.make("Dies").start()
    error = caught.value
    assert (type(error), error.reason, error.message) == (JobFailed, "LOAD_FAILED", f"the worker process {text}")
    assert error.metadata == metadata


async def test_a_crash_is_seen_and_cleaned_up_though_the_model_has_forked(process: Fixture) -> None:
    runner = process.make()
    await runner.start()
    with trio.fail_after(10), pytest.raises(JobFailed, match="SIGKILL"):
        await runner.run(process.task("fork"), ignore)
    left = int((process.data / "running").read_text())
    with trio.fail_after(10):
        while alive(left):
            await trio.sleep(0.01)


async def test_a_worker_that_does_not_obey_is_ended(process: Fixture) -> None:
    runner = process.make(grace=0.2)
    await runner.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runner.run, process.task("stubborn"), ignore)
        await process.appears("running")
        nursery.cancel_scope.cancel()
    assert not alive(int((process.data / "running").read_text()))
    assert runner.broken


async def test_a_shutdown_that_is_cancelled_leaves_no_process(process: Fixture) -> None:
    runner = process.make()
    await runner.start()
    with trio.CancelScope() as scope:
        scope.cancel()
        await runner.shutdown()
    assert await runner.wait() is not None


async def test_a_worker_that_dies_before_it_has_read_its_task_has_not_started_it(process: Fixture) -> None:
    """Mutant seen: the end of its socket says WORKER_CRASHED, whatever was unread in it."""
    before = set(children(os.getpid()))
    runner = process.make()
    await runner.start()
    (worker,) = set(children(os.getpid())) - before
    os.kill(worker, signal.SIGSTOP)
    os.waitid(os.P_PID, worker, os.WSTOPPED)  # until then a read under way would still take the task
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def run() -> None:
            with pytest.raises(RunnerBroken):
                await runner.run(process.task("forever"), ignore)

        await trio.testing.wait_all_tasks_blocked()
        os.kill(worker, signal.SIGKILL)
    assert runner.broken
    assert not (process.data / "running").exists()


async def test_a_worker_s_lock_tells_of_one_run(process: Fixture) -> None:
    """I7: held under the name of a run until that is over, though the worker lives on; then under the next one's.

    Mutant seen: the lock keeps its name.
    """
    runner = process.make()
    await runner.start()

    def held(name: str) -> bool:
        return is_locked(process.spool.worker_lock(name))

    first = runner.lock_name
    assert held(first)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runner.run, process.task("forever"), ignore)
        await process.appears("running")
        assert (runner.lock_name, held(first)) == (first, True)
        nursery.cancel_scope.cancel()
    names = [first]
    for method in ("boom", "talk"):
        assert not held(names[-1])
        assert held(runner.lock_name)
        names.append(runner.lock_name)
        with contextlib.suppress(ModelError):
            await runner.run(process.task(method), ignore)
    assert len({*names, runner.lock_name}) == 4
    assert [path.name for path in process.spool.workers.iterdir()] == [f"{runner.lock_name}.lock"]
    await runner.shutdown()


async def test_what_a_model_has_forked_does_not_hold_the_worker_s_lock(process: Fixture) -> None:
    """I7: else the run is not over for those who recover it, for as long as that process lives.

    Mutant seen: only what the worker executes lets go of it.
    """
    before = set(children(os.getpid()))
    runner = process.make()
    await runner.start()
    (worker,) = set(children(os.getpid())) - before
    lock = process.job / "lock"
    os.link(process.spool.worker_lock(runner.lock_name), lock)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def run() -> None:
            with pytest.raises(JobFailed, match="SIGKILL"):
                await runner.run(process.task("detach"), ignore)

        await process.appears("running")
        assert is_locked(lock)
        os.kill(worker, signal.SIGKILL)
    left = int((process.data / "running").read_text())
    try:
        assert alive(left)
        assert not is_locked(lock)
    finally:
        os.kill(left, signal.SIGKILL)


async def test_an_interpreter_that_is_gone_is_no_bug_and_leaves_nothing(
    process: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was is for the server's log only. Mutant seen: the OSError is told as it came."""
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(JobFailed, match="cannot start a worker process: No such file or directory; ") as caught:
        await process.make().start()
    assert caught.value.reason == "LOAD_FAILED"
    assert "python" in caught.value.metadata["trace"]
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        *((getattr(errno, name), "OVERLOADED") for name in ("EAGAIN", "ENOMEM", "EMFILE")),
        (errno.EACCES, "LOAD_FAILED"),
    ],
)
def test_what_keeps_a_process_from_starting_may_pass_or_not(number: int, reason: str) -> None:
    with pytest.raises(AipodError) as caught, _startable():
        raise OSError(number, os.strerror(number))
    assert caught.value.reason == reason


async def test_runners_leak_no_descriptor(process: Fixture) -> None:
    before = os.listdir("/proc/self/fd")
    for method in ("talk", "crash"):
        runner = process.make()
        await runner.start()
        try:
            await runner.run(process.task(method), ignore)
        except JobFailed:
            assert method == "crash"
        await runner.shutdown()
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize("method", ["grouped", "unheeding"])
async def test_a_cancelled_method_may_raise_what_it_likes(tmp_path: Path, method: str) -> None:
    its = Fixture("trio", tmp_path)
    runner = its.make()
    await runner.start()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.run, its.task(method), ignore)
            await its.appears("running")
            scope.cancel()
    assert scope.cancelled_caught
    await runner.shutdown()


async def test_a_fake_can_crash(tmp_path: Path) -> None:
    its = Fixture("fake", tmp_path)
    runner = its.make()
    assert isinstance(runner, FakeRunner)
    await runner.start()
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            with pytest.raises(JobFailed, match="SIGKILL"):
                await runner.run(its.task("forever"), ignore)

        nursery.start_soon(run)
        await its.appears("running")
        runner.crash()
    assert await runner.wait() == -9
    assert runner.verbs == ["start", "run forever"]
