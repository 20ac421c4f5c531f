"""A job from the complete payload to its outcome: the queue, the lease, the run, the store."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Generator, Iterator
from typing import Any

import trio

from aipod.codec import digest, new_hasher
from aipod.errors import TOLD, JobFailed, Refused, job_failed, leaves
from aipod.job.job import Job
from aipod.job.queue import Queue
from aipod.job.upload import BULK
from aipod.job.watched import Answer, phase_of
from aipod.results import Result
from aipod.runner import RunnerBroken, Task
from aipod.spool import MAX_ATTEMPTS, Entry
from aipod.versions import Versions
from aipod.wire.ai import Phase

log = logging.getLogger("aipod.job")

# Ticks for which an outcome that the disk does not take is tried again, and nobody is told of it.
STORE_TRIES = 600
# Ticks for which it is tried again to make a long answer survive a power cut.
SETTLE_TRIES = 10
# Workers that die between load and run, one after the other, before a job is given up: chance does not do that.
MAX_BROKEN = 3


@dataclasses.dataclass(frozen=True)
class Terms:
    """How a job is run. `timeout`: seconds that the method declared for one run. `deadline`: the caller's, by trio's
    clock. `restartable`: the method may be started once more after a kill."""

    tick: float
    timeout: float | None = None
    deadline: float = math.inf
    restartable: bool = False
    tracebacks: bool = False  # who asks for the outcome is told the model's traceback


Outcome = Answer | JobFailed


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
            nursery.start_soon(_keep, job, terms.tick)  # also while a method that was stopped takes its time to end
            with job.scope:
                outcome = await _queue_and_run(job, queue, versions, terms)
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
            outcome = outcome or _bug()
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
        with trio.CancelScope(shield=True):
            end = End(job, outcome, terms, job.take_log(last=True))
            with _going_on(job):
                await trio.to_thread.run_sync(end.write, versions)
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
                with _going_on(job):
                    outcome = await _store_later(job, outcome, end.why, terms.tick)
                job.end(outcome, end.trace)
        finally:
            if not end.over:
                with trio.CancelScope(shield=True), _going_on(job):
                    if not job.request.plain:
                        await trio.to_thread.run_sync(job.entry.let_go)
            job.close()
        if job.request.plain:
            try:
                await job.released.wait()
            finally:
                with trio.CancelScope(shield=True), _going_on(job):
                    await trio.to_thread.run_sync(job.entry.destroy)


class End:
    """The end of a run, written down in one go: a thread for each step would take longer than all of them.

    `write` is called once, in a thread; what it has done stands in the attributes.
    """

    def __init__(self, job: Job, outcome: Outcome | None, terms: Terms, log_text: str) -> None:
        self._job = job
        self._terms = terms
        self._log_text = log_text
        self.outcome = outcome  # what is to be told; None: the job waits for the next server
        self.why = "it could not be written down" if outcome is not None else ""  # why `outcome` is not stored
        self.trace = ""  # the model's, for the log
        self.published = False  # the version has other data now
        self.again = False  # the method may be started once more, by the next server
        self.over = False  # the entry was let go of

    def write(self, versions: Versions) -> None:
        """Publish what the run made or forget it, save the log, store the outcome, let go of the entry. Blocks.

        Whatever a step raises is logged, and the next one follows.
        """
        job, entry = self._job, self._job.entry
        with _going_on(job):
            self._publish(versions)
        with _going_on(job):
            # Before: who reads the outcome in another process reads the log a last time.
            if self._log_text:
                entry.append_log(self._log_text)
        with _going_on(job):
            if isinstance(self.outcome, JobFailed) and _is_worth_another(job, self._terms, self.outcome):
                self.outcome, self.again, self.why = None, True, ""
                entry.record({"phase": "QUEUED"})
        with _going_on(job):
            if job.handed_over or self.again:
                _note_hand_over(entry)
        if isinstance(self.outcome, JobFailed):
            self.trace = self.outcome.metadata.get("trace", "")
            if not self._terms.tracebacks:
                self.outcome.metadata.pop("trace", None)
        with _going_on(job):
            if self.outcome is not None:
                self.outcome, self.why = _store(job, self.outcome)
        if not self.why and not job.request.plain:
            with _going_on(job):
                entry.let_go()
                self.over = True

    def _publish(self, versions: Versions) -> None:
        job = self._job
        try:
            if isinstance(self.outcome, Answer):
                with _result_lost():
                    self.published = versions.publish(job.request.job_id, job.request.version)
        except JobFailed as exc:
            self.outcome = exc
        except Exception:
            self.outcome = _bug()
            raise
        finally:
            if not self.published:
                versions.discard(job.request.job_id)


def _bug() -> JobFailed:
    return job_failed("INTERNAL", "an internal error; the server's log says more")


def _who(job: Job) -> tuple[str, str, str]:
    return job.request.job_id, job.request.method, job.request.version


@contextlib.contextmanager
def _waiting(job: Job, why: str) -> Iterator[None]:
    """Have who watches told what the job waits for."""
    message, job.message = job.message, f"waiting: {why.partition(';')[0]}"  # not the advice to come again
    job.notify()
    try:
        yield
    finally:
        job.message = message


async def _pause(job: Job, refused: Refused, tick: float) -> None:
    """Wait a tick for what `refused` tells of to pass: what was acknowledged is not lost for want of room.

    A plain client's job is refused, for the client comes again by itself. This is a trio-flavored async function.
    """
    if job.request.plain or refused.retry_after is None:
        raise refused
    with _waiting(job, refused.message):
        await trio.sleep(tick)


def _note_hand_over(entry: Entry) -> None:
    """Who takes the job up next need not fear that it is what ends its server. Blocks."""
    if entry.read().get("adopted"):
        entry.record({"adopted": 0})


async def settle_later(job: Job, tick: float) -> None:
    """Make a long answer that came before the job's first tick, and was told at once, survive a power cut.

    This is a trio-flavored async function. The entry was let go of; one that was released meanwhile is left alone.
    """
    if job.request.plain or job.answer is None or job.answer.inline is not None or job.entry.settled:
        return
    for _ in range(SETTLE_TRIES):
        await trio.sleep(tick)
        if await trio.to_thread.run_sync(_settle_answer, job, limiter=BULK):
            return


def _settle_answer(job: Job) -> bool:
    try:
        return job.entry.settle_answer()
    except Exception as exc:
        log.warning("job %s: its answer would not survive a power cut: %s", job.entry.id, exc, extra=job.named)
        return False


@contextlib.contextmanager
def _going_on(job: Job) -> Iterator[None]:
    """Whatever a step of a job's end raises is logged, and the next step follows: one job must not end the server."""
    try:
        yield
    except Exception as exc:
        log.error("job %s: a step of its end failed", job.request.job_id, exc_info=exc, extra=job.named)


