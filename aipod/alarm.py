"""What is to be begun after a while, unless it is over by then: for the price of an entry in a heap.

A task that sleeps for it costs ten times as much, and most small jobs have ended before anything was due.
"""

from __future__ import annotations

import contextvars
import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any

import trio


class Alarm:
    """One thing that is to be begun. Made by `at`; whoever made it cancels it when it must not be begun any more."""

    __slots__ = ("_begin", "_context", "when")

    def __init__(self, when: float, begin: Callable[[], Any]) -> None:
        self.when = when  # by trio's clock
        self._begin: Callable[[], Any] | None = begin
        # Not the clock's, in which there is no loop of asyncio's: a task has that of who starts it.
        self._context = contextvars.copy_context()

    @property
    def is_over(self) -> bool:
        """It was begun, or cancelled."""
        return self._begin is None

    def cancel(self) -> None:
        """It is not begun any more. Idempotent."""
        self._begin = None

    def _ring(self) -> None:
        begin, self._begin = self._begin, None
        if begin is not None:
            self._context.run(begin)


class _Clock:
    """The alarms of one run of trio, the next one first."""

    def __init__(self) -> None:
        self._alarms: list[tuple[float, int, Alarm]] = []
        self._count = itertools.count()
        self._next = math.inf  # what `run` waits for
        self._earlier = trio.Event()

    def add(self, alarm: Alarm) -> None:
        heapq.heappush(self._alarms, (alarm.when, next(self._count), alarm))
        if alarm.when < self._next:
            self._next = alarm.when
            self._earlier.set()

    async def run(self) -> None:
        """Ring in time. This is a trio-flavored async function; it never returns."""
        while True:
            now = trio.current_time()
            # What is over is not waited for: most alarms are cancelled long before their time.
            while self._alarms and (self._alarms[0][0] <= now or self._alarms[0][2].is_over):
                heapq.heappop(self._alarms)[2]._ring()
            self._next = self._alarms[0][0] if self._alarms else math.inf
            self._earlier = trio.Event()
            with trio.move_on_at(self._next):
                await self._earlier.wait()


def at(when: float, begin: Callable[[], Any]) -> Alarm:
    """Call `begin`, which must not raise, at `when` by trio's clock. From a trio task."""
    try:
        clock = _clock.get()
    except LookupError:
        _clock.set(clock := _Clock())
        # Its owner is this run of trio. What is begun has owners of its own.
        trio.lowlevel.spawn_system_task(clock.run)
    alarm = Alarm(when, begin)
    clock.add(alarm)
    return alarm


_clock = trio.lowlevel.RunVar[_Clock]("aipod-clock")
