"""A job from the complete payload to its outcome: the queue, the lease, the run, the store."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Generator, Iterator
from typing import Any

import trio

from aipod import alarm, hands
from aipod.codec import digest, new_hasher
from aipod.errors import JobFailed, Refused, job_failed, leaves
from aipod.job.end import (
    STORE_TRIES,
    End,
    GoingOn,
    Outcome,
    Terms,
    bug,
    is_worth_another,
    result_lost,
    store_later,
    waiting,
)
from aipod.job.job import Job
from aipod.job.queue import Lease, Queue
from aipod.job.upload import BULK
from aipod.job.watched import Answer
from aipod.results import Result
from aipod.runner import RunnerBroken, Task
from aipod.spool import Entry
from aipod.versions import Versions
from aipod.wire.ai import Phase

log = logging.getLogger("aipod.job")

# Workers that die between load and run, one after the other, before a job is given up: chance does not do that.
MAX_BROKEN = 3


async def run_job(job: Job, queue: Queue, versions: Versions, terms: Terms) -> None:
    """Queue the job, run it, store the outcome; then let go of it, or remove a plain client's once nobody wants it.

    This is a trio-flavored async function; it owns the job's entry and lives in the server's nursery, so that it
    outlives the call that brought the job. Cancelled: the method has ended when it returns. A ticketed job that has not
    started stays queued for the next process, one that has is interrupted.
    """
    outcome: Outcome | None = None  # told once it is stored: a kill before that may make it another one
    try:
        job.scope.deadline = terms.deadline
        async with trio.open_nursery() as nursery:
            begin = functools.partial(nursery.start_soon, _keep, job, terms.tick)
            keeper = alarm.at(trio.current_time() + terms.tick, begin)
            try:  # also while a method that was stopped takes its time to end
                with job.scope:
                    outcome = await _queue_and_run(job, queue, versions, terms)
            finally:
                keeper.cancel()
            if nursery.child_tasks:
                nursery.cancel_scope.cancel()
        # A cancel that comes when there is an answer is caught too: too late, what the run did stands.
        if outcome is None and not job.handed_over:
            outcome = job.stopped()
    except BaseException as exc:
        # Refused: the disk is full, or there is no descriptor left.
        known = [leaf for leaf in leaves(exc) if isinstance(leaf, JobFailed | Refused)]
        if known:
            outcome = job_failed(known[0].reason, known[0].message, known[0].metadata)
        elif isinstance(exc, Exception):
            log.error("job %s: a bug of aipod", job.request.job_id, exc_info=exc, extra=job.named)
            outcome = outcome or bug()
        else:
            if outcome is not None:
                raise  # too late, as above
            if job.started:
                outcome = job_failed("INTERRUPTED", "the server was shut down while the method ran")
            elif job.request.plain:
                outcome = job_failed("CANCELLED", "the server was shut down")
            else:
                job.hand_over()
            raise
    finally:
        end = End(job, outcome, terms, job.take_log(last=True))
        with GoingOn(job):
            await hands.finish(end.write, versions)
        outcome, job.handed_over = end.outcome, job.handed_over or end.again
        if end.published:
            queue.retire()
        if end.again:
            job.enter(Phase.QUEUED)
        if outcome is None:
            log.info("job %s %s@%s waits for the next server", *_who(job), extra=job.named)
        elif not end.why or job.request.plain:
            job.end(outcome, end.trace)
        try:
            if outcome is not None and not job.ended:
                with GoingOn(job):
                    outcome = await store_later(job, outcome, end.why, terms.tick)
                job.end(outcome, end.trace)
        finally:
            if not end.over:
                with trio.CancelScope(shield=True), GoingOn(job):
                    if not job.request.plain:
                        await trio.to_thread.run_sync(job.entry.let_go)
            job.close()
        if job.request.plain:
            try:
                await job.released.wait()
            finally:
                with trio.CancelScope(shield=True), GoingOn(job):
                    await trio.to_thread.run_sync(job.entry.destroy)


def running(lease: Lease, attempt: int) -> dict[str, Any]:
    """The line of the journal before a run."""
    return {"phase": "RUNNING", "worker": lease.lock_name, "attempt": attempt}


def _who(job: Job) -> tuple[str, str, str]:
    return job.request.job_id, job.request.method, job.request.version


async def _pause(job: Job, refused: Refused, tick: float) -> None:
    """Wait a tick for what `refused` tells of to pass: what was acknowledged is not lost for want of room.

    A plain client's job is refused, for the client comes again by itself. This is a trio-flavored async function.
    """
    if job.request.plain or refused.retry_after is None:
        raise refused
    with waiting(job, refused.message):
        await trio.sleep(tick)


async def _queue_and_run(job: Job, queue: Queue, versions: Versions, terms: Terms) -> Answer:
    request, entry = job.request, job.entry
    job.queue = queue
    while job.phase != Phase.QUEUED:
        try:
            # The size too: other processes tell it as the offset.
            await hands.do(entry.record, {"phase": "QUEUED", "offset": entry.written})
            job.enter(Phase.QUEUED)
        except Refused as exc:
            await _pause(job, exc, terms.tick)
    result = None
    broken = 0
    while result is None:
        try:
            async with queue.lease() as lease:
                if job.attempt:
                    # A run that was killed has left half a new version, a work directory, perhaps a result.
                    await trio.to_thread.run_sync(versions.discard, request.job_id)
                    await trio.to_thread.run_sync(entry.forget_run)
                kwargs = request.kwargs
                if kwargs is None:
                    kwargs = await trio.to_thread.run_sync(_long_kwargs, entry, limiter=BULK)
                if not job.begun:
                    # What is written is also true of `job`: no cancel comes between.
                    await hands.do(entry.record, running(lease, job.attempt + 1))
                job.begun = False
                job.enter(Phase.RUNNING)
                left = min(terms.deadline - trio.current_time(), terms.timeout or math.inf)
                task = Task(
                    job_id=request.job_id,
                    method=request.method,
                    version=request.version,
                    kwargs=kwargs,
                    metadata={**request.metadata, **job.times.trace.headers()},  # what it traces belongs to its run
                    payload=entry.payload,
                    work_dir=entry.work_name,
                    res=entry.result_name,
                    new_version=versions.fresh_name(request.job_id),
                    timeout=None if left == math.inf else left,
                    remark=job.remark,
                )
                try:
                    job.lease, job.times.worker = lease, lease.lock_name
                    result = await _run_in_time(lease, task, job, terms.timeout)
                except RunnerBroken:
                    # Its worker had died while idle; the method was not started.
                    broken += 1
                    job.unstart()
                    with trio.CancelScope(shield=True):
                        again = {"phase": "QUEUED", "attempt": job.attempt}
                        await trio.to_thread.run_sync(entry.record, again)
                    if broken >= MAX_BROKEN:
                        text = f"{broken} workers died before they could run the job"
                        raise job_failed("WORKER_CRASHED", text) from None
                except JobFailed as exc:
                    if exc.reason != "WORKER_CRASHED" or not await trio.to_thread.run_sync(
                        is_worth_another, job, terms, exc
                    ):
                        raise
                    text = "job %s: its worker died, its method is started once more: %s"
                    log.warning(text, request.job_id, exc.message, extra=job.named)
                    job.times.run_again()
                    job.enter(Phase.QUEUED)
                finally:
                    job.lease = None
        except Refused as exc:  # in line, or before its run: in a run a disk is the model's concern
            await _pause(job, exc, terms.tick)
    with result_lost():
        return await _measured(job, result, terms.tick)


async def _run_in_time(lease: Lease, task: Task, job: Job, timeout: float | None) -> Result:
    """Run the task, in `timeout` seconds where its method has declared so many. Raises `JobFailed`, as `Lease.run`."""
    if timeout is None:
        return await lease.run(task, job.report)
    with trio.move_on_after(timeout):
        return await lease.run(task, job.report)
    raise job_failed("DEADLINE_EXCEEDED", f"{task.method} ran longer than its timeout of {timeout:g} s")


def _long_kwargs(entry: Entry) -> bytes:
    """The kwargs that only the entry has: in memory from here to the end of the run, of as many jobs as run at once."""
    try:
        return entry.kwargs()
    except FileNotFoundError:
        raise job_failed("DAMAGED", "the server has lost the keyword arguments") from None


def cancellable(pieces: Generator[bytes, None, None]) -> Iterator[bytes]:
    """As `pieces`, in a thread of trio's: raises `Cancelled` between two of them once its caller is cancelled.

    Closes them then: an exception's traceback would keep their file open.
    """
    with contextlib.closing(pieces):
        for piece in pieces:
            trio.from_thread.check_cancelled()
            yield piece


async def _measured(job: Job, result: Result, tick: float) -> Answer:
    """The answer that the result is, once it can be read. This is a trio-flavored async function."""
    if result.inline is not None:
        return Answer(result.kind, result.inline, len(result.inline), digest(result.inline))
    for _ in range(STORE_TRIES):
        try:
            return await trio.to_thread.run_sync(_measure, job.entry, result, limiter=BULK)
        except Refused as exc:
            await _pause(job, exc, tick)
    return await trio.to_thread.run_sync(_measure, job.entry, result, limiter=BULK)


def _measure(entry: Entry, result: Result) -> Answer:
    """The answer that the file of a result is. Blocks, for hours if the model has made one of terabytes."""
    hasher, size = new_hasher(), 0
    for piece in cancellable(entry.read_result(0)):
        hasher.update(piece)
        size += len(piece)
    return Answer(result.kind, None, size, hasher.digest())


async def _keep(job: Job, tick: float) -> None:
    """Once a tick, at once too: what was logged and reported goes to disk, and the job becomes safe from power cuts."""
    while True:
        job.look_at_worker()
        await job.save_log()
        done = job.entry.settled and job.entry.report.is_noted(job.progress, job.message, job.heard)
        if not job.request.plain and not done:  # most ticks of most jobs: a thread has better things to do
            await trio.to_thread.run_sync(_note, job)
        await trio.sleep(tick)


def _note(job: Job) -> None:
    try:
        job.entry.settle()
    except (Refused, OSError) as exc:
        log.warning("job %s: it would not survive a power cut: %s", job.entry.id, exc, extra=job.named)
    job.entry.report.note(job.progress, job.message, job.heard)
