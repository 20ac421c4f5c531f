"""What one task makes and an async iterator gives: events, the chunks of an answer."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Generic, TypeVar

from aipod.client.aside import end
from aipod.client.event import Event, Listener, merged

T = TypeVar("T")


class Handed(Generic[T]):
    """Things on their way to who iterates. asyncio-flavored; for one task that makes them, and one that takes them."""

    def __init__(self) -> None:
        self._items: collections.deque[T] = collections.deque()
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()

    async def put(self, item: T) -> None:
        """Hand `item` on, and wait while another one is before it."""
        self._items.append(item)
        self._arrived.set()
        while len(self._items) > 1:
            await self._wait()

    async def taken(self) -> None:
        """Until all was taken."""
        while self._items:
            await self._wait()

    async def _wait(self) -> None:
        self._taken.clear()
        await self._taken.wait()

    async def each(self, make: Callable[[], Coroutine[Any, Any, Any]]) -> AsyncGenerator[T, None]:
        """What `make` puts in, until it ends; then what it raises. Left early, it is cancelled and waited for."""
        making = asyncio.create_task(make(), name="aipod-hand-on")
        making.add_done_callback(lambda _: self._arrived.set())
        try:
            while True:
                self._arrived.clear()
                while self._items:
                    item = self._items.popleft()
                    self._taken.set()
                    yield item
                    del item  # a chunk is not held while the next one is awaited
                if making.done():
                    break
                await self._arrived.wait()
            await making
        finally:
            await end(making)


class Events(Handed[Event], Listener):
    """Events. While who iterates is busy, the newest of a phase takes the place of the one before it."""

    def __call__(self, event: Event) -> None:
        both = merged(self._items[-1], event) if self._items else None
        if both is not None:
            self._items[-1] = both
        else:
            self._items.append(event)
        self._arrived.set()
