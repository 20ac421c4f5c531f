"""A job from the complete payload to its outcome: the queue, the lease, the run, the store."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import trio

from aipod.codec import digest, new_hasher
from aipod.errors import JobFailed, Refused, job_failed, leaves
from aipod.job.request import Request
from aipod.results import Result
from aipod.runner import Report, RunnerBroken, Task
from aipod.spool import Entry
from aipod.versions import Versions
from aipod.wire.ai import Error, Phase, State

log = logging.getLogger("aipod.job")

LOG_PIECE = 64 * 1024  # of the job's log per heartbeat
# Workers that die between load and run, one after the other, before a job is given up: chance does not do that.
MAX_BROKEN = 3
# Log text between two writes to the entry; a worker's own bound is lower, this one is for methods on the loop.
MAX_PENDING_LOG = 1024 * 1024

CONTENT_TYPES = {"json": "application/json", "bytes": "application/octet-stream", "file": "application/octet-stream"}


class Lease(Protocol):
    """What `run_job` needs of `pool.Lease`."""

    @property
    def lock_name(self) -> str: ...

    async def run(self, task: Task, report: Report) -> Result: ...


class Queue(Protocol):
    """A place in line for an instance: given by `service`, so that a job knows no pool."""

    def place(self) -> int: ...

    def lease(self) -> AbstractAsyncContextManager[Lease]: ...

    def retire(self) -> None:
        """The version's data has changed: instances that loaded the former data end."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A stored result."""

    kind: str
    inline: bytes | None
    size: int
    digest: bytes


class Job:
    """What is known of a job while a process works on it. Changes in the trio thread only; `changed` tells viewers."""

    def __init__(self, request: Request, entry: Entry, spool_id: str) -> None:
        self.request = request
        self.entry = entry
        self.phase = Phase.RECEIVING
        self.answer: Answer | None = None
        self.error: JobFailed | None = None
        self.progress = 0.0
        self.message = ""
        self.queue: Queue | None = None
        self.changed = trio.Event()
        self.ended = trio.Event()
        self.released = trio.Event()  # nobody wants the answer any more
        self.scope = trio.CancelScope()  # of the run: cancelled, the method is stopped
        self._spool_id = spool_id
        self._pending_log: list[str] = []
        self._pending_size = 0
        self._attempt = 0
        self._stopped_because = "the job was cancelled"
        self.began = time.monotonic()

    def enter(self, phase: Phase) -> None:
        """Go to `phase` and wake who watches."""
        self.phase = phase
        if phase == Phase.RUNNING:
            self._attempt += 1
        self.changed.set()
        self.changed = trio.Event()

    def unstart(self) -> None:
        """Back in line: the method was not started after all."""
        self._attempt -= 1
        self.enter(Phase.QUEUED)

    def report(self, progress: float | None, message: str | None, text: str | None) -> None:
        """What the method says; kept until the next tick."""
        if progress is not None:
            self.progress, self.message = progress, message or ""
        if text is not None and self._pending_size < MAX_PENDING_LOG:
            self._pending_size += len(text)
            self._pending_log.append(text if text.endswith("\n") else text + "\n")
            if self._pending_size >= MAX_PENDING_LOG:
                self._pending_log.append("[lines were dropped]\n")

    async def save_log(self) -> None:
        """Write what was logged since the last time. This is a trio-flavored async function."""
        if self._pending_log:
            text, self._pending_log, self._pending_size = "".join(self._pending_log), [], 0
            with trio.CancelScope(shield=True):  # cancelled on the way to the thread, the text would be lost
                await trio.to_thread.run_sync(self.entry.append_log, text)

    def state(self) -> State:
        """The job as its own client sees it."""
        state = State(
            phase=self.phase,
            offset=self.entry.durable,
            spool=self._spool_id,
            progress=self.progress,
            message=self.message,
            attempt=self._attempt,
            place=self.queue.place() if self.queue is not None and self.phase == Phase.QUEUED else 0,
            epoch=self.request.open.epoch if self.request.open else 0,
        )
        if self.answer is not None:
            state.size, state.digest = self.answer.size, self.answer.digest
            state.content_type = CONTENT_TYPES[self.answer.kind]
        if self.error is not None:
            kind = self.error.metadata.get("type", "")
            state.error = Error(type=kind, message=self.error.message, reason=self.error.reason)
        return state

    @property
    def started(self) -> bool:
        """True once the method may have run."""
        return self._attempt > 0

    def stop(self, why: str) -> None:
        """Stop the run; who watches is told `why`. A job that has ended keeps its outcome."""
        if not self.scope.cancel_called:
            self._stopped_because = why
            self.scope.cancel()

    def stopped(self) -> JobFailed:
        """The outcome of a job that was stopped."""
        return job_failed("CANCELLED", self._stopped_because)

    def cancel(self) -> None:
        """Nobody wants the answer: stop the run, and let the entry go."""
        self.scope.cancel()
        self.released.set()


