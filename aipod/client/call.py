"""One attempt for a job, over one stream: upload and watch side by side, then the answer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpclib.client
from grpclib.const import Cardinality

from aipod.client.course import Course, Request, Until, lead_to
from aipod.client.event import Event as Event  # also known from here
from aipod.client.failure import BadAnswer, Local, NoAnswer, of_state
from aipod.client.link import Link
from aipod.client.reader import BATCH
from aipod.client.sink import Filling, Sink
from aipod.client.source import HOP, InThread, Source
from aipod.codec import digest, job_id
from aipod.config import CHUNK
from aipod.errors import JobFailed, leaves
from aipod.transport.channel import CALL_OVER, expect, open_call, read_status, reset, send_message
from aipod.wire.ai import Op, Open, Phase, Raw, State, StreamInput

# Batches between the threads that compress and the network: one that is being sent, one that is ready.
_AHEAD = 1
# A payload up to it is sent to the spool that was there last, `last` included, without waiting to hear from it. If that
# is the wrong one, so much was sent in vain.
_UNASKED = BATCH * CHUNK
# What a call that is not for the answer says that it has of it: else as much as a window would come for nothing.
_NO_ANSWER = 2**64 - 1
# Seconds after `silence` to read what came while this process did not run (Ctrl-Z, a virtual machine that was paused).
_CATCH_UP = 1.0
# Seconds to wait for the trailers behind a complete answer.
TRAILERS = 1.0
T = TypeVar("T")
TERMINAL = (Phase.DONE, Phase.FAILED, Phase.CANCELLED, Phase.RELEASED)

Outcome = tuple[Any, JobFailed | None]  # the answer, or why there is none


class Attempt:
    """One stream. What it learns stays in `course`; what it says of itself is for the decision about the next one."""

    def __init__(self, link: Link, request: Request, course: Course) -> None:
        self._link = link
        self._config = link.config
        self._request = request
        self._course = course
        self._channel = link.channel()
        self.op = Op.ATTACH if request.source is None else course.op
        self.spool = self._spool(request.source)  # that the request is meant for
        self.idle = self._channel.connected  # it goes over a connection that may have ended without a word
        self.was_fresh = course.fresh
        self.heard = False  # a message came
        self.answered = False  # a state came
        self.receiving = False  # the last one said that the payload is not complete
        self.ran = False  # it said that the job is alive without its caller's help
        self.committed = False  # it was this attempt that sent `last` for the first time
        self.silent = False  # nothing came for too long
        self._first: asyncio.Future[State] = asyncio.get_running_loop().create_future()
        self._listening: float | None = None  # since when a message is waited for
        self._stream: grpclib.client.Stream[Any, Raw] = self._channel.request(
            f"/ai.AI/{request.rpc}",
            Cardinality.STREAM_STREAM,
            Raw if request.rpc == "chaos" else StreamInput,
            Raw,
            deadline=request.deadline,
            metadata=[*link.identity(request.metadata), *course.headers],
        )

    def _spool(self, source: Source | None) -> str:
        course = self._course
        if source is None:
            return ""
        if course.op == Op.RESUME:
            return course.sent_to or ""
        small = source.size is not None and source.size <= _UNASKED
        return self._link.spool(self._request.upstream) if small and course.fresh and not course.relearn else ""

    async def run(self) -> Any:
        """The answer, or what the request wants instead. Raises what `decide` reads.

        This is an asyncio-flavored function; cancelled, it leaves the call.
        """
        if (part := self._course.new_part(self._request)) is not None:
            await _local(part.find)
        opening = self._opening()
        if self._course.file is not None and self._request.source is not None:
            await _local(self._course.save, self._request)  # the epoch: whoever comes next must have a higher one
        async with self._stream as stream:
            released = self._link.take_released(opening, self.spool or self._link.spool(self._request.upstream))
            try:
                await open_call(stream)
                uploader = asyncio.create_task(self._upload(opening), name="aipod-upload")
                try:
                    answer, error = await self._outcome(uploader)
                finally:
                    await _end(uploader)
                if self._request.until is Until.ANSWER:
                    # The outcome is whole and checked: what becomes of the call's last bytes changes nothing.
                    with contextlib.suppress(Exception):
                        async with asyncio.timeout(TRAILERS):
                            await read_status(stream)
                if error is not None:
                    raise error
                return answer
            finally:
                reset(stream)
                if not self.answered:
                    self._link.put_back(released)
                if self.silent:
                    self._channel.retire(stream)

    def _opening(self) -> Open:
        course, source = self._course, self._request.source
        have = course.have if self._request.until is Until.ANSWER else _NO_ANSWER
        opening = Open(ticket=course.ticket, op=self.op, have=have, log_have=course.log_have)
        if source is not None:
            opening.epoch = course.next_epoch()
            opening.spool = self.spool
            opening.size = source.size
            opening.source = source.tag
        return opening

    # Up

    async def _upload(self, opening: Open) -> None:
        """Send what is missing. Ends early, without an error of its own, where the server has ended the call."""
        request, source = self._request, self._request.source
        if source is None:
            await send_message(self._stream, Raw(open=opening), end=True)
            return
        # An empty payload is complete with the first message.
        empty = source.size == 0 and bool(self.spool)
        if empty:
            await self._commit(self.spool, digest())
        raw = Raw(open=opening, last=empty, digest=digest() if empty else b"")
        first: Raw | StreamInput = raw
        if request.rpc == "chaos":
            raw.data = request.kwargs
        else:
            first = StreamInput(kwargs_json=request.kwargs, version=request.version, raw=raw)
        self._course.fresh = False
        await send_message(self._stream, first, end=empty)
        if empty:
            return
        start = 0
        if not self.was_fresh:
            state = await self._first
            if state.phase != Phase.RECEIVING:
                await self._stream.end()
                return
            start = state.offset
        ready: asyncio.Queue[list[Raw]] = asyncio.Queue(_AHEAD)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._produce(source, start, ready))
            last = False
            while not last:
                for chunk in await ready.get():
                    last = chunk.last
                    if last and not await self._may_commit(chunk.digest):
                        await self._stream.end()
                        return
                    await self._send_chunk(chunk)

    async def _produce(self, source: Source, start: int, ready: asyncio.Queue[list[Raw]]) -> None:
        batches = source.batches(start, self._config.level)
        async with contextlib.aclosing(batches):
            while True:
                try:
                    batch = await anext(batches)
                except StopAsyncIteration:
                    return
                except Exception as exc:
                    raise Local(exc) from exc
                await ready.put(batch)

    async def _send_chunk(self, chunk: Raw) -> None:
        message = chunk if self._request.rpc == "chaos" else StreamInput(raw=chunk)
        end = chunk.last
        await send_message(self._stream, message, end=end)
        assert self._request.source is not None
        sent = self._request.source.size if end else chunk.offset
        self._course.tell(self._request, phase="RECEIVING", sent=sent or self._course.event.sent)

    async def _may_commit(self, whole: bytes) -> bool:
        """Before `last` goes out: it goes only to a spool that can be named. False where it need not go."""
        if self.was_fresh and self.spool:
            await self._commit(self.spool, whole)
            return True
        state = await self._first
        if state.phase != Phase.RECEIVING:
            return False
        await self._commit(state.spool, whole)
        return True

    async def _commit(self, spool: str, whole: bytes) -> None:
        """From here on the method may run. On the disk, where there is a file, before it is on the wire.

        `whole`: the digest of the payload, which the server compares with what it has.
        """
        course = self._course
        assert self._request.source is not None
        course.payload, course.unchecked = whole.hex() if self._request.source.is_compared else "", False
        if course.sent_to is None:
            self.committed = True
            course.sent(spool)
        if course.file is not None:
            await _local(course.save, self._request)

    # Down

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
                    self.silent = True
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
        """Read states until there is what the request wants: the answer, or why there is none."""
        final: State | None = None
        until = self._request.until
        while True:
            message = await self._receive()
            if message is None:
                await read_status(self._stream)
                raise NoAnswer("the call ended without an outcome")
            self.heard = True
            state = message.state
            if state is None:
                if final is not None:
                    return await self._download(final, message), None
                self._course.tell(self._request, heartbeats=self._course.event.heartbeats + 1)
                continue
            self._note(state)
            if self._request.taken is not None:
                await self._request.taken()
            if until is Until.TAKEN and state.phase >= Phase.QUEUED:
                await self._check_payload()
                return None, None
            # The terminal state comes again for as long as there is more of the log.
            if state.phase in TERMINAL:
                await self._check_payload()
                final = state
                if not state.log and until is Until.END:
                    return None, None
                if not state.log and state.phase != Phase.DONE:
                    return None, of_state(state)

    async def _check_payload(self) -> None:
        """Before the caller is told what became of the job: it may be another payload's, which only its bytes tell."""
        course, source = self._course, self._request.source
        if not course.unchecked or source is None or course.file is None:
            return
        try:
            same = (await source.digest()).hex() == course.payload
        except Exception as exc:
            raise Local(exc) from exc
        if not same:
            raise Local(course.file.other())
        course.unchecked = False

    async def _receive(self) -> Raw | None:
        """The next message; None at the end."""
        self._listening = time.monotonic()
        try:
            return await self._stream.recv_message()
        finally:
            self._listening = None

    def _note(self, state: State) -> None:
        """Take note of a state, and tell."""
        course = self._course
        course.saw(state)
        self._link.learn(self._request.upstream, state.spool)
        self.answered = True
        self.receiving = state.phase == Phase.RECEIVING
        self.ran = self.ran or state.phase in (Phase.QUEUED, Phase.RUNNING)
        if not self._first.done():
            self._first.set_result(state)
        course.tell(
            self._request,
            phase=state.phase.name,
            place=state.place,
            progress=state.progress,
            message=state.message,
            log=course.new_log(state),
            answer_size=state.size,
            content_type=state.content_type,
            heartbeats=course.event.heartbeats + 1,
            offset=course.offset,
            runs=state.attempt,
            quiet=state.quiet,
        )

    async def _download(self, state: State, message: Raw | None) -> Any:
        course, save_to = self._course, self._request.save_to
        if course.sink is not None and not course.sink.matches(state):
            await _local(course.discard)
            raise BadAnswer("the server has another answer than before")
        if course.part is not None and course.part.size > state.size:
            await _local(course.discard)
            raise BadAnswer("there is more of it here than it has")
        if course.sink is None:
            course.sink = Sink(state, None) if save_to is None else await _local(Sink, state, save_to, course.part)
            course.part = None
        sink = course.sink
        expect(self._stream, state.size - sink.received)
        filling = Filling(
            sink,
            functools.partial(_local, in_thread=self._link.in_thread),
            lambda: course.tell(self._request, phase="DONE", received=sink.received, answer_size=state.size),
        )
        last = False
        try:
            while message is not None and not last:
                last = message.last
                # A hop into a thread would cost more.
                await filling.add(message, inline=save_to is None and len(message.data) <= HOP)
                message = None if last else await self._receive()
        except asyncio.CancelledError:
            await filling.drop()
            raise
        finally:
            await filling.settle()  # what has come is not asked for again
        if last:
            return await self._finish(sink)
        await read_status(self._stream)
        raise NoAnswer("the answer ended before its last byte")

    async def _finish(self, sink: Sink) -> Any:
        try:
            if self._request.save_to is None and sink.received <= HOP:
                return sink.finish()
            return await _local(functools.partial(sink.finish, durable=self._request.durable))
        except BadAnswer:
            await _local(self._course.discard)  # it is not known which byte is wrong
            raise


