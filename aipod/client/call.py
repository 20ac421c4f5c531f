"""One attempt for a job, over one stream: upload and watch side by side, then the answer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from typing import Any

from grpclib.const import Cardinality

from aipod.client.aside import end, local
from aipod.client.course import Course, Request, Until
from aipod.client.event import Event as Event  # also known from here
from aipod.client.failure import BadAnswer, Local, NoAnswer, of_state
from aipod.client.flow import Flow, Pour
from aipod.client.link import Link
from aipod.client.sink import Filling, Sink
from aipod.client.source import HOP, Source
from aipod.config import CHUNK
from aipod.errors import JobFailed, leaves
from aipod.packing import BATCH, Packed, Packer
from aipod.transport.channel import CALL_OVER, Channel, read_status, reset, send_message
from aipod.transport.stream import came, expect, held
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
TERMINAL = (Phase.DONE, Phase.FAILED, Phase.CANCELLED, Phase.RELEASED)

Outcome = tuple[Any, JobFailed | None]  # the answer, or why there is none


class Attempt:
    """One stream. What it learns stays in `course`; what it says of itself is for the decision about the next one."""

    def __init__(self, link: Link, request: Request, course: Course) -> None:
        self._link = link
        self._config = link.config
        self._request = request
        self._course = course
        self.op = Op.ATTACH if request.source is None else course.op
        self.spool = self._spool(request.source)  # that the request is meant for
        self.unreached = False  # what the job is in could not be asked
        self.was_fresh = course.fresh
        self.heard = False  # a message came
        self.answered = False  # a state came
        self.receiving = False  # the last one said that the payload is not complete
        self.ran = False  # it said that the job is alive without its caller's help
        self.committed = False  # it was this attempt that sent `last` for the first time
        self.silent = False  # nothing came for too long
        self._first: asyncio.Future[State] = asyncio.get_running_loop().create_future()
        self._listening: float | None = None  # since when a message is waited for
        self._timer: asyncio.TimerHandle | None = None  # until the next look at that
        self._came = 0  # what `came` told at the last look
        self._stirred = 0.0  # when a part of a message had come, where nothing else had for `silence`
        self._late = False  # the time is over, but this process may have been stopped meanwhile
        self._opening = Open()
        self._complete = False  # what the call begins with is all that it has to send
        self._use(link.channel(course.where, course.misses))

    def _use(self, channel: Channel | None) -> None:
        """Go over `channel`; None: that is chosen later."""
        request, course = self._request, self._course
        self.idle = channel is not None and channel.connected  # over a connection that may have ended without a word
        self._channel = channel
        if channel is not None:
            self._call = channel.request(
                f"/ai.AI/{request.rpc}",
                Cardinality.STREAM_STREAM,
                Raw if request.rpc == "chaos" else StreamInput,
                Raw,
                deadline=request.deadline,
                metadata=[*self._link.identity(request.metadata), *course.headers],
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
        if self._channel is None:
            self._use(await self._link.choose(self._course.where, self._course.misses))
        channel = self._channel
        assert channel is not None
        if (part := self._course.new_part(self._request)) is not None:
            await local(part.find)
        self._opening = self._make_opening()
        if self._course.file is not None and self._request.source is not None:
            await local(self._course.save, self._request)  # the epoch: whoever comes next must have a higher one
        async with self._call as call:
            released = self._link.take_released(self._opening, self.spool or self._link.spool(self._request.upstream))
            try:
                begun: list[Raw | StreamInput] = []
                sent = await self._open(begun)
                uploader = self._start_upload(begun[sent:])
                self._look()
                try:
                    answer, error = await self._watch()
                finally:
                    if uploader is not None:
                        await end(uploader)
                if self._request.until is Until.ANSWER:
                    # The outcome is whole and checked: what becomes of the call's last bytes changes nothing.
                    with contextlib.suppress(Exception):
                        async with asyncio.timeout(None if call.has_status else TRAILERS):
                            await read_status(call)
                if error is not None:
                    raise error
                return answer
            finally:
                if self._timer is not None:
                    self._timer.cancel()
                reset(call)
                if not self.answered:
                    self._link.put_back(released)
                if self.silent:
                    channel.retire(call)

    def _make_opening(self) -> Open:
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

    async def _open(self, begun: list[Raw | StreamInput]) -> int:
        try:
            return await self._call.open(functools.partial(self._begin, begun))
        except OSError:
            self.unreached = not begun
            raise

    def _begin(self, begun: list[Raw | StreamInput]) -> tuple[list[Raw | StreamInput], bool]:
        """What the call begins with, at the moment in which it does: with a small payload all that there is to say."""
        request, source = self._request, self._request.source
        raw = Raw(open=self._opening)
        if source is None:
            self._complete = True
            begun.append(raw)
            return begun, True
        whole = self._whole(source)
        if whole is not None and (request.rpc != "chaos" or not whole.data):
            raw, whole = whole, None
            raw.open = self._opening
        if request.rpc == "chaos":
            raw.data = request.kwargs
            begun.append(raw)
        else:
            begun.append(StreamInput(kwargs_json=request.kwargs, version=request.version, raw=raw))
        if whole is not None:
            begun.append(whole)
        self._course.fresh = False
        return begun, self._complete

    def _whole(self, source: Source) -> Raw | None:
        """All of the payload in one message, where it is small, and where it may go out without a word from the server
        or on the disk; else None.
        """
        if not (self.was_fresh and self.spool) or self._course.file is not None:
            return None
        whole = source.whole(self._config.small_level)
        if whole is not None:
            self._complete = True
            self._note_commit(self.spool, whole.digest)
        return whole

    def _start_upload(self, rest: list[Raw | StreamInput]) -> asyncio.Task[None] | None:
        """Send what the call did not begin with: `rest`, and then what else is missing."""
        if self._complete and not rest:
            self._tell_sent(None if self._request.source is None else self._request.source.size)
            return None
        uploader = asyncio.create_task(self._upload(rest), name="aipod-upload")
        uploader.add_done_callback(self._note_upload)
        return uploader

    async def _upload(self, rest: list[Raw | StreamInput]) -> None:
        """Ends early, without an error of its own, where the server has ended the call."""
        source = self._request.source
        for message in rest:
            await send_message(self._call, message, end=self._complete and message is rest[-1])
        if self._complete:
            self._tell_sent(None if self._request.source is None else self._request.source.size)
            return
        assert source is not None, "a call without a payload begins with all that it has"
        start = 0
        if not self.was_fresh:
            state = await self._first
            if state.phase != Phase.RECEIVING:
                await self._call.end()
                return
            start = state.offset
        ready: asyncio.Queue[Packed] = asyncio.Queue(_AHEAD)
        packer = Packer(self._config.level, start, functools.partial(held, self._call))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._produce(source, packer, ready))
            last = False
            while not last:
                batch = await ready.get()
                with packer.sending(batch):
                    for chunk in batch.messages:
                        last = chunk.last
                        if last and not await self._may_commit(chunk.digest):
                            await self._call.end()
                            return
                        await self._send_chunk(chunk, packer)

    async def _produce(self, source: Source, packer: Packer, ready: asyncio.Queue[Packed]) -> None:
        batches = source.batches(packer)
        async with contextlib.aclosing(batches):
            while True:
                try:
                    batch = await anext(batches)
                except StopAsyncIteration:
                    return
                except Exception as exc:
                    raise Local(exc) from exc
                await ready.put(batch)

    async def _send_chunk(self, chunk: Raw, packer: Packer) -> None:
        message = chunk if self._request.rpc == "chaos" else StreamInput(raw=chunk)
        end = chunk.last
        await send_message(self._call, message, end=end)
        assert self._request.source is not None
        packed: dict[str, Any] = {"level": packer.level}
        if packer.ratio:  # of nothing there is none: what was told before stands
            packed["ratio"] = packer.ratio
        self._tell_sent(self._request.source.size if end else chunk.offset, **packed)

    def _tell_sent(self, sent: int | None, **packed: Any) -> None:
        if sent:
            self._course.tell(self._request, phase="RECEIVING", sent=sent, **packed)

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
        self._note_commit(spool, whole)
        if self._course.file is not None:
            await local(self._course.save, self._request)

    def _note_commit(self, spool: str, whole: bytes) -> None:
        course = self._course
        assert self._request.source is not None
        course.payload, course.unchecked = whole.hex() if self._request.source.is_compared else "", False
        if course.sent_to is None:
            self.committed = True
            course.sent(spool)

    def _note_upload(self, uploader: asyncio.Task[None]) -> None:
        """What has ended the upload ends the call; but what the server did to it is told better by what it says."""
        exc = None if uploader.cancelled() else uploader.exception()
        if isinstance(exc, Exception) and not all(isinstance(leaf, CALL_OVER) for leaf in leaves(exc)):
            self._call.fail(exc)

    # Down

    def _look(self) -> None:
        """End the call after `silence` seconds without a message, and without a part of one.

        A chunk of an answer may take minutes on a slow line, or on one that many calls share. One timer for the whole
        call: one for each message would cost more than reading that.
        """
        left = self._config.silence
        if self._listening is not None:  # else this side is busy, with a slow disk perhaps
            left += max(self._listening, self._stirred) - time.monotonic()
        before, self._came = self._came, came(self._call)
        if left <= 0 and self._came != before:
            self._stirred, left = time.monotonic(), self._config.silence
        if left <= 0 and self._late:
            self.silent = True
            self._call.fail(NoAnswer(f"no heartbeat for {self._config.silence:g} s"))
            return
        self._late = left <= 0
        self._timer = asyncio.get_running_loop().call_later(_CATCH_UP if self._late else left, self._look)

    async def _watch(self) -> Outcome:
        """Read states until there is what the request wants: the answer, or why there is none."""
        final: State | None = None
        until = self._request.until
        while True:
            message = await self._receive()
            if message is None:
                await read_status(self._call)
                raise NoAnswer("the call ended without an outcome")
            self.heard = True
            state = message.state
            if state is None:
                if final is not None:
                    return await self._download(final, message), None
                self._course.tell(self._request, heartbeats=self._course.told["heartbeats"] + 1)
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
            message: Raw | None = await self._call.recv_message()
            return message
        finally:
            self._listening = None

    def _note(self, state: State) -> None:
        """Take note of a state, and tell."""
        course = self._course
        course.saw(state)
        self._link.learn(self._request.upstream, state.spool, self._channel)
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
            heartbeats=course.told["heartbeats"] + 1,
            offset=course.offset,
            runs=state.attempt,
            quiet=state.quiet,
        )

    async def _hand_on(self, state: State, message: Raw | None, pour: Pour) -> None:
        """The answer, chunk by chunk, to who takes it at a pace of its own."""
        course = self._course
        flow = course.sink = course.sink if isinstance(course.sink, Flow) else Flow(state, pour)
        expect(self._call, state.size - flow.received)
        tell = functools.partial(course.tell, self._request, phase="DONE", answer_size=state.size)
        if not await flow.carry(state, message, self._receive, self._link.in_thread, tell):
            await read_status(self._call)
            raise NoAnswer("the answer ended before its last byte")

    async def _download(self, state: State, message: Raw | None) -> Any:
        if self._request.pour is not None:
            return await self._hand_on(state, message, self._request.pour)
        course, save_to = self._course, self._request.save_to
        if isinstance(course.sink, Sink) and not course.sink.matches(state):
            await local(course.discard)
            raise BadAnswer("the server has another answer than before")
        if course.part is not None and course.part.size > state.size:
            await local(course.discard)
            raise BadAnswer("there is more of it here than it has")
        if course.sink is None:
            course.sink = Sink(state, None) if save_to is None else await local(Sink, state, save_to, course.part)
            course.part = None
        sink = course.sink
        assert isinstance(sink, Sink)
        expect(self._call, state.size - sink.received)
        before = sink.received

        def tell() -> None:
            ratio = (sink.received - before) / filling.wire if filling.wire else 0.0
            course.tell(self._request, phase="DONE", received=sink.received, answer_size=state.size, ratio=ratio)

        filling = Filling(sink, functools.partial(local, in_thread=self._link.in_thread), tell)
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
        await read_status(self._call)
        raise NoAnswer("the answer ended before its last byte")

    async def _finish(self, sink: Sink) -> Any:
        try:
            if self._request.save_to is None and sink.received <= HOP:
                return sink.finish()
            return await local(functools.partial(sink.finish, durable=self._request.durable))
        except BadAnswer:
            await local(self._course.discard)  # it is not known which byte is wrong
            raise
