"""A method call under way: followed once to its answer, or step by step by who has asked for events or chunks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aipod.client.ask import ask
from aipod.client.course import CallDeadline, Course, Request, Until
from aipod.client.event import Event, Listener, OnEvent
from aipod.client.flow import Pour
from aipod.client.follow import Follower, end_left, release
from aipod.client.handed import Events, Handed
from aipod.client.link import Had, Link
from aipod.client.sink import check_target
from aipod.client.traced import traced
from aipod.errors import JobLost, Refused, Unreachable, UsageError, job_failed
from aipod.results import INLINE
from aipod.wire.ai import Op, Phase


class Call:
    """A method that is called, made by `Client.stream`. asyncio-flavored.

        async with client.stream("predict", "scan.nii", top=5) as call:
            async for event in call.events():
                show(event.phase, event.progress, event.log)
            async for chunk in call.chunks():
                ...

    Nothing is sent before `events`, `wait`, `save` or `chunks` is called. One of them at a time, and the answer once.
    Leaving the `with` block before the answer was had cancels the job, best effort, unless it has a ticket file.
    """

    def __init__(
        self, link: Link, prepare: Callable[[], Awaitable[tuple[Request, Course]]], timeout: float | None
    ) -> None:
        self._link = link
        self._prepare = prepare
        self._timeout = timeout
        self._closes = link.closes  # when the caller called: one that was closed since is not opened again for that
        self._over: asyncio.Future[None] | None = None  # None outside of its block
        self._is_busy = False
        self._is_had = False  # the caller has what was asked for
        self._given_up: BaseException | None = None  # what has ended it without an answer

    async def __aenter__(self) -> Self:
        self._request, self._course = await self._prepare()
        self._metadata = self._request.metadata
        self._until = None if self._timeout is None else asyncio.get_running_loop().time() + self._timeout
        if self._timeout is not None and self._course.file is None:
            self._request.deadline = CallDeadline.from_timeout(self._timeout)
        self._over = self._link.begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        course, source = self._course, self._request.source
        assert source is not None
        assert self._over is not None
        over, self._over = self._over, None
        error = exc or self._given_up
        try:
            try:
                await source.__aexit__(kind, exc, trace)
            finally:
                if self._request.until is Until.TAKEN and self._is_had:
                    pass  # it goes on by itself
                elif self._is_had:
                    self._delivered()
                else:
                    self._leave(error)
                self._link.end(over)
        finally:
            continued = not self._is_had and _is_continued(course, error)
            if self._request.save_to is not None:
                await asyncio.to_thread(course.leave if continued else course.discard)

    @property
    def id(self) -> str:
        """The job's public name, as in the server's logs and in header x-job-id.

        Another one from the moment when the job is begun anew, which is told by events: `Event.job_id`.
        """
        return self._course.id

    def events(self) -> AsyncGenerator[Event, None]:
        """What the call is doing, until the job has ended: connection, upload, queue place, progress, log.

            async for event in call.events():
                show(event.phase, event.progress, event.log)

        The last event has the phase in which the job has ended; its answer is not fetched. While the caller is busy
        with one event, the newest of each phase waits, with all that was logged meanwhile, and what follows waits at
        the server; the upload goes on. Raises as `Client.predict`, but for what the job ends with: that is told by what
        fetches its answer. Left early (through `contextlib.aclosing`), the call pauses until the next method is called.
        """
        events = Events()
        return events.each(lambda: self._follow(Until.END, on_event=events))

    async def wait(self, *, save_to: str | os.PathLike[str] | None = None, on_event: OnEvent | None = None) -> Any:
        """The answer, with `save_to` and `on_event` as for `Client.predict`; it raises the same."""
        if save_to is not None:
            await asyncio.to_thread(check_target, save_to)
        return await self.answer(save_to, on_event)

    async def save(self, path: str | os.PathLike[str]) -> Path:
        """Wait for the answer and write it to the file `path`. Raises as `Client.predict`."""
        await self.wait(save_to=path)
        return Path(path)

    def chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes of the answer as they come, in pieces of at most 1 MiB: what `Client.predict` would have returned
        as bytes, or what the method's JSON is in UTF-8.

            async for chunk in call.chunks():
                file.write(chunk)

        While the caller is busy with one, the next ones wait at the server, but for what a stream's window holds (some
        20 MiB). Where a connection is lost, it goes on at the byte where it was. Raises as `Client.predict`, and
        `AipodError` (BAD_ANSWER) where what has come is not what was stored: that is known at the end, so do not use
        what has come before that. Left early (through `contextlib.aclosing`), the next call begins at the first byte.
        """
        chunks = Handed[bytes]()

        async def pour() -> None:
            try:
                await self._follow(Until.ANSWER, pour=chunks.put)
                await chunks.taken()
                self._is_had = True
            finally:
                self._course.discard()

        return chunks.each(pour)

    async def answer(self, save_to: str | os.PathLike[str] | None, on_event: OnEvent | None) -> Any:
        """As `wait`, of a file that was checked before."""
        answer = await self._follow(Until.ANSWER, save_to=save_to, on_event=on_event)
        self._is_had = True
        return answer

    async def hand_over(self, on_event: OnEvent | None) -> tuple[Request, Course]:
        """Until the server has the request; what is known of it and of the job then, which goes on by itself."""
        await self._follow(Until.TAKEN, on_event=on_event)
        self._is_had = True
        return self._request, self._course

    async def _follow(
        self,
        until: Until,
        *,
        save_to: str | os.PathLike[str] | None = None,
        on_event: OnEvent | None = None,
        pour: Pour | None = None,
    ) -> Any:
        if self._over is None:
            raise UsageError("a call is used within its block: `with client.stream(...) as call`")
        if self._is_busy or self._is_had:
            why = "its answer was had" if self._is_had else "one of its methods is under way"
            raise UsageError(f"this call has no more to give: {why}; use `submit` for what is asked for several times")
        request = self._request
        request.until, request.save_to, request.on_event, request.pour = until, save_to, on_event, pour
        request.taken = on_event.taken if isinstance(on_event, Listener) else None
        request.metadata = self._metadata
        follower = Follower(self._link, request, self._course, self._closes)
        scope = asyncio.timeout_at(self._until)
        what = f"submit {_method(request)}" if until is Until.TAKEN else _method(request)
        self._is_busy = True
        try:
            with traced(follower, request, what):
                async with scope:
                    return await follower.run()
        except BaseException as exc:
            self._given_up = exc
            if isinstance(exc, TimeoutError) and scope.expired():
                raise job_failed("DEADLINE_EXCEEDED", "not done within the call's timeout") from exc.__cause__
            raise
        finally:
            self._course, self._is_busy = follower.course, False

    def _leave(self, error: BaseException | None) -> None:
        """The caller goes without an answer: nobody can ask for the job again, unless there is a file."""
        course, link = self._course, self._link
        if course.unchecked:
            return  # it may be another caller's
        if course.phase > Phase.DONE:
            self._release()
            return
        absent = course.fresh or isinstance(error, Unreachable | JobLost)  # or out of reach
        absent = absent or (isinstance(error, Refused) and not course.answered)
        if course.file is None and not absent and link.closes == self._closes:
            op = Op.RELEASE if course.phase == Phase.DONE else Op.CANCEL
            link.errand(end_left, link, self._request.metadata, course.ticket, op, course.misses, course.where)

    def _delivered(self) -> None:
        """The caller has the answer: nobody will ask for it again."""
        self._course.forget_file()
        self._release()

    def _release(self) -> None:
        """Let the server forget what became of the job: at once where that is large, else with a later call."""
        link, course = self._link, self._course
        is_open = link.closes == self._closes
        had = Had(course.spool, course.ticket, self._request.metadata, course.misses)
        if course.file is not None:
            # Another process may have begun with the same file, and ask when it is in reach again. A job that is
            # released by a word of its own is known for its whole time, so the method is not run for that one.
            if is_open:
                link.errand(ask, link, had.metadata, had.ticket, Op.RELEASE, had.misses, had.spool)
        elif not (is_open and course.told.get("answer_size", 0) > INLINE and link.errand(release, link, had)):
            link.release(had)


def _is_continued(course: Course, error: BaseException | None) -> bool:
    """Whether the same call can go on with the job. Its ticket file goes where not.

    A job that has ended without an answer, or never began, is not continued: another try takes a new ticket.
    """
    if course.file is None:
        return False
    if course.unchecked:
        return True  # by whoever has the payload that was sent; this caller was told nothing of what became of it
    new = not (course.found or course.answered) and course.sent_to is None
    # SUPERSEDED: another caller goes on with the job, and with the file.
    refused = isinstance(error, Refused) and error.reason != "SUPERSEDED"
    if course.phase > Phase.DONE or (new and refused):
        course.forget_file()
        return False
    return True


def _method(request: Request) -> str:
    """What the request names, on whatever call."""
    return next((value for name, value in request.metadata if name == "x-func-name"), request.rpc)
