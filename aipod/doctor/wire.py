"""Calls of `aipod.probe`, each on a connection of its own, and how they ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from google.rpc.error_details_pb2 import ErrorInfo
from grpclib.const import Cardinality
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from aipod import codec
from aipod.config import KIB, Config
from aipod.errors import DOMAIN, AipodError
from aipod.transport.call import Call
from aipod.transport.channel import CALL_OVER, open_call, read_status, send_message
from aipod.transport.sounding import Heard, Hop, Sounding, heard, leave
from aipod.wire.ai import Raw

T = TypeVar("T")

PATH = "/ai.AI/chaos"
# Bytes of what a server says of itself.
_ABOUT = 64 * KIB
# Of what is sent in bulk, in one message.
LOAD = 256 * KIB
TIMED_OUT = "timed out"
# Seconds that an answer may take which nothing delays on purpose.
ANSWER = 10.0


class NoProbe(Exception):
    """What answers has no `aipod.probe`: an older server, or none of aipod's."""


@dataclasses.dataclass(frozen=True)
class Fate:
    """How a call ended. Exactly one of `status`, `http`, `reset` and `lost` says it, where it did not end well."""

    after: float  # seconds since the wait for it began
    status: int | None = None  # a grpc-status; 0 is OK
    reason: str = ""  # aipod's, of that status: it comes from the server, not from a proxy
    text: str = ""
    http: str = ""  # an answer that is no gRPC: its HTTP status
    reset: int | None = None  # RST_STREAM's code
    lost: bool = False  # the connection went, or was never made
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    early: bool = False  # before the probe did what it was for

    @property
    def fine(self) -> bool:
        """Whether it ended as it should."""
        return self.status == 0

    @property
    def reached(self) -> bool:
        """Whether the server has answered, be it by a refusal."""
        return self.fine or bool(self.reason)

    def __str__(self) -> str:
        if self.status is not None:
            return f"grpc-status {self.status}" + (f" ({self.text})" if self.text else "")
        if self.http:
            return f"HTTP status {self.http}, which is no gRPC"
        return f"RST_STREAM code {self.reset}" if self.reset is not None else f"connection lost ({self.text})"


@dataclasses.dataclass(frozen=True)
class Chain:
    """What is between here and the server, and how it is called."""

    target: str
    config: Config
    metadata: Sequence[tuple[str, str]]

    @contextlib.asynccontextmanager
    async def sound(self) -> AsyncIterator[Sounding]:
        """A connection of its own, not made yet. This is an asyncio-flavored context manager."""
        channel = Sounding(self.target, self.config)
        try:
            yield channel
        finally:
            await channel.aclose()

    def identity(self) -> list[tuple[str, str]]:
        """The caller's metadata with what says who calls."""
        token = self.config.token
        if not token or any(name == "authorization" for name, _ in self.metadata):
            return list(self.metadata)
        return [*self.metadata, ("authorization", f"Bearer {token}")]


class Probe:
    """One call of `aipod.probe`, and how it went."""

    def __init__(self, stream: Call, channel: Sounding) -> None:
        self._stream = stream
        self._channel = channel
        self.about: dict[str, Any] = {}  # what the server says of itself

    @property
    def hop(self) -> Hop:
        """Its connection, once the call is open."""
        assert self._channel.hop is not None
        return self._channel.hop

    @property
    def goaway(self) -> tuple[int, str] | None:
        """The code and text of the connection's GOAWAY."""
        return self._channel.hop.goaway if self._channel.hop is not None else None

    def heard(self) -> Heard:
        return heard(self._stream, self._channel.hop)

    async def open(self, asked: dict[str, Any], *, end: bool) -> None:
        """Send the request. `end`: nothing follows. This is an asyncio-flavored function."""
        await open_call(self._stream)
        data = codec.frame(json.dumps(asked).encode(), 3)
        await self.send(Raw(data=data), end=end)

    async def send(self, message: Raw, *, end: bool = False) -> bool:
        """Send a message; False where the call is over: what is received tells why."""
        try:
            await send_message(self._stream, message, end=end)
        except CALL_OVER:
            return False
        return True

    async def wait_started(self) -> None:
        """Wait for the response's headers."""
        await self._stream.recv_initial_metadata()

    async def receive(self) -> bytes | None:
        """The data of the next message, a PONG too; None at the end, whose status was OK."""
        message: Raw | None = await self._stream.recv_message()
        if message is None:
            await read_status(self._stream)
            return None
        return message.data

    async def receive_json(self) -> dict[str, Any]:
        """The next message that is no PONG, which is zstd(JSON). Raises NoProbe where it is none."""
        while (data := await self.receive()) == codec.PONG:
            pass
        try:
            told = json.loads(codec.unframe(data or b"", _ABOUT, "BAD_MESSAGE"))
        except (AipodError, ValueError, RecursionError):
            raise NoProbe("what answers has no aipod.probe") from None
        if not isinstance(told, dict):
            raise NoProbe("what answers has no aipod.probe")
        return told

    async def receive_count(self, name: str, most: int) -> int:
        """The number of that name in the next message, at most `most`. Raises NoProbe where it is none."""
        count = (await self.receive_json()).get(name)
        if type(count) is not int or not 0 <= count <= most:
            raise NoProbe(f"what answers tells no {name!r}, as aipod.probe does")
        return count

    async def ask(self, asked: dict[str, Any], *, end: bool = False) -> None:
        """Open the call and take note of what the server says of itself. Raises NoProbe."""
        await self.open(asked, end=end)
        self.about = await self.receive_json()


