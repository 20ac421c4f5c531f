"""One call, as trio sees it: the stream's two directions and the task that writes."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Mapping
from typing import Any

import trio
from grpclib.server import Stream

from aipod import alarm
from aipod.codec import PONG
from aipod.errors import Refused
from aipod.job.request import shown
from aipod.job.watched import Watched
from aipod.metrics import LAG, Histogram
from aipod.service.status import Ending
from aipod.transport import bridge
from aipod.transport.requests import (
    PEER_GONE,
    has_message,
    joined,
    message_arrived,
    peer_certificate,
    request_timeout,
    send_beginning,
    send_message,
    send_now,
    was_on_its_way,
)
from aipod.transport.stream import came, expect, held
from aipod.wire.ai import Phase, Raw, State, StreamInput

log = logging.getLogger("aipod.service")

# Seconds in which most small jobs end, on a busy server too: what becomes of them meanwhile is then told with the end.
MOMENT = 0.1


class Call:
    """A grpclib server stream with trio-flavored methods. One task may receive, one may send.

    It begins when this is made and is over with `log_end`, whether it was finished or left by its peer.
    """

    def __init__(self, stream: Stream[Any, Raw]) -> None:
        self._stream = stream
        self.began = time.monotonic()
        self.status = "CANCELLED"  # unless it is finished
        self.caller = ""  # whose it is, where the server asks
        self.job_id = ""  # which job it watches
        self.timeout = request_timeout(stream)
        self.was_on_its_way = was_on_its_way(stream)
        # Repeated headers: the last one wins, as in a dict; bin headers are not for us.
        self.headers: Mapping[str, str] = {
            name: value for name, value in (stream.metadata or {}).items() if isinstance(value, str)
        }

    @property
    def authorization(self) -> str:
        """The header of that name. One that comes twice is joined, as HTTP has it, and no token any more."""
        return ", ".join(str(value) for name, value in (self._stream.metadata or {}).items() if name == "authorization")

    @property
    def certificate(self) -> Mapping[str, Any] | None:
        """The caller's, which its connection has verified; None without mTLS."""
        return peer_certificate(self._stream)

    async def start(self) -> None:
        """Send the initial metadata. First of all, or nginx may never tell a client that its upstream has died."""
        await bridge.inline(send_beginning, self._stream)

    @property
    def has_message(self) -> bool:
        """Whether `receive` need not wait for the peer."""
        return has_message(self._stream)

    async def receive_first(self) -> Any:
        """The first message, a Raw or a StreamInput; None after the half-close. Raises GRPCError for a bad one."""
        return await bridge.inline(self._stream.recv_message)

    def expect(self, size: int) -> None:
        """So many bytes of payload are about to come."""
        expect(self._stream, size)

    def held(self) -> int:
        """Bytes that were sent on its connection, and that the peer's system has not acknowledged."""
        return held(self._stream)

    async def receive(self) -> Raw | None:
        """The next piece of the payload, None after the half-close. Raises GRPCError for what cannot be parsed."""
        message = await bridge.inline(self._stream.recv_message)
        return (message.raw or Raw()) if isinstance(message, StreamInput) else message

    async def arrival(self, stall: float) -> bool:
        """Wait until `receive` need not wait for the peer; False once nothing has come for `stall` seconds, not even a
        part of a message: a long one may take minutes on a slow line. Cancelled, no message is lost.
        """
        while not self.has_message:
            before = came(self._stream)
            with trio.move_on_after(stall) as patience:
                await message_arrived(self._stream)
            if patience.cancelled_caught and came(self._stream) == before:
                return False
        return True

    async def receive_within(self, stall: float) -> Raw | None:
        """As `receive`. Raises `Refused` (UPLOAD_STALLED) where nothing comes for `stall` seconds."""
        if not await self.arrival(stall):
            raise Refused("UPLOAD_STALLED", f"no message for {stall:g} s (--upload-stall)")
        return await self.receive()

    async def receive_soon(self, seconds: float) -> Raw | None:
        """As `receive`; None also where nothing comes for so long. Cancelled or late, no message is lost."""
        if not self.has_message:
            with trio.move_on_after(seconds) as patience:
                await message_arrived(self._stream)
            if patience.cancelled_caught:
                return None
        return await self.receive()

    async def send(self, message: Raw) -> None:
        """Send one message. Never cancelled on the good path: half a message would precede the status."""
        await bridge.inline(send_message, self._stream, message)

    def send_now(self, message: Raw) -> bool:
        """Send a small message that has to wait for nothing; False where it has, or nobody is there: `send` tells."""
        try:
            return send_now(self._stream, message)
        except PEER_GONE:
            return False

    def joined(self) -> contextlib.AbstractContextManager[None]:
        """Have what is sent in the block go out in one write. Nothing in it may wait."""
        return joined(self._stream)

    async def finish(self, ending: Ending, trailers: Mapping[str, str]) -> None:
        """Send the trailers; nothing may be sent after."""
        self.status = ending.status.name
        details = ending.details

        async def end() -> None:
            await self._stream.send_trailing_metadata(
                status=ending.status, status_message=ending.message, status_details=details, metadata=dict(trailers)
            )

        await bridge.inline(end)

    def log_end(self, rpc: str) -> None:
        """One line for developers: calls come as their peers like, hundreds for one job perhaps."""
        if log.isEnabledFor(logging.DEBUG):
            seconds = round(time.monotonic() - self.began, 3)
            told = {"rpc": rpc, "code": self.status, "seconds": seconds, "caller": self.caller, "job": self.job_id}
            metadata = shown(self.headers)
            text = "a call of %s has ended after %.3f s: %s; metadata: %s"
            log.debug(text, rpc, seconds, self.status, metadata, extra=told | {"metadata": metadata})


