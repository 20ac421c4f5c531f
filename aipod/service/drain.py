"""The end of a server's work: what is waited for, what is stopped, what is left to the next server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trio

from aipod.errors import Refused
from aipod.job.job import Job
from aipod.service.jobs import Jobs
from aipod.wire.ai import Phase


class Drain:
    """Waits for calls and jobs. The mutable state is the calls under way, with the jobs of plain clients."""

    def __init__(self, jobs: Jobs, cancel_grace: float) -> None:
        self._jobs = jobs
        self._cancel_grace = cancel_grace
        self._calls: dict[trio.CancelScope, Job | None] = {}
        self._less = trio.Event()  # there is one call less in it

    @property
    def begun(self) -> bool:
        return self._jobs.draining

    @contextlib.contextmanager
    def call(self) -> Iterator[trio.CancelScope]:
        """A call is under way in the block. The scope ends it when the time is over."""
        scope = trio.CancelScope()
        self._calls[scope] = None
        try:
            yield scope
        finally:
            del self._calls[scope]
            self._less.set()
            self._less = trio.Event()

    def is_of(self, scope: trio.CancelScope, job: Job) -> None:
        """The call is all that the job of a plain client has."""
        self._calls[scope] = job

    def why(self, scope: trio.CancelScope) -> Refused:
        """For the caller whose scope was cancelled."""
        return self._jobs.refusals.kept() if self._calls.get(scope) is None else self._jobs.refusals.draining()

    async def run(self, seconds: float) -> None:
        """Refuse new jobs and wait for those under way; cancel what is left after `seconds`.

        A job whose method was not started is left to the next server, or a plain client's refused with the advice to
        try again; any other ends as interrupted or cancelled, for the method must not run twice.
        This is a trio-flavored async function.
        """
        self._jobs.draining = True
        for job in self._jobs.held.values():
            if job.phase == Phase.RECEIVING and not job.request.plain:
                job.hand_over()  # the next server goes on where this one has come
        with trio.move_on_after(seconds):
            while self._calls or self._jobs.held:
                await self._wait_less()
        for job in list(self._jobs.held.values()):
            if job.request.plain:
                continue
            if job.started:
                job.stop("the server was shut down while the method ran", "INTERRUPTED")
            else:
                job.hand_over()
        for scope, plain in self._calls.items():
            if plain is not None:
                plain.stop("the server is shutting down")
                if not plain.started:
                    scope.cancel()
        with trio.move_on_after(2 * self._cancel_grace + 5):  # the three steps
            while self._jobs.held:
                await self._wait_less()
        for seconds in (1.0, 5.0):  # to tell the outcome, and then that there is none here
            with trio.move_on_after(seconds):
                while self._calls:
                    await self._wait_less()
            for scope in self._calls:
                scope.cancel()

    async def _wait_less(self) -> None:
        """Wait for a call or a job to end."""
        async with trio.open_nursery() as nursery:
            for event in (self._less, self._jobs.changed):
                nursery.start_soon(_then_cancel, event, nursery.cancel_scope)


async def _then_cancel(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
