"""aipod's own wire, message by message: a client that does what a test says, and one that comes back until it knows."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import zstandard
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpclib.const import Cardinality
from grpclib.exceptions import GRPCError, StreamTerminatedError
from h2.exceptions import ProtocolError

from aipod.codec import Compressor, digest, job_id
from aipod.config import Config
from aipod.transport.channel import Channel, read_status
from aipod.wire.ai import Op, Open, Phase, Raw, State
from tests.conftest import run

LOST = (OSError, TimeoutError, StreamTerminatedError, ProtocolError)


class Lost(Exception):
    """The connection, or whoever was at its other end, is gone."""


class Refusal(Exception):
    """The call ended with a status."""

    def __init__(self, exc: GRPCError) -> None:
        self.reason, self.metadata, self.retry = "", dict[str, str](), False
        for detail in exc.details if isinstance(exc.details, list) else []:
            if isinstance(detail, ErrorInfo):
                self.reason, self.metadata = detail.reason, dict(detail.metadata)
            self.retry = self.retry or isinstance(detail, RetryInfo)
        self.status, self.message = exc.status, exc.message or ""
        super().__init__(f"{exc.status} {self.reason}: {self.message}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job has ended, as every attach must tell it."""

    phase: Phase
    reason: str = ""
    message: str = ""
    data: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class Call:
    """One call. Methods raise `Lost` and `Refusal`."""

    def __init__(self, stream: Any, have: int, log_have: int) -> None:
        self._stream = stream
        self._have = have
        self.states: list[State] = []
        self.beats = 0  # heartbeats without a state: no job has been found yet
        self.on_state: Callable[[State], None] = lambda state: None
        self.data = b""  # of the answer, from `have` on
        self.log = b""  # from `log_have` on
        self._log_have = log_have

    async def send(self, message: Raw, *, end: bool = False) -> None:
        try:
            await self._stream.send_message(message, end=end)
        except LOST:
            await self._why()

    async def chunk(self, data: bytes, offset: int, *, end: bool = False, **fields: Any) -> None:
        await self.send(Raw(data=Compressor(3).frame(data) if data else b"", offset=offset, **fields), end=end)

    async def last(self, payload: bytes) -> None:
        """The payload is complete."""
        await self.send(Raw(offset=len(payload), last=True, digest=digest(payload)), end=True)

    async def receive(self) -> Raw | None:
        """The next message, or None at the end of a call that went well."""
        try:
            message: Raw | None = await self._stream.recv_message()
            if message is None:
                await read_status(self._stream)
        except GRPCError as exc:
            raise _refusal(exc) from None
        except LOST as exc:
            raise Lost from exc
        if message is None:
            return None
        if message.state is not None:
            assert message.data == b"PONG"
            state = message.state
            if state.log:
                assert state.log_offset == self._log_have + len(self.log), "log bytes twice, or not at all"
                self.log += state.log
            self.states.append(state)
            self.on_state(state)
        elif message.data == b"PONG":
            self.beats += 1
        else:
            assert message.offset == self._have + len(self.data)
            if message.data:
                self.data += zstandard.decompress(message.data)
        return message

    async def until(self, condition: Callable[[State], Any]) -> State:
        """The first state from now on that is so."""
        while (message := await self.receive()) is not None:
            if message.state is not None and condition(message.state):
                return message.state
        raise AssertionError(f"the call has ended; its states were {self.states}")

    async def state(self) -> State:
        return await self.until(lambda state: True)

    async def phase(self, phase: Phase) -> State:
        return await self.until(lambda state: state.phase == phase)

    async def outcome(self, before: bytes = b"") -> Outcome:
        """Read to the end. `before`: what the client has of the answer already."""
        last = False
        while (message := await self.receive()) is not None:
            last = message.last
        state = self.states[-1]
        assert state.phase >= Phase.DONE
        if state.phase != Phase.DONE:
            assert state.error is not None
            return Outcome(state.phase, state.error.reason, state.error.message)
        data = before + self.data
        assert last
        assert (len(data), digest(data)) == (state.size, state.digest)
        return Outcome(state.phase, data=data)

    async def _why(self) -> None:
        """A call that the server has ended says why, also to who was still sending."""
        while await self.receive() is not None:
            pass
        raise Lost


def _refusal(exc: GRPCError) -> Exception:
    refusal = Refusal(exc)
    return refusal if refusal.reason else Lost(refusal)  # else it is a proxy's, or grpclib's own


