"""A job and its viewer: heartbeats on virtual time, and the story of a job over real files and a fake runner."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from aipod import alarm
from aipod.client.failure import of_state
from aipod.codec import PONG, digest
from aipod.config import Config
from aipod.errors import Refused
from aipod.identity import Identities
from aipod.job.end import STORE_TRIES, Terms, settle_later
from aipod.job.job import LOG_IS_LONG, MAX_PENDING_LOG, Job
from aipod.job.reply import own_messages, plain_messages, send_all
from aipod.job.request import Request
from aipod.job.run import MAX_BROKEN, run_job, running
from aipod.job.watched import Answer, Keep, Told
from aipod.metrics import Metrics
from aipod.packing import Packer
from aipod.pool import Pool, open_pool
from aipod.results import INLINE
from aipod.runner import Description
from aipod.runner.fake import FakeRunner
from aipod.server import _sweep
from aipod.service.ai import AI, Viewer
from aipod.service.place import Place
from aipod.service.status import Ending
from aipod.service.viewer import Call, Writer
from aipod.spool import MAX_LOG, Entry, Journal, Look, Spool, Sweeper, Words
from aipod.spool.entry import SLOW
from aipod.versions import Versions
from aipod.wire.ai import Open, Phase, Raw
from tests.conftest import left_in
from tests.spools import Clock, descriptors


class FakeCall:
    """Takes a call's messages and notes when they came; `seconds` each."""

    def __init__(self, seconds: float = 0) -> None:
        self.sent: list[tuple[float, Raw]] = []
        self._seconds = seconds
        self._began = trio.current_time()
        self._joined = False
        self.writes = 0

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        before, self._joined = len(self.sent), True
        try:
            yield
        finally:
            self._joined = False
            self.writes += len(self.sent) > before

    def _wrote(self, message: Raw) -> None:
        self.writes += not self._joined
        self.sent.append((trio.current_time() - self._began, message))

    def send_now(self, message: Raw) -> bool:
        if not self._seconds:
            self._wrote(message)
        return not self._seconds

    async def send(self, message: Raw) -> None:
        await trio.sleep(self._seconds)
        self._wrote(message)

    async def finish(self, ending: Ending, trailers: Mapping[str, str]) -> None:
        """The trailers' names stand for the status."""
        for name in trailers:
            self._wrote(Raw(data=name.encode()))

    @property
    def phases(self) -> list[tuple[float, Phase | None]]:
        return [(when, message.state.phase if message.state else None) for when, message in self.sent]


class NoEntry:
    """Of an entry what heartbeats look at."""

    durable = written = 0
    log_size = 0


def request(open_: Open | None = None) -> Request:
    return Request("0" * 32, "train", "v", b"{}", None, open_, Raw(), {})


def fake_job(open_: Open | None = None) -> Job:
    return Job(request(open_), cast(Entry, NoEntry()), "spool")


async def test_a_long_log_goes_on_when_the_run_is_over() -> None:
    """So that there is room for what comes last.

    Mutants seen: that is dropped; the log stops without a word; the disk is asked on the loop how long it is.
    """

    class Log:
        text = ""

        def append_log(self, text: str) -> int:
            self.text += text
            return len(self.text)

    entry = Log()
    job = Job(request(), cast(Entry, entry), "spool")
    for n in range(40):
        for _ in range(30):
            job.report(None, None, f"{n}".ljust(50_000))
        await job.save_log()
    long = entry.text
    assert long.endswith(LOG_IS_LONG)
    assert long.count(LOG_IS_LONG) == 1
    assert long.startswith("0  ")
    job.report(None, None, "the last word")
    entry.append_log(job.take_log(last=True))
    assert entry.text.startswith(long)
    assert entry.text.endswith("39".ljust(50_000) + "\nthe last word\n")
    assert MAX_LOG - 3 * MAX_PENDING_LOG < len(entry.text) <= MAX_LOG


async def test_a_plain_client_hears_a_pong_at_once_and_every_second(autojump_clock: MockClock) -> None:
    call = FakeCall()
    async with trio.open_nursery() as nursery:
        writer = Writer(cast(Call, call), nursery)
        viewer = Viewer(writer, nursery, 1.0)
        viewer.begin()
        await trio.sleep(1.5)
        viewer.watch(job := fake_job())
        for phase in (Phase.QUEUED, Phase.RUNNING):  # no concern of a plain client's
            await trio.sleep(0.7)
            job.enter(phase)
        await trio.sleep(2.4)
        nursery.cancel_scope.cancel()
    assert call.sent == [(float(second), Raw(data=PONG)) for second in range(6)]


async def test_an_own_client_hears_the_phases_at_once_and_a_state_every_second(autojump_clock: MockClock) -> None:
    call = FakeCall()
    async with trio.open_nursery() as nursery:
        writer = Writer(cast(Call, call), nursery)
        viewer = Viewer(writer, nursery, 1.0)
        viewer.begin()
        await trio.sleep(1.5)
        viewer.watch(job := fake_job(Open(ticket=b"t" * 16)), 0)
        await trio.sleep(0.25)
        job.enter(Phase.QUEUED)
        await trio.sleep(2.25)
        job.enter(Phase.RUNNING)
        await trio.sleep(1.25)
        nursery.cancel_scope.cancel()
    assert call.phases == [
        (0, None),
        (1, None),
        (1.5, Phase.RECEIVING),
        (1.75, Phase.QUEUED),
        (2.75, Phase.QUEUED),
        (3.75, Phase.QUEUED),
        (4, Phase.RUNNING),
        (5, Phase.RUNNING),
    ]


async def test_heartbeats_begin_once_though_the_job_comes_as_they_do(autojump_clock: MockClock) -> None:
    """Twice, each piece of the log would be told twice and the next one not at all. Mutant seen: they do."""
    call = FakeCall()
    async with trio.open_nursery() as nursery:
        viewer = Viewer(Writer(cast(Call, call), nursery), nursery, 1.0)
        viewer.begin()
        job = fake_job(Open(ticket=b"t" * 16))
        alarm.at(trio.current_time() + 1.0, lambda: viewer.watch(job, 0))  # behind the heartbeats' own
        await trio.sleep(3.5)
        nursery.cancel_scope.cancel()
    assert call.phases == [(0, None), (1, Phase.RECEIVING), (2, Phase.RECEIVING), (3, Phase.RECEIVING)]