async def _queue_and_run(job: Job, queue: Queue, versions: Versions, terms: Terms) -> Answer:
    request, entry, timeout = job.request, job.entry, terms.timeout
    task = Task(
        job_id=request.job_id,
        method=request.method,
        version=request.version,
        kwargs=b"",
        metadata=request.metadata,
        payload=entry.payload,
        work_dir=entry.work,
        res=entry.result,
        new_version=versions.fresh(request.job_id),
        timeout=None,
        remark=job.remark,
    )
    job.queue = queue
    while job.phase != Phase.QUEUED:
        try:
            # The size too: other processes tell it as the offset.
            await trio.to_thread.run_sync(entry.record, {"phase": "QUEUED", "offset": entry.written})
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
                with trio.CancelScope(shield=True):  # what is written is also true of `job`
                    step = {"phase": "RUNNING", "worker": lease.lock_name, "attempt": job.attempt + 1}
                    await trio.to_thread.run_sync(entry.record, step)
                    job.enter(Phase.RUNNING)
                left = min(terms.deadline - trio.current_time(), timeout or math.inf)
                timed = dataclasses.replace(
                    task,
                    kwargs=kwargs,
                    metadata={
                        **request.metadata,
                        **job.times.trace.headers(),
                    },  # what the method traces belongs to its run
                    timeout=None if left == math.inf else left,
                )
                try:
                    job.lease, job.times.worker = lease, lease.lock_name
                    with trio.move_on_after(timeout or math.inf) as patience:
                        result = await lease.run(timed, job.report)
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
                        _is_worth_another, job, terms, exc
                    ):
                        raise
                    text = "job %s: its worker died, its method is started once more: %s"
                    log.warning(text, request.job_id, exc.message, extra=job.named)
                    job.times.run_again()
                    job.enter(Phase.QUEUED)
                finally:
                    job.lease = None
                if patience.cancelled_caught:
                    text = f"{request.method} ran longer than its timeout of {timeout:g} s"
                    raise job_failed("DEADLINE_EXCEEDED", text)
        except Refused as exc:  # in line, or before its run: in a run a disk is the model's concern
            await _pause(job, exc, terms.tick)
    with _result_lost():
        return await _measured(job, result, terms.tick)


