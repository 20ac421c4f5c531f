"""Who may write next on a connection: senders of long messages take turns, a frame each."""

from __future__ import annotations

import asyncio
import collections


class Turns:
    """The senders that wait for a socket, in order. Mutable state: the queue, and whether the socket takes data."""

    def __init__(self) -> None:
        self._writable = True
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()
        self._ended = False

    @property
    def free(self) -> bool:
        """The socket takes data and nobody is ahead; or the connection is over."""
        return self._ended or (self._writable and not self._waiting)

    def pause(self) -> None:
        """The socket takes no more for now."""
        self._writable = False

    def resume(self) -> None:
        """The socket takes data again."""
        self._writable = True
        self.next()

    def end(self) -> None:
        """The connection is over: nobody waits for it any more."""
        self._ended = True
        while self._waiting:
            _give(self._waiting.popleft())

    async def wait(self) -> None:
        """Wait for one's turn to write one frame; whoever got it calls `next` afterwards, whatever happened.

        Cancelled, it leaves the queue or passes the turn on. This is an asyncio-flavored function.
        """
        enqueue = self._waiting.append
        while True:
            turn = asyncio.get_running_loop().create_future()
            enqueue(turn)
            try:
                await turn
            except BaseException:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                elif not turn.cancelled():
                    self.next()
                raise
            if self._writable or self._ended:
                return
            enqueue = self._waiting.appendleft  # the socket filled up meanwhile: still first

    def next(self) -> None:
        """Let the next one write, if the socket takes it."""
        while self._writable and self._waiting:
            if _give(self._waiting.popleft()):
                return


def _give(turn: asyncio.Future[None]) -> bool:
    """False where the waiter is cancelled: it leaves the queue when it runs again, which may be later than this."""
    if turn.done():
        return False
    turn.set_result(None)
    return True