async def test_heartbeats_do_not_pile_up_before_a_peer_that_does_not_read(autojump_clock: MockClock) -> None:
    call = FakeCall(seconds=10.5)
    async with trio.open_nursery() as nursery:
        viewer = Viewer(Writer(cast(Call, call), nursery), nursery, 1.0)
        viewer.begin()
        await trio.sleep(32)
        nursery.cancel_scope.cancel()
    assert [when for when, _ in call.sent] == [10.5, 21, 31.5]


async def test_no_heartbeat_follows_the_first_message_of_an_answer(autojump_clock: MockClock) -> None:
    call = FakeCall()
    async with trio.open_nursery() as nursery:
        writer = Writer(cast(Call, call), nursery)
        viewer = Viewer(writer, nursery, 1.0)
        viewer.begin()
        await trio.sleep(1.5)
        viewer.stop()
        await writer.send(Raw(data=b"answer"))
        await trio.sleep(5)
        await writer.finish(Ending(), {})
    assert [message.data for _, message in call.sent] == [PONG, PONG, b"answer"]


@pytest.mark.parametrize(("seconds", "writes"), [(0.0, 2), (10.0, 4)])
async def test_the_last_messages_go_with_the_status(autojump_clock: MockClock, seconds: float, writes: int) -> None:
    """In one write, but where they have to wait; never behind it. Mutants seen: a write of its own for the status; it
    does not wait for what has to.
    """
    call = FakeCall(seconds)
    async with trio.open_nursery() as nursery:
        writer = Writer(cast(Call, call), nursery)
        writer.beat(None)
        await writer.send_last(Raw(data=b"outcome"), Raw(data=b"answer"))
        await writer.finish(Ending(), {"x-content-type": "some"})
    assert [message.data for _, message in call.sent] == [PONG, b"outcome", b"answer", b"x-content-type"]
    assert call.writes == writes


class Story:
    """Jobs of fake models in a real spool."""

    def __init__(self, path: Path, pool: Pool, nursery: trio.Nursery) -> None:
        self.spool = Spool.open(path / "spool", "app", reserve=0)
        self.versions = Versions(path / "data")
        self.versions.sweep(self.spool.is_held)
        self.pool = pool
        self.nursery = nursery
        self.jobs = 0

    async def begin(
        self,
        *,
        timeout: float | None = None,
        deadline: float = math.inf,
        journal: type[Journal] = Journal,
        open_: Open | None = None,
        restartable: bool = False,
    ) -> Job:
        """A job whose payload is complete, queued."""
        job = self.make(journal, open_)
        self.run(job, Terms(0.01, timeout, deadline, restartable))
        return job

    def make(self, journal: type[Journal] = Journal, open_: Open | None = None) -> Job:
        """A job whose payload is complete."""
        self.jobs += 1
        what = Request(f"{self.jobs:032}", "train", "v", b"{}", None, open_, Raw(), {})
        entry = self.spool.claim(what.job_id, what.fields, what.kwargs)
        assert entry is not None
        entry.write(b"payload")
        entry.seal()
        entry._journal = journal(entry.path / "state")
        return Job(what, entry, self.spool.id)

    def service(self) -> AI:
        """The server's object, without a server."""
        what = Identities(), Description("Class", {}, False), self.pool, self.spool, self.versions
        return AI(Config(), *what, self.nursery, Metrics())

    def run(self, job: Job, terms: Terms) -> None:
        self.nursery.start_soon(run_job, job, Place(self.pool, "v", "train"), self.versions, terms)

    async def end(self, job: Job) -> Phase:
        """Wait for the job's end, and let it go."""
        with trio.fail_after(10):
            await job.over.wait()
        job.cancel()
        with trio.fail_after(10):
            while list(self.spool.path.glob("*.lock")):  # the last that goes
                await trio.sleep(0.001)
        assert left_in(self.spool.path) == []
        assert [path.name for path in self.versions.path.glob(".*")] == []
        return job.phase


class Model:
    """What the fake runners run: tests replace `train` and `load`."""

    def __init__(self) -> None:
        self.runners: list[FakeRunner] = []
        self.train: Callable[..., Any] = lambda context, path: path.read_text()

    async def load(self) -> None: ...

    def __call__(self, version: str) -> FakeRunner:
        runner = FakeRunner(
            {"train": lambda *args: self.train(*args)}, load=lambda: self.load(), lock_name=f"worker-{version}"
        )
        self.runners.append(runner)
        return runner


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
async def story(tmp_path: Path, model: Model) -> AsyncIterator[Story]:
    async with open_pool(model, shared=False, per_version=1, total=4) as pool, trio.open_nursery() as nursery:
        yield Story(tmp_path, pool, nursery)
        nursery.cancel_scope.cancel()  # of a test that failed: the others have waited for their jobs


async def test_a_job_from_the_queue_to_its_answer(story: Story, model: Model) -> None:
    go = trio.Event()

    async def train(context: Any, path: Path) -> str:
        context.progress(0.5, "half")
        context.log("a line")
        await go.wait()
        return path.read_text()

    model.train = train
    job = await story.begin()
    phases = []
    while not job.over.is_set():
        changed = job.changed
        phases.append(job.phase)
        if job.phase == Phase.RUNNING:
            state = Journal(job.entry.path / "state").read()
            assert (state["phase"], state["worker"]) == ("RUNNING", "worker-v")
            go.set()
        with trio.move_on_after(0.05):
            await changed.wait()
    assert list(dict.fromkeys(phases)) == [Phase.RECEIVING, Phase.QUEUED, Phase.RUNNING]
    assert job.phase == Phase.DONE
    assert job.answer == Answer("json", b'"payload"', 9, digest(b'"payload"'))
    assert (job.progress, job.message) == (0.5, "half")
    assert job.entry.read_log(0, 99) == b"a line\n"
    assert Journal(job.entry.path / "state").read()["phase"] == "DONE"
    assert await story.end(job) == Phase.DONE


