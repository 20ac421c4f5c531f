"""How a job's run ends: what becomes of its outcome, also where the disk does not take it at once."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator
from typing import Any

import trio

from aipod.errors import TOLD, JobFailed, Refused, job_failed
from aipod.job.job import Job
from aipod.job.upload import BULK
from aipod.job.watched import Answer, phase_of
from aipod.spool import MAX_ATTEMPTS, Entry
from aipod.versions import Versions

log = logging.getLogger("aipod.job")

# Ticks for which an outcome that the disk does not take is tried again, and nobody is told of it.
STORE_TRIES = 600
# Ticks for which it is tried again to make a long answer survive a power cut.
SETTLE_TRIES = 10


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
        job, entry, going_on = self._job, self._job.entry, GoingOn(self._job)
        with going_on:
            self._publish(versions)
        with going_on:
            # Before: who reads the outcome in another process reads the log a last time.
            if self._log_text:
                entry.append_log(self._log_text)
        with going_on:
            if isinstance(self.outcome, JobFailed) and is_worth_another(job, self._terms, self.outcome):
                self.outcome, self.again, self.why = None, True, ""
                entry.record({"phase": "QUEUED"})
        with going_on:
            if self.outcome is None and job.begun:
                entry.record({"phase": "QUEUED", "attempt": job.attempt})  # it was not started after all
        with going_on:
            if job.handed_over or self.again:
                _note_hand_over(entry)
        if isinstance(self.outcome, JobFailed):
            self.trace = self.outcome.metadata.get("trace", "")
            if not self._terms.tracebacks:
                self.outcome.metadata.pop("trace", None)
        with going_on:
            if self.outcome is not None:
                self.outcome, self.why = _store(job, self.outcome)
        if not self.why and not job.request.plain:
            with going_on:
                entry.let_go(free=False)
                self.over = True

    def _publish(self, versions: Versions) -> None:
        job = self._job
        try:
            if isinstance(self.outcome, Answer):
                with result_lost():
                    self.published = versions.publish(job.request.job_id, job.request.version)
        except JobFailed as exc:
            self.outcome = exc
        except Exception:
            self.outcome = bug()
            raise
        finally:
            if not self.published:
                versions.discard(job.request.job_id)


def bug() -> JobFailed:
    return job_failed("INTERNAL", "an internal error; the server's log says more")


@contextlib.contextmanager
def waiting(job: Job, why: str) -> Iterator[None]:
    """Have who watches told what the job waits for."""
    message, job.message = job.message, f"waiting: {why.partition(';')[0]}"  # not the advice to come again
    job.notify()
    try:
        yield
    finally:
        job.message = message


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


class GoingOn:
    """Whatever a step of a job's end raises is logged, and the next step follows: one job must not end the server."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> bool:
        if not isinstance(exc, Exception):
            return False
        job = self._job
        log.error("job %s: a step of its end failed", job.request.job_id, exc_info=exc, extra=job.named)
        return True


@contextlib.contextmanager
def result_lost() -> Iterator[None]:
    """Errors of the disk after the run. Not under their own reasons, which may say that trying again is safe."""
    try:
        yield
    except (Refused, OSError) as exc:
        raise _not_stored(_why(exc)) from exc


def _why(exc: Refused | OSError) -> str:
    return exc.message if isinstance(exc, Refused) else exc.strerror or str(exc)


def _not_stored(why: str) -> JobFailed:
    return job_failed("RESULT_NOT_STORED", f"the method has run, its result is lost: {why}")


def is_worth_another(job: Job, terms: Terms, failure: JobFailed) -> bool:
    """Whether the run was interrupted, and its method may be started once more, on what it was started on before.

    Blocks.
    """
    interrupted = job.started and failure.reason in ("INTERRUPTED", "WORKER_CRASHED")
    may = interrupted and terms.restartable and not job.request.plain and job.attempt < MAX_ATTEMPTS
    return may and job.entry.payload.exists()  # it may have made room for the result


async def store_later(job: Job, outcome: Outcome, why: str, tick: float) -> Outcome:
    """What could not be written down may be later, and is told then. What there is to be told.

    This is a trio-flavored async function. Cancelled: nobody is told, and the next server calls the run interrupted.
    """
    name, stored = job.entry.id, False
    log.warning("job %s: its outcome could not be stored: %s", name, why, extra=job.named)
    try:
        for _ in range(STORE_TRIES):
            with waiting(job, why):
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
