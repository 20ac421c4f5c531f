"""One attempt of one call: upload and watch side by side, then the answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpclib.client
from grpclib.const import Cardinality
from grpclib.metadata import Deadline

from aipod.client.failure import Local, NoAnswer, of_state
from aipod.client.sink import Sink
from aipod.client.source import Source
from aipod.codec import job_id
from aipod.config import Config
from aipod.errors import JobFailed, leaves
from aipod.transport.channel import CALL_OVER, Channel, open_call, read_status, reset, send_message
from aipod.wire.ai import Op, Open, Phase, Raw, State, StreamInput

# Batches between the threads that compress and the network: one that is being sent, one that is ready.
_AHEAD = 1
# Seconds after `silence` to read what came while this process did not run (Ctrl-Z, a virtual machine that was paused).
_CATCH_UP = 1.0
# Seconds to wait for the trailers behind a complete answer.
TRAILERS = 1.0
T = TypeVar("T")
TERMINAL = (Phase.DONE, Phase.FAILED, Phase.CANCELLED, Phase.RELEASED)


@dataclasses.dataclass(frozen=True)
class Event:
    """What a call is doing. Bytes are uncompressed; `log` is what is new since the last event."""

    # CONNECTING, RECEIVING (the upload), QUEUED, RUNNING, DONE (the download), FAILED, CANCELLED; WAITING before
    # another attempt: `attempt` is that one's number, `message` why the last one failed
    phase: str
    sent: int = 0
    payload_size: int | None = None
    received: int = 0
    answer_size: int = 0
    place: int = 0
    progress: float = 0.0
    message: str = ""
    log: str = ""
    heartbeats: int = 0
    content_type: str = ""  # of the answer, once it is known
    attempt: int = 1
    attempts: int = 1  # at most


OnEvent = Callable[[Event], Any]
Outcome = tuple[Any, JobFailed | None]  # the answer, or why there is none


@dataclasses.dataclass
class Request:
    """What is asked for; the same for every attempt."""

    rpc: str
    kwargs: bytes  # zstd(JSON)
    version: str
    source: Source
    metadata: Sequence[tuple[str, str]]
    deadline: Deadline | None
    save_to: str | os.PathLike[str] | None
    on_event: OnEvent | None

    def tell(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(event)


class Attempt:
    """One stream. `committed` turns true when the message that lets the method run is handed to the network."""

    def __init__(self, channel: Channel, config: Config, request: Request, number: int) -> None:
        self._config = config
        self._request = request
        self._ticket = secrets.token_bytes(16)
        self.committed = False
        self._listening: float | None = None  # since when a message is waited for
        self._event = Event("CONNECTING", payload_size=request.source.size, attempt=number, attempts=config.attempts)
        kind = Raw if request.rpc == "chaos" else StreamInput
        self._stream: grpclib.client.Stream[Any, Raw] = channel.request(
            f"/ai.AI/{request.rpc}",
            Cardinality.STREAM_STREAM,
            kind,
            Raw,
            deadline=request.deadline,
            metadata=[*request.metadata, ("x-job-id", job_id(self._ticket))],
        )

    async def run(self) -> Any:
        """The answer. Raises what `explain` reads.

        This is an asyncio-flavored function; cancelled, it tells the server.
        """
        self._tell()
        async with self._stream as stream:
            try:
                await open_call(stream)
                uploader = asyncio.create_task(self._upload(), name="aipod-upload")
                try:
                    answer, error = await self._outcome(uploader)
                finally:
                    await _end(uploader)
                # The outcome is whole and checked: what becomes of the call's last bytes changes nothing.
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(TRAILERS):
                        await read_status(stream)
                if error is not None:
                    raise error
                return answer
            finally:
                reset(stream)

    async def _upload(self) -> None:
        """Send everything. Ends early, without an error of its own, where the server has ended the call."""
        request = self._request
        opening = Open(ticket=self._ticket, op=Op.RUN, epoch=time.time_ns() // 1000, size=request.source.size)
        # An empty payload is complete with the first message.
        empty = self.committed = request.source.size == 0
        if request.rpc == "chaos":
            first: Raw | StreamInput = Raw(data=request.kwargs, open=opening, last=empty)
        else:
            raw = Raw(open=opening, last=empty)
            first = StreamInput(kwargs_json=request.kwargs, version=request.version, raw=raw)
        await send_message(self._stream, first, end=empty)
        if empty:
            return
        ready: asyncio.Queue[list[Raw]] = asyncio.Queue(_AHEAD)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._produce(ready))
            while not self.committed:
                for raw in await ready.get():
                    await self._send_chunk(raw)

    async def _produce(self, ready: asyncio.Queue[list[Raw]]) -> None:
        batches = self._request.source.batches(self._config.level)
        async with contextlib.aclosing(batches):
            while True:
                try:
                    batch = await anext(batches)
                except StopAsyncIteration:
                    return
                except Exception as exc:
                    raise Local(exc) from exc
                await ready.put(batch)

    async def _send_chunk(self, raw: Raw) -> None:
        self.committed = self.committed or raw.last
        message = raw if self._request.rpc == "chaos" else StreamInput(raw=raw)
        await send_message(self._stream, message, end=raw.last)
        sent = self._request.source.size if raw.last else raw.offset
        self._tell(phase="RECEIVING", sent=sent or self._event.sent)

    async def _outcome(self, uploader: asyncio.Task[None]) -> Outcome:
        """What `_watch` returns. Raises NoAnswer after `silence` seconds without a message, or what ended the upload.

        One timer for the whole call: a task or a timer for each message would cost more than reading it.
        """
        silence = self._config.silence
        late = False  # the time is over, but this process may have been stopped meanwhile
        watcher = asyncio.create_task(self._watch(), name="aipod-watch")
        waiting: set[asyncio.Task[Any]] = {watcher, uploader}
        try:
            while not watcher.done():
                left = silence
                if self._listening is not None:  # else this side is busy, with a slow disk perhaps
                    left += self._listening - time.monotonic()
                if left <= 0 and late:
                    raise NoAnswer(f"no heartbeat for {silence:g} s")
                late = left <= 0
                await asyncio.wait(waiting, timeout=_CATCH_UP if late else left, return_when=asyncio.FIRST_COMPLETED)
                if uploader.done():
                    waiting.discard(uploader)
                    _raise_local(uploader)
            return watcher.result()
        finally:
            await _end(watcher)

    async def _watch(self) -> Outcome:
        """Read states until the terminal one, then the answer: what it is, or why there is none."""
        final: State | None = None
        while True:
            message = await self._receive()
            if message is None:
                await read_status(self._stream)
                raise NoAnswer("the call ended without an outcome")
            state = message.state
            if state is None:
                if final is not None:
                    return await self._download(final, message), None
                self._tell(heartbeats=self._event.heartbeats + 1)
                continue
            self._show(state)
            # The terminal state comes again for as long as there is more of the log.
            if state.phase in TERMINAL:
                final = state
                if state.phase != Phase.DONE and not state.log:
                    return None, of_state(state)

    async def _receive(self) -> Raw | None:
        """The next message; None at the end."""
        self._listening = time.monotonic()
        try:
            return await self._stream.recv_message()
        finally:
            self._listening = None

    async def _download(self, state: State, message: Raw | None) -> Any:
        sink = await _local(Sink, state, self._request.save_to)
        try:
            while message is not None:
                last = message.last
                await _local(sink.add, message)
                self._tell(phase="DONE", received=sink.received, answer_size=state.size, log="")
                if last:
                    # Nothing but this waits for others than the server: a FIFO's reader may never come.
                    deadline = self._request.deadline
                    async with asyncio.timeout(None if deadline is None else deadline.time_remaining()):
                        return await _local(sink.finish)
                message = await self._receive()
            await read_status(self._stream)
            raise NoAnswer("the answer ended before its last byte")
        finally:
            await asyncio.to_thread(sink.discard)

    def _show(self, state: State) -> None:
        self._tell(
            phase=state.phase.name,
            place=state.place,
            progress=state.progress,
            message=state.message,
            log=state.log.decode("utf-8", "replace"),
            answer_size=state.size,
            content_type=state.content_type,
            heartbeats=self._event.heartbeats + 1,
        )

    def _tell(self, **changes: Any) -> None:
        self._event = dataclasses.replace(self._event, **{"log": "", **changes})
        try:
            self._request.tell(self._event)
        except Exception as exc:
            raise Local(exc) from exc


def _raise_local(uploader: asyncio.Task[None]) -> None:
    """Raise what ended the upload; but what the server did to it the watcher tells better."""
    exc = None if uploader.cancelled() else uploader.exception()
    if exc is not None and not all(isinstance(leaf, CALL_OVER) for leaf in leaves(exc)):
        raise exc


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel `task` and wait for its end, whatever that is. This is an asyncio-flavored function."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # asyncio logs an exception that nobody has asked for


async def _local(fn: Callable[..., T], *args: Any) -> T:
    """Run `fn` in a thread; what it raises is no failure of the network's. This is an asyncio-flavored function."""
    try:
        return await asyncio.to_thread(fn, *args)
    except Exception as exc:
        raise Local(exc) from exc