async def run_job(
    job: Job, queue: Queue, versions: Versions, tick: float, timeout: float | None, deadline: float
) -> None:
    """Queue the job, run it, store the outcome, and keep the entry until nobody wants it.

    `timeout`: seconds that the method declared for one run. `deadline`: the caller's, by trio's clock.

    This is a trio-flavored async function; it owns the job's entry and lives in the server's nursery, so that it can
    outlive the call that brought the job. Cancelled: the method has ended and the entry is gone when it returns.
    """
    try:
        with job.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_keep_log, job, tick)
                await _queue_and_run(job, queue, versions, timeout, deadline)
                nursery.cancel_scope.cancel()
        # A cancel that comes while the answer is stored is caught too: too late, what the run did stands.
        if job.scope.cancelled_caught and job.answer is None:
            _fail(job, job.stopped())
    except BaseException as exc:
        # Refused: the disk is full, or there is no descriptor left.
        known = [leaf for leaf in leaves(exc) if isinstance(leaf, JobFailed | Refused)]
        if known:
            _fail(job, job_failed(known[0].reason, known[0].message, known[0].metadata))
        elif isinstance(exc, Exception):
            log.error("job %s: a bug of aipod", job.request.job_id, exc_info=exc)
            _fail(job, job_failed("INTERNAL", "an internal error; the server's log says more"))
        else:
            _fail(job, job_failed("CANCELLED", "the server is shutting down"))
            raise
    finally:
        with trio.CancelScope(shield=True):
            with _going_on(job):
                await trio.to_thread.run_sync(versions.discard, job.request.job_id)
            with _going_on(job):
                await job.save_log()
            with _going_on(job):
                if job.error is not None:
                    await trio.to_thread.run_sync(_store_failure, job.entry, job.phase, job.error)
        _log_end(job)
        job.ended.set()
        try:
            await job.released.wait()
        finally:
            with trio.CancelScope(shield=True), _going_on(job):
                await trio.to_thread.run_sync(job.entry.destroy)


@contextlib.contextmanager
def _going_on(job: Job) -> Iterator[None]:
    """Whatever a step of a job's end raises is logged, and the next step follows: one job must not end the server."""
    try:
        yield
    except Exception as exc:
        log.error("job %s: a step of its end failed", job.request.job_id, exc_info=exc)


