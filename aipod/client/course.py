"""What is asked for, and what is known so far of the job that does it: all that outlives a connection."""

from __future__ import annotations

import codecs
import dataclasses
import enum
import math
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from grpclib.metadata import Deadline

from aipod.client.event import Event, OnEvent, Rate
from aipod.client.failure import ELSEWHERE, Known, Local
from aipod.client.flow import Flow, Pour
from aipod.client.part import Part
from aipod.client.sink import Sink
from aipod.client.source import Source
from aipod.client.ticket import Saved, TicketFile
from aipod.codec import job_id
from aipod.tracing import Trace
from aipod.wire.ai import Op, Phase, State

# What the phase of an event is called in a trace; those that end a job have no span.
_SPANS = {
    "CONNECTING": "connect",
    "WAITING": "wait",
    "RECEIVING": "upload",
    "QUEUED": "queue",
    "RUNNING": "run",
    "DONE": "download",
}


class Until(enum.Enum):
    """When a job is followed far enough."""

    ANSWER = "its answer is here"
    TAKEN = "its request is complete at the server"
    END = "it has ended"


class CallDeadline(Deadline):
    """When the caller's time is up. Above ten seconds it counts whole ones, which is what grpclib sends.

    Rounded up: grpclib cuts them off, and the server would end a call up to a second before its time.
    """

    def time_remaining(self) -> float:
        left = super().time_remaining()
        return math.ceil(left) if left > 10 else left


@dataclasses.dataclass
class Request:
    """What is asked for; the same for every attempt."""

    rpc: str
    metadata: Sequence[tuple[str, str]] = ()
    kwargs: bytes = b""  # zstd(JSON)
    version: str = ""
    source: Source | None = None  # None: only watch
    until: Until = Until.ANSWER
    deadline: Deadline | None = None
    save_to: str | os.PathLike[str] | None = None
    on_event: OnEvent | None = None
    pour: Pour | None = None  # takes the answer's chunks, which then are kept nowhere
    taken: Callable[[], Awaitable[None]] | None = None  # waits until the events so far were consumed
    goes_on: bool = False  # a later process may ask for the same answer: what was saved of it is left to that one
    durable: bool = False  # what is saved shall be on the disk: the ticket file, the only other way to it, goes then
    fingerprint: str = ""  # what the ticket file compares
    trace: Trace | None = None

    @property
    def upstream(self) -> str:
        """Which servers it goes to: those behind one name share what is known of them."""
        return next((value for name, value in self.metadata if name == "x-upstream"), "")


def lead_to(job_id: str, misses: int) -> list[tuple[str, str]]:
    """The headers by which a proxy chooses among servers with a spool each.

    A job whose own server was down when it began is at another one, and stays there when its own is back. So a job that
    was missed is asked for elsewhere, by a number that goes into the proxy's choice, and at its own in turns.
    """
    return [("x-job-id", job_id), *([("x-job-missed", str(misses))] if misses % 2 else [])]


def elsewhere(misses: int) -> int:
    """The next number of misses that leads to another server than the job's own."""
    return misses + 1 + misses % 2