async def test_what_the_method_raises_is_the_outcome(story: Story, model: Model) -> None:
    def train(context: Any, path: Path) -> None:
        (context.new_version / "data").touch()
        raise KeyError("no such word")

    model.train = train
    job = await story.begin()
    assert await story.end(job) == Phase.FAILED
    assert job.error is not None
    assert (job.error.reason, job.error.metadata["type"]) == ("MODEL_ERROR", "KeyError")
    assert list(story.versions.path.iterdir()) == []


async def test_a_new_version_is_published_and_the_instance_replaced(story: Story, model: Model) -> None:
    model.train = lambda context, path: (context.new_version / "data").write_text("new")
    assert await story.end(await story.begin()) == Phase.DONE
    assert (story.versions.data_dir("v") / "data").read_text() == "new"
    assert await story.end(await story.begin()) == Phase.DONE
    assert [runner.verbs for runner in model.runners] == [["start", "run train", "shutdown"]] * 2


async def test_when_the_viewer_leaves_the_method_is_cancelled(story: Story, model: Model) -> None:
    running, stopped = trio.Event(), trio.Event()

    async def train(context: Any, path: Path) -> None:
        (context.new_version / "data").touch()
        running.set()
        try:
            await trio.sleep_forever()
        finally:
            stopped.set()

    model.train = train
    job = await story.begin()
    await running.wait()
    job.cancel()
    assert await story.end(job) == Phase.CANCELLED
    assert stopped.is_set()
    assert list(story.versions.path.iterdir()) == []


async def test_a_job_that_is_cancelled_in_line_never_runs(story: Story, model: Model) -> None:
    go, runs = trio.Event(), 0

    async def train(context: Any, path: Path) -> None:
        nonlocal runs
        runs += 1
        await go.wait()

    model.train = train
    first = await story.begin()
    while runs == 0:
        await trio.sleep(0.001)
    second = await story.begin()
    while second.phase != Phase.QUEUED:
        await trio.sleep(0.001)
    assert second.state().place == 0
    second.stop("because")
    await second.over.wait()
    assert not second.started
    assert second.error is not None
    assert second.error.message == "because"
    go.set()
    await first.over.wait()
    second.cancel()
    assert await story.end(first) == Phase.DONE
    assert runs == 1


async def test_a_method_that_takes_longer_than_it_declared(story: Story, model: Model) -> None:
    left: list[float] = []

    async def train(context: Any, path: Path) -> None:
        left.append(context.deadline)
        await trio.sleep_forever()

    model.train = train
    job = await story.begin(timeout=0.05, deadline=trio.current_time() + 100)
    assert await story.end(job) == Phase.CANCELLED
    assert job.error is not None
    assert job.error.reason == "DEADLINE_EXCEEDED"
    assert 0 < left[0] <= 0.05


async def test_a_stop_that_comes_while_the_answer_is_stored_is_too_late(story: Story, model: Model) -> None:
    model.train = lambda context, path: (context.new_version / "data").write_text("new")
    token = trio.lowlevel.current_trio_token()

    class Slow(Versions):
        def publish(self, job_id: str, version: str) -> bool:
            trio.from_thread.run_sync(job.stop, "too late", trio_token=token)
            return super().publish(job_id, version)

    story.versions = Slow(story.versions.path)
    job = await story.begin()
    assert await story.end(job) == Phase.DONE
    assert job.error is None
    assert (story.versions.data_dir("v") / "data").read_text() == "new"


@pytest.mark.parametrize("restartable", [False, True])
async def test_a_worker_that_died_before_the_run_is_replaced_but_not_for_ever(
    story: Story, model: Model, restartable: bool
) -> None:
    """Mutant seen: what was never started is an interrupted run, and begun once more, again and again."""
    deaths = 1

    async def load() -> None:
        if len(model.runners) <= deaths:
            model.runners[-1].crash()

    model.load = load  # type: ignore[method-assign]
    job = await story.begin()
    assert await story.end(job) == Phase.DONE
    assert job.state().attempt == 1
    model.runners[-1].crash()
    deaths = 99
    job = await story.begin(open_=OWN, restartable=restartable)
    with trio.fail_after(10):
        await job.over.wait()
    assert (job.phase, job.handed_over) == (Phase.FAILED, False)
    assert job.error is not None
    assert job.error.reason == "WORKER_CRASHED"
    assert len(model.runners) == 2 + MAX_BROKEN
    assert not job.started


async def test_a_server_that_is_cancelled_ends_its_jobs_and_their_entries(tmp_path: Path, model: Model) -> None:
    model.train = lambda context, path: trio.sleep_forever()
    async with open_pool(model, shared=False, per_version=1, total=4) as pool, trio.open_nursery() as nursery:
        story = Story(tmp_path, pool, nursery)
        jobs = [await story.begin() for _ in range(3)]
        while Phase.RUNNING not in [job.phase for job in jobs]:
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert sorted(job.phase for job in jobs) == [Phase.FAILED, Phase.CANCELLED, Phase.CANCELLED]
    assert sorted(job.error.reason for job in jobs if job.error) == ["CANCELLED", "CANCELLED", "INTERRUPTED"]
    assert left_in(story.spool.path) == []


# Jobs with a ticket: they outlive who brought them

OWN = Open(ticket=b"t" * 16)


async def test_a_server_that_is_cancelled_leaves_what_has_not_started_to_the_next_one(
    tmp_path: Path, model: Model
) -> None:
    """I2. Mutant seen: a job whose method has started is handed over too."""
    model.train = lambda context, path: trio.sleep_forever()
    async with open_pool(model, shared=False, per_version=1, total=4) as pool, trio.open_nursery() as nursery:
        story = Story(tmp_path, pool, nursery)
        jobs = [await story.begin(open_=OWN) for _ in range(2)]
        while sorted(job.phase for job in jobs) != [Phase.QUEUED, Phase.RUNNING]:
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert all(job.over.is_set() and not story.spool.is_held(job.look.id) for job in jobs)
    states = sorted((story.spool.look(job.look.id).read() for job in jobs), key=lambda state: state["phase"])
    assert [state["phase"] for state in states] == ["FAILED", "QUEUED"]
    assert states[0]["reason"] == "INTERRUPTED"
    assert "attempt" not in states[1]
    waiting = next(job for job in jobs if job.phase == Phase.QUEUED)
    assert waiting.look.payload.read_bytes() == b"payload"
    assert left_in(story.spool.path) == [
        *(f"{waiting.look.id}{name}" for name in ("", ".lock", "/in", "/state")),
    ]