@contextlib.asynccontextmanager
async def call(
    address: str,
    ticket: bytes,
    op: Op = Op.RUN,
    name: str = "count",
    kwargs: Any = None,
    *,
    end: bool = False,
    job: str | None = None,
    data: bytes | None = None,
    last: bool = False,
    whole: bytes = b"",
    kind: type[Call] = Call,
    **fields: Any,
) -> AsyncIterator[Call]:
    """A call on a connection of its own, which is cut where the block is left. `fields`: of Open.

    asyncio-flavored. RUN and RESUME send `kwargs`. `last`: with the first message, for the payload `whole`.
    """
    channel = Channel(address, Config(connect_timeout=5))
    headers = {"x-job-id": job_id(ticket) if job is None else job, "x-func-name": name}
    headers = {key: value for key, value in headers.items() if value}
    stream: Any = channel.request("/ai.AI/chaos", Cardinality.STREAM_STREAM, Raw, Raw, metadata=headers)
    open_ = Open(ticket=ticket, op=op, **fields)
    if data is None:
        data = zstandard.compress(json.dumps(kwargs or {}).encode()) if op in (Op.RUN, Op.RESUME) else b""
    first = Raw(
        data=data, open=open_, last=last, offset=len(whole) if last else 0, digest=digest(whole) if last else b""
    )
    try:
        await stream.__aenter__()
        try:
            await stream.send_request()
            await stream.send_message(first, end=end or op in (Op.CANCEL, Op.RELEASE, Op.ATTACH))
        except LOST as exc:
            raise Lost from exc
        yield kind(stream, open_.have, open_.log_have)
    finally:
        await channel.aclose()


async def ask(address: str, ticket: bytes, op: Op, **fields: Any) -> State:
    """CANCEL, RELEASE: a short call, answered by one state."""
    async with call(address, ticket, op, **fields) as one:
        while await one.receive() is not None:
            pass
        (state,) = one.states
        return state


async def attach(address: str, ticket: bytes, *, before: bytes = b"", **fields: Any) -> Outcome:
    """The outcome, for who has nothing but the ticket (and perhaps a part of the answer)."""
    async with call(address, ticket, Op.ATTACH, have=len(before), **fields) as one:
        return await one.outcome(before)


class Client:
    """One job of an honest client: it comes back until it knows how the job has ended.

    It checks what it is told on the way: durable offsets never decrease (`begins_anew` after an upload that turned out
    at its end to be of other bytes), the phase never goes back (but where a
    restartable method runs again), the spool is always the same.
    """

    def __init__(self, name: str, payload: bytes, kwargs: Any, *, restartable: bool = False) -> None:
        self.name = name
        self.payload = payload
        self.kwargs = kwargs
        self.restartable = restartable
        self.sized = True  # it says beforehand how long its payload is
        self.ticket = os.urandom(16)
        self.epoch = 0
        self.spool = ""
        self.committed = False
        self.offset = 0
        self.phase = Phase.NONE
        self.sent: list[int] = []  # offsets of chunks, of all connections

    @property
    def fields(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "size": len(self.payload) if self.sized else None,
            "spool": self.spool,
            "source": b"a file",
        }

    async def visit(self, address: str, *, chunk: int = 1000, wait: bool = False, kind: type[Call] = Call) -> Outcome:
        """One connection, to the end of the job. `wait`: for each chunk to be durable."""
        self.epoch += 1
        op = Op.RESUME if self.committed else Op.RUN
        async with call(address, self.ticket, op, self.name, self.kwargs, kind=kind, **self.fields) as one:
            one.on_state = self.check
            await one.state()
            offset = one.states[-1].offset
            while one.states[-1].phase == Phase.RECEIVING and offset < len(self.payload):
                piece = self.payload[offset : offset + chunk]
                self.sent.append(offset)
                await one.chunk(piece, offset, sync=wait)
                offset += len(piece)
                while wait and one.states[-1].offset < offset and one.states[-1].phase == Phase.RECEIVING:
                    await one.state()
            if one.states[-1].phase == Phase.RECEIVING:
                self.committed = True
                await one.last(self.payload)
            return await one.outcome()

    async def visit_at_once(self, address: str, spool: str) -> Outcome:
        """Everything in one message, for who knows the spool: no payload, no round trip."""
        self.epoch += 1
        self.committed, self.spool = True, spool
        assert not self.payload
        async with call(
            address, self.ticket, Op.RUN, self.name, self.kwargs, last=True, end=True, **self.fields
        ) as one:
            return await one.outcome()

    def check(self, state: State) -> None:
        """Whether it agrees with all that was told before."""
        assert self.spool.partition("-")[0] in ("", state.spool.partition("-")[0])
        self.spool = self.spool or state.spool
        if state.phase == Phase.RECEIVING:
            assert state.offset >= self.offset, "an acknowledged offset has decreased"
            self.offset = state.offset
        again = self.restartable and (self.phase, state.phase) == (Phase.RUNNING, Phase.QUEUED)
        assert state.phase >= self.phase or again, f"{state.phase.name} after {self.phase.name}"
        self.phase = state.phase

    def begins_anew(self) -> None:
        self.offset = 0

    async def until_known(self, addresses: Sequence[str]) -> Outcome:
        """Visit one after the other until one tells the outcome. Raises `Refusal` for what cannot be mended."""
        for turn in range(100):
            try:
                return await self.visit(addresses[turn % len(addresses)])
            except Lost:
                await asyncio.sleep(0.05)
            except Refusal as exc:
                if not exc.retry:
                    raise
                await asyncio.sleep(0.1)
        raise AssertionError("it never came to an end")


def sync(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an asyncio-flavored function of this module from a plain test."""

    async def main() -> Any:
        return await function(*args, **kwargs)

    return run(main)