@dataclasses.dataclass
class Course:
    """One job as its client knows it. A job that is run anew has a new one."""

    ticket: bytes = dataclasses.field(default_factory=lambda: secrets.token_bytes(16))
    op: Op = Op.RUN  # RUN until `last` goes out, RESUME from then on
    file: TicketFile | None = None
    found: bool = False  # another process has begun it
    epoch: int = 0
    sent_to: str | None = None  # the spool that `last` was, or is this moment, sent to
    sent_at: float = 0.0  # seconds since 1970 when it was sent for the first time
    sent_clock: float | None = None  # the same by this process's clock, which nobody sets
    payload: str = ""  # digest of what was sent, where its bytes are to be compared
    unchecked: bool = False  # another process has sent that, and they were not yet
    fresh: bool = True  # no request has gone out under this ticket, so nothing can be durable
    relearn: bool = False  # the spool that was thought of was the wrong one
    phase: Phase = Phase.NONE  # the furthest that was told
    answered: bool = False  # a state has come
    offset: int = 0  # durable bytes of the payload
    log_have: int = 0
    part: Part | None = None  # of the answer, until `sink` has it
    sink: Sink | Flow | None = None
    may_outbid: bool = False
    damaged: int = 0
    spool: str = ""  # the one that spoke last
    misses: int = 0  # times that it was asked for where it is not
    searched: int = 0  # of them, times elsewhere before anybody had told of it
    # The latest event; most callers listen to none.
    told: dict[str, Any] = dataclasses.field(default_factory=lambda: {"phase": "CONNECTING", "heartbeats": 0})
    _rate: Rate = dataclasses.field(default_factory=Rate)
    _log: codecs.IncrementalDecoder = dataclasses.field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    @classmethod
    def of_file(cls, file: TicketFile, saved: Saved) -> Course:
        """Continue what another process has begun."""
        return cls(
            saved.ticket,
            Op.RUN if saved.sent is None else Op.RESUME,
            file,
            True,
            saved.epoch,
            None if saved.sent is None else saved.spool,
            saved.sent or 0.0,
            payload=saved.payload,
            unchecked=saved.sent is not None and saved.payload != "",
            fresh=False,
            may_outbid=True,
        )

    @property
    def id(self) -> str:
        """The job's public name."""
        return job_id(self.ticket)

    @property
    def headers(self) -> list[tuple[str, str]]:
        """What leads a call to the job."""
        return lead_to(self.id, self.misses)

    @property
    def where(self) -> str:
        """The spool that it is in, or may be; empty where nobody has it."""
        return self.sent_to or self.spool

    @property
    def have(self) -> int:
        """Bytes of the answer that are here."""
        if self.sink is not None:
            return self.sink.received
        return 0 if self.part is None else self.part.size

    @property
    def step(self) -> tuple[Phase, int, int]:
        """What grows with progress."""
        return self.phase, self.offset, self.have

    def known(self, target: str, op: Op, *, receiving: bool) -> Known:
        """What the table of failures wants to know after an attempt with `op`."""
        ago = time.time() - self.sent_at
        if self.sent_clock is not None and ago >= 0:
            ago = max(ago, time.monotonic() - self.sent_clock)
        left = ELSEWHERE - self.searched
        phase, spool = self.phase, self.where
        return Known(target, op, self.sent_to, ago, phase, self.may_outbid, self.damaged, left, spool, receiving)

    def next_epoch(self) -> int:
        self.epoch = max(self.epoch + 1, time.time_ns() // 1000)
        return self.epoch

    def sent(self, spool: str) -> None:
        """`last` is about to go out to `spool`: from now on the job is never created again under this ticket."""
        self.sent_to, self.op = spool, Op.RESUME
        self.sent_at, self.sent_clock = time.time(), time.monotonic()

    def not_sent(self) -> None:
        """It did not arrive."""
        self.sent_to, self.op, self.sent_clock = None, Op.RUN, None

    def saw(self, state: State) -> None:
        """Take note of a state."""
        self.answered = True
        self.may_outbid = False  # from now on whoever takes the job over is newer
        self.spool = state.spool or self.spool
        self.phase = max(self.phase, Phase(state.phase))
        self.offset = max(self.offset, state.offset)

    def tell(self, request: Request, **changes: Any) -> None:
        """Let the caller know. Raises `Local` for what the caller's function raises."""
        self.told |= {"log": "", **changes}
        if self.told["phase"] == "DONE" and not self.told.get("received"):
            self.told["ratio"] = 0.0  # what the upload had is none of the answer's
        if request.trace is not None:
            request.trace.enter(_SPANS.get(self.told["phase"], ""))
        if request.on_event is not None:
            told = self.told
            done = told.get("received", 0) if told["phase"] == "DONE" else max(told.get("sent") or 0, self.offset)
            rate = self._rate.note(told["phase"], done, time.monotonic())
            try:
                request.on_event(Event(**told, rate=rate))
            except Exception as exc:
                raise Local(exc) from exc

    def new_log(self, state: State) -> str:
        """The text in `state` that was not seen before."""
        known = max(0, self.log_have - state.log_offset)
        new = state.log[known:]
        if new:
            self.log_have = state.log_offset + known + len(new)
        return self._log.decode(new)

    def saved(self, request: Request) -> Saved:
        """What belongs into the ticket file."""
        sent = None if self.sent_to is None else self.sent_at
        return Saved(self.ticket, self.epoch, self.sent_to or "", sent, request.fingerprint, self.payload)

    def save(self, request: Request) -> None:
        """Bring the ticket file up to date, where there is one. Blocks."""
        if self.file is not None:
            self.file.save(self.saved(request))

    def forget_file(self) -> None:
        """Remove the ticket file, where there is one.

        Not in a thread: a caller cancelled meanwhile would have neither the answer nor the way to it, and the same call
        would run the method once more.
        """
        if self.file is not None:
            self.file.remove(self.ticket)

    def new_part(self, request: Request) -> Part | None:
        """Where an earlier process may have saved some of the answer; None where nobody can have, or it is here."""
        if request.save_to is None or not request.goes_on or self.part is not None or self.sink is not None:
            return None
        self.part = Part(Path(request.save_to), self.id)
        return self.part

    def leave(self) -> None:
        """What was received is of no more use to this process, perhaps to a later one. Blocks."""
        if self.sink is not None:
            self.sink.leave()
        elif self.part is not None:
            self.part.leave()
        self.sink = self.part = None

    def discard(self) -> None:
        """Drop what was received. Blocks."""
        if self.sink is not None:
            self.sink.discard()
        elif self.part is not None:
            self.part.remove()
        self.sink = self.part = None
