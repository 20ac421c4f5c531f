"""One call, as trio sees it: the stream's two directions and the task that writes."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import trio
from grpclib.server import Stream

from aipod.codec import PONG
from aipod.job.request import shown
from aipod.job.watched import Watched
from aipod.metrics import LAG, Histogram
from aipod.service.status import Ending
from aipod.transport import bridge
from aipod.transport.requests import expect, peer_certificate, request_timeout, send_message, was_on_its_way
from aipod.wire.ai import Raw, State, StreamInput

log = logging.getLogger("aipod.service")


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
        await bridge.inline(self._stream.send_initial_metadata)

    async def receive_first(self) -> Any:
        """The first message, a Raw or a StreamInput; None after the half-close. Raises GRPCError for a bad one."""
        return await bridge.inline(self._stream.recv_message)

    def expect(self, size: int) -> None:
        """So many bytes of payload are about to come."""
        expect(self._stream, size)

    async def receive(self) -> Raw | None:
        """The next piece of the payload, None after the half-close. Raises GRPCError for what cannot be parsed."""
        message = await bridge.inline(self._stream.recv_message)
        return (message.raw or Raw()) if isinstance(message, StreamInput) else message

    async def send(self, message: Raw) -> None:
        """Send one message. Never cancelled on the good path: half a message would precede the status."""
        await bridge.inline(send_message, self._stream, message)

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
    """The one task that writes to a call. Everybody else hands messages to it."""

    def __init__(self, call: Call) -> None:
        self._call = call
        # One message waits while one is written: a heartbeat finds no room behind a stalled peer, and is skipped.
        self._send, self._receive = trio.open_memory_channel[Raw](1)
        self.done = trio.Event()

    async def run(self) -> None:
        """Write until `close`. This is a trio-flavored async function."""
        async with self._receive:
            async for message in self._receive:
                await self._call.send(message)
        self.done.set()

    async def send(self, message: Raw) -> None:
        """Hand over a message of the answer. Never returns where `run` has failed: its error ends the call."""
        try:
            await self._send.send(message)
        except trio.BrokenResourceError:
            await trio.sleep_forever()

    def beat(self, state: State | None) -> bool:
        """A heartbeat, unless the peer has not even taken what came before it. False where it was skipped."""
        try:
            self._send.send_nowait(Raw(data=PONG, state=state))
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True

    def close(self) -> None:
        """No more messages: `run` ends when it has written those that it has."""
        self._send.close()


class Viewer:
    """Says what a job is doing: at once, at every tick, and to its own client also when its phase changes."""

    def __init__(self, writer: Writer, tick: float, late: Histogram | None = None) -> None:
        """`late`: takes in how many seconds after their time heartbeats come."""
        self._late = late or Histogram(LAG)
        self._writer = writer
        self._tick = tick
        self._job: Watched | None = None
        self._plain = False
        self._log_seen: int | None = None
        self._watched = trio.Event()
        self._stopped = False

    def watch(self, job: Watched, log_have: int | None = None) -> None:
        """From now on heartbeats are about `job`. `log_have`: bytes of its log that were seen; None: a plain client."""
        self._job = job
        if log_have is None:
            self._plain = True
        elif self._log_seen is None:
            self._log_seen = log_have
        if not self._plain:
            self._watched.set()

    def stop(self) -> None:
        """No more heartbeats: the answer follows."""
        self._stopped = True

    async def beat(self) -> None:
        """Send heartbeats until `stop`. This is a trio-flavored async function."""
        due: float | None = None  # when the tick was over
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

    async def say_outcome(self) -> None:
        """Send the terminal state and the rest of the log; unlike heartbeats they are never skipped."""
        while True:
            state = await self._state()
            assert state is not None, "only own clients are told states"
            assert self._log_seen is not None
            self._log_seen += len(state.log)
            await self._writer.send(Raw(data=PONG, state=state))
            if not state.log:
                return
