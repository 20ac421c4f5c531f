"""Short steps on the disk, for trio tasks: one after the other in a thread, in several where one of them stands still.

A thread for each step would cost more than the steps of small jobs do: while the loop is busy each call of the system
gives the GIL away and waits to have it back, and dozens of threads that do so at once wait for each other. So steps
that come while one is under way wait in line, and one wake tells the loop of all that are done. A disk may stand still,
or a step turn out to be long (a tree that has to be removed): then the next ones go to another thread.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple, cast

import outcome
import trio

# Seconds that a step may take before those behind it get another thread, and how many threads there are at most: as
# many as trio has for everything else.
PATIENCE = 0.05
MOST_HANDS = 40
# Seconds that a step may wait in line, though each before it was short, and how many threads there are at most for
# that: of steps that take 30 ms each, as over a network, one thread does 33 a second, whoever waits.
LINE = 0.25
SOME_HANDS = 8

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Step:
    __slots__ = ("call", "came", "result", "task")

    def __init__(self, task: trio.lowlevel.Task, call: Callable[[], Any]) -> None:
        self.task = task
        self.call = call
        self.came = time.monotonic()
        self.result: outcome.Outcome[Any] | None = None


async def do(fn: Callable[[*Ts], T], *args: *Ts) -> T:
    """`fn(*args)` in a thread, shortly. This is a trio-flavored async function; once begun it cannot be cancelled.

    `fn` must not ask trio for anything, and be done in milliseconds on a disk that is not slow.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    return await finish(fn, *args)


async def finish(fn: Callable[[*Ts], T], *args: *Ts) -> T:
    """As `do`, also where the task is cancelled."""
    try:
        hands = _hands.get()
    except LookupError:
        _hands.set(hands := Hands())
        # Its owner is this run of trio, as that of trio's own threads.
        trio.lowlevel.spawn_system_task(hands.watch)
    return await hands.do(functools.partial(fn, *args))


class Hands:
    """Does steps, of one run of trio. Changes in the trio thread, but for `_done`, `_telling` and `_begun`.

    A thread that finds nothing to do takes itself out of `_begun` and looks once more: whoever adds a step looks the
    other way round, so one of the two sees the other, and no thread has to tell the loop that it goes.

    The mutable state is who waits in line, when (monotonic) each thread has begun its step, and what is done.
    """

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._todo: collections.deque[_Step] = collections.deque()
        self._done: collections.deque[_Step] = collections.deque()
        self._telling = False
        self._begun: dict[object, float] = {}
        self._came = trio.Event()  # a step that has to wait

    async def do(self, call: Callable[[], T]) -> T:
        """As the function of that name."""
        step = _Step(trio.lowlevel.current_task(), call)
        self._todo.append(step)
        if not self._begun:
            self._start()
        else:
            self._came.set()
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        assert step.result is not None, "a step that is told is done"
        return cast(T, step.result.unwrap())

    async def watch(self) -> None:
        """Give another thread to steps that wait too long. This is a trio-flavored async function; it never returns."""
        while True:
            await self._came.wait()
            self._came = trio.Event()
            while self._todo:
                await trio.sleep(PATIENCE)
                if self._wants_more():
                    self._start()

    def _wants_more(self) -> bool:
        """Whether those in line wait too long for the threads that there are."""
        now, hands = time.monotonic(), len(self._begun)
        try:
            came = self._todo[0].came
        except IndexError:  # a thread has just taken the last one
            return False
        stuck = all(begun < now - PATIENCE for begun in list(self._begun.values()))
        return (stuck and hands < MOST_HANDS) or (came < now - LINE and hands < SOME_HANDS)

    def _start(self) -> None:
        me = object()
        self._begun[me] = time.monotonic()
        try:
            # Without a name: to give one and to take it back are two system calls each, and let go of the GIL.
            trio.lowlevel.start_thread_soon(lambda: self._work(me), _gone)
        except RuntimeError:  # the system has no thread to give (ulimit -u, a container's pids): `watch` asks again
            del self._begun[me]
            self._came.set()

    def _work(self, me: object) -> None:
        """In a thread: do what is in line until there is no more."""
        while True:
            try:
                step = self._todo.popleft()
            except IndexError:
                del self._begun[me]
                if not self._todo:
                    return
                self._begun[me] = time.monotonic()  # another may have begun for it by now: one of them finds nothing
                continue
            self._begun[me] = time.monotonic()
            step.result = outcome.capture(step.call)
            self._done.append(step)
            if not self._telling:
                self._telling = True
                with contextlib.suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(self._tell)

    def _tell(self) -> None:
        self._telling = False
        while self._done:
            trio.lowlevel.reschedule(self._done.popleft().task)


def _gone(result: outcome.Outcome[None]) -> None:
    """A thread has ended: nobody waits for that."""


_hands = trio.lowlevel.RunVar[Hands]("aipod-hands")
