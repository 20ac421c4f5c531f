"""A job while a process works on it."""

from __future__ import annotations

import logging
import time
from typing import Any

import trio

from aipod.errors import JobFailed, job_failed
from aipod.job.queue import Lease, Queue
from aipod.job.request import Request
from aipod.job.times import Times, log_end
from aipod.job.watched import Answer, Keep, Watched, phase_of
from aipod.metrics import QUEUE, RUN, UPLOAD, Metrics
from aipod.runner.output import Excerpt
from aipod.spool import MAX_LOG, Entry, Words
from aipod.wire.ai import Phase

log = logging.getLogger("aipod.job")

STOPPED = "the worker process is stopped"

# Bytes of log between two writes to the entry.
MAX_PENDING_LOG = 1024 * 1024
# A log of this size is written on at the end of the run only: there is room for what came last, a stack for instance.
LONG_LOG = MAX_LOG - 2 * MAX_PENDING_LOG - 1024
LOG_IS_LONG = "[the log is long: of the rest, beginning and end are told when the run is over]\n"

# What a phase is called in metrics, logs and traces; those that come after are none.
PHASE_NAMES = {Phase.RECEIVING: UPLOAD, Phase.QUEUED: QUEUE, Phase.RUNNING: RUN}


class Job(Watched):
    """A job that this process works on: it holds the entry."""

    look: Entry

    def __init__(
        self,
        request: Request,
        entry: Entry,
        spool_id: str,
        keep: Keep | None = None,
        metrics: Metrics | None = None,
        phase: Phase = Phase.RECEIVING,
    ) -> None:
        super().__init__(entry, spool_id, keep or Keep())
        self.request = request
        self.entry = entry
        self.phase = phase
        self.times = Times(metrics or Metrics(), request, PHASE_NAMES[phase])
        self.epoch = request.open.epoch if request.open is not None else 0
        self.attempt = request.attempt
        self.queue: Queue | None = None
        self.begun = False  # its journal says already that it runs, and it is about to
        self.lease: Lease | None = None  # while the method runs
        self.heard = 0.0  # when the method was started, or has last said something; monotonic
        self._said = ""  # the model's message
        self._remark = ""  # the runner's
        self._is_stopped = False
        self.released = trio.Event()  # nobody wants the answer any more
        self.scope = trio.CancelScope()  # of the run: cancelled, the method is stopped
        self.upload = trio.CancelScope()
        self.superseded_by = 0  # the epoch of who has asked for the upload
        self.handed_over = False  # not ended here: whoever comes next goes on with it
        self.viewers = 0
        # What was read of the log last: from which byte on, how long it was then, and the piece. None for one viewer.
        self._piece: tuple[int, int, bytes] | None = None
        self._reading: trio.Event | None = None  # somebody does this moment
        self._log = Excerpt(MAX_PENDING_LOG)
        self._log_size = 0  # in the entry, as it was told last: an earlier process may have begun it
        self._log_is_long = False
        self._stopped_because: tuple[str, str] | None = None
        self._alone_since = time.monotonic()
        self._watched = 0

    @property
    def method(self) -> str:
        return self.request.method

    @property
    def durable(self) -> int:
        return self.entry.durable if self.phase == Phase.RECEIVING else self.entry.written

    @property
    def complete(self) -> bool:
        """Its payload is: what it waits for is the server, if only for room to write that down."""
        return self.queue is not None or self.phase != Phase.RECEIVING

    @property
    def place(self) -> int:
        return self.queue.place() if self.queue is not None and self.phase == Phase.QUEUED else 0

    @property
    def quiet(self) -> int:
        return int(time.monotonic() - self.heard)

    def enter(self, phase: Phase) -> None:
        """Go to `phase` and wake who watches."""
        self.phase = phase
        self.times.enter(PHASE_NAMES.get(phase, ""))
        if phase == Phase.RUNNING:
            self.attempt += 1
            self.heard = time.monotonic()
        self._remark, self._is_stopped = "", False
        self._set_message()
        self.notify()

    def end(self, outcome: Answer | JobFailed, trace: str = "") -> None:
        """It has its outcome: say so, to all who watch and in the log. `trace`: the model's, for the log alone."""
        if isinstance(outcome, Answer):
            self.answer = outcome
        else:
            self.error = outcome
        log_end(self, trace)
        self.times.trace.tag(runs=self.attempt, payload_size=self.entry.written)
        self.times.end(self.error)
        self.enter(phase_of(outcome))

    @property
    def named(self) -> dict[str, Any]:
        """Its fields in lines of the log that are about it."""
        return {"job": self.request.job_id}

    def unstart(self) -> None:
        """Back in line: the method was not started after all."""
        self.attempt -= 1
        self.enter(Phase.QUEUED)

    def report(self, progress: float | None, message: str | None, text: str | None) -> None:
        """What the method says; kept until the next tick."""
        self.heard = time.monotonic()
        if progress is not None:
            self.progress, self._said = progress, message or ""
            self._set_message()
        if text is not None:
            self._log.add(text)

    def remark(self, text: str) -> None:
        """What the runner says of the run."""
        log.info("job %s: %s", self.request.job_id, text, extra=self.named)
        self._remark = text
        self._set_message()
        self.notify()

    def look_at_worker(self) -> None:
        """Take note of whether what runs the method computes at all."""
        is_stopped = self.lease is not None and self.lease.stopped
        if is_stopped != self._is_stopped:
            self._is_stopped = is_stopped
            text = STOPPED if is_stopped else "its worker process goes on"
            log.warning("job %s: %s", self.request.job_id, text, extra=self.named)
            self._set_message()

    def _set_message(self) -> None:
        remarks = filter(None, (self._remark, STOPPED if self._is_stopped else ""))
        self.message = "; ".join(remarks) or self._said

    def take_log(self, *, last: bool = False) -> str:
        """What was logged since the last time, to be written. `last`: the run is over.

        Until then nothing is added to a log that is long.
        """
        if not self._log:
            return ""
        if last or self._log_size < LONG_LOG:
            return self._log.take()
        if self._log_is_long:
            return ""
        self._log_is_long = True
        return LOG_IS_LONG

    async def save_log(self) -> None:
        """Write what was logged since the last time. This is a trio-flavored async function."""
        if text := self.take_log():
            with trio.CancelScope(shield=True):  # cancelled on the way to the thread, the text would be lost
                self._log_size = await trio.to_thread.run_sync(self.entry.append_log, text)

    async def read_log(self, offset: int) -> bytes:
        """As for any, but read once for all viewers that have come as far: a thread for each takes 0.2 ms."""
        size = self.entry.log_size
        if size <= offset or self.viewers < 2:
            return await super().read_log(offset)
        is_new = False  # an empty piece is one that could not be read: the next beat may
        while (known := self._piece) is None or known[0] != offset or known[1] < size or not (known[2] or is_new):
            is_new = True
            if self._reading is not None:
                await self._reading.wait()
                continue
            self._reading = trio.Event()
            try:
                self._piece = offset, self.entry.log_size, await super().read_log(offset)
            finally:
                self._reading.set()
                self._reading = None
        return known[2]

    @property
    def started(self) -> bool:
        """True once the method may have run here."""
        return self.attempt > self.request.attempt

    def stop(self, why: str, reason: str = "CANCELLED") -> None:
        """Stop the job; who watches is told `why`. One that has ended keeps its outcome."""
        if self._stopped_because is None:
            self._stopped_because = reason, why
        self.upload.cancel()
        self.scope.cancel()

    @property
    def stop_asked(self) -> bool:
        return self._stopped_because is not None

    def stopped(self) -> JobFailed:
        """The outcome of a job that was stopped."""
        if self._stopped_because is None:  # by the scope's deadline
            return job_failed("DEADLINE_EXCEEDED", "not done within the call's timeout")
        return job_failed(*self._stopped_because)

    def give_up_upload(self, epoch: int) -> None:
        """A newer connection with `epoch` asks for the upload."""
        self.superseded_by = max(self.superseded_by, epoch)
        self.upload.cancel()

    def hand_over(self) -> None:
        """Stop to work on it without an outcome, unless its method has started: whoever comes next goes on with it."""
        if not self.started:
            self.handed_over = True
            self.upload.cancel()
            self.scope.cancel()

    def heed(self, words: Words, now: float, grace: float) -> None:
        """Do what others have asked for, and stop a job for which nobody has come back. `now`: monotonic."""
        if words.stop:
            self.stop("it was cancelled by its client")
        if self.phase == Phase.RECEIVING and words.wanted > self.epoch:
            self.give_up_upload(words.wanted)
        if self.viewers or words.watched != self._watched:
            self._watched, self._alone_since = words.watched, now
        elif self.complete and now - self._alone_since >= grace:
            self.stop(f"nobody came back for it for {grace:g} s")

    def leave(self) -> None:
        """One viewer less. The grace begins when the last one leaves."""
        self.viewers -= 1
        if self.viewers < 2:
            self._piece = None
        self._alone_since = time.monotonic()

    def close(self) -> None:
        """It says nothing new any more: it has ended, or nobody works on it here."""
        self.times.trace.end("LEFT")
        self.over.set()
        self.notify()

    def cancel(self) -> None:
        """Nobody wants the answer: stop the run, and let the entry go."""
        self.stop("the job was cancelled")
        self.released.set()
