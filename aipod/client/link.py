"""The connection of a client, and what it remembers of the servers behind it."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from aipod.client.addresses import Addresses, parse_targets
from aipod.codec import MAX_RELEASED
from aipod.config import Config
from aipod.transport.channel import Channel, is_literal, split_target
from aipod.wire.ai import Open

# Names of upstreams whose spool is remembered; a client that uses more pays a round trip more for a small job.
_SPOOLS = 64
# Small answers that wait for the next call, to be released with it; those that are dropped stay for their time.
_RELEASED = 256
# Of them in one call.
RELEASED_PER_CALL = MAX_RELEASED
# Seconds for each thing that is done behind the caller's back; how many of them at once, few enough for all to be in
# time on a connection that is busy; and how many may wait for their turn, of some 500 bytes each.
ERRAND = 2.0
_ERRANDS = 16
_WAITING = 4096

# Threads for chunks, of all calls of a client: one that compresses and one that reads or writes keep up with the loop,
# which sends all that they do. Each has a heap of its own, which grows by 10 MB and more and stays, and asyncio's
# threads are up to 32.
THREADS = 2

T = TypeVar("T")
Errand = tuple[Callable[..., Coroutine[Any, Any, Any]], tuple[Any, ...]]


class Had(NamedTuple):
    """A job whose outcome is here, and what leads to it."""

    spool: str
    ticket: bytes
    metadata: Sequence[tuple[str, str]] = ()
    misses: int = 0


class Link:
    """What the calls of one `Client` share. asyncio-flavored."""

    def __init__(self, targets: str | Sequence[str], config: Config) -> None:
        self._targets = parse_targets(targets)
        self.target = ", ".join(self._targets)
        # One that needs no choice is spared it.
        host = split_target(self._targets[0])[0]
        is_one = len(self._targets) == 1 and (host is None or is_literal(host))
        self._addresses = None if is_one else Addresses(self._targets, config)
        self.config = config
        self.closes = 0  # how often it was closed: a call does not outlive that by trying again
        self._channel: Channel | None = None
        self._spools: collections.OrderedDict[str, str] = collections.OrderedDict()
        self._released: collections.deque[Had] = collections.deque(maxlen=_RELEASED)
        self.errands: set[asyncio.Task[None]] = set()
        self._waiting: collections.deque[Errand] = collections.deque()
        self._calls: dict[asyncio.Future[None], asyncio.Task[Any]] = {}  # the ends of those under way, and whose
        self._leaving = False  # in `aclose`: no more patience with a server that does not answer
        self._watches: set[asyncio.Task[None]] = set()
        self._threads: ThreadPoolExecutor | None = None

    async def in_thread(self, fn: Callable[..., T], *args: Any) -> T:
        """Run `fn`, which does something to chunks and waits for nobody but the disk, in a thread of this client's."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="aipod")
        return await asyncio.get_running_loop().run_in_executor(self._threads, fn, *args)

    # The connections

    def channel(self, spool: str = "", misses: int = 0) -> Channel | None:
        """Where to ask for a job in `spool`, or a new one; None where `choose` has to find that out."""
        if self._addresses is not None:
            return self._addresses.at_hand(spool, misses)
        if self._channel is None:
            self._channel = Channel(self.target, self.config)
        return self._channel

    async def choose(self, spool: str, misses: int) -> Channel:
        """As `channel`, which may take a connection. Raises OSError where there is none."""
        channel = self.channel(spool, misses)
        if channel is None:
            assert self._addresses is not None
            channel = await self._addresses.choose(spool, misses)
        return channel

    @property
    def is_several(self) -> bool:
        """Whether what cannot be reached at one address is to be asked for at another."""
        return self._addresses is not None

    def is_connected(self, spool: str = "") -> bool:
        """Whether there is a connection for a job in `spool`, or a new one."""
        if self._addresses is None:
            return self._channel is not None and self._channel.connected
        channel = self._addresses.at_hand(spool, 0)
        return channel is not None and channel.connected

    def identity(self, metadata: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """`metadata` with what says who calls; where it says so itself, as it is."""
        token = self.config.token
        if not token or any(name == "authorization" for name, _ in metadata):
            return list(metadata)
        return [*metadata, ("authorization", f"Bearer {token}")]

    # The spool

    def spool(self, upstream: str) -> str:
        """The spool that answered last for `upstream`; empty where none has."""
        return self._spools.get(upstream, "")

    def learn(self, upstream: str, spool: str, channel: Channel | None = None) -> None:
        """`spool` has answered for `upstream`, over `channel` where that is known."""
        if spool:
            if self._addresses is not None and channel is not None:
                self._addresses.learn(spool, channel)
            self._spools[upstream] = spool
            self._spools.move_to_end(upstream)
            if len(self._spools) > _SPOOLS:
                self._spools.popitem(last=False)

    # Answers that arrived

    def release(self, had: Had) -> None:
        """Let the server know, with a later call or at the end, that it may forget the job."""
        if had.spool:  # else nobody can tell where to say it
            self._released.append(had)

    def take_released(self, opening: Open, spool: str) -> list[Had]:
        """Put tickets for `spool` into `opening`. What is returned goes to `put_back` where the call was lost."""
        # Not the one that this call asks for: it would be forgotten while it is told.
        mine = [had for had in self._released if had.spool == spool and had.ticket != opening.ticket]
        mine = mine[:RELEASED_PER_CALL]
        for had in mine:
            self._released.remove(had)
        opening.released = [had.ticket for had in mine]
        return mine

    def put_back(self, taken: Sequence[Had]) -> None:
        self._released.extend(taken)

    def _take_groups(self) -> Iterator[list[Had]]:
        """Take out all that waits, as many of one spool as may go with a call."""
        while self._released:
            spool = self._released[0].spool
            yield self.take_released(Open(), spool)

    def begin(self) -> asyncio.Future[None]:
        """A call of this task's has begun; what is returned goes to `end`."""
        task, over = asyncio.current_task(), asyncio.get_running_loop().create_future()
        assert task is not None
        self._calls[over] = task
        return over

    def end(self, over: asyncio.Future[None]) -> None:
        """That call has told the server what it has to tell it."""
        del self._calls[over]
        over.set_result(None)

    # What goes on behind the caller's back

    def errand(self, fn: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> bool:
        """Run `fn` for `ERRAND` seconds at most when its turn comes, best effort; `aclose` waits for it.

        False where too many wait: then it is not run.
        """
        if len(self.errands) < _ERRANDS:
            task = asyncio.get_running_loop().create_task(self._work_off(fn, args), name="aipod-errand")
            self.errands.add(task)
            task.add_done_callback(self.errands.discard)
        elif len(self._waiting) < _WAITING:
            self._waiting.append((fn, args))
        else:
            return False
        return True

    async def _work_off(self, fn: Callable[..., Coroutine[Any, Any, Any]], args: tuple[Any, ...]) -> None:
        """Do this errand, then those that wait. What they raise, nobody is there to be told."""
        while True:
            scope = asyncio.timeout(ERRAND)
            with contextlib.suppress(Exception):
                async with scope:
                    await fn(*args)
            if not self._waiting or (self._leaving and scope.expired()):
                return
            fn, args = self._waiting.popleft()

    def watch(self, fn: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Run `fn`, which must raise nothing, until it ends or the client is closed."""
        task = asyncio.get_running_loop().create_task(fn(*args), name="aipod-watch-job")
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    # The end

    def close(self) -> None:
        """Close the connection at once; calls under way end as lost ones, errands and watches are cancelled."""
        channels = self._let_go()
        self._waiting.clear()
        for task in (*self.errands, *self._watches):
            task.cancel()
        for channel in channels:
            channel.close()

    async def aclose(self, release: Callable[[Link, list[Had]], Coroutine[Any, Any, None]]) -> None:
        """As `close`, but errands are finished first, and the socket is waited for.

        Where there is a connection, answers that have arrived are released by an errand more, `release`.
        All errands for as long as they are answered; where nobody answers, that takes `ERRAND` seconds.
        """
        # Calls that were cancelled and have not learnt it yet: they too have something to tell the server.
        if left := [over for over, task in self._calls.items() if task.cancelling()]:
            await asyncio.wait(left, timeout=ERRAND)
        self.closes += 1
        watches = list(self._watches)
        for task in watches:
            task.cancel()
        if watches:
            await asyncio.wait(watches)
        for had in list(self._take_groups()):
            if self.is_connected(had[0].spool):
                self.errand(release, self, had)
            else:
                self.put_back(had)
        await self._finish_errands()
        channels = self._let_go()
        for channel in channels:
            channel.close()
        for channel in channels:
            await channel.aclose()

    async def _finish_errands(self) -> None:
        self._leaving = True
        while self.errands:
            await asyncio.wait(list(self.errands))
        self._waiting.clear()
        self._leaving = False

    def _let_go(self) -> list[Channel]:
        self.closes += 1
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False)  # they end what they do
        channel, self._channel = self._channel, None
        if self._addresses is not None:
            return self._addresses.let_go()
        return [] if channel is None else [channel]
