"""The handle of a job that goes on by itself."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from aipod.client.course import Course, Request, Until
from aipod.client.event import Event, Listener, OnEvent
from aipod.client.follow import ASK_AGAIN, Follower, ask_surely
from aipod.client.handed import Events, Handed
from aipod.client.link import Link
from aipod.client.sink import check_target
from aipod.client.ticket import TicketFile
from aipod.client.traced import traced
from aipod.codec import job_id
from aipod.errors import JobFailed, Refused
from aipod.wire.ai import Op, Phase

# Seconds, at most and with full jitter, between two times that a job out of reach is looked for behind its caller's
# back: well below the server's grace.
STAY = 30.0


class Job:
    """A job at the server, made by `Client.submit` or found again by `Client.attach`. asyncio-flavored.

    Whoever has `ticket` owns the job: keep it as a secret. `str(job)` is the ticket in hexadecimal, for a person or a
    file; `id` is the public name, which may be logged.

    The job goes on while nobody waits for it: as long as the client that submitted it is open, then for the server's
    grace time (600 s by default), and at the next server where its own was killed. What it answers can be had any
    number of times, until `release` or until it expires. Waiting may be cancelled, and begun again, at any time.
    """

    def __init__(
        self,
        link: Link,
        ticket: bytes,
        metadata: Sequence[tuple[str, str]],
        *,
        taken: bool,
        file: TicketFile | None,
        misses: int = 0,
        spool: str = "",
    ) -> None:
        self._link = link
        self._metadata = metadata
        self._taken = taken  # the server has said that it has the job
        self._goes_on = file is not None or not taken  # a later process may have the ticket too
        self._file = file
        self._misses = misses  # which of several servers it is at
        self._spool = spool  # that it is in; empty where that is not known yet
        self.ticket = ticket

    @property
    def id(self) -> str:
        """The job's public name, as in the server's logs and in header x-job-id."""
        return job_id(self.ticket)

    def __str__(self) -> str:
        return self.ticket.hex()

    def __repr__(self) -> str:
        return f"<Job {self.id}>"

    async def wait(
        self,
        *,
        timeout: float | None = None,
        save_to: str | os.PathLike[str] | None = None,
        on_event: OnEvent | None = None,
        keep: bool = False,
    ) -> Any:
        """The answer, as `Client.predict` returns it; the same each time it is asked for.

        The ticket file that the job was submitted with is removed then (what was saved is on the disk before), and
        where the job has ended without an answer; with `keep` it stays until `release`.

        Raises `ModelError`, `JobCancelled`, `Interrupted` and `JobFailed` for a job that ended without one, `Refused`
        (NOT_FOUND) for a ticket that the server does not know, `JobLost` where server or job are not found again,
        `UsageError`, and TimeoutError after `timeout` seconds. Cancelled, or out of time, the job goes on; what has
        arrived for `save_to` then waits beside it for the next time, in `.NAME.ID.part`, where the job has a ticket
        file or was attached to.
        """
        if save_to is not None:
            await asyncio.to_thread(check_target, save_to)
        durable = self._file is not None and not keep
        request = Request(
            "chaos", self._metadata, save_to=save_to, on_event=on_event, goes_on=self._goes_on, durable=durable
        )
        if isinstance(on_event, Listener):
            request.taken = on_event.taken
        async with self._had(keep), asyncio.timeout(timeout):
            return await self._follow(request, what="wait")

    async def save(self, path: str | os.PathLike[str]) -> Path:
        """Wait for the answer and write it to the file `path`. Raises as `wait`."""
        await self.wait(save_to=path)
        return Path(path)

    def events(self) -> AsyncGenerator[Event, None]:
        """What the job is doing, until it has ended: phase, progress, message, the log from its beginning.

            async for event in job.events():
                show(event.phase, event.progress, event.log)

        The last event has the phase in which the job has ended; its answer is not fetched. Raises `Refused` (NOT_FOUND)
        and `JobLost`. While the caller is busy with one event, the next ones wait at the server. Leave it early through
        `contextlib.aclosing`.
        """
        events = Events()
        request = Request("chaos", self._metadata, until=Until.END, on_event=events, taken=events.taken)
        return events.each(lambda: self._follow(request))

    def chunks(self, *, keep: bool = False) -> AsyncGenerator[bytes, None]:
        """The bytes of the answer as they come, in pieces of at most 1 MiB: bytes or a file's as they are, what else
        the method returned as JSON in UTF-8.

            async for chunk in job.chunks():
                file.write(chunk)

        While the caller is busy with one, the next ones wait at the server, but for what a stream's window holds (some
        20 MiB). Where a connection is lost, it goes on at the byte where it was. `keep`, and what is raised, as for
        `wait`; and `AipodError` (BAD_ANSWER) where what has come is not what was stored: that is known at the end, so
        do not use what has come before that. Leave it early through `contextlib.aclosing`.
        """
        chunks = Handed[bytes]()
        request = Request("chaos", self._metadata, pour=chunks.put)

        async def pour() -> None:
            async with self._had(keep):
                await self._follow(request, what="chunks")
                await chunks.taken()

        return chunks.each(pour)

    @contextlib.asynccontextmanager
    async def _had(self, keep: bool) -> AsyncIterator[None]:
        """The body has the answer when it ends: the ticket file is needed no more, but where it is to be kept."""
        try:
            yield
        except JobFailed:
            if not keep:
                self._forget_file()  # it is the job's answer: asked again it would say the same
            raise
        if not keep:
            self._forget_file()

    async def cancel(self) -> None:
        """Ask the server to stop the job; harmless where it has ended. What it then answers is told by `wait`.

        A method that looks at `context.cancelled` ends by itself, any other is ended after the server's grace for that.
        Raises `JobLost` where no server answers or the job is not found again, and `Refused` (NOT_FOUND) for a ticket
        that the server does not know.
        """
        await self._end(Op.CANCEL)

    async def release(self) -> None:
        """Let the server forget the job and its answer, for everybody; stop it where it has not ended.

        Raises `JobLost` where no server answers or the job is not found again, and `Refused` (NOT_FOUND) for a ticket
        that the server does not know.
        """
        await self._end(Op.RELEASE)
        self._forget_file()

    async def _end(self, op: Op) -> None:
        for pause in ASK_AGAIN:  # the call that brought the job may be about to let go of its upload
            state, self._misses = await ask_surely(
                *(self._link, self._metadata, self.ticket, op, self._misses), taken=self._taken, spool=self._spool
            )
            self._taken, self._spool = True, state.spool
            if state.phase > Phase.RECEIVING:
                return
            await asyncio.sleep(pause)

    def _watch(self) -> None:
        """Stay attached until the job has ended or the client is closed, so that it is not taken for abandoned."""
        self._link.watch(self._stay)

    async def _stay(self) -> None:
        """Follow the job to its end, however long it is out of reach meanwhile, unless it is not found any more."""
        known = self._taken
        for limit in itertools.chain((1, 2, 4, 8, 16), itertools.repeat(STAY)):
            try:
                await self._follow(Request("chaos", self._metadata, until=Until.END), known=known)
                return
            except JobFailed:
                return
            except Exception as exc:  # those who wait are told
                if isinstance(exc, Refused) and exc.reason == "NOT_FOUND":
                    return
            known = False  # it was looked for as a job that is there: next time a server's word counts
            await asyncio.sleep(random.uniform(0, limit))  # noqa: S311 - jitter is no secret

    async def _follow(self, request: Request, *, known: bool | None = None, what: str = "") -> Any:
        """Watch the job as `request` says. `known`: a server that does not find it is not to be believed at once.

        `what`: what its caller does, for a trace.
        """
        known = self._taken if known is None else known
        phase = Phase.QUEUED if known else Phase.NONE
        course = Course(
            self.ticket, Op.ATTACH, fresh=False, answered=known, phase=phase, misses=self._misses, spool=self._spool
        )
        follower = Follower(self._link, request, course, self._link.closes)
        is_over = False
        try:
            with traced(follower, request, what) if what else contextlib.nullcontext():
                return await follower.run()
        except (JobFailed, Refused) as exc:
            is_over = isinstance(exc, JobFailed) or exc.reason == "NOT_FOUND"
            raise
        finally:
            self._taken = self._taken or follower.course.answered
            self._misses, self._spool = follower.course.misses, follower.course.spool
            if request.save_to is not None:
                await asyncio.to_thread(course.leave if request.goes_on and not is_over else course.discard)

    def _forget_file(self) -> None:
        if self._file is not None:
            self._file.remove(self.ticket)  # not in a thread: who is cancelled meanwhile has not had the answer