@pytest.mark.parametrize("goes", [True, False])
async def test_a_job_whose_first_line_says_that_it_runs(tmp_path: Path, model: Model, goes: bool) -> None:
    """It has come whole, and an instance was free. What is handed over before its start stands in line again.

    Mutants seen: it is left as one that ran, which the next server would call interrupted; RUNNING is written twice;
    the instance stays taken.
    """
    async with open_pool(model, shared=False, per_version=1, total=4) as pool, trio.open_nursery() as nursery:
        story = Story(tmp_path, pool, nursery)
        assert await story.end(await story.begin()) == Phase.DONE  # its instance is free now
        place = Place(pool, "v", "train")
        lease = place.take()
        assert lease is not None
        what = Request("f" * 32, "train", "v", b"{}", None, OWN, Raw(), {})
        begin = running(lease, 1)
        entry = story.spool.claim(what.job_id, what.fields, what.kwargs or b"", payload=b"payload", begin=begin)
        assert entry is not None
        before = entry.read()
        assert (before["phase"], before["worker"], before["attempt"]) == ("RUNNING", lease.lock_name, 1)
        job = Job(what, entry, story.spool.id)
        job.begun = True
        job.enter(Phase.QUEUED)
        if not goes:
            job.hand_over()
        with trio.fail_after(10):
            await run_job(job, place, story.versions, Terms(0.01))
        lines = (entry.path / "state").read_bytes().splitlines()
        assert [json.loads(line.partition(b" ")[2])["phase"] for line in lines] == [
            "RUNNING",
            "DONE" if goes else "QUEUED",
        ]
        assert (job.phase, entry.read()["attempt"]) == ((Phase.DONE, 1) if goes else (Phase.QUEUED, 0))
        assert [runner.verbs for runner in model.runners] == [["start", *["run train"] * (1 + goes)]]
        assert pool.states()["idle"] == 1


async def test_an_outcome_is_told_when_it_is_stored_and_not_before(story: Story, model: Model) -> None:
    """I14. Mutant seen: the phase changes first (as it did once), and a kill before the line makes it another one."""
    fail = True

    def train(context: Any, path: Path) -> str:
        if fail:
            raise KeyError("no such word")
        return "done"

    model.train = train
    token = trio.lowlevel.current_trio_token()
    outcomes: list[Phase] = [Phase.FAILED, Phase.DONE]
    for wanted in outcomes:
        told: list[tuple[Phase, str]] = []

        class Watched(Journal):
            def append(self, fields: dict[str, Any], *, sync: bool = False) -> None:
                # Whoever waits for a change has its turn, and has read what there is before this line.
                trio.from_thread.run(trio.testing.wait_all_tasks_blocked, trio_token=token)
                super().append(fields, sync=sync)

        job = await story.begin(open_=OWN, journal=Watched)
        while not job.over.is_set():
            changed = job.changed
            told.append((job.phase, Journal(job.look.path / "state").read().get("phase", "RECEIVING")))
            await changed.wait()
        assert job.phase == wanted
        assert [phase.name for phase, _ in told] == [stored for _, stored in told]
        fail = False


def written(job: Job) -> dict[str, Any]:
    """What the journal of a job tells."""
    return Journal(job.look.path / "state").read()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.001)


async def test_at_its_first_tick_a_job_becomes_safe_and_later_ones_cost_nothing(story: Story, model: Model) -> None:
    """But for what the model has reported. Mutants seen: no `settle` at a tick; a thread at every tick."""
    reported, go = trio.Event(), trio.Event()

    async def train(context: Any, path: Path) -> str:
        await reported.wait()
        context.progress(0.5, "half")
        await go.wait()
        return "done"

    model.train = train
    job = story.make(open_=OWN)
    ticks: list[bool] = []
    settle = job.entry.settle

    def counted() -> None:
        ticks.append(job.entry.settled)
        settle()

    job.entry.settle = counted
    story.run(job, Terms(0.01))
    await until(lambda: "settled" in written(job))
    await trio.sleep(0.2)
    reported.set()
    await until(lambda: job.look.live() == {"progress": 0.5, "message": "half"})
    await trio.sleep(0.2)
    go.set()
    await job.over.wait()
    assert job.phase == Phase.DONE
    # Of some forty. Where a tick comes while a slow machine still writes the report, it looks once more.
    assert ticks in ([False, True], [False, True, True])


@pytest.mark.parametrize("size", [INLINE, INLINE + 1])
async def test_a_long_answer_before_the_first_tick_is_told_at_once_and_safe_afterwards(
    story: Story, model: Model, size: int
) -> None:
    """A short one is in the journal: small jobs cost no sync. Mutants seen: nothing is settled; any answer is."""
    model.train = lambda context, path: "x" * (size - 2)
    job = story.make(open_=OWN)
    early: list[str] = []

    async def look() -> None:
        await job.over.wait()
        assert not story.spool.is_held(job.entry.id)
        early.extend(written(job))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await run_job(job, Place(story.pool, "v", "train"), story.versions, Terms(0.5))
    await settle_later(job, 0.01)
    assert job.answer is not None
    assert job.answer.size == size
    assert "settled" not in early
    assert ("settled" in written(job)) == (size > INLINE)
    assert not story.spool.is_held(job.entry.id)


async def test_an_answer_does_not_wait_for_the_room_of_a_long_payload(story: Story) -> None:
    """A disk takes 0.2 s to free a GiB. Mutants seen: the entry is let go of behind that; with it."""
    job = story.make(open_=OWN)
    job.entry.written = SLOW
    await run_job(job, Place(story.pool, "v", "train"), story.versions, Terms(0.5))
    assert job.over.is_set()
    assert job.phase == Phase.DONE
    assert not story.spool.is_held(job.entry.id)
    assert job.entry.has_rest
    job.entry.free()


