"""Which server a call goes to, where a client has several addresses: gRPC's pick_first, and jobs stay where they are.

New jobs go to one address while there is a connection to it. When there is none, the addresses are tried in turn,
beginning behind the one that was had: in the order in which they were given, a name's in the order of its resolver
(not shuffled, gRFC A62), each `STAGGER` after the one before it or as soon as that has failed (gRFC A61, RFC 8305
section 5); the first that speaks HTTP/2 is had. Names are resolved again for that.

A job is asked for where its spool has spoken last. Where that cannot be reached, or has it no more, the others are
asked in turns with it, by the number of misses that a proxy chooses by too (`course.lead_to`).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import socket
from collections.abc import Iterator, Sequence

from aipod.codec import spool_name
from aipod.config import Config
from aipod.errors import UsageError
from aipod.transport.channel import Channel, is_literal, split_target, why_unconnected
from aipod.transport.tls import Disagreement

# Seconds between two connection attempts of one picking: what gRFC A61 and RFC 8305 recommend.
STAGGER = 0.25
# Addresses of one client, and spools of which it is remembered where they are: a headless service of Kubernetes has one
# for each pod, and each that is known here can have a connection.
MOST = 64


def parse_targets(target: str | Sequence[str]) -> list[str]:
    """The addresses in `target`. Raises `UsageError`."""
    try:
        targets = target.split(",") if isinstance(target, str) else list(target)
        for one in targets:
            split_target(one)
    except (AttributeError, TypeError):  # an environment variable that is not set, say
        raise UsageError(f"{target!r} is not HOST:PORT, [::1]:PORT or unix:PATH, nor a list of them") from None
    except ValueError as exc:
        raise UsageError(str(exc)) from None
    if not 1 <= len(targets) <= MOST:
        raise UsageError(f"{len(targets)} addresses; a client has 1 to {MOST}")
    return targets


class Addresses:
    """The channels of one client. asyncio-flavored."""

    def __init__(self, targets: Sequence[str], config: Config) -> None:
        self._targets = targets
        self._config = config
        self._channels: dict[str, Channel] = {}  # by address, in the order in which they are tried
        self._had: Channel | None = None  # where new jobs go
        self._homes: collections.OrderedDict[str, Channel] = collections.OrderedDict()
        self._lock = asyncio.Lock()

    def __iter__(self) -> Iterator[Channel]:
        return iter(self._channels.values())

    def learn(self, spool: str, channel: Channel) -> None:
        """`spool` has spoken over `channel`."""
        name = spool_name(spool)
        if self._homes.get(name) is not channel:
            self._homes[name] = channel
            self._homes.move_to_end(name)
            if len(self._homes) > MOST:
                self._homes.popitem(last=False)

    def at_hand(self, spool: str, misses: int) -> Channel | None:
        """Where to ask, of a job in `spool`, or a new one where that is ""; None where that is for `choose` to say."""
        if misses % 2:
            return None
        home = self._home(spool)
        if home is None and self._had is not None and self._had.connected:
            return self._had
        return home

    async def choose(self, spool: str, misses: int) -> Channel:
        """As `at_hand`, where it takes a connection, or a look at the names. Raises OSError."""
        if misses % 2:
            with contextlib.suppress(OSError):  # what was known before will do
                async with self._lock:
                    await self._resolve()
            home = self._home(spool) or self._had
            others = [channel for channel in self if channel is not home]
            if others:
                others.sort(key=lambda channel: not channel.connected)  # before who may not be there
                return others[misses // 2 % len(others)]
        return self.at_hand(spool, 0) or await self.pick()

    def _home(self, spool: str) -> Channel | None:
        home = self._homes.get(spool_name(spool)) if spool else None
        return home if home in self._channels.values() else None

    async def pick(self) -> Channel:
        """The first that can be reached. Raises OSError where none can."""
        async with self._lock:  # who waits finds what was picked meanwhile
            if self._had is None or not self._had.connected:
                await self._resolve()
                channels = list(self)
                begin = channels.index(self._had) + 1 if self._had in channels else 0
                self._had = await _first(channels[begin:] + channels[:begin])
            return self._had

    async def _resolve(self) -> None:
        """Bring `_channels` up to date. What was resolved no more is forgotten, unless it is connected."""
        found: dict[str, Channel] = {}
        error: OSError | None = None
        for target in self._targets:
            try:
                addresses = await _addresses(target, self._config.connect_timeout)
            except OSError as exc:
                error = exc
                continue
            for address, ip in addresses:
                if len(found) < MOST:
                    found[address] = self._channels.get(address) or Channel(target, self._config, ip)
        if not found:
            raise error or OSError("no address")
        for address, channel in self._channels.items():
            if channel.connected:
                found.setdefault(address, channel)
            elif address not in found:
                channel.close()
        self._channels = found

    def let_go(self) -> list[Channel]:
        """All channels, which are to be closed; later calls make new ones."""
        channels, self._channels, self._had = list(self), {}, None
        self._homes.clear()
        self._lock = asyncio.Lock()  # another loop may be the next
        return channels


async def _addresses(target: str, seconds: float) -> list[tuple[str, str | None]]:
    """What `target` stands for: names of addresses, and the IP address of each that is not in it already."""
    host, port, _ = split_target(target)
    if host is None or is_literal(host):
        return [(target, None)]
    async with asyncio.timeout(seconds):
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(f"{target} {info[4][0]}", str(info[4][0])) for info in infos]


async def _first(channels: Sequence[Channel]) -> Channel:
    """The first of `channels` that is connected. Raises OSError where none can be."""
    errors: list[Exception] = []
    texts: list[str] = []
    connecting: dict[asyncio.Task[object], Channel] = {}
    left = collections.deque(channels)
    try:
        while left or connecting:
            if left:
                channel = left.popleft()
                connecting[asyncio.create_task(channel.__connect__(), name="aipod-connect")] = channel
            pause = STAGGER if left else None
            done, _ = await asyncio.wait(connecting, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                channel = connecting.pop(task)
                if (exc := task.exception()) is None:
                    return channel
                if not isinstance(exc, OSError):
                    raise exc
                errors.append(exc)
                texts.append(f"{channel.name}: {why_unconnected(exc) or 'no answer in time'}")
    finally:
        for task in connecting:
            task.cancel()
        if connecting:
            await asyncio.wait(connecting)
    if len(errors) == 1:
        raise errors[0]
    stop = all(isinstance(exc, Disagreement) for exc in errors)
    raise (Disagreement if stop else ConnectionError)("; ".join(texts))