@contextlib.asynccontextmanager
async def probing(
    chain: Chain, channel: Sounding, *, metadata: Sequence[tuple[str, str]] | None = None, path: str = PATH
) -> AsyncIterator[Probe]:
    """A call of `aipod.probe`, which ends with the block. In a task of its own: see `alone`."""
    asked = chain.identity() if metadata is None else list(metadata)
    stream = channel.request(
        path, Cardinality.STREAM_STREAM, Raw, Raw, metadata=[*asked, ("x-func-name", "aipod.probe")]
    )
    async with stream:
        try:
            yield Probe(stream, channel)
        finally:
            leave(stream)


async def alone(coro: Coroutine[Any, Any, T]) -> T:
    """Await `coro` in a task of its own, because grpclib ends a wait by cancelling the task that waits.

    This is an asyncio-flavored function; cancelled, it waits for that task's end.
    """
    task = asyncio.create_task(coro, name="aipod-probe")
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait([task])
        raise


FAILURES = (NoProbe, GRPCError, StreamTerminatedError, ProtocolError, OSError, TimeoutError)


def fate_of(exc: BaseException | None, probe: Probe | None, since: float) -> Fate:
    """How a call ended that has raised `exc`, one of FAILURES; None is a good end."""
    after = time.monotonic() - since
    told = probe.heard() if probe is not None else Heard()
    headers = told.headers
    if exc is None:
        return Fate(after, status=0, headers=headers)
    if told.http and (told.http != "200" or not headers.get("content-type", "").startswith("application/grpc")):
        return Fate(after, http=told.http, text=headers.get("content-type", ""), headers=headers)
    if isinstance(exc, GRPCError):
        details = exc.details or []
        reasons = [detail.reason for detail in details if isinstance(detail, ErrorInfo) and detail.domain == DOMAIN]
        return Fate(after, exc.status.value, "".join(reasons[:1]), exc.message or "", headers=headers)
    if told.reset is not None:
        code, at = told.reset
        return Fate(at - since, reset=code, headers=headers)
    text = TIMED_OUT if isinstance(exc, TimeoutError) else str(exc)
    if probe is not None and probe.goaway is not None:
        code, said = probe.goaway
        text = f"GOAWAY code {code} {said}".rstrip()
    return Fate(after, lost=True, text=text or type(exc).__name__, headers=headers)


async def attempt(
    chain: Chain,
    asked: dict[str, Any] | None = None,
    *,
    metadata: Sequence[tuple[str, str]] | None = None,
    path: str = PATH,
    until_started: bool = False,
) -> Fate:
    """How one probe ends, on a connection of its own, within `ANSWER`; `until_started`: with its headers.

    This is an asyncio-flavored function.
    """
    since, probe = time.monotonic(), None
    async with chain.sound() as channel:

        async def call() -> None:
            nonlocal probe
            async with asyncio.timeout(ANSWER), probing(chain, channel, metadata=metadata, path=path) as probe:
                await probe.open(asked or {}, end=not until_started)
                await probe.wait_started()
                while not until_started and await probe.receive() is not None:
                    pass

        try:
            await alone(call())
        except FAILURES as exc:
            return fate_of(exc, probe, since)
        return fate_of(None, probe, since)