class FullDisk(Journal):
    """On a disk without room for lines of some phases, for so many of each."""

    phases: tuple[str, ...] = ("FAILED", "DONE")
    lines: float = 6
    error = errno.ENOSPC

    def append(self, fields: dict[str, Any], *, sync: bool = False) -> None:
        if (phase := fields.get("phase", "")) in self.phases and self.failed(phase) < self.lines:
            self.failures.append(phase)
            raise OSError(self.error, "full")
        super().append(fields, sync=sync)

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.failures: list[str] = []

    def failed(self, phase: str) -> int:
        return self.failures.count(phase)


class NoDescriptor(FullDisk):
    error = errno.EMFILE


Seen = tuple[str, str, str, bool]


async def followed(story: Story, job: Job) -> list[Seen]:
    """What a job tells until it is over, each once: phase, the one that is stored, message, and whether it is held."""
    seen: list[Seen] = []
    with trio.fail_after(20):
        while not job.over.is_set():
            changed = job.changed
            held = story.spool.is_held(job.entry.id)
            seen.append((job.phase.name, written(job).get("phase", "RECEIVING"), job.message, held))
            await changed.wait()
    seen.append((job.phase.name, written(job)["phase"], job.message, story.spool.is_held(job.entry.id)))
    return list(dict.fromkeys(seen))


FULL, EXHAUSTED = "waiting: the server's disk is full", "waiting: the server has too many files and connections open"


@pytest.mark.parametrize(("journal", "why"), [(FullDisk, FULL), (NoDescriptor, EXHAUSTED)])
@pytest.mark.parametrize("fails", [True, False], ids=["error", "answer"])
async def test_an_outcome_that_could_not_be_stored_is_stored_later(
    story: Story, model: Model, caplog: pytest.LogCaptureFixture, fails: bool, journal: type[FullDisk], why: str
) -> None:
    """I14: nobody is told of it before, for a kill then makes it another one. And nobody else gets the job.

    Mutants seen: no `_store_later`; one try; a line in the server's log for each; it is told at the first try; the
    answer is thrown away, and that is stored.
    """
    model.train = lambda context, path: 1 / 0 if fails else path.read_text()
    job = await story.begin(open_=OWN, journal=journal)
    end = "FAILED" if fails else "DONE"
    assert await followed(story, job) == [
        ("RECEIVING", "RECEIVING", "", True),
        ("QUEUED", "QUEUED", "", True),
        ("RUNNING", "RUNNING", "", True),
        ("RUNNING", "RUNNING", why, True),
        (end, end, "", True),
        (end, end, "", False),
    ]
    assert not story.spool.is_held(job.entry.id)
    assert cast(FullDisk, job.entry._journal).failures == [end] * 6
    if fails:
        assert written(job).items() >= {"phase": "FAILED", "reason": "MODEL_ERROR", "type": "ZeroDivisionError"}.items()
    else:
        assert written(job)["inline"] == '"payload"'
    assert said_of_outcomes(caplog) == [
        f"its outcome could not be stored: {why.removeprefix('waiting: ')}; try again later",
        "its outcome is stored now",
    ]