async def ask(
    link: Link,
    metadata: Sequence[tuple[str, str]],
    ticket: bytes,
    op: Op,
    misses: int = 0,
    released: Sequence[bytes] = (),
) -> State:
    """Cancel or release a job: one message up, one state down. Raises what `decide` reads.

    This is an asyncio-flavored function, to be run in a task of its own.
    """
    stream: grpclib.client.Stream[Raw, Raw] = link.channel().request(
        "/ai.AI/chaos",
        Cardinality.STREAM_STREAM,
        Raw,
        Raw,
        metadata=[*link.identity(metadata), *lead_to(job_id(ticket), misses)],
    )
    state: State | None = None
    async with stream:
        try:
            await open_call(stream)
            await send_message(stream, Raw(open=Open(ticket=ticket, op=op, released=list(released))), end=True)
            while (message := await stream.recv_message()) is not None:
                state = message.state or state
            await read_status(stream)
        finally:
            reset(stream)
    if state is None:
        raise NoAnswer("the call ended without a state")
    return state


async def in_own_task(coro: Coroutine[Any, Any, T]) -> T:
    """Await `coro` in a task of its own. This is an asyncio-flavored function.

    grpclib ends a wait by cancelling the task that waits. The caller's must not be that one: asyncio.timeout and
    TaskGroup count cancellations, and a cancelled caller must not be taken for a lost connection.
    """
    caller = asyncio.current_task()
    assert caller is not None
    before = caller.cancelling()
    try:
        return await asyncio.create_task(coro, name="aipod-call")
    except (Exception, asyncio.CancelledError) as exc:
        if caller.cancelling() > before:
            raise asyncio.CancelledError from exc
        if isinstance(exc, asyncio.CancelledError):
            raise NoAnswer("the connection was lost") from None
        raise


def _raise_local(uploader: asyncio.Task[None]) -> None:
    """Raise what ended the upload; but what the server did to it the watcher tells better."""
    exc = None if uploader.cancelled() else uploader.exception()
    if exc is not None and not all(isinstance(leaf, CALL_OVER) for leaf in leaves(exc)):
        raise exc


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel `task` and wait for its end, whatever that is. This is an asyncio-flavored function."""
    task.cancel()
    task.add_done_callback(_ask)  # also where this wait is cancelled
    await asyncio.wait([task])


def _ask(task: asyncio.Future[Any]) -> None:
    """asyncio logs an exception that nobody has asked for."""
    if not task.cancelled():
        task.exception()


async def _local(fn: Callable[..., T], *args: Any, in_thread: InThread = asyncio.to_thread) -> T:
    """Run `fn` in a thread; what it raises is no failure of the network's. This is an asyncio-flavored function."""
    try:
        return await in_thread(fn, *args)  # type: ignore[no-any-return]
    except BadAnswer:
        raise
    except Exception as exc:
        raise Local(exc) from exc
