"""Short steps on the disk, and what is begun after a while."""

from __future__ import annotations

import collections
import contextvars
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from aipod import alarm, hands


async def test_steps_that_come_while_one_is_under_way_share_its_thread() -> None:
    """Mutant seen: a thread for each."""
    go, names = threading.Event(), list[str]()

    def step(name: str) -> int:
        go.wait(10)
        names.append(name)
        return threading.get_ident()

    found: dict[str, int] = {}

    async def do(name: str) -> None:
        found[name] = await hands.do(step, name)

    async with trio.open_nursery() as nursery:
        for name in "abc":
            nursery.start_soon(do, name)
        await trio.testing.wait_all_tasks_blocked()
        go.set()
    assert sorted(names) == ["a", "b", "c"]
    assert len(set(found.values())) == 1


async def test_a_step_that_stands_still_keeps_no_other_one() -> None:
    """As on a disk that does. Mutants seen: nobody looks; one look and no more."""
    go, stuck = threading.Event(), []

    async def stand() -> None:
        await hands.do(go.wait, 20)
        stuck.append("went on")

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(stand)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(20):
            assert await hands.do(lambda: 42) == 42
        assert not stuck
        go.set()
    assert len(stuck) == 3


async def test_short_steps_that_make_a_long_line_get_more_threads() -> None:
    """As on a disk behind a network, where each takes a while. Mutant seen: only a step that stands still counts."""
    busy, most, threads = set[int](), 0, set[int]()

    def step() -> None:
        nonlocal most
        busy.add(threading.get_ident())
        most = max(most, len(busy))
        time.sleep(hands.PATIENCE / 2)
        threads.add(threading.get_ident())
        busy.discard(threading.get_ident())

    async with trio.open_nursery() as nursery:
        for _ in range(60):
            nursery.start_soon(hands.do, step)
    assert len(threads) > 1
    assert most <= hands.SOME_HANDS


async def test_a_step_that_comes_as_the_thread_goes_is_done() -> None:
    """It saw the thread, which saw nothing to do. Mutant seen: that does not look again."""
    empty, go = threading.Event(), threading.Event()

    class Line(collections.deque[Any]):
        def popleft(self) -> Any:
            if not self:
                empty.set()
                assert go.wait(20)
                raise IndexError
            return super().popleft()

    alone = hands.Hands()  # nobody watches
    alone._todo = Line()
    assert await alone.do(lambda: 1) == 1
    assert await trio.to_thread.run_sync(empty.wait, 20)
    done = threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alone.do, done.set)
        await trio.testing.wait_all_tasks_blocked()
        go.set()
        was_done = await trio.to_thread.run_sync(done.wait, 20)
        if not was_done:
            alone._start()  # or this would never end
    assert was_done


# A thread wants more memory for its stack than there is, until there is more: the system has none to give, as where
# `ulimit -u` or a container's bound is reached. In a process of its own, which is left with little.
NO_THREADS = """
import resource, threading, trio
from aipod import hands

GIB = 1 << 30

async def main():
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    threading.stack_size(2 * GIB)
    resource.setrlimit(resource.RLIMIT_AS, (taken + GIB, resource.RLIM_INFINITY))
    try:
        threading.Thread(target=int).start()
    except RuntimeError as exc:
        print(exc)
    done = 0

    async def do():
        nonlocal done
        await hands.do(int)
        done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(do)
        await trio.sleep(4 * hands.PATIENCE)
        print(done)
        threading.stack_size(0)
    print(done)

trio.run(main)
"""


def test_steps_wait_while_the_system_has_no_thread_to_give() -> None:
    """Mutants seen: the step raises, and its entry stays; who gives more threads does, and ends the server."""
    found = subprocess.run([sys.executable, "-c", NO_THREADS], capture_output=True, text=True, timeout=60)
    assert found.stderr == ""
    assert found.stdout.splitlines() == ["can't start new thread", "0", "3"]


async def test_a_step_that_raises_and_one_that_is_cancelled() -> None:
    """Mutants seen: an error is lost; a step is begun for who was cancelled before; one that began is not awaited."""
    with pytest.raises(ZeroDivisionError):
        await hands.do(lambda: 1 // 0)
    with trio.CancelScope() as scope:
        scope.cancel()
        assert await hands.finish(lambda: "done") == "done"
        await hands.do(pytest.fail, "begun")
    assert scope.cancelled_caught
    go, done = threading.Event(), []
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hands.do, lambda: go.wait(20) and done.append("done"))
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            go.set()
    assert done == ["done"]


async def test_alarms_ring_in_time_and_in_order(autojump_clock: MockClock) -> None:
    """Mutants seen: an earlier one does not wake; a cancelled one rings; it rings in the context of the clock."""
    began, rung = trio.current_time(), list[tuple[str, float]]()
    whose = contextvars.ContextVar[str]("whose")

    def ring() -> None:
        rung.append((whose.get(), trio.current_time() - began))

    alarms = {}
    for name, seconds in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("d", 1.5)):
        whose.set(name)
        alarms[name] = alarm.at(began + seconds, ring)
        await trio.testing.wait_all_tasks_blocked()
    alarms["d"].cancel()
    await trio.sleep(10)
    assert rung == [("a", 1.0), ("b", 2.0), ("c", 3.0)]


async def test_alarms_that_are_over_are_not_waited_for(autojump_clock: MockClock) -> None:
    """Mutant seen: the clock wakes at the time of one that was cancelled, as nearly all are."""
    now, rung = trio.current_time(), trio.Event()
    alarm.at(now + 1.0, rung.set)
    for seconds in (2.0, 3.0):
        alarm.at(now + seconds, rung.set).cancel()
    alarm.at(now + 10.0, rung.set)
    await rung.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().seconds_to_next_deadline == 9.0
