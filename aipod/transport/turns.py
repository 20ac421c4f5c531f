"""Who may write next on a connection, and who may open a stream.

Senders of long messages take turns, a frame each, both where the socket is full and where the window is used up: else
whoever runs first when there is credit again takes all of it, and others never have any (of six downloads over a window
of 64 KiB, two had everything). Small messages that have to wait, heartbeats above all, go before long ones.
"""

from __future__ import annotations

import asyncio
import collections
import functools

from aipod.transport.wakes import Wakes

# What one waits for: False where the next frame may be written, True where there is none to write any more.
Turn = asyncio.Future[bool]


class Turns:
    """The senders that wait, in order.

    The mutable state is the two queues, whether the socket takes data, and whether the connection has credit.
    """

    def __init__(self) -> None:
        self._writable = True
        self.has_credit = True  # the peer's window for the connection has room
        self._small: collections.deque[Turn] = collections.deque()
        self._long: collections.deque[Turn] = collections.deque()
        self._of: dict[object, Turn] = {}
        self._ended = False

    @property
    def free(self) -> bool:
        """Data can be written and nobody is ahead; or the connection is over."""
        return self._ended or (self._is_open and not self.awaited)

    @property
    def awaited(self) -> bool:
        """Somebody waits."""
        return bool(self._small or self._long)

    @property
    def _is_open(self) -> bool:
        return self._writable and self.has_credit

    def pause(self) -> None:
        """The socket takes no more for now."""
        self._writable = False

    def resume(self) -> None:
        """The socket takes data again."""
        self._writable = True
        self.next()

    def starve(self) -> None:
        """The window of the connection is used up."""
        self.has_credit = False

    def feed(self) -> None:
        """It has room again."""
        self.has_credit = True
        self.next()

    def end(self, wakes: Wakes) -> None:
        """The connection is over: nobody waits for it any more."""
        self._ended = True
        while self.awaited:
            wakes.add(functools.partial(_give, (self._small or self._long).popleft()))

    def skip(self, sender: object) -> None:
        """Let `sender` go on, which has nothing to write any more."""
        turn = self._of.get(sender)
        if turn is None or turn.done():
            return
        for queue in (self._small, self._long):
            if turn in queue:
                queue.remove(turn)
        turn.set_result(True)

    async def wait(self, sender: object, *, small: bool = False) -> None:
        """Wait for one's turn to write one frame; whoever got it calls `next` afterwards, whatever happened.

        Cancelled, it leaves the queue or passes the turn on. This is an asyncio-flavored function.
        """
        queue = self._small if small else self._long
        enqueue = queue.append
        while True:
            turn = self._of[sender] = asyncio.get_running_loop().create_future()
            enqueue(turn)
            try:
                await turn
            except BaseException:
                if turn in queue:
                    queue.remove(turn)
                elif not turn.cancelled():
                    self.next()
                raise
            finally:
                self._of.pop(sender, None)
            if self._is_open or self._ended or turn.result():
                return
            enqueue = queue.appendleft  # the socket filled up meanwhile: still first

    def next(self) -> None:
        """Let the next one write, if that is possible."""
        while self._is_open and self.awaited:
            if _give((self._small or self._long).popleft()):
                return


class Places:
    """The calls that wait to open a stream, in order: one goes on for each stream that ends.

    (grpclib lets all go on, and all but one wait again.) Who was called and opens no stream gives its place on.
    """

    def __init__(self) -> None:
        self._waiting: collections.deque[Turn] = collections.deque()

    @property
    def awaited(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def give(self) -> None:
        """There is a place: for who waits for it, or who comes next."""
        while self._waiting and not _give(self._waiting.popleft()):
            pass

    def end(self, wakes: Wakes) -> None:
        """There will be no more places: nobody waits for one any longer."""
        while self._waiting:
            wakes.add(functools.partial(_give, self._waiting.popleft()))

    async def wait(self) -> None:
        """Wait for a place. Cancelled, it leaves the line, or gives its place on. asyncio-flavored."""
        turn: Turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except BaseException:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif not turn.cancelled():
                self.give()
            raise


def _give(turn: Turn) -> bool:
    """False where the waiter is cancelled: it leaves the queue when it runs again, which may be later than this."""
    if turn.done():
        return False
    turn.set_result(False)
    return True
