"""How much a peer may send before the application has taken it: HTTP/2 windows that grow with the link.

A stream begins with a small window. While most of it arrives within one round trip, the window is what limits the
stream, and it doubles: it ends at the link's bandwidth-delay product (the rule of gRPC's BDP estimator; `protocol`
sends the PINGs that measure round trips). An application that knows that much is coming says so, and need not wait for
that: at 50 ms and 1 Gbit/s the doubling takes as long as 25 MB. A message longer than the window gets the difference
for as long as it lasts, unless the application has enough such messages to take before it. All are taken from pools
that the connection's streams share. What a connection can make this process hold:

    streams * stream_window + connection_window (growth) + max_message (long messages) + max_message (inflated)

`streams` is max_streams, and with those that were reset while their work goes on four times as many at most
(`protocol.STREAM_SLACK`). Of compressed messages one is inflated at a time (`inbox`); what they were before counts as
any other. What an application has taken is its own affair.

The connection's own window limits nothing but the bytes on their way: it is given back as they arrive, so that a stream
whose application stalls takes no room from the others.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

from aipod.config import MIB

# Room is given back in quarters of the window; but whatever there is when an eighth is left and nothing else would make
# the message under way complete.
_TOP_UP = 4
_LOW = 8
# Who widens its window beforehand takes this part of what there is.
_SHARE = 4
# Long messages of one stream that have come or are coming before the application has taken them, but for the first:
# enough that its sender need not wait between two, and not all that the pool has for an application that is slow.
_AHEAD = 8 * MIB


class Grant:
    """Bytes asked of a Budget, in turn; `granted` once they were given."""

    def __init__(self, size: int, on_granted: Callable[[], None]) -> None:
        self.size = size
        self.granted = False
        self.on_granted = on_granted


class Budget:
    """Bytes that are shared by the streams of a connection, given to one request after the other."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._waiting: collections.deque[Grant] = collections.deque()

    @property
    def share(self) -> int:
        """What one may take that is not in need: others come."""
        return self._free // _SHARE

    def take(self, size: int) -> bool:
        """`size` bytes at once, or nothing."""
        if size > self._free:
            return False
        self._free -= size
        return True

    def give(self, size: int) -> None:
        """Give bytes back."""
        self._free += size
        self._serve()

    def ask(self, size: int, on_granted: Callable[[], None]) -> Grant:
        """Ask for `size` bytes, more than the pool has cut to that; `on_granted` is called, perhaps at once."""
        grant = Grant(min(size, self._size), on_granted)
        self._waiting.append(grant)
        self._serve()
        return grant

    def withdraw(self, grant: Grant) -> None:
        """The end of a grant, whether it was given or still waits."""
        if grant.granted:
            self._free += grant.size
        else:
            self._waiting.remove(grant)
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self.take(self._waiting[0].size):
            grant = self._waiting.popleft()
            grant.granted = True
            grant.on_granted()


class ReceiveWindow:
    """The window of one stream. `credit` sends a WINDOW_UPDATE."""

    def __init__(
        self, initial: int, limit: int, growth: Budget, messages: Budget, credit: Callable[[int], None]
    ) -> None:
        self.size = initial
        self._initial = initial
        self._limit = limit
        self._growth = growth
        self._messages = messages
        self._credit = credit
        self._sendable = initial  # what the peer may send now
        self._held = 0  # bytes that the application has not taken
        self._round = 0  # bytes that came since the last sample
        self._granted: dict[int, Grant] = {}  # for long messages, by their place in the stream
        self._unasked: tuple[int, int] | None = None  # the long message under way that has no grant yet, and its size
        self._closed = False

    def arrived(self, size: int, *, hungry: bool) -> None:
        """`size` bytes came; `hungry`: the application has no whole message to take."""
        self._sendable -= size
        self._held += size
        self._round += size
        self._top_up(hungry=hungry)

    def taken(self, size: int, *, hungry: bool) -> None:
        """The application has taken `size` bytes."""
        self._held -= size
        self._top_up(hungry=hungry)

    def widen(self, size: int) -> None:
        """So many bytes are coming: let as many come at once as one may have, out of what others leave."""
        more = min(size - self.size, self._limit - self.size, self._growth.share)
        if more > 0 and not self._closed and self._growth.take(more):
            self.size += more
            self._top_up()

    def sample(self) -> bool:
        """A round trip has passed: grow if most of the window came in it. Whether it did grow."""
        busy, self._round = self._round * 3 > self.size * 2, 0
        more = min(self.size, self._limit - self.size)
        if not busy or self._closed or more <= 0 or not self._growth.take(more):
            return False
        self.size += more
        self._top_up()
        return True

    def expect(self, message: int, size: int) -> int:
        """Message number `message` begins and will have `size` bytes; how many of them may come for certain."""
        if size <= self.size:
            return size
        self._unasked = message, size
        self._ask()
        return size if message in self._granted and self._granted[message].granted else self.size

    def _ask(self) -> None:
        """Ask for room for the long message under way, unless the application has enough to take before it."""
        if self._unasked is None:
            return
        message, size = self._unasked
        if self._granted and sum(grant.size for grant in self._granted.values()) + size > _AHEAD:
            return
        self._unasked = None
        self._granted[message] = self._messages.ask(size, self._top_up)
        self._top_up()  # when it was granted at once, this window did not know it yet

    def done(self, message: int) -> None:
        """The application has taken message number `message`."""
        if self._granted and (grant := self._granted.pop(message, None)) is not None:
            self._messages.withdraw(grant)
        if self._unasked is not None and self._unasked[0] <= message:
            self._unasked = None  # the window alone has let it come
        if not self._closed:
            self._ask()

    def end(self) -> None:
        """Nothing more comes."""
        self._closed = True

    def close(self) -> None:
        """The stream is over: what it had beyond its first window is for others."""
        self._closed = True
        self._growth.give(self.size - self._initial)
        self.size = self._initial
        for message in list(self._granted):
            self.done(message)

    def _top_up(self, *, hungry: bool = True) -> None:
        granted = sum(grant.size for grant in self._granted.values() if grant.granted) if self._granted else 0
        room = self.size + granted - self._held - self._sendable
        least = 1 if hungry and self._sendable < self.size // _LOW else max(1, self.size // _TOP_UP)
        if room >= least and not self._closed:
            self._sendable += room
            self._credit(room)