async def test_an_answer_that_is_never_stored_is_lost_in_the_end(
    story: Story, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """What is told then is stored, in a shorter line. Mutant seen: no bound."""

    class TooLong(FullDisk):
        phases = ("DONE",)
        lines = math.inf

    job = story.make(TooLong, OWN)
    story.run(job, Terms(0))
    with trio.fail_after(30):
        await job.over.wait()
    assert cast(FullDisk, job.entry._journal).failed("DONE") == 2 * (1 + STORE_TRIES)
    assert (job.phase, written(job)["reason"]) == (Phase.FAILED, "RESULT_NOT_STORED")
    assert said_of_outcomes(caplog)[1:] == ["its outcome is stored now"]


@pytest.mark.parametrize(("journal", "why"), [(FullDisk, FULL), (NoDescriptor, EXHAUSTED)])
async def test_what_was_acknowledged_waits_for_room(
    story: Story, model: Model, journal: type[FullDisk], why: str
) -> None:
    """Mutants seen: a job that never started ends as FAILED; what it waited for is told of its run."""

    class Line(journal):  # type: ignore[misc, valid-type]
        phases = ("QUEUED", "RUNNING")
        lines = 3

    job = await story.begin(open_=OWN, journal=Line)
    assert await followed(story, job) == [
        ("RECEIVING", "RECEIVING", "", True),
        ("RECEIVING", "RECEIVING", why, True),
        ("QUEUED", "QUEUED", "", True),
        ("QUEUED", "QUEUED", why, True),
        ("RUNNING", "RUNNING", "", True),
        ("DONE", "DONE", "", False),
    ]
    assert cast(FullDisk, job.entry._journal).failures == ["QUEUED"] * 3 + ["RUNNING"] * 3
    assert [runner.verbs for runner in model.runners] == [["start", "run train"]]


async def test_a_job_that_waits_for_room_can_be_ended_and_keeps_no_instance(story: Story, model: Model) -> None:
    """Mutants seen: it waits with its lease; neither a cancel nor the grace ends it."""

    class Never(FullDisk):
        phases: tuple[str, ...] = ("RUNNING",)
        lines = math.inf

    class NotEvenQueued(Never):
        phases = ("QUEUED",)

    waiting, unqueued = await story.begin(open_=OWN, journal=Never), await story.begin(open_=OWN, journal=NotEvenQueued)
    for job in (waiting, unqueued):
        await until(lambda job=job: cast(FullDisk, job.entry._journal).failures)
    other = await story.begin(open_=OWN)
    with trio.fail_after(10):
        await other.over.wait()
    assert other.phase == Phase.DONE
    waiting.stop("because")
    unqueued.heed(Words(), time.monotonic() + 100, grace=99)
    for job in (waiting, unqueued):
        with trio.fail_after(10):
            await job.over.wait()
        assert (job.phase, job.started, written(job)["phase"]) == (Phase.CANCELLED, False, "CANCELLED")


async def test_a_job_that_waits_for_room_is_left_to_the_next_server(tmp_path: Path, model: Model) -> None:
    class Never(FullDisk):
        phases = ("RUNNING",)
        lines = math.inf

    async with open_pool(model, shared=False, per_version=1, total=4) as pool, trio.open_nursery() as nursery:
        story = Story(tmp_path, pool, nursery)
        job = await story.begin(open_=OWN, journal=Never)
        await until(lambda: cast(FullDisk, job.entry._journal).failures != [])
        job.hand_over()
        with trio.fail_after(10):
            await job.over.wait()
        assert (job.phase, written(job)["phase"], job.look.payload.exists()) == (Phase.QUEUED, "QUEUED", True)
        nursery.cancel_scope.cancel()


async def test_an_outcome_that_was_never_stored_is_not_said_to_be_a_kill(
    tmp_path: Path, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """Its disk was full until the server was shut down."""

    class NeverStored(FullDisk):
        lines = math.inf

    model.train = lambda context, path: 1 / 0
    async with open_pool(model, shared=False, per_version=1, total=4) as pool:
        async with trio.open_nursery() as nursery:
            story = Story(tmp_path, pool, nursery)
            job = await story.begin(open_=OWN, journal=NeverStored)
            await until(lambda: job.message == FULL)
            nursery.cancel_scope.cancel()
        assert (job.over.is_set(), job.error, job.phase) == (True, None, Phase.RUNNING)
        assert [said.partition(": ")[0] for said in said_of_outcomes(caplog)] == [
            "its outcome could not be stored",
            "its outcome is given up; from now on nobody is told how it ended",
        ]
        async with trio.open_nursery() as nursery:
            await Story(tmp_path, pool, nursery).service().adopt([job.look.id])
    told = story.spool.look(job.look.id).read()
    assert (told["phase"], told["reason"]) == ("FAILED", "INTERRUPTED")
    assert told["message"].endswith("the server was killed, or could not store the outcome")


def said_of_outcomes(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.getMessage().partition(": ")[2] for record in caplog.records]
    return [text for text in said if text.startswith("its outcome")]


async def test_without_a_descriptor_what_goes_on_beside_the_calls_goes_on(
    story: Story, caplog: pytest.LogCaptureFixture
) -> None:
    """Mutants seen: a sweep, or a look for what others ask, raises what the system does."""
    ai, job = story.service(), story.make(open_=OWN)
    ai._jobs.held[job.entry.id] = job
    caplog.set_level("ERROR", "aipod")
    with trio.move_on_after(0.1), descriptors(0):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_sweep, Sweeper(story.spool, upload_ttl=0, ttl=0), ai.adopt)
            for _ in range(3):
                await ai._jobs._heed_once()
            await trio.sleep_forever()
    assert "sweeping failed; trying again in" in caplog.text
    job.entry.ask_to_stop()
    await ai._jobs._heed_once()
    assert job.stop_asked
    job.entry.destroy()


async def test_a_drain_leaves_an_upload_that_comes_late_to_the_next_server(story: Story) -> None:
    """Its claim was under way when the drain began. What runs is interrupted. Mutant seen: both are."""
    ai, upload, run = story.service(), story.make(open_=OWN), story.make(open_=OWN)
    for phase in (Phase.QUEUED, Phase.RUNNING):
        run.enter(phase)
    ai._jobs.held[run.entry.id] = run
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ai.drain.run, 0.05, lambda text: None)
        await trio.testing.wait_all_tasks_blocked()
        ai._jobs.held[upload.entry.id] = upload
        await until(lambda: upload.upload.cancel_called and run.stop_asked)
        for job in (upload, run):
            ai._jobs._drop(job)
    assert (upload.handed_over, upload.stop_asked) == (True, False)
    assert (run.handed_over, run.stopped().reason) == (False, "INTERRUPTED")
    for job in (upload, run):
        job.entry.destroy()


async def test_an_interrupted_run_of_a_restartable_method_is_repeated_once(story: Story, model: Model) -> None:
    """I2. Mutant seen: no bound (MAX_ATTEMPTS)."""
    starts = 0

    async def train(context: Any, path: Path) -> str:
        nonlocal starts
        starts += 1
        (context.new_version / f"of run {starts}").touch()
        (context.work_dir / f"of run {starts}").touch()
        if starts != 2:
            model.runners[-1].crash()
            await trio.sleep_forever()
        return " ".join(sorted(path.name for path in context.work_dir.iterdir()))

    model.train = train
    job = await story.begin(open_=OWN, restartable=True)
    with trio.fail_after(10):
        await job.over.wait()
    assert (job.phase, job.attempt, starts) == (Phase.DONE, 2, 2)
    assert job.answer is not None
    assert job.answer.inline == b'"of run 2"'  # it begins where the first has begun
    assert [path.name for path in story.versions.data_dir("v").iterdir()] == ["of run 2"]
    starts = 2
    job = await story.begin(open_=OWN, restartable=True)
    with trio.fail_after(10):
        await job.over.wait()
    assert (job.phase, job.attempt, starts) == (Phase.FAILED, 2, 4)
    assert story.spool.look(job.look.id).read()["reason"] == "WORKER_CRASHED"
    starts = 2
    job = await story.begin(open_=OWN, restartable=False)
    with trio.fail_after(10):
        await job.over.wait()
    assert (job.phase, job.attempt, starts) == (Phase.FAILED, 1, 3)


class Noticed(type(Path())):  # type: ignore[misc]
    """A path that notes whether the loop has waited for the disk."""

    on_loop: ClassVar[list[bool]] = []

    def exists(self) -> bool:
        self.on_loop.append(trio.lowlevel.in_trio_run())
        return super().exists()


async def test_a_run_whose_payload_has_made_room_is_not_repeated(story: Story, model: Model) -> None:
    """Mutants seen: the method is started once more, without a payload; the loop waits for the look at it."""
    starts = 0

    async def train(context: Any, path: Path) -> None:
        nonlocal starts
        starts += 1
        path.unlink()
        model.runners[-1].crash()
        await trio.sleep_forever()

    model.train = train
    job = await story.begin(open_=OWN, restartable=True)
    job.entry.payload = Noticed(job.entry.payload)
    with trio.fail_after(10):
        await job.over.wait()
    assert (job.phase, starts, written(job)["reason"]) == (Phase.FAILED, 1, "WORKER_CRASHED")
    assert set(Noticed.on_loop) == {False}


