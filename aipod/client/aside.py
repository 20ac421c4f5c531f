"""What goes on beside a call: tasks that end with it, and functions in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from aipod.client.failure import BadAnswer, Local
from aipod.client.source import InThread

T = TypeVar("T")


async def end(task: asyncio.Future[Any]) -> None:
    """Cancel `task` and wait for its end, whatever that is. This is an asyncio-flavored function."""
    task.cancel()
    task.add_done_callback(_ask)  # also where this wait is cancelled
    await asyncio.wait([task])


def _ask(task: asyncio.Future[Any]) -> None:
    """asyncio logs an exception that nobody has asked for."""
    if not task.cancelled():
        task.exception()


async def local(fn: Callable[..., T], *args: Any, in_thread: InThread = asyncio.to_thread) -> T:
    """Run `fn` in a thread; what it raises is no failure of the network's. This is an asyncio-flavored function."""
    try:
        return await in_thread(fn, *args)  # type: ignore[no-any-return]
    except BadAnswer:
        raise
    except Exception as exc:
        raise Local(exc) from exc