async def _queue_and_run(job: Job, queue: Queue, versions: Versions, timeout: float | None, deadline: float) -> None:
    request, entry = job.request, job.entry
    task = Task(
        job_id=request.job_id,
        method=request.method,
        version=request.version,
        kwargs=request.kwargs,
        metadata=request.metadata,
        payload=entry.payload,
        work_dir=entry.work,
        res=entry.result,
        new_version=versions.fresh(request.job_id),
        timeout=None,
    )
    job.queue = queue
    await trio.to_thread.run_sync(entry.record, {"phase": "QUEUED"})
    job.enter(Phase.QUEUED)
    result = None
    broken = 0
    while result is None:
        async with queue.lease() as lease:
            await trio.to_thread.run_sync(entry.record, {"phase": "RUNNING", "worker": lease.lock_name})
            job.enter(Phase.RUNNING)
            left = min(deadline - trio.current_time(), timeout or math.inf)
            timed = dataclasses.replace(task, timeout=None if left == math.inf else left)
            try:
                with trio.move_on_after(timeout or math.inf) as patience:
                    result = await lease.run(timed, job.report)
            except RunnerBroken:
                # Its worker had died while idle; the method was not started.
                broken += 1
                job.unstart()
                if broken == MAX_BROKEN:
                    raise job_failed("WORKER_CRASHED", f"{broken} workers died before they could run the job") from None
            if patience.cancelled_caught:
                raise job_failed("DEADLINE_EXCEEDED", f"{request.method} ran longer than its timeout of {timeout:g} s")
    with _result_lost():
        answer = await trio.to_thread.run_sync(_measure, entry, result)
        # From here on a cancel must not undo what the run did.
        with trio.CancelScope(shield=True):
            if await trio.to_thread.run_sync(versions.publish, request.job_id, request.version):
                queue.retire()
            await trio.to_thread.run_sync(_store, entry, answer)
            job.answer = answer
    job.enter(Phase.DONE)


@contextlib.contextmanager
def _result_lost() -> Iterator[None]:
    """Errors of the disk after the run. Not under their own reasons, which may say that trying again is safe."""
    try:
        yield
    except (Refused, OSError) as exc:
        why = exc.message if isinstance(exc, Refused) else exc.strerror or exc
        raise job_failed("RESULT_NOT_STORED", f"the method has run, its result is lost: {why}") from exc


def cancellable(pieces: Generator[bytes, None, None]) -> Iterator[bytes]:
    """As `pieces`, in a thread of trio's: raises `Cancelled` between two of them once its caller is cancelled.

    Closes them then: an exception's traceback would keep their file open.
    """
    with contextlib.closing(pieces):
        for piece in pieces:
            trio.from_thread.check_cancelled()
            yield piece


def _measure(entry: Entry, result: Result) -> Answer:
    """The answer that the result is. Blocks, for hours if the model has made a file of terabytes."""
    if result.inline is not None:
        return Answer(result.kind, result.inline, len(result.inline), digest(result.inline))
    hasher, size = new_hasher(), 0
    for piece in cancellable(entry.read_result(0)):
        hasher.update(piece)
        size += len(piece)
    return Answer(result.kind, None, size, hasher.digest())


def _store(entry: Entry, answer: Answer) -> None:
    """Write the answer down. Blocks."""
    entry.drop_payload()
    fields: dict[str, Any] = {"phase": "DONE", "kind": answer.kind, "size": answer.size, "digest": answer.digest.hex()}
    if answer.inline is not None:
        fields["inline"] = answer.inline.decode("latin-1")
    entry.record(fields)


async def _keep_log(job: Job, tick: float) -> None:
    while True:
        await trio.sleep(tick)
        await job.save_log()


def _store_failure(entry: Entry, phase: Phase, error: JobFailed) -> None:
    """Write down why there is no answer. Blocks."""
    try:
        entry.record({"phase": phase.name, "reason": error.reason, "message": error.message})
    except (Refused, OSError) as exc:
        log.warning("job %s: its outcome could not be stored: %s", entry.id, exc)


def _fail(job: Job, error: JobFailed) -> None:
    job.error = error
    job.enter(Phase.CANCELLED if error.reason in ("CANCELLED", "DEADLINE_EXCEEDED") else Phase.FAILED)


def _log_end(job: Job) -> None:
    took = time.monotonic() - job.began
    request = job.request
    if job.error is None:
        log.info("job %s %s@%s done in %.3f s", request.job_id, request.method, request.version, took)
        return
    level = logging.INFO if job.error.reason == "CANCELLED" else logging.WARNING
    trace = job.error.metadata.get("trace", "")
    log.log(
        level,
        "job %s %s@%s ended in %.3f s: %s: %s%s",
        *(request.job_id, request.method, request.version, took, job.error.reason, job.error.message),
        f"\n{trace}" if trace else "",
    )
