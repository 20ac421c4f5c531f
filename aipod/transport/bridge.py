"""The one place where trio and asyncio meet; the only importer of trio_asyncio.

Importing trio_asyncio patches asyncio for the whole process, so nothing that an asyncio client needs may import this.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpclib.utils
import trio_asyncio

# grpclib binds `current_task` when it is imported. Where that was before trio_asyncio replaced it (Python 3.12+), every
# call would fail with "no running event loop": bind it again, so that the order of imports does not matter.
grpclib.utils._current_task = asyncio.current_task

log = logging.getLogger("aipod.transport")
T = TypeVar("T")


@contextlib.asynccontextmanager
async def open_loop() -> AsyncIterator[Any]:
    """An asyncio loop on top of trio for the body of the `async with`. This is a trio-flavored async function."""
    async with trio_asyncio.open_loop() as loop:
        # trio-asyncio's own handler ends the loop, and with it the process, at the first bad packet.
        loop.set_exception_handler(_log_error)
        _purge_timers(loop)
        yield loop


def _log_error(loop: Any, context: dict[str, Any]) -> None:
    log.error("event loop: %s", context.get("message"), exc_info=context.get("exception"))


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


def to_asyncio(fn: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """Make trio-flavored `fn` callable from asyncio. One crossing costs 47 us: cross once per call.

    A cancelled asyncio caller cancels `fn`'s scope and waits until it has really ended.
    """
    return trio_asyncio.trio_as_aio(fn)  # type: ignore[no-any-return]


def to_trio(fn: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """Make asyncio-flavored `fn` callable from trio, in a task of its own, which a cancelled scope cancels."""
    return trio_asyncio.aio_as_trio(fn)  # type: ignore[no-any-return]


async def inline(fn: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Call asyncio-flavored `fn` from trio without a task (1.2 us): only for code that needs no current asyncio task.

    This is a trio-flavored async function; `fn` sees `trio.Cancelled` where asyncio would raise CancelledError.
    """
    return await trio_asyncio.allow_asyncio(fn, *args)  # type: ignore[no-any-return]
