"""The end of a server's work: what is waited for, what is stopped, what is left to the next server.

    when it begins     new jobs are refused; uploads of own clients end after a checkpoint; whoever asks for a job, to
                       watch it, end it or release it, is served as before
    until the time     jobs that run or wait in line come to their ends, and plain clients' uploads; their callers get
    is over            the answers
    then               jobs that have not begun are left to the next server, others end as interrupted or cancelled

A call that was on its way when the drain began is none of the new ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import trio

from aipod.errors import Refused
from aipod.job.job import Job
from aipod.service.jobs import Jobs
from aipod.wire.ai import Phase


@dataclasses.dataclass(eq=False)
class Ongoing:
    """A call under way."""

    refused: bool  # it may bring nothing new
    scope: trio.CancelScope = dataclasses.field(default_factory=trio.CancelScope)  # ends it when the time is over
    job: Job | None = None  # a plain client's, which has nothing but this call
    asks: bool = False  # an own client's: it asks for a job that is in the spool
    idle: bool = False  # nothing here depends on it: no drain waits for it


class Drain:
    """Waits for calls and jobs. The mutable state is the calls under way."""

    def __init__(self, jobs: Jobs, cancel_grace: float) -> None:
        self._jobs = jobs
        self._cancel_grace = cancel_grace
        self._calls: set[Ongoing] = set()
        self._less = trio.Event()  # there is one less to wait for

    @property
    def begun(self) -> bool:
        return self._jobs.draining

    @contextlib.contextmanager
    def call(self, *, was_on_its_way: bool) -> Iterator[Ongoing]:
        """A call is under way in the block."""
        ongoing = Ongoing(refused=self.begun and not was_on_its_way)
        self._calls.add(ongoing)
        try:
            yield ongoing
        finally:
            self._calls.discard(ongoing)
            self._one_less()

    @contextlib.contextmanager
    def idling(self, ongoing: Ongoing) -> Iterator[None]:
        """The call waits in the block for what somebody else does."""
        ongoing.idle = True
        self._one_less()
        try:
            yield
        finally:
            ongoing.idle = False

    def why(self, ongoing: Ongoing) -> Refused:
        """For the caller whose scope was cancelled."""
        return self._jobs.refusals.kept() if ongoing.asks else self._jobs.refusals.draining()

    async def run(self, seconds: float, say: Callable[[str], None]) -> None:
        """Refuse new jobs and wait for those under way; end what is left after `seconds`. `say` is told once a second.

        A job whose method was not started is left to the next server, or a plain client's refused with the advice to
        try again; any other ends as interrupted or cancelled, unless its method is restartable and it is left too.
        This is a trio-flavored async function.
        """
        self._jobs.draining = True
        for job in self._jobs.held.values():
            if job.phase == Phase.RECEIVING and not job.request.plain:
                job.hand_over()  # the next server goes on where this one has come
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell, trio.current_time() + seconds, say)
            with trio.move_on_after(seconds):
                while self._jobs.held or self._awaited:
                    await self._wait_less()
            nursery.cancel_scope.cancel()
        for job in list(self._jobs.held.values()):
            if job.request.plain:
                continue
            if job.started:
                job.stop("the server was shut down while the method ran", "INTERRUPTED")
            else:
                job.hand_over()
        for call in self._calls:
            if call.job is not None:
                call.job.stop("the server is shutting down")
            if call.idle or not (call.asks or (call.job is not None and call.job.started)):
                call.scope.cancel()
        with trio.move_on_after(2 * self._cancel_grace + 5):  # the three steps
            while self._jobs.held:
                await self._wait_less()
        for seconds in (1.0, 5.0):  # to tell the outcome, and then that there is none here
            with trio.move_on_after(seconds):
                while self._awaited:
                    await self._wait_less()
            for call in self._calls:
                call.scope.cancel()

    @property
    def _awaited(self) -> bool:
        return not all(call.idle for call in self._calls)

    async def _tell(self, until: float, say: Callable[[str], None]) -> None:
        while True:
            calls = sum(not call.idle for call in self._calls)
            left = max(until - trio.current_time(), 0)
            say(f"draining: {len(self._jobs.held)} jobs and {calls} calls under way, at most {left:.0f} s left")
            await trio.sleep(1.0)

    async def _wait_less(self) -> None:
        """Wait for a call or a job to end."""
        async with trio.open_nursery() as nursery:
            for event in (self._less, self._jobs.changed):
                nursery.start_soon(_then_cancel, event, nursery.cancel_scope)

    def _one_less(self) -> None:
        self._less.set()
        self._less = trio.Event()


async def _then_cancel(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