async def test_a_restartable_run_that_a_shutdown_ends_waits_for_the_next_server(tmp_path: Path, model: Model) -> None:
    model.train = lambda context, path: trio.sleep_forever()
    async with open_pool(model, shared=False, per_version=1, total=4) as pool, trio.open_nursery() as nursery:
        story = Story(tmp_path, pool, nursery)
        job = await story.begin(open_=OWN, restartable=True)
        while job.phase != Phase.RUNNING:
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    state = story.spool.look(job.look.id).read()
    assert (state["phase"], state["attempt"]) == ("QUEUED", 1)
    assert job.look.payload.exists()


async def test_no_log_line_is_lost_when_the_job_ends_while_the_log_is_written(story: Story, model: Model) -> None:
    lines = [f"line {n}" for n in range(200)]

    async def train(context: Any, path: Path) -> None:
        for line in lines:
            context.log(line)
            await trio.sleep(0.0005)

    model.train = train
    job = await story.begin()
    await job.over.wait()
    read = functools.partial(job.entry.read_log, 0, 1 << 20)
    assert (await trio.to_thread.run_sync(read)).decode().splitlines() == lines
    await story.end(job)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), OSError(errno.EMFILE, "too many"), RuntimeError()])
@pytest.mark.parametrize("step", ["discard", "append_log", "record", "destroy"])
async def test_no_step_of_a_job_s_end_can_end_the_server(
    tmp_path: Path, model: Model, step: str, error: Exception
) -> None:
    """The nursery is the server's: what leaves a job would leave it too."""

    def train(context: Any, path: Path) -> float:
        context.log("a line")
        return 1 / 0

    model.train = train
    failed = []

    def fails(*args: Any, **kwargs: Any) -> None:
        failed.append(step)
        raise error

    async with open_pool(model, shared=False, per_version=1, total=4) as pool, trio.open_nursery() as nursery:
        story = Story(tmp_path, pool, nursery)
        job = await story.begin()
        while job.phase != Phase.RUNNING:
            await job.changed.wait()
        setattr(story.versions if step == "discard" else job.entry, step, fails)
        with trio.fail_after(10):
            await job.over.wait()
        job.cancel()
    assert failed == [step]
    assert job.phase == Phase.FAILED
    assert job.error is not None
    assert job.error.reason == "MODEL_ERROR"


@pytest.mark.parametrize(
    ("error", "reason"), [(OSError(errno.EIO, "broken"), "INTERNAL"), (OSError(errno.EMFILE, "too many"), "OVERLOADED")]
)
async def test_a_disk_that_fails_before_the_run(story: Story, model: Model, error: OSError, reason: str) -> None:
    class Broken(Journal):
        def append(self, fields: dict[str, Any], *, sync: bool = False) -> None:
            raise error

    job = await story.begin(journal=Broken)
    assert await story.end(job) == Phase.FAILED
    assert job.error is not None
    assert job.error.reason == reason
    assert (job.error.retry_after is not None) == (reason == "OVERLOADED")


async def test_a_version_that_cannot_be_published(story: Story, model: Model) -> None:
    model.train = lambda context, path: (context.new_version / "data").write_text("new")
    (story.versions.path / "v").write_text("a file where the version's directory would be")
    (blocked := story.versions.path / f".old-{1:032}-v").mkdir()
    job = await story.begin()
    await job.over.wait()
    blocked.rmdir()
    assert await story.end(job) == Phase.FAILED
    assert job.error is not None
    assert job.error.reason == "RESULT_NOT_STORED"


SPARSE = 1 << 38  # minutes to read, no room on the disk


async def test_a_stop_ends_the_measuring_of_a_huge_result(story: Story, model: Model) -> None:
    def train(context: Any, path: Path) -> Path:
        (context.new_version / "data").touch()
        result: Path = context.work_dir / "result"
        result.touch()
        os.truncate(result, SPARSE)
        return result

    model.train = train
    job = await story.begin()
    while not job.entry.result.exists():
        await trio.sleep(0.001)
    await trio.to_thread.run_sync(lambda: None)
    job.stop("because")
    assert await story.end(job) == Phase.CANCELLED
    assert list(story.versions.path.iterdir()) == []  # what it made is not published either


@pytest.mark.parametrize("kind", ["bytes", "file"])
async def test_a_viewer_that_leaves_ends_the_making_of_a_huge_answer(tmp_path: Path, kind: str) -> None:
    entry = Spool.open(tmp_path, "app", reserve=0).claim("0" * 32, {})
    assert entry is not None
    entry.result.touch()
    os.truncate(entry.result, SPARSE)
    messages = plain_messages(entry, Answer(kind, None, SPARSE, b""), 1, 1 << 26)

    async def send(message: Raw) -> None: ...

    with trio.fail_after(10), trio.move_on_after(0.1) as scope:
        await send_all(messages, send)
    assert scope.cancelled_caught
    entry.destroy()


async def test_an_answer_that_is_released_while_it_is_sent_is_not_a_bug_of_the_server(tmp_path: Path) -> None:
    entry = Spool.open(tmp_path, "app", reserve=0).claim("0" * 32, {})
    assert entry is not None

    async def send(message: Raw) -> None: ...

    with pytest.raises(ExceptionGroup) as caught:
        await send_all(own_messages(entry, Answer("bytes", None, 5, b""), Packer(1)), send)
    assert caught.group_contains(FileNotFoundError)
    entry.destroy()


async def test_the_grace_begins_when_the_last_viewer_leaves_and_not_a_tick_before() -> None:
    """I16. Mutants seen: it counts from the last tick at which somebody was there; a watcher elsewhere is none."""
    job = fake_job(OWN)
    job.phase = Phase.RUNNING
    job.viewers = 1
    now = time.monotonic()
    job.heed(Words(), now - 0.9, 1.0)
    job.leave()
    left = time.monotonic()
    job.heed(Words(), now + 0.1, 1.0)
    assert not job.stop_asked
    job.heed(Words(watched=5), now + 0.9, 1.0)  # somebody watches from another process
    job.heed(Words(watched=5), now + 1.8, 1.0)
    assert not job.stop_asked
    job.heed(Words(watched=5), left + 1.9, 1.0)
    assert job.stop_asked
    assert job.stopped().reason == "CANCELLED"


