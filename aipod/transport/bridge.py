"""The one place where trio and asyncio meet; the only importer of trio_asyncio.

Importing trio_asyncio patches asyncio for the whole process, so nothing that an asyncio client needs may import this.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import functools
import heapq
import logging
import sys
import time
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any, TypeVar, cast

import grpclib.utils
import trio

_is_first = "trio_asyncio" not in sys.modules
import trio_asyncio  # noqa: E402
from trio_asyncio import _loop as _patches  # noqa: E402

from aipod.transport.limits import Bucket  # noqa: E402

# grpclib binds `current_task` when it is imported. Where that was before trio_asyncio replaced it (Python 3.12+), every
# call would fail with "no running event loop": bind it again, so that the order of imports does not matter.
grpclib.utils._current_task = asyncio.current_task

# Outside trio, trio_asyncio makes loops of its own kind for whoever asks asyncio for one, unless the thread has set a
# policy: as if each had set the one that there was, so that `asyncio.run` in a program that serves is as before. Not
# where the program has imported trio_asyncio by itself, and may want that.
if _is_first:
    _patches._FakedPolicy.policy = _patches._original_policy

log = logging.getLogger("aipod.transport")
T = TypeVar("T")

# Seconds between two lines that say that this process, or its machine, has no more descriptors or memory.
EXHAUSTED_EVERY = 60.0
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

# Callbacks that are run, and reads of one descriptor and the seconds that they take, before trio has its turn again.
_CALLBACKS = 32
_READS = 4
_READING = 0.001


@contextlib.asynccontextmanager
async def open_loop() -> AsyncIterator[Any]:
    """An asyncio loop on top of trio for the body of the `async with`. This is a trio-flavored async function."""
    async with trio_asyncio.open_loop() as loop:
        # trio-asyncio's own handler ends the loop, and with it the process, at the first bad packet.
        loop.set_exception_handler(functools.partial(_log_error, Bucket(1 / EXHAUSTED_EVERY, 1)))
        _purge_timers(loop)
        _batch_callbacks(loop)
        _read_on(loop)
        yield loop


def _log_error(exhausted: Bucket, loop: Any, context: dict[str, Any]) -> None:
    exc = context.get("exception")
    if isinstance(exc, OSError) and exc.errno in _EXHAUSTED:
        # By accept(), which is tried again every second: it is not worth a line each time.
        if exhausted.take():
            log.error("no connection can be accepted for now: %s", exc.strerror)
        return
    log.error("event loop: %s", context.get("message"), exc_info=exc)


def _purge_timers(loop: Any) -> None:
    """trio-asyncio keeps a cancelled timer until it is due: drop them when they are half of all."""
    cancelled = 0

    def count(handle: Any) -> None:
        nonlocal cancelled
        cancelled += 1
        if cancelled > 100 and cancelled > len(loop._timers) // 2:
            loop._timers[:] = [timer for timer in loop._timers if not timer.cancelled()]
            heapq.heapify(loop._timers)
            cancelled = 0

    loop._timer_handle_cancelled = count


def _batch_callbacks(loop: Any) -> None:
    """trio-asyncio runs one callback for each turn of trio's scheduler: run all that wait, up to a bound."""
    run_one = loop._main_loop_one
    queue = loop._q_recv

    async def run_some(no_wait: bool = False) -> None:
        await run_one(no_wait)
        left = min(queue.statistics().current_buffer_used, _CALLBACKS)
        for _ in range(0 if no_wait else left):
            await run_one(True)

    loop._main_loop_one = run_some


def _read_on(loop: Any) -> None:
    """trio-asyncio waits for its queue and for epoll after each read: go on while more is there, up to a bound.

    What a read has left for the loop to do comes first.
    """

    async def io_task(fd: int, handle: Any, wait_ready: Callable[[int], Awaitable[None]]) -> None:
        with handle._scope:
            try:
                while not handle._cancelled:
                    try:
                        await wait_ready(fd)
                    except OSError:  # the descriptor was closed in the same moment
                        if handle._cancelled:
                            break
                        raise
                    began = time.monotonic()
                    for _ in range(_READS):
                        if handle._cancelled:
                            break
                        handle._run()
                        if not loop._q_recv.statistics().tasks_waiting_receive:
                            await loop.synchronize()
                            break
                        if time.monotonic() - began > _READING:
                            break
            except Exception as exc:
                handle._raise(exc)

    loop._io_task = io_task


class Spawner:
    """Starts trio tasks from callbacks of the loop's, in a nursery and with the context in which this was made."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        # Not the callback's: a context that `inline` has been entered in would go wrong.
        self._context = contextvars.copy_context()

    def start(
        self, fn: Callable[..., Awaitable[object]], *args: Any, on_end: Callable[[Exception | None], None]
    ) -> trio.CancelScope:
        """Start trio-flavored `fn(*args)`; the scope cancels it. `on_end` hears of its end, and what it raised."""
        scope = trio.CancelScope()

        async def run() -> None:
            error: Exception | None = None
            try:
                if not scope.cancel_called:  # as asyncio does it: what is cancelled before its first step never begins
                    with scope:
                        await fn(*args)
            except Exception as exc:
                error = exc
            except BaseExceptionGroup as group:  # the nursery is cancelled, and something went wrong besides
                cancelled, other = group.split(trio.Cancelled)
                if not isinstance(other, Exception):
                    raise
                error = other
                if cancelled is not None:
                    raise cancelled from None
            finally:
                on_end(error)

        self._context.run(self._nursery.start_soon, run)
        return scope


def to_trio(fn: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """Make asyncio-flavored `fn` callable from trio, in a task of its own, which a cancelled scope cancels."""
    return trio_asyncio.aio_as_trio(fn)  # type: ignore[no-any-return]


async def inline(fn: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Call asyncio-flavored `fn` from trio without a task: only for code that needs no current asyncio task.

    This is a trio-flavored async function; `fn` sees `trio.Cancelled` where asyncio would raise CancelledError.
    """
    steps = fn(*args).__await__()
    try:
        first = next(steps)
    except StopIteration as done:  # most have nothing to wait for, and need no adapter
        return cast(T, done.value)
    return cast(T, await go_on(steps, first))


@types.coroutine
def go_on(steps: Any, yielded: Any) -> Generator[Any, Any, Any]:
    """What is left of a coroutine that has yielded: a future of asyncio's, or what trio understands itself."""
    while True:
        try:
            if isinstance(yielded, asyncio.Future):
                value = yield from trio_asyncio.TrioEventLoop.run_aio_future(yielded)
            else:
                value = yield yielded
        except BaseException as exc:
            step, value = steps.throw, exc
        else:
            step = steps.send
        try:
            yielded = step(value)
        except StopIteration as done:
            return done.value