class Writer:
    """The one that writes to a call; everybody else hands messages to it.

    Small messages go out at once while nothing keeps them waiting. From the first one that has to wait on they all go
    by way of a task of its own, in `nursery`.
    """

    def __init__(self, call: Call, nursery: trio.Nursery) -> None:
        self._call = call
        self._nursery = nursery
        self._runs = False  # the task
        self._last: list[Raw] = []  # what the call ends with, for `finish`
        self._send: trio.MemorySendChannel[Raw]  # to the task, where it runs
        self._done = trio.Event()

    async def _run(self, messages: trio.MemoryReceiveChannel[Raw]) -> None:
        """Write until `finish` has no more."""
        async with messages:
            async for message in messages:
                await self._call.send(message)
        self._done.set()

    def _went(self, message: Raw) -> bool:
        """Whether it could be sent at once; else the task is there, and takes it."""
        if not self._runs:
            if self._call.send_now(message):
                return True
            self._runs = True
            # One message waits while one is written: a heartbeat finds no room behind a stalled peer, and is skipped.
            self._send, messages = trio.open_memory_channel[Raw](1)
            self._nursery.start_soon(self._run, messages)
        return False

    async def send(self, *messages: Raw) -> None:
        """Hand over messages of the answer; those that go out at once do in one write.

        Never returns where the task has failed: its error ends the call.
        """
        with self._call.joined():
            left = list(itertools.dropwhile(self._went, messages))
        for message in left:
            try:
                await self._send.send(message)
            except trio.BrokenResourceError:
                await trio.sleep_forever()

    def beat(self, state: State | None) -> bool:
        """A heartbeat, unless the peer has not even taken what came before it. False where it was skipped."""
        message = Raw(data=PONG, state=state)
        if self._went(message):
            return True
        try:
            self._send.send_nowait(message)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True

    async def send_last(self, *messages: Raw) -> None:
        """As `send`, of the last messages of all: they go with the status."""
        self._last += messages

    async def finish(self, ending: Ending, trailers: Mapping[str, str]) -> None:
        """Send the last messages and the status: in one write, where nothing keeps them waiting."""
        last, self._last = self._last, []
        with self._call.joined():
            left = list(itertools.dropwhile(self._went, last))
            if not self._runs:
                await self._call.finish(ending, trailers)
                return
        await self.send(*left)
        self._send.close()
        await self._done.wait()
        await self._call.finish(ending, trailers)


class Viewer:
    """Says what a job is doing: at once, at every tick, and to its own client also when its phase changes."""

    def __init__(self, writer: Writer, nursery: trio.Nursery, tick: float, late: Histogram | None = None) -> None:
        """`late`: takes in how many seconds after their time heartbeats come. They come in `nursery`, until `end`."""
        self._late = late or Histogram(LAG)
        self._writer = writer
        self._nursery = nursery
        self._tick = tick
        self._job: Watched | None = None
        self._plain = False
        self._log_seen: int | None = None
        self._watched = trio.Event()
        self._stopped = False
        self._alarm: alarm.Alarm | None = None  # at which `_beat` begins
        self._beating = trio.CancelScope()

    def begin(self) -> None:
        """Send the first heartbeat; the others follow."""
        self._writer.beat(None)
        self._begin_at(trio.current_time() + self._tick)

    def _begin_at(self, when: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = alarm.at(when, lambda: self._ring(when))

    def _ring(self, when: float) -> None:
        self._alarm = None  # now: until the task runs `watch` may come, and would have them begin twice
        self._nursery.start_soon(self._beat, when)

    def watch(self, job: Watched, log_have: int | None = None, *, patient: bool = False) -> None:
        """From now on heartbeats are about `job`. `log_have`: bytes of its log that were seen; None: a plain client.

        `patient`: nobody needs to know of its phases before its end, where that comes within `MOMENT`.
        """
        self._job = job
        if log_have is None:
            self._plain = True
            return
        if self._log_seen is None:
            self._log_seen = log_have
        self._watched.set()
        if self._alarm is not None:  # else they go on
            wait = MOMENT if patient and job.phase != Phase.RECEIVING else 0.0
            self._begin_at(min(self._alarm.when, trio.current_time() + wait))

    def stop(self) -> None:
        """No more heartbeats: the answer follows."""
        self._stopped = True
        if self._alarm is not None:
            self._alarm.cancel()

    def end(self) -> None:
        """No more heartbeats, and nothing is left of them. Idempotent."""
        self.stop()
        self._beating.cancel()

    async def _beat(self, due: float) -> None:
        with self._beating:
            await self._go_on(due)

    async def _go_on(self, due: float | None) -> None:
        """Send heartbeats until `stop`, the first one now, which was `due` then."""
        while True:
            changed = self._job.changed if self._job is not None else self._watched
            state = await self._state()
            if self._stopped:
                return
            if due is not None:
                self._late.observe(trio.current_time() - due)
            if self._writer.beat(state) and state is not None and self._log_seen is not None:
                self._log_seen += len(state.log)
            with trio.move_on_after(self._tick) as pause:
                # A plain client hears a PONG a second and nothing else.
                await (self._watched if self._plain else changed).wait()
            due = pause.deadline if pause.cancelled_caught else None

    async def _state(self) -> State | None:
        if self._job is None or self._log_seen is None:
            return None
        state = self._job.state()
        state.log_offset = self._log_seen
        state.log = await self._job.read_log(self._log_seen)
        return state

    async def outcome(self) -> State:
        """The terminal state, once the log before its end was sent; unlike heartbeats that is never skipped."""
        while True:
            state = await self._state()
            assert state is not None, "only own clients are told states"
            assert self._log_seen is not None
            if not state.log:
                return state
            self._log_seen += len(state.log)
            await self._writer.send(Raw(data=PONG, state=state))