def _long_kwargs(entry: Entry) -> bytes:
    """The kwargs that only the entry has: in memory from here to the end of the run, of as many jobs as run at once."""
    try:
        return entry.kwargs()
    except FileNotFoundError:
        raise job_failed("DAMAGED", "the server has lost the keyword arguments") from None


@contextlib.contextmanager
def _result_lost() -> Iterator[None]:
    """Errors of the disk after the run. Not under their own reasons, which may say that trying again is safe."""
    try:
        yield
    except (Refused, OSError) as exc:
        raise _not_stored(_why(exc)) from exc


def _why(exc: Refused | OSError) -> str:
    return exc.message if isinstance(exc, Refused) else exc.strerror or str(exc)


def _not_stored(why: str) -> JobFailed:
    return job_failed("RESULT_NOT_STORED", f"the method has run, its result is lost: {why}")


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


def _is_worth_another(job: Job, terms: Terms, failure: JobFailed) -> bool:
    """Whether the run was interrupted, and its method may be started once more, on what it was started on before.

    Blocks.
    """
    interrupted = job.started and failure.reason in ("INTERRUPTED", "WORKER_CRASHED")
    may = interrupted and terms.restartable and not job.request.plain and job.attempt < MAX_ATTEMPTS
    return may and job.entry.payload.exists()  # it may have made room for the result


async def _keep(job: Job, tick: float) -> None:
    """Once a tick: what was logged and reported goes to disk; at the first, the job becomes safe from power cuts."""
    while True:
        await trio.sleep(tick)
        job.look_at_worker()
        await job.save_log()
        done = job.entry.settled and job.entry.is_noted(job.progress, job.message, job.heard)
        if not job.request.plain and not done:  # most ticks of most jobs: a thread has better things to do
            await trio.to_thread.run_sync(_note, job)


def _note(job: Job) -> None:
    try:
        job.entry.settle()
    except (Refused, OSError) as exc:
        log.warning("job %s: it would not survive a power cut: %s", job.entry.id, exc, extra=job.named)
    job.entry.note_progress(job.progress, job.message, job.heard)


async def _store_later(job: Job, outcome: Outcome, why: str, tick: float) -> Outcome:
    """What could not be written down may be later, and is told then. What there is to be told.

    This is a trio-flavored async function. Cancelled: nobody is told, and the next server calls the run interrupted.
    """
    name, stored = job.entry.id, False
    log.warning("job %s: its outcome could not be stored: %s", name, why, extra=job.named)
    try:
        for _ in range(STORE_TRIES):
            with _waiting(job, why):
                await trio.sleep(tick)
                outcome, why = await trio.to_thread.run_sync(_store, job, outcome)
            if not why:
                stored = not await trio.to_thread.run_sync(_cannot_be_written_to, job.entry)
                return outcome
        if isinstance(outcome, Answer):
            outcome, why = await trio.to_thread.run_sync(_store, job, _not_stored(why))
            stored = not why
        return outcome
    finally:
        if stored:
            log.warning("job %s: its outcome is stored now", name, extra=job.named)
        else:
            text = "job %s: its outcome is given up; from now on nobody is told how it ended"
            log.warning(text, name, extra=job.named)


def _store(job: Job, outcome: Outcome) -> tuple[Outcome, str]:
    """Write the outcome down. The one that is to be told, and why that is not stored, which may pass; "" where nothing
    more can be done. Blocks.
    """
    try:
        job.entry.store(_fields_of(outcome))
    except (Refused, OSError) as exc:
        passes = isinstance(exc, Refused) and exc.retry_after is not None and not job.request.plain
        if isinstance(outcome, Answer) and not passes:
            return _store(job, _not_stored(_why(exc)))
        return outcome, "" if _cannot_be_written_to(job.entry) else _why(exc)
    return outcome, ""


def _fields_of(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, Answer):
        return outcome.fields
    fields = {"phase": phase_of(outcome).name, "reason": outcome.reason, "message": outcome.message}
    return fields | {name: outcome.metadata[name] for name in TOLD if name in outcome.metadata}


def _cannot_be_written_to(entry: Entry) -> bool:
    """Whether a model has removed its own job, or put something else where its journal was."""
    try:
        return not entry.read()
    except Refused:
        return True
    except OSError:
        return False
