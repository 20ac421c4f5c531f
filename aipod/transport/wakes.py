"""Those whose streams have ended, woken some dozens at a time."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable

# Calls that are told of their end before the loop has its turn again: each takes up to half a millisecond to unwind,
# with its tasks. All at once, twenty lost connections with a thousand calls each were seconds without a PING answered.
IN_A_TURN = 32


class Wakes:
    """Wakes in order: a few at once, the others in the next turns of the loop.

    Whoever shares one shares its turns: all connections of a server do. Waking one that has ended by itself meanwhile
    must be nothing. The mutable state is who waits, and how many may still be woken in this turn.
    """

    def __init__(self) -> None:
        self._waiting: collections.deque[Callable[[], object]] = collections.deque()
        self._left: float = IN_A_TURN
        self._refill: asyncio.Handle | None = None

    def add(self, wake: Callable[[], object]) -> None:
        """Call `wake` behind all that were added before; at once where this turn has room for it."""
        self._waiting.append(wake)
        self._go_on()

    def hurry(self) -> None:
        """Wake all now, and from now on each at once: nobody is left who would have to wait for that."""
        self._left = float("inf")
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting and self._left:
            self._left -= 1
            self._waiting.popleft()()
        if self._refill is None and self._left < IN_A_TURN:
            self._refill = asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._refill = None
        self._left = max(self._left, IN_A_TURN)
        self._go_on()
