"""The jobs of a server: those that this process works on, and how a caller finds its own.

    found                            RUN, RESUME               ATTACH            CANCEL, RELEASE
    nothing                          create; RESUME: fence     NOT_FOUND         NOT_FOUND
    RECEIVING                        take the upload over      watch             end it
    QUEUED, held by nobody           work on it                work on it        end it
    RUNNING, held by nobody          recover                   recover           recover, end it
    QUEUED or RUNNING, held          watch                     watch             ask its holder to end it
    ended                            tell                      tell              tell; RELEASE: forget

"Held by nobody" means that the job's lock and its worker's are free: whoever worked on it has died.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import trio

from aipod import hands
from aipod.config import Config
from aipod.errors import Refused, refused_when_exhausted
from aipod.identity import Caller
from aipod.job.end import Terms, settle_later
from aipod.job.job import Job
from aipod.job.request import Request
from aipod.job.run import run_job, running
from aipod.job.times import outcome_of
from aipod.job.watched import KEEP_ANSWERED, Keep, Told
from aipod.job.whole import whole_payload
from aipod.metrics import Metrics
from aipod.results import INLINE
from aipod.service.place import Place
from aipod.service.recover import Ended, end, recover
from aipod.service.refusals import Refusals
from aipod.service.room import Room
from aipod.spool import ENDED, Entry, Look, Spool
from aipod.versions import Versions
from aipod.wire.ai import Op, Phase

log = logging.getLogger("aipod.job")

# Seconds that a newer connection waits for an older one to let go of an upload; a checkpoint takes a part of one.
TAKE_OVER = 10.0
# Times that a job's holder is asked to end it, half a tick apart.
_END_TRIES = 4
# Seconds between two looks at an entry that somebody is making.
_LOOK_AGAIN = 0.05


class Jobs:
    """Finds, creates, takes over, recovers, ends.

    The mutable state is the jobs that this process holds: each has a task in `nursery`, or an upload in its viewer's.
    """

    def __init__(
        self,
        config: Config,
        methods: Mapping[str, Any],
        spool: Spool,
        versions: Versions,
        make_queue: Callable[[str, str], Place],
        nursery: trio.Nursery,
        metrics: Metrics,
    ) -> None:
        self._metrics = metrics
        self._config = config
        self._methods = methods
        self._spool = spool
        self._versions = versions
        self._make_queue = make_queue
        # The server's: a job outlives the call that brought it.
        self._nursery = nursery
        self._keep = Keep(config.upload_ttl, config.grace, config.ttl)
        self.refusals = Refusals(spool, min(config.ttl, config.upload_ttl, KEEP_ANSWERED))
        self.room = Room(config)
        self.held = self.room.held
        self.changed = trio.Event()  # there is one job less in `held`
        self.draining = False

    # What a caller finds

    async def find(self, request: Request, stored: Callable[[], None], deadline: float = math.inf) -> Job | Told:
        """The job that a RUN or RESUME is about: with the caller as its uploader (`Job` RECEIVING), or to be watched.

        A new one that has come whole is run already, with the caller's `deadline`. `stored` is called as soon as the
        request's kwargs are in the job's entry: who waits for an older connection to let go of it needs no room for
        them. This is a trio-flavored async function. Raises `Refused`.
        """
        assert request.open is not None
        job_id, epoch = request.job_id, request.open.epoch
        self.refusals.check_spool(request.open)
        older_has_it = False
        with trio.move_on_after(TAKE_OVER):
            while True:
                fields, job = await self._read_or_begin(request, deadline)
                if job is not None:
                    return job
                if not fields:
                    await trio.sleep(_LOOK_AGAIN)
                    continue
                self.refusals.check_same(request, fields)
                stored()
                if fields.get("phase", "RECEIVING") != "RECEIVING":
                    self._metrics.resumed["watch"] += 1
                    return await self.attach(job_id)
                if self.draining:
                    raise Refusals.draining()
                with self.room.coming(job_id):
                    older = self.held.get(job_id)
                    if older is not None and older.epoch < epoch:
                        older.give_up_upload(epoch)
                    entry = await self._held(functools.partial(self._spool.take_over, job_id, epoch))
                older_has_it = entry is None
                if entry is not None:
                    job = await self._resume(entry, request)
                    if job is not None:
                        return job
                await trio.sleep(min(self._config.tick, 1.0) / 4)
        if older_has_it:
            raise Refused("BUSY", "an older connection has not yet let go of this upload; try again")
        raise Refused("BUSY", f"the server has not come to this job in {TAKE_OVER:g} s, its disk is slow; try again")

    async def attach(self, job_id: str) -> Job | Told:
        """The job, to be watched. This is a trio-flavored async function.

        Raises `Refused` (NOT_FOUND, DRAINING, OVERLOADED).
        """
        while True:
            if job_id in self.held:
                return self.held[job_id]
            look = self._spool.look(job_id)
            fields, live, free = await trio.to_thread.run_sync(self._read, look)
            if not fields:
                raise self.refusals.not_found()
            if free and job_id not in self.held:
                if self.draining:
                    raise self.refusals.kept()
                with self.room.coming(job_id):
                    await self.adopt(job_id)
                continue
            told = Told(look, self._spool.id, self._keep)
            told.learn(fields, live)
            if told.ended:
                told.over.set()
            return told

    async def check_owner(self, job_id: str, caller: Caller) -> None:
        """Raises `Refused` for another name's job (PERMISSION_DENIED), and for one that is not there: it may be
        another name's the next moment. This is a trio-flavored async function.
        """
        if caller.name:
            fields, _, _ = await trio.to_thread.run_sync(self._read, self._spool.look(job_id))
            if not fields:
                raise self.refusals.not_found()
            caller.check_owner(fields)

    async def follow(self, told: Told) -> None:
        """Keep `told` up to date until the job has ended or is somebody's to take. This is a trio-flavored function."""
        while not told.ended:
            await trio.sleep(self._config.tick)
            if told.phase != Phase.RECEIVING:  # an upload has its time, however many wait for its end
                await trio.to_thread.run_sync(told.look.watch)
            fields, live, free = await trio.to_thread.run_sync(self._read, told.look)
            if not fields or free or told.look.id in self.held:
                break
            told.learn(fields, live)
        told.over.set()
        told.notify()

    def _read(self, look: Look) -> tuple[dict[str, Any], dict[str, Any], bool]:
        """What the spool tells of a job: its journal, its progress, and whether there is work that nobody does."""
        with refused_when_exhausted():
            fields = look.read()
            phase = fields.get("phase")
            if phase in ("QUEUED", "RUNNING"):
                free = not self._spool.is_held(look.id)
                fields = look.read()  # again: it may have ended between the first look and the lock
                if fields.get("phase") not in ENDED:
                    return fields, look.live() | {"quiet": look.quiet()}, free and fields.get("phase") == phase
            if fields.get("phase") in ENDED:
                look.make_sure()  # its holder may not have synced it yet, and may have been killed before it did
            if not self._config.tracebacks:  # the server that ran it may have told them
                fields = {name: value for name, value in fields.items() if name != "trace"}
            return fields, {}, False

    # Beginning

    async def _read_or_begin(self, request: Request, deadline: float) -> tuple[dict[str, Any], Job | None]:
        """What the spool tells of the job; where there is none, nothing and the new one, or None where somebody else
        just made it.

        A RESUME never creates: it fences. This is a trio-flavored async function. Raises `Refused`.
        """
        assert request.open is not None
        job_id, look = request.job_id, self._spool.look(request.job_id)
        if request.open.op == Op.RESUME or self._why_not(request) is not None:
            fields, _, _ = await hands.do(self._read, look)
            if fields:
                return fields, None
            if (why := self._why_not(request)) is not None and request.open.op != Op.RESUME:
                raise why
            if await trio.to_thread.run_sync(self._spool.fence, job_id):
                raise self.refusals.not_started()
            return {}, None
        fields = {}
        payload, queue, begin = whole_payload(request), None, None
        if payload is not None:
            queue = self._make_queue(request.version, request.method)
            # Where an instance is free, one line for all that there is to be written before the run.
            if len(request.kwargs or b"") <= INLINE and (lease := queue.take()) is not None:
                begin = running(lease, 1)

        def claim() -> Entry | None:
            fields.update(self._read(look)[0])
            return None if fields else self._claim_now(request, payload=payload, begin=begin)

        try:
            entry = await self._claim(request, claim, whole=payload is not None)
            if entry is None:
                return fields, None
            job = self._take_in(self._job(request, entry))
            if queue is not None and payload is not None:
                job.times.arrived(len(payload), len(request.take_first().data))
                job.begun = begin is not None
                job.queue = queue.join()  # before anybody is told of its place
                job.enter(Phase.QUEUED)
                self.start(job, deadline, queue)
                queue = None  # the job's now
            return {}, job
        finally:
            if queue is not None:
                queue.give_back()

    def _why_not(self, request: Request) -> Refused | None:
        """Why no job can be begun for the request now."""
        if self.draining:
            return Refusals.draining()
        if request.kwargs is None:  # they are in the entry of the job that this call has watched
            return Refused("BUSY", "the job was removed while it was watched; try again")
        return self.room.why_not(request.job_id, request.version)

    async def _resume(self, entry: Entry, request: Request) -> Job | None:
        """Take the upload up where it is durable; None where it is complete by now."""
        job = self._take_in(self._job(request, entry))
        try:
            if await trio.to_thread.run_sync(entry.resume):
                self._metrics.resumed["upload"] += 1
                return job
        except BaseException:
            await self._let_go(job)
            raise
        await self._let_go(job)
        return None

    async def claim_plain(self, request: Request) -> Entry:
        """A new entry for a plain client's job. This is a trio-flavored async function. Raises `Refused`."""
        entry = await self._claim(request, functools.partial(self._claim_now, request))
        if entry is None:  # two random tickets are not the same: its lock is held, by a sweep that does not go on
            raise Refused("BUSY", "the server could not begin the job; try again")
        return entry

    def _claim_now(self, request: Request, **whole: Any) -> Entry | None:
        """A new entry, as `Spool.claim` makes it. Blocks. Raises `Refused`."""
        assert request.kwargs is not None, "a job is created once for a request"
        what = request.job_id, request.fields, request.kwargs
        return self._spool.claim(*what, size=request.size, **whole)

    async def _claim(self, request: Request, claim: Callable[[], Entry | None], *, whole: bool = False) -> Entry | None:
        with self.room.coming(request.job_id, request.version):
            # Cancelled meanwhile it goes: nobody was told. But of one that has come whole the next call may have been.
            entry = await (hands.do(claim) if whole else self._held(claim, Entry.destroy))
        if entry is not None:
            self._metrics.of_method(request.method).started += 1
        return entry

    async def leave_upload(self, job: Job) -> None:
        """End an upload that was cancelled, leave any other to whoever comes next.

        This is a trio-flavored async function; it cannot be cancelled. Raises `Refused` (SPOOL_FULL).
        """
        try:
            if not job.stop_asked:
                # Seconds on a busy disk. Who asks meanwhile for the end may have gone before they are over.
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(job.entry.stop_writing)
            if job.stop_asked:
                outcome = job.stopped()
                fields = {"phase": "CANCELLED", "reason": outcome.reason, "message": outcome.message}
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(job.entry.store, fields)
                job.end(outcome)
        finally:
            await self._let_go(job)

    async def _held(
        self, claim: Callable[[], Entry | None], undo: Callable[[Entry], None] = Entry.let_go
    ) -> Entry | None:
        """What `claim` gives; cancelled meanwhile, `undo` is called with it."""
        entry = await hands.do(claim)
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
        except BaseException:
            if entry is not None:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(undo, entry)
            raise
        return entry

    def _job(self, request: Request, entry: Entry, phase: Phase = Phase.RECEIVING) -> Job:
        return Job(request, entry, self._spool.id, self._keep, self._metrics, phase)

    def _take_in(self, job: Job) -> Job:
        self.held[job.entry.id] = job
        if self.draining:
            job.hand_over()  # the drain began while its entry was made
        return job

    async def _let_go(self, job: Job) -> None:
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(job.entry.let_go)
        finally:
            self._drop(job)

    def _drop(self, job: Job) -> None:
        if self.held.get(job.entry.id) is job:
            del self.held[job.entry.id]
            self.changed.set()
            self.changed = trio.Event()
        job.close()

    # Running

    def start(self, job: Job, deadline: float, queue: Place | None = None) -> None:
        """Run the job in a task of its own. `deadline`: the caller's, by trio's clock. `queue`: with what was taken."""
        options = self._methods[job.request.method]
        restartable = bool(options.get("restartable"))
        terms = Terms(self._config.tick, options["timeout"], deadline, restartable, self._config.tracebacks)
        queue = queue or self._make_queue(job.request.version, job.request.method)
        self.held[job.entry.id] = job
        self._nursery.start_soon(self._run, job, queue, terms)

    async def _run(self, job: Job, queue: Place, terms: Terms) -> None:
        try:
            await run_job(job, queue, self._versions, terms)
        finally:
            self._drop(job)
            if job.entry.has_rest:  # who waits for the outcome has it by now
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(job.entry.free)
        await settle_later(job, terms.tick)

    async def adopt(self, job_id: str, *, asked: bool = True) -> None:
        """Go on with a job whose process has died; harmless where another does. `asked`: there is a caller who waits.

        This is a trio-flavored async function.
        """
        entry = await self._held(functools.partial(self._spool.hold, job_id))
        if entry is None:
            await trio.sleep(min(self._config.tick, 1.0) / 4)  # the worker of a killed server is about to be ended
            return
        if job_id in self.held:
            # Its run has let go of it this moment, and is about to tell those who watch.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(entry.let_go)
            return
        found = None
        try:
            found = await trio.to_thread.run_sync(recover, entry, self._methods, asked)
        finally:
            if not isinstance(found, Request):  # or it has raised: the disk is full, say
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(entry.let_go)
        if not isinstance(found, Request):
            self._count(found)
            return
        self._metrics.resumed["job"] += 1
        job = self._job(found, entry, Phase.QUEUED)
        log.info("job %s %s@%s: taken over", job_id, found.method, found.version, extra=job.named)
        self.start(job, float("inf"))

    # Ending

    async def end(self, job_id: str, *, release: bool) -> Job | Told:
        """Cancel the job, or forget the answer of one that has ended. This is a trio-flavored async function.

        What it returns tells how the job is now: a run may take a while to stop. Raises `Refused` (NOT_FOUND).
        """
        with trio.move_on_after(TAKE_OVER):
            await self.room.arrival(job_id)  # the call that brings it was left this moment
        job = self.held.get(job_id)
        if job is not None and not job.ended and not job.over.is_set():
            job.stop("it was cancelled by its client")
            with trio.move_on_after(TAKE_OVER):
                while job.phase == Phase.RECEIVING and not job.over.is_set():
                    await job.changed.wait()
            if job.phase != Phase.RECEIVING:
                return job
            # The call that brought it was about to let go of it, and did not heed that any more.
        for _ in range(_END_TRIES):
            entry = await self._held(functools.partial(self._spool.hold, job_id))
            if entry is not None:
                try:
                    with trio.CancelScope(shield=True):
                        self._count(await trio.to_thread.run_sync(end, entry, release))
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(entry.let_go)
                break
            look = self._spool.look(job_id)
            fields = await trio.to_thread.run_sync(look.read)
            ended = fields.get("phase") in ENDED
            if not fields or (ended and not release):
                break
            if not ended:
                await trio.to_thread.run_sync(look.ask_to_stop)
            # Its holder may be letting go of it this moment, and not heed that any more.
            await trio.sleep(self._config.tick / 2)
        told = Told(self._spool.look(job_id), self._spool.id, self._keep)
        fields, live, _ = await trio.to_thread.run_sync(self._read, told.look)
        if not fields:
            raise self.refusals.not_found()
        told.learn(fields, live)
        return told

    def _count(self, ended: Ended | None) -> None:
        if ended is not None:
            self._metrics.of_method(ended.method).ended[outcome_of(ended.failure)] += 1

    # While it works

    async def heed(self) -> None:
        """Once a tick: do what other processes have asked of the jobs here. This is a trio-flavored function."""
        while True:
            await trio.sleep(self._config.tick)
            await self._heed_once()

    async def _heed_once(self) -> None:
        jobs = [job for job in self.held.values() if not job.request.plain and not job.over.is_set()]
        if jobs:
            words = await trio.to_thread.run_sync(lambda: [job.entry.words() for job in jobs])
            for job, word in zip(jobs, words, strict=True):
                job.heed(word, time.monotonic(), self._config.grace)
