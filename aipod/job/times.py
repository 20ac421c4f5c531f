"""When a job goes from phase to phase here, what of it comes over the wire, how it ends: counted, logged, traced."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aipod.errors import Interrupted, JobCancelled, JobFailed
from aipod.job.request import Request
from aipod.metrics import CANCELLED, DONE, DOWNLOAD, FAILED, INTERRUPTED, UPLOAD, Metrics, Moved
from aipod.tracing import Trace

if TYPE_CHECKING:
    from aipod.job.job import Job

log = logging.getLogger("aipod.job")


class Times:
    """One job in this process, from its upload or from where it was taken over. Changes in the trio thread only."""

    def __init__(self, metrics: Metrics, request: Request, phase: str) -> None:
        self._metrics = metrics
        self._counted = metrics.of_method(request.method)
        self.began = self._since = time.monotonic()
        self.phase = phase  # one of `metrics.PHASES`; "" when it is over
        known = {"job_id": request.job_id, "method": request.method, "version": request.version}
        self.trace = Trace(f"job {request.method}", request.metadata, **known)
        self.trace.enter(phase)
        self._took: dict[str, float] = {}
        self.up = Moved()  # of the payload, since then
        self.worker = ""  # who has run it last: the name of its lock in the spool; empty for the server's own process

    def enter(self, phase: str) -> None:
        """Leave the phase that the job is in; it is over where `phase` is empty."""
        now = time.monotonic()
        if self.phase:
            took = now - self._since
            self._took[self.phase] = self._took.get(self.phase, 0.0) + took
            self._counted.seconds[self.phase].observe(took)
        self.phase, self._since = phase, now
        self.trace.enter(phase)

    def arrived(self, data: int, wire: int) -> None:
        """Count bytes of the payload: new ones as they are, all as they were on the wire."""
        for moved in (self.up, self._metrics.up):
            moved.data += data
            moved.wire += wire

    def run_again(self) -> None:
        """Its method is started once more."""
        self._metrics.resumed["run"] += 1

    def end(self, failure: JobFailed | None) -> None:
        """It has its outcome."""
        self.enter("")
        self._counted.ended[outcome_of(failure)] += 1
        self.trace.end("" if failure is None else failure.reason)

    @property
    def took(self) -> dict[str, float]:
        """Seconds in each phase up to now."""
        open_ = {self.phase: self._took.get(self.phase, 0.0) + time.monotonic() - self._since} if self.phase else {}
        return self._took | open_


class Download:
    """One way of an answer to somebody who asks for it. The thread that reads it counts `read`, all else is trio's."""

    def __init__(self, metrics: Metrics, method: str, size: int, have: int = 0) -> None:
        """`have`: bytes that the caller has already."""
        self._down = metrics.down
        self._levels = metrics.levels
        self._seconds = metrics.of_method(method).seconds[DOWNLOAD]
        self._began = time.monotonic()
        self._told = 0
        self.read = 0
        if 0 < have < size:
            metrics.resumed["download"] += 1

    def sent(self, wire: int) -> None:
        """A message with so many bytes of the answer was sent."""
        read = self.read
        self._down.data += read - self._told
        self._down.wire += wire
        self._told = read

    def packed(self, chunks: Mapping[int | None, int]) -> None:
        """So many chunks of each zstd level were sent."""
        for level, count in chunks.items():
            self._levels[level] = self._levels.get(level, 0) + count

    def end(self) -> None:
        """All of it was."""
        self._seconds.observe(time.monotonic() - self._began)


def outcome_of(failure: JobFailed | None) -> str:
    """What metrics and logs call an outcome."""
    if failure is None:
        return DONE
    if isinstance(failure, JobCancelled):
        return CANCELLED
    return INTERRUPTED if isinstance(failure, Interrupted) else FAILED


def log_end(job: Job, trace: str) -> None:
    """The one line of a job that has ended: what it was, what became of it, and where its time has gone."""
    request, times, failure = job.request, job.times, job.error
    took, total = times.took, time.monotonic() - times.began
    told: dict[str, Any] = job.named | {"method": request.method, "version": request.version, "caller": request.owner}
    told |= {"outcome": outcome_of(failure), "attempts": job.attempt, "worker": times.worker}
    told |= {"seconds": round(total, 3)} | {f"{phase}_seconds": round(seconds, 3) for phase, seconds in took.items()}
    payload, answer = job.entry.written, job.answer.size if job.answer is not None else 0
    told |= {"payload_bytes": payload, "wire_bytes": times.up.wire, "answer_bytes": answer}
    told["ratio"] = round(times.up.data / times.up.wire, 2) if times.up.wire else None
    where = ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in took.items())
    attempts = f"; {job.attempt} attempts" if job.attempt > 1 else ""
    where = f"({where}; {payload} bytes up, {answer} down{attempts})"
    head = "job %s %s@%s "
    who = request.job_id, request.method, request.version
    if failure is None:
        log.info(f"{head}done in %.3f s %s", *who, total, where, extra=told)
        return
    kind = failure.metadata.get("type", "")
    text = f"{kind}: {failure.message}" if kind else failure.message
    # How an upload ends is its client's doing.
    quiet = failure.reason == "CANCELLED" or times.phase == UPLOAD
    told |= {"reason": failure.reason, "type": kind, "trace": trace}
    log.log(
        logging.INFO if quiet else logging.WARNING,
        f"{head}ended in %.3f s %s: %s: %s%s",
        *(*who, total, where, failure.reason, text, f"\n{trace}" if trace else ""),
        extra=told,
    )
