"""A payload that an async iterator of trio's gives, on its way to the client's loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
from collections.abc import AsyncIterable
from typing import Any

import trio

from aipod.errors import UsageError

_END = object()
_Asked = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


class Ferry:
    """Asks `items` for one after the other, in one trio task, whenever the loop wants one; then it is iterated there.

    The task begins with the first question and ends with `aclose`. It belongs to the call, which outlives no `async
    with`, and is a system task only because a nursery would put an ExceptionGroup around what the call raises.
    """

    def __init__(self, items: AsyncIterable[Any]) -> None:
        self._items = items
        self._token = trio.lowlevel.current_trio_token()
        self._context = contextvars.copy_context()
        # The loop asks for one at a time; a question that it has given up is answered all the same.
        self._ask, self._asked = trio.open_memory_channel[_Asked](math.inf)
        self._scope = trio.CancelScope()
        self._over: trio.Event | None = None

    # On the loop

    def __aiter__(self) -> Ferry:
        return self

    async def __anext__(self) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._token.run_sync_soon(self._want, loop, future)
        if (item := await future) is _END:
            raise StopAsyncIteration
        return item

    # In trio

    def _want(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any]) -> None:
        if self._scope.cancel_called:
            _settle(loop, future, UsageError("the call of this payload is over"))
            return
        if self._over is None:
            self._over = trio.Event()
            trio.lowlevel.spawn_system_task(self._carry, name="aipod-payload", context=self._context)
        self._ask.send_nowait((loop, future))

    async def _carry(self) -> None:
        assert self._over is not None
        try:
            with self._scope:
                items = aiter(self._items)
                async for loop, future in self._asked:
                    item: Any
                    try:
                        item = await anext(items, _END)
                    except Exception as exc:
                        item = exc
                    _settle(loop, future, item)
        finally:
            self._over.set()

    async def aclose(self) -> None:
        """No more is wanted. Waits until the iterator has let go, also where it is cancelled."""
        self._scope.cancel()
        if self._over is not None:
            with trio.CancelScope(shield=True):
                await self._over.wait()


def _settle(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], item: Any) -> None:
    """Answer a question, unless nobody waits any more."""

    def settle() -> None:
        if future.done():
            return
        if isinstance(item, Exception):
            future.set_exception(item)
        else:
            future.set_result(item)

    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(settle)
