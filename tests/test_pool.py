"""The pool on virtual time: who gets an instance, when, and what becomes of it."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from aipod.errors import JobFailed, Refused
from aipod.instance import Waiter
from aipod.pool import LOADS, PROBE, Pool, open_pool
from aipod.restarts import LONGEST_PAUSE, VERSIONS, Restarts
from aipod.runner import Description, Runner, RunnerBroken, Task
from aipod.runner.fake import FakeRunner

LOAD, CLOSE = 5.0, 3.0  # seconds


class Models:
    """Makes fake runners and remembers them by version, in the order in which they were made."""

    def __init__(self, *, shared: bool = False, load: Callable[[], Awaitable[object]] | None = None) -> None:
        self.shared = shared
        self.load = load or (lambda: trio.sleep(LOAD))
        self.made: list[tuple[str, FakeRunner]] = []

    def __call__(self, version: str) -> Runner:
        async def sleep(context: object, path: Path, *, seconds: float) -> None:
            await trio.sleep(seconds)

        runner = FakeRunner(
            {"sleep": sleep}, load=lambda: self.load(), close=lambda: trio.sleep(CLOSE), shared=self.shared
        )
        self.made.append((version, runner))
        return runner

    @property
    def versions(self) -> list[str]:
        return [version for version, _ in self.made]


def task(version: str, seconds: float) -> Task:
    here = Path()
    return Task("0" * 32, "sleep", version, b'{"seconds": %f}' % seconds, {}, here, here, here, here, None)


async def use(pool: Pool, version: str, seconds: float = 1, waiter: Waiter | None = None) -> float:
    """Run one job; when it ended."""
    async with pool.lease(version, waiter or Waiter(version)) as lease:
        await lease.run(task(version, seconds), lambda *report: None)
    return trio.current_time()


async def line_up(nursery: trio.Nursery, *jobs: Callable[[], Awaitable[object]]) -> None:
    """Start jobs one after the other, so that the line has their order."""
    for job in jobs:
        nursery.start_soon(job)
        await trio.testing.wait_all_tasks_blocked()


async def test_first_come_first_served_on_one_instance_and_everybody_knows_the_place(autojump_clock: MockClock) -> None:
    """Nobody is before the one for which the instance loads. Mutant seen: all that came later are."""
    models, ended, waiters = Models(), list[tuple[int, float]](), [Waiter("v") for _ in range(5)]
    began = trio.current_time()
    async with open_pool(models, shared=False, per_version=1, total=1) as pool, trio.open_nursery() as nursery:

        async def job(number: int) -> None:
            ended.append((number, await use(pool, "v", 1, waiters[number]) - began))

        await line_up(nursery, *(lambda n=n: job(n) for n in range(5)))
        assert [pool.place(waiter) for waiter in waiters] == [0, 0, 1, 2, 3]
        await trio.sleep(LOAD + 2.5)
        assert [pool.place(waiter) for waiter in waiters[3:]] == [0, 1]
    assert ended == [(n, LOAD + 1 + n) for n in range(5)]
    assert [runner.verbs for _, runner in models.made] == [["start", *["run sleep"] * 5, "shutdown"]]


async def test_the_place_counts_only_jobs_of_the_same_version(autojump_clock: MockClock) -> None:
    async with open_pool(Models(), shared=False, per_version=1, total=2) as pool, trio.open_nursery() as nursery:
        last = Waiter("b")
        jobs = [Waiter("a"), Waiter("a"), Waiter("b"), Waiter("a"), last]
        await line_up(nursery, *(lambda w=w: use(pool, w.version, 1, w) for w in jobs))
        assert pool.place(last) == 0
        assert pool.place(jobs[3]) == 1


@pytest.mark.parametrize(("per_version", "total", "seconds"), [(1, 9, 4), (2, 9, 2), (4, 9, 1), (4, 2, 2)])
async def test_as_many_instances_as_the_limits_allow(
    autojump_clock: MockClock, per_version: int, total: int, seconds: float
) -> None:
    models, began = Models(), trio.current_time()
    async with open_pool(models, shared=False, per_version=per_version, total=total) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(use, pool, "v")
        assert trio.current_time() == began + LOAD + seconds
    assert len(models.made) == min(per_version, total)


async def test_who_wants_an_instance_beside_the_others_takes_none_of_theirs(autojump_clock: MockClock) -> None:
    """One more, whatever there is of them; its line is its own. Mutants seen: as many of it as of the others; the
    place in line counts them; the one that is free is given to any."""
    models, long = Models(), [Waiter("v", beside=True) for _ in range(3)]
    async with open_pool(models, shared=False, per_version=2, total=9) as pool, trio.open_nursery() as nursery:
        await line_up(nursery, *(lambda w=w: use(pool, "v", 100, w) for w in long))
        assert await use(pool, "v") == LOAD + 1
        assert [pool.place(waiter) for waiter in long] == [0, 0, 1]
        async with trio.open_nursery() as others:
            last = Waiter("v")
            await line_up(others, *(lambda w=w: use(pool, "v", 10, w) for w in (Waiter("v"), Waiter("v"), last)))
            assert pool.place(last) == 0
        assert trio.current_time() == LOAD + 1 + 20
    assert trio.current_time() == LOAD + 300 + CLOSE
    assert [runner.verbs.count("run sleep") for _, runner in models.made] == [3, 3, 1]


@pytest.mark.parametrize("shared", [False, True])
async def test_where_there_is_room_for_one_instance_all_jobs_have_it(autojump_clock: MockClock, shared: bool) -> None:
    """Mutant seen: it is closed, and another one loaded, for each job that wants one beside it."""
    models = Models(shared=shared)
    async with open_pool(models, shared=shared, per_version=4, total=9 if shared else 1) as pool:
        for n in range(6):
            await use(pool, "v", 1, Waiter("v", beside=n % 2 == 1))
    assert models.versions == ["v"]


async def test_an_instance_beside_others_makes_room_as_they_do(autojump_clock: MockClock) -> None:
    """And is made room for. Mutant seen: it does not count to the total."""
    models = Models()
    async with open_pool(models, shared=False, per_version=2, total=2) as pool, trio.open_nursery() as nursery:
        await line_up(nursery, lambda: use(pool, "v", 3), lambda: use(pool, "v", 10))
        await line_up(nursery, lambda: use(pool, "v", 20, Waiter("v", beside=True)), lambda: use(pool, "v", 1))
        await trio.sleep(LOAD + 3 + CLOSE + LOAD + 1)
        assert [runner.verbs[-1] for _, runner in models.made] == ["shutdown", "run sleep", "run sleep"]
    assert [runner.verbs.count("run sleep") for _, runner in models.made] == [1, 2, 1]


async def test_a_shared_instance_runs_all_jobs_at_once_and_loads_once(autojump_clock: MockClock) -> None:
    models, began = Models(shared=True), trio.current_time()
    async with open_pool(models, shared=True, per_version=1, total=16) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(use, pool, "v")
        assert trio.current_time() == began + LOAD + 1
    assert models.versions == ["v"]


async def test_a_shared_instance_runs_so_many_jobs_at_once_and_the_others_wait_in_line(
    autojump_clock: MockClock,
) -> None:
    """Mutant seen: no bound."""
    models, waiters = Models(shared=True), [Waiter("v") for _ in range(7)]
    began, ended = trio.current_time(), list[float]()
    async with open_pool(models, shared=True, at_once=3, per_version=1, total=16) as pool:

        async def job(waiter: Waiter) -> None:
            ended.append(await use(pool, "v", waiter=waiter))

        async with trio.open_nursery() as nursery:
            await line_up(nursery, *(functools.partial(job, waiter) for waiter in waiters))
            await trio.sleep(LOAD + 0.5)
            assert [pool.place(waiter) for waiter in waiters[3:]] == [0, 1, 2, 3]
    assert ended == [began + LOAD + seconds for seconds in (1, 1, 1, 2, 2, 2, 3)]
    assert models.versions == ["v"]


async def test_the_instance_that_was_idle_for_longest_makes_room_and_is_gone_first(autojump_clock: MockClock) -> None:
    models = Models()
    async with open_pool(models, shared=False, per_version=1, total=2) as pool:
        for version in ("a", "b", "a"):
            await use(pool, version)
        began = trio.current_time()
        assert await use(pool, "c") == began + CLOSE + LOAD + 1
        assert [runner.broken for _, runner in models.made] == [False, True, False]
        assert await use(pool, "a") == began + CLOSE + LOAD + 2
        assert models.versions == ["a", "b", "c"]


async def test_a_line_for_another_version_gets_the_instance_of_one_that_is_never_idle(
    autojump_clock: MockClock,
) -> None:
    models = Models()
    async with open_pool(models, shared=False, per_version=1, total=1) as pool, trio.open_nursery() as nursery:
        versions = ["a", "a", "b", "a"]
        order: list[str] = []

        async def job(version: str) -> None:
            await use(pool, version)
            order.append(version)

        await line_up(nursery, *(lambda v=v: job(v) for v in versions))
    assert order == versions
    assert models.versions == ["a", "b", "a"]


async def test_a_busy_instance_is_never_evicted(autojump_clock: MockClock) -> None:
    models = Models()
    async with open_pool(models, shared=False, per_version=1, total=1) as pool, trio.open_nursery() as nursery:
        began = trio.current_time()
        await line_up(nursery, lambda: use(pool, "a", 100))
        assert await use(pool, "b") == began + LOAD + 100 + CLOSE + LOAD + 1


async def test_a_retired_instance_ends_when_it_is_free_and_the_next_job_gets_a_new_one(
    autojump_clock: MockClock,
) -> None:
    models = Models()
    async with open_pool(models, shared=False, per_version=2, total=16) as pool, trio.open_nursery() as nursery:
        await line_up(nursery, lambda: use(pool, "v", 10), lambda: use(pool, "v", 20))
        await trio.sleep(LOAD + 12)  # one is idle, one busy
        pool.retire("v")
        assert pool.retire("never loaded") is None
        began = trio.current_time()
        assert await use(pool, "v") == began + LOAD + 1
        assert [runner.broken for _, runner in models.made] == [True, False, False]
        await trio.sleep(20)
        assert [runner.broken for _, runner in models.made] == [True, True, False]


async def test_a_version_that_is_retired_while_it_loads_serves_that_one_job(autojump_clock: MockClock) -> None:
    models = Models()
    async with open_pool(models, shared=True, per_version=1, total=16) as pool, trio.open_nursery() as nursery:
        await line_up(nursery, lambda: use(pool, "v"))
        pool.retire("v")
        await trio.sleep(LOAD + 2)
        await use(pool, "v")
    assert [runner.verbs for _, runner in models.made] == [["start", "run sleep", "shutdown"]] * 2


@pytest.mark.parametrize("shared", [False, True])
async def test_data_that_another_process_has_replaced_is_loaded_anew(autojump_clock: MockClock, shared: bool) -> None:
    """Also for the job that waited in line meanwhile. What was looked at is let go of, once."""

    class Numbered:
        number, closed = 0, list[int]()

        def __init__(self, version: str) -> None:
            self._loaded = Numbered.number

        @property
        def replaced(self) -> bool:
            return self._loaded != Numbered.number

        def close(self) -> None:
            Numbered.closed.append(self._loaded)

    models = Models(shared=shared)
    async with open_pool(models, Numbered, shared=shared, per_version=1, total=16) as pool:
        async with trio.open_nursery() as nursery:
            await line_up(nursery, lambda: use(pool, "v", 10))
            await trio.sleep(LOAD + 1)
            Numbered.number = 1
            await line_up(nursery, lambda: use(pool, "v"))
        await use(pool, "v")
    assert [runner.verbs for _, runner in models.made] == [
        ["start", "run sleep", "shutdown"],
        ["start", "run sleep", "run sleep", "shutdown"],
    ]
    assert Numbered.closed == [0, 1]


@pytest.mark.parametrize("times", [1, 3, 100])
async def test_an_instance_whose_data_was_replaced_while_it_loaded_loads_anew(
    autojump_clock: MockClock, times: int
) -> None:
    """It may have read a part of both. Mutants seen: what is watched is the data of the first load; no end of it."""
    moved = 0

    class Moving:
        def __init__(self, version: str) -> None:
            self._seen = moved

        @property
        def replaced(self) -> bool:
            return self._seen != moved

        def close(self) -> None: ...

    async def load() -> None:
        nonlocal moved
        await trio.sleep(LOAD)
        if moved < times:
            moved += 1

    models = Models(load=load)
    async with open_pool(models, Moving, shared=False, per_version=1, total=1) as pool:
        if times < LOADS:
            await use(pool, "v")
        else:
            with pytest.raises(JobFailed, match="was replaced in each of 5 loads"):
                await use(pool, "v")
    loads = min(times, LOADS)
    assert [runner.verbs for _, runner in models.made][:loads] == [["start", "shutdown"]] * loads
    if times < LOADS:
        assert models.made[-1][1].verbs == ["start", "run sleep", "shutdown"]


@pytest.mark.parametrize("shared", [False, True])
async def test_a_load_that_fails_is_told_to_its_job_and_the_next_one_tries_again(
    autojump_clock: MockClock, shared: bool
) -> None:
    loads = 0

    async def load() -> None:
        nonlocal loads
        loads += 1
        await trio.sleep(LOAD)
        if loads < 3:
            raise OSError("no weights here")

    outcomes: list[str] = []
    models = Models(shared=shared, load=load)
    async with open_pool(models, shared=shared, per_version=1, total=1) as pool, trio.open_nursery() as nursery:

        async def job() -> None:
            try:
                await use(pool, "v")
                outcomes.append("ran")
            except JobFailed as exc:
                outcomes.append(f"{exc.reason} {exc.metadata['type']}")

        for _ in range(4):
            nursery.start_soon(job)
    assert outcomes == ["LOAD_FAILED OSError", "LOAD_FAILED OSError", "ran", "ran"]
    assert [runner.verbs[-1] for _, runner in models.made] == ["start", "start", "shutdown"]


async def fails() -> None:
    raise ValueError("no such weights")


async def test_when_no_instance_can_run_the_pool_says_so_and_tries_by_itself(autojump_clock: MockClock) -> None:
    """Mutants seen: names that nobody has make it say so; it waits for a job that never comes."""
    models, told = Models(load=lambda: trio.sleep(0)), []
    restarts = Restarts(lambda version: version == "known", told.append)
    async with open_pool(models, shared=False, per_version=1, total=1, restarts=restarts) as pool:

        async def fail(version: str, times: int) -> None:
            for _ in range(times):
                with pytest.raises(JobFailed, match="while it loaded"):
                    await use(pool, version)

        models.load = fails
        await fail("unknown", 4)
        await fail("known", 2)
        assert told == []
        await fail("known", 1)
        assert told == [False]
        began = trio.current_time()
        while models.made[-1][0] == "known" and len(models.made) < 12:  # nobody calls
            await trio.sleep(1)
        assert trio.current_time() - began > 5 * PROBE
        assert told == [False]
        models.load = lambda: trio.sleep(0)
        await trio.sleep(PROBE + LONGEST_PAUSE)
        assert told == [False, True]
        # What has loaded once is known, and tried first when it cannot any more.
        await use(pool, "proven")
        models.load = fails
        pool.retire("proven")
        await fail("proven", 3)
        assert told == [False, True, False]
        began = trio.current_time()
    assert trio.current_time() == began  # leaving does not wait for the next try


@pytest.mark.parametrize(
    "error",
    [Refused("OVERLOADED", "no process"), OSError(errno.EACCES, "no"), ExceptionGroup("in a nursery", [OSError()])],
    ids=lambda error: type(error).__name__,
)
async def test_whatever_keeps_an_instance_from_starting_counts_and_ends_nobody_else(
    autojump_clock: MockClock, error: Exception
) -> None:
    """Also where nobody asked. Mutants seen: only what a model raises is counted; what a try by itself meets that is
    neither `JobFailed` nor `Refused` ends the pool, and what runs in it."""
    made, told, broken = list[FakeRunner](), list[bool](), True

    class Unstartable(FakeRunner):
        async def start(self) -> Description:
            if broken:
                raise error
            return await super().start()

    def make(version: str) -> Runner:
        made.append(Unstartable({}))
        return made[-1]

    restarts = Restarts(lambda version: True, told.append)
    async with open_pool(make, shared=False, per_version=1, total=2, restarts=restarts) as pool:
        for _ in range(3):
            with pytest.raises(type(error)):
                async with pool.lease("v", Waiter("v")):
                    pass
        assert told == [False]
        assert restarts.due("v") > trio.current_time()
        tries = len(made)
        await trio.sleep(3 * (PROBE + LONGEST_PAUSE))
        assert len(made) > tries + 1
        assert told == [False]
        broken = False
        await trio.sleep(PROBE + LONGEST_PAUSE)
    assert told == [False, True]


async def test_while_no_instance_may_be_started_because_they_die_in_their_runs_the_pool_says_so(
    autojump_clock: MockClock,
) -> None:
    """Ready again with the next that has loaded, whoever asked for it. Mutants seen: the one that has just died is
    taken for one that can run; a load ends the row of deaths; each time that it is not ready it has one more who tries.
    """
    models, told = Models(load=lambda: trio.sleep(0)), list[tuple[float, bool]]()
    restarts = Restarts(lambda version: True, lambda able: told.append((trio.current_time(), able)))

    async def crash() -> None:
        async with pool.lease("v", Waiter("v")) as lease, trio.open_nursery() as nursery:

            @nursery.start_soon
            async def run() -> None:
                with pytest.raises(JobFailed, match="SIGKILL"):
                    await lease.run(task("v", 1), lambda *report: None)

            await trio.testing.wait_all_tasks_blocked()
            models.made[-1][1].crash()

    async with open_pool(models, shared=False, per_version=1, total=2, restarts=restarts) as pool:
        for _ in range(3):
            assert told == []
            await crash()
        assert told == [(0, False)]
        await crash()  # after a second
        await crash()  # after two
        assert told == [(0, False), (1, True), (1, False), (3, True), (3, False)]
        await trio.sleep(PROBE)  # nobody calls
        assert told[5:] == [(PROBE, True)]
        await use(pool, "v")
        await crash()
        await crash()
        assert len(told) == 6
        await use(pool, "w")
        await crash()
        assert len(told) == 6
        for _ in range(3):
            await crash()  # another version has one that can run
        assert len(told) == 6
    assert models.versions.count("v") == 11


async def test_an_instance_that_runs_is_reason_enough_to_be_ready(autojump_clock: MockClock) -> None:
    models, told = Models(load=lambda: trio.sleep(0)), []
    async with open_pool(
        models, shared=False, per_version=1, total=2, restarts=Restarts(lambda version: True, told.append)
    ) as pool:
        await use(pool, "good")
        models.load = fails
        for _ in range(5):
            with pytest.raises(JobFailed, match="while it loaded"):
                await use(pool, "bad")
    assert told == []


async def test_what_may_be_started_is_tried_before_what_must_wait(autojump_clock: MockClock) -> None:
    """Mutant seen: what has failed last is waited for, though another version would load."""
    restarts = Restarts(lambda version: True, lambda able: None)
    restarts.loaded("v", 1.0)
    restarts.failed("w", "load", others=False)
    assert restarts.suspects == ["w", "v"]
    for _ in range(2):
        restarts.failed("w", "load", others=False)
    assert restarts.suspects == ["v", "w"]


async def test_of_many_names_the_failures_are_forgotten(autojump_clock: MockClock) -> None:
    restarts = Restarts(lambda version: False, lambda able: None)
    for n in range(2 * VERSIONS):
        for _ in range(3):
            restarts.failed(f"v{n}", "load", others=False)
    assert restarts.due("v0") == 0
    assert restarts.due(f"v{2 * VERSIONS - 1}") > 0
    assert len(restarts._failures) == len(restarts._due) == VERSIONS


async def test_a_job_that_is_cancelled_in_line_gives_its_place_up(autojump_clock: MockClock) -> None:
    async with open_pool(Models(), shared=False, per_version=1, total=1) as pool, trio.open_nursery() as nursery:
        scope, last, began = trio.CancelScope(), Waiter("v"), trio.current_time()

        async def leaves() -> None:
            with scope:
                await use(pool, "v", 1000)

        await line_up(nursery, lambda: use(pool, "v"), leaves, lambda: use(pool, "v", 1, last))
        assert pool.place(last) == 1
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert pool.place(last) == 0
        assert await use(pool, "v") == began + LOAD + 3


async def test_a_job_that_is_cancelled_before_it_stands_in_line_wedges_nobody(autojump_clock: MockClock) -> None:
    models = Models()
    async with open_pool(models, shared=False, per_version=1, total=1) as pool:
        with trio.CancelScope() as scope:
            scope.cancel()
            await use(pool, "v")
        with trio.fail_after(LOAD + 2):
            await use(pool, "v")
    assert [runner.verbs for _, runner in models.made] == [[], ["start", "run sleep", "shutdown"]]


@pytest.mark.parametrize("ready", [False, True])
async def test_a_job_that_is_cancelled_in_the_moment_in_which_it_is_given_an_instance(
    autojump_clock: MockClock, ready: bool
) -> None:
    """Given, but not yet awake: the instance goes to the next in line, loaded or not."""
    load = trio.Event()
    models = Models(load=load.wait)
    async with open_pool(models, shared=False, per_version=1, total=1) as pool, trio.open_nursery() as nursery:
        if ready:
            load.set()
        waiter, scope = Waiter("v"), trio.CancelScope()

        async def holds() -> None:
            with contextlib.suppress(RuntimeError):
                async with pool.lease("v", Waiter("v")):
                    await let_go.wait()
                    if not ready:
                        raise RuntimeError

        async def leaves() -> None:
            with scope:
                await use(pool, "v", 1000, waiter)

        let_go = trio.Event()
        if ready:
            await line_up(nursery, holds, leaves)
            let_go.set()
        else:
            nursery.start_soon(leaves)
        while not waiter.given.is_set():
            await trio.lowlevel.cancel_shielded_checkpoint()
        scope.cancel()
        load.set()
        with trio.fail_after(10):
            await use(pool, "v")


@pytest.mark.parametrize("shared", [False, True])
async def test_a_load_goes_on_for_the_next_when_its_job_has_left(autojump_clock: MockClock, shared: bool) -> None:
    """Callers that wait for less than a load takes would else never see its end. Mutants seen: the load ends with its
    job; who comes next starts another; nobody is told of a load that is over."""
    models = Models(shared=shared)
    async with open_pool(models, shared=shared, per_version=1, total=1) as pool:
        began = trio.current_time()
        for _ in range(2):
            with trio.move_on_after(LOAD / 2 - 0.5) as scope:
                await use(pool, "v")
            assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            first = Waiter("v")
            await line_up(nursery, lambda: use(pool, "v", 1, first), lambda: use(pool, "v"))
            assert pool.place(first) == 0
        assert trio.current_time() == began + LOAD + (1 if shared else 2)
    assert [runner.verbs for _, runner in models.made] == [["start", "run sleep", "run sleep", "shutdown"]]


async def test_who_comes_next_hears_of_the_load_that_was_begun_for_another(autojump_clock: MockClock) -> None:
    """Though there may be more instances. Mutant seen: it begins one of its own."""

    async def fail() -> None:
        await trio.sleep(LOAD)
        raise OSError("no weights here")

    models = Models(load=fail)
    async with open_pool(models, shared=False, per_version=2, total=9) as pool:
        with trio.move_on_after(1):
            await use(pool, "v")
        with pytest.raises(JobFailed, match="no weights here"):
            await use(pool, "v")
        assert (trio.current_time(), models.versions) == (LOAD, ["v"])


async def test_a_load_that_nobody_waits_for_makes_room_for_another_version(autojump_clock: MockClock) -> None:
    """At once. Mutant seen: it is waited for."""
    models = Models()
    async with open_pool(models, shared=False, per_version=1, total=1) as pool:
        with trio.move_on_after(1):
            await use(pool, "a")
        assert await use(pool, "b") == 1 + LOAD + 1
    assert [(version, runner.verbs) for version, runner in models.made] == [
        ("a", ["start"]),
        ("b", ["start", "run sleep", "shutdown"]),
    ]


async def test_what_has_loaded_for_nobody_is_idle_from_then_on(autojump_clock: MockClock) -> None:
    """Mutant seen: it is closed while it loads, or too early after that."""
    models = Models()
    async with open_pool(models, shared=False, per_version=1, total=9, idle=LOAD - 1) as pool:
        with trio.move_on_after(0.5):
            await use(pool, "v")
        await trio.sleep(2 * LOAD - 1.6)
        assert models.made[0][1].verbs == ["start"]
        await trio.sleep(0.2)
        assert models.made[0][1].verbs == ["start", "shutdown"]


async def test_a_load_that_nobody_waits_for_and_that_fails_counts(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        await trio.sleep(LOAD)
        raise OSError("no weights here")

    models, restarts = Models(load=fail), Restarts(lambda version: True, lambda able: None)
    async with open_pool(models, shared=False, per_version=1, total=1, restarts=restarts) as pool:
        for _ in range(3):
            with trio.move_on_after(1):
                await use(pool, "v")
            await trio.sleep(LOAD)
        assert not restarts.able
        assert caplog.text.count("did not load: while it loaded: no weights here") == 3
    assert models.versions == ["v"] * 3


async def test_leaving_the_pool_ends_loads_under_way(autojump_clock: MockClock) -> None:
    models = Models()
    async with open_pool(models, shared=False, per_version=1, total=2) as pool:
        with trio.move_on_after(1):
            await use(pool, "v")
    assert trio.current_time() == 1
    assert [runner.verbs for _, runner in models.made] == [["start"]]


@pytest.mark.parametrize("shared", [False, True])
async def test_a_load_whose_data_is_replaced_while_nobody_waits_for_it_is_given_up(
    autojump_clock: MockClock, shared: bool
) -> None:
    """What was looked at is let go of. Mutant seen: its descriptor is not."""

    class Look:
        replaced = closed = False

        def __init__(self, version: str) -> None:
            looks.append(self)

        def close(self) -> None:
            self.closed = True

    models, looks = Models(shared=shared), list[Look]()
    async with open_pool(models, Look, shared=shared, per_version=1, total=9) as pool:
        with trio.move_on_after(1):
            await use(pool, "v")
        looks[0].replaced = True
        assert await use(pool, "v") == 1 + LOAD + 1
    assert [runner.verbs for _, runner in models.made] == [["start"], ["start", "run sleep", "shutdown"]]
    assert [look.closed for look in looks] == [True, True]


async def test_a_crash_ends_its_own_job_and_the_instance_is_replaced(autojump_clock: MockClock) -> None:
    models = Models()
    outcomes: list[str] = []
    async with open_pool(models, shared=False, per_version=1, total=1) as pool, trio.open_nursery() as nursery:

        async def job() -> None:
            try:
                await use(pool, "v")
                outcomes.append("ran")
            except JobFailed as exc:
                outcomes.append(exc.reason)

        await line_up(nursery, job, job)
        await trio.sleep(LOAD + 0.5)
        models.made[0][1].crash()
    assert outcomes == ["WORKER_CRASHED", "ran"]
    assert models.versions == ["v", "v"]


async def test_an_instance_that_keeps_dying_is_replaced_less_and_less_often(autojump_clock: MockClock) -> None:
    """Twice at once; other versions do not wait; a run that its instance survives ends the row.

    Mutants seen: who waits for a pause is not woken; the pause is longer each time for ever; idle deaths do not count.
    """
    models = Models(load=lambda: trio.sleep(0))
    ends: list[float] = []

    async def crash(pool: Pool, *, idle: bool) -> None:
        async with pool.lease("v", Waiter("v")) as lease, trio.open_nursery() as nursery:

            @nursery.start_soon
            async def later() -> None:
                await trio.sleep(0.01)
                if not idle:
                    models.made[-1][1].crash()

            if not idle:
                with pytest.raises(JobFailed, match="SIGKILL"):
                    await lease.run(task("v", 1), lambda *report: None)
        if idle:
            models.made[-1][1].crash()
            await trio.testing.wait_all_tasks_blocked()

    async with open_pool(models, shared=False, per_version=1, total=2) as pool:
        await use(pool, "w")
        for n in range(9):
            await crash(pool, idle=n % 2 == 1)
            ends.append(trio.current_time())
        began = trio.current_time()
        await use(pool, "w", seconds=0)
        assert trio.current_time() - began < 1
        await use(pool, "v", seconds=0)
        assert trio.current_time() - began == pytest.approx(30, abs=1)
        began = trio.current_time()
        await crash(pool, idle=False)
        await use(pool, "v", seconds=0)
        assert trio.current_time() - began < 1
    pauses = [round(after - before) for before, after in itertools.pairwise(ends)]
    assert pauses == [0, 0, 1, 2, 4, 8, 16, 30]


async def test_an_instance_that_died_while_it_was_idle_is_not_given_to_anybody(autojump_clock: MockClock) -> None:
    models = Models()
    async with open_pool(models, shared=False, per_version=1, total=1) as pool:
        await use(pool, "v")
        models.made[0][1].crash()
        await use(pool, "v")
    assert [runner.verbs for _, runner in models.made] == [["start", "run sleep", "shutdown"]] * 2


async def test_a_job_whose_runner_was_broken_goes_to_the_head_of_the_line(autojump_clock: MockClock) -> None:
    models = Models()
    order: list[str] = []
    async with open_pool(models, shared=False, per_version=1, total=1) as pool, trio.open_nursery() as nursery:

        async def unlucky() -> None:
            async with pool.lease("v", Waiter("v")) as lease:
                models.made[0][1].crash()
                with pytest.raises(RunnerBroken):
                    await lease.run(task("v", 1), lambda *report: None)
            await use(pool, "v", 1, Waiter("v", again=True))
            order.append("unlucky")

        async def other(name: str) -> None:
            await use(pool, "v")
            order.append(name)

        await line_up(nursery, unlucky, lambda: other("second"), lambda: other("third"))
    assert order == ["unlucky", "second", "third"]


async def test_leaving_the_pool_closes_all_instances_at_once_even_when_cancelled(autojump_clock: MockClock) -> None:
    models = Models()
    with trio.CancelScope() as scope:
        async with open_pool(models, shared=False, per_version=1, total=16) as pool:
            async with trio.open_nursery() as nursery:
                for version in "abc":
                    nursery.start_soon(use, pool, version)
            began = trio.current_time()
            scope.cancel()
    assert trio.current_time() == began + CLOSE
    assert [runner.verbs[-1] for _, runner in models.made] == ["shutdown"] * 3


async def test_a_close_hook_that_raises_does_not_keep_others_from_closing(autojump_clock: MockClock) -> None:
    class Raises(Models):
        def __call__(self, version: str) -> Runner:
            async def close() -> None:
                raise OSError("disk full")

            runner = FakeRunner({}, close=close)
            self.made.append((version, runner))
            return runner

    models = Raises()
    async with open_pool(models, shared=False, per_version=1, total=16) as pool:
        for version in "ab":
            async with pool.lease(version, Waiter(version)):
                pass
    assert [runner.verbs for _, runner in models.made] == [["start", "shutdown"]] * 2


@pytest.mark.parametrize(
    ("shared", "per_version", "total", "count"), [(False, 3, 9, 3), (False, 3, 2, 2), (True, 3, 9, 1)]
)
async def test_a_version_is_loaded_before_its_first_job(
    shared: bool, per_version: int, total: int, count: int, autojump_clock: MockClock
) -> None:
    models = Models(shared=shared)
    async with open_pool(models, shared=shared, per_version=per_version, total=total) as pool:
        began = trio.current_time()
        await pool.preload("v")
        assert (models.versions, trio.current_time() - began) == (["v"] * count, LOAD)
        assert await use(pool, "v", 1) - began == LOAD + 1
    assert models.versions == ["v"] * count


async def test_what_does_not_load_beforehand_is_an_error_and_leaves_nothing(autojump_clock: MockClock) -> None:
    async def fail() -> None:
        await trio.sleep(LOAD)
        raise ValueError("no such weights")

    models = Models(load=fail)
    async with open_pool(models, shared=False, per_version=3, total=9) as pool:
        with pytest.RaisesGroup(pytest.RaisesExc(JobFailed, match="while it loaded")):
            await pool.preload("v")
        models.load = lambda: trio.sleep(LOAD)
        await use(pool, "v")
    assert models.versions == ["v"] * 4


async def test_an_instance_that_nobody_uses_is_closed_after_a_while_and_not_before(autojump_clock: MockClock) -> None:
    """Mutants seen: counted from the start; what became free meanwhile is closed too early, or a period late."""
    models = Models()
    async with open_pool(models, shared=False, per_version=1, total=9, idle=60) as pool:
        await use(pool, "a")
        for _ in range(5):  # each within the time
            await trio.sleep(59)
            await use(pool, "a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, pool, "b", 200)  # longer than that, but not idle
            await trio.sleep(59.9)
            assert [runner.verbs[-1] for _, runner in models.made] == ["run sleep", "run sleep"]
            await trio.sleep(0.2)
            assert [runner.verbs[-1] for _, runner in models.made] == ["shutdown", "run sleep"]
        await trio.sleep(59.9)
        assert models.made[1][1].verbs[-1] == "run sleep"
        await trio.sleep(0.2)
        assert models.made[1][1].verbs[-1] == "shutdown"
        await use(pool, "a")
    assert models.versions == ["a", "b", "a"]


@pytest.mark.parametrize("shared", [False, True])
async def test_an_instance_that_is_free_now_may_be_taken_before_its_job_is_there(
    autojump_clock: MockClock, shared: bool
) -> None:
    """Mutants seen: one that loads is taken, or a busy one; it is used by two, or counted twice; what is given back
    stays taken.
    """
    models, ended = Models(shared=shared), []
    async with (
        open_pool(models, shared=shared, at_once=1, per_version=1, total=1) as pool,
        trio.open_nursery() as limit,
    ):
        limit.cancel_scope.deadline = trio.current_time() + 100
        assert pool.take(Waiter("v")) is None
        with trio.move_on_after(LOAD / 2):  # its load goes on for the next one
            await use(pool, "v")
        assert pool.take(Waiter("v")) is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, pool, "v")
            await trio.sleep(LOAD / 2 + 0.5)
            assert pool.take(Waiter("v")) is None
        taken = Waiter("v")
        assert pool.take(taken) is not None
        assert pool.take(Waiter("v")) is None
        assert pool.states()["busy"] == 1

        async def job(name: str, waiter: Waiter) -> None:
            await use(pool, "v", 1, waiter)
            ended.append(name)

        async with trio.open_nursery() as nursery:
            await line_up(nursery, functools.partial(job, "in line", Waiter("v")))
            nursery.start_soon(job, "taken", taken)
        assert ended == ["taken", "in line"]
        given_back = Waiter("v")
        assert pool.take(given_back) is not None
        async with trio.open_nursery() as nursery:
            await line_up(nursery, functools.partial(job, "later", Waiter("v")))
            pool.give_back(given_back)
            assert pool.take(Waiter("v")) is None
        assert ended[2:] == ["later"]
        assert pool.states() == {"loading": 0, "idle": 1, "busy": 0, "closing": 0}
    assert not limit.cancel_scope.cancelled_caught
    assert models.versions == ["v"]