async def test_what_is_new_in_the_log_is_read_once_for_all_who_have_come_as_far(story: Story) -> None:
    """Also for who asks when it has grown, and who is behind. Mutants seen: read for each; an old piece is given."""
    job = story.make(open_=OWN)
    read, reads = job.entry.read_log, list[int]()

    def counted(offset: int, limit: int) -> bytes:
        reads.append(offset)
        return read(offset, limit)

    job.entry.read_log = counted
    job.viewers = 100
    heard: dict[int, list[bytes]] = {0: [], 6: []}

    async def ask(offset: int) -> None:
        heard[offset].append(await job.read_log(offset))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, 0)
    job.entry.append_log("first\n")
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(ask, 0)
    job.entry.append_log("second\n")
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(ask, 6)
    await ask(0)
    assert heard == {0: [b"", *[b"first\n"] * 100, b"first\nsecond\n"], 6: [b"second\n"] * 100}
    assert reads == [0, 6, 0]
    log = (job.entry.path / "log").rename(job.entry.path / "away")
    log.with_name("log").mkdir()  # it cannot be read now
    assert [await job.read_log(1), await job.read_log(1)] == [b"", b""]
    log.with_name("log").rmdir()
    log.rename(log.with_name("log"))
    assert await job.read_log(1) == b"irst\nsecond\n"
    job.entry.destroy()


async def test_an_upload_has_no_grace_but_its_time_in_the_spool() -> None:
    job = fake_job(OWN)
    job.heed(Words(), time.monotonic() + 1e6, 1.0)
    assert not job.stop_asked
    job.heed(Words(wanted=job.epoch), 0, 1.0)
    assert not job.upload.cancel_called
    job.heed(Words(wanted=job.epoch + 1), 0, 1.0)
    assert (job.upload.cancel_called, job.superseded_by) == (True, job.epoch + 1)
    assert not job.scope.cancel_called


@pytest.mark.parametrize("metadata", [{"type": "KeyError"}, {"signal": "SIGKILL"}])
async def test_how_a_run_ended_is_told_by_every_process_alike(
    story: Story, model: Model, metadata: dict[str, str]
) -> None:
    """To its own client: all but the traceback. Mutants seen: the journal, or the state, has the class only."""

    async def train(context: Any, path: Path) -> None:
        if "type" in metadata:
            raise KeyError
        model.runners[-1].crash()
        await trio.sleep_forever()

    model.train = train
    job = await story.begin(open_=OWN)
    with trio.fail_after(10):
        await job.over.wait()
    told = Told(story.spool.look(job.look.id), "", Keep())
    told.learn(written(job), {})
    assert told.error is not None
    assert told.error.metadata == metadata
    for watched in (job, told):
        assert of_state(watched.state()).metadata == metadata


class Counted(Look):
    """A job that counts how often it is read."""

    reads = 0

    def read(self) -> dict[str, Any]:
        self.reads += 1
        return super().read()


async def test_an_upload_that_nobody_brings_goes_though_somebody_waits_for_it(story: Story) -> None:
    """Who waits learns that there is none. What runs elsewhere is kept. Mutants seen: both are watched; neither is."""
    ai, job = story.service(), story.make(open_=OWN)
    ai._jobs._config = Config(tick=0.01)
    clock = Clock()
    sweeper = Sweeper(story.spool, upload_ttl=5, ttl=99, clock=clock)
    seen = job.look.path / "seen"
    told = await ai._jobs.attach(job.look.id)
    assert isinstance(told, Told)
    story.nursery.start_soon(ai._jobs.follow, told)
    job.entry.record({"phase": "QUEUED"})
    await until(seen.exists)
    job.entry.destroy()
    with trio.fail_after(10):
        await told.over.wait()
    job = story.make(open_=OWN)
    told = await ai._jobs.attach(job.look.id)
    assert isinstance(told, Told)
    assert told.phase == Phase.RECEIVING
    told.look = look = Counted(story.spool.path, job.look.id, story.spool.boot)
    story.nursery.start_soon(ai._jobs.follow, told)
    job.entry.let_go()
    list(sweeper.sweep())  # from here on it has 5 s, unless somebody tells of life in it
    before = look.reads
    await until(lambda: look.reads >= before + 2)  # a whole tick of who waits: it would tell of that before it reads
    clock.now += 6
    assert sum(sweeper.sweep()) == 1
    with trio.fail_after(10):
        await told.over.wait()
    with pytest.raises(Refused) as caught:
        await ai._jobs.attach(job.look.id)
    assert caught.value.reason == "NOT_FOUND"


async def test_who_watches_from_another_process_is_woken_by_news_only(tmp_path: Path) -> None:
    """Once a tick it is told all the same. Mutant seen: nothing reported counts as news (as it did once)."""
    look = Spool.open(tmp_path, "app", reserve=0).look("a" * 32)
    told = Told(look, "", Keep())
    phase: dict[str, Any] = {"phase": "RUNNING"}
    half: dict[str, Any] = {"progress": 0.5, "message": "half"}
    for fields, live, news in (
        (phase, {}, True),
        (phase, {}, False),
        (phase, half, True),
        (phase, half, False),
        (phase | {"settled": True}, half, True),
    ):
        changed = told.changed
        told.learn(fields, live)
        assert changed.is_set() == news


async def test_a_job_whose_worker_died_before_the_run_is_back_in_line_for_every_process(
    story: Story, model: Model
) -> None:
    """Its method was not started, and the next instance may take minutes to load. Mutant seen: only `job` knows."""
    go = trio.Event()

    async def load() -> None:
        if len(model.runners) == 1:
            model.runners[0].crash()
        else:
            await go.wait()

    model.load = load  # type: ignore[method-assign]
    job = await story.begin()
    while len(model.runners) < 2:
        await trio.sleep(0.01)
    state = Journal(job.entry.path / "state").read()
    assert (state["phase"], state["attempt"], job.phase) == ("QUEUED", 0, Phase.QUEUED)
    go.set()
    assert await story.end(job) == Phase.DONE
