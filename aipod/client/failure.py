"""What went wrong with one attempt, and what follows from it: the table of the retry policy, without I/O.

certificate that cannot be verified, no TLS where there should be, before any word of the job  stop
connection lost, silence, status OK without an outcome, INTERNAL, UNAVAILABLE, UNKNOWN, CANCELLED or
DEADLINE_EXCEEDED without our details (a proxy's words for a lost connection)          connect again
OFFSET_MISMATCH, UPLOAD_STALLED, TRUNCATED                                             connect again
anything with RetryInfo (BUSY, DRAINING, SPOOL_FULL, OVERLOADED)                       connect again, later
DRAINING of a job that is nowhere yet             connect again, elsewhere, until `reconnect`
BAD_CHUNK, an answer that arrived damaged                                              connect again, once
WRONG_SPOOL where nothing was to be created elsewhere                                  run at once, without a spool
WRONG_SPOOL of a job that was there, NOT_FOUND of one in another spool: its own server is away
                                                                                       connect again
NOT_FOUND of a job that was there                                                      connect again, 60 s long
NOT_FOUND of a job of which nobody has told yet                                        ask elsewhere, so many times
NOT_STARTED                                                                            run anew: see `_anew`
SUPERSEDED                                                                             stop, or outbid once
every other refusal (SPOOL_FULL of what never fits, say), every stored outcome         stop
"""

from __future__ import annotations

import dataclasses
import enum

from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from aipod.codec import spool_name
from aipod.errors import DOMAIN, TOLD, AipodError, JobFailed, JobLost, Refused, Unreachable, job_failed, leaves
from aipod.transport.channel import why_unconnected
from aipod.transport.codec import BadMessage
from aipod.transport.stream import StreamRefused
from aipod.transport.tls import Disagreement
from aipod.wire.ai import Op, Phase, State

# Seconds for which a job is looked for that the servers who answer do not have, though nobody of another spool may.
OUT_OF_SIGHT = 60.0
# Times that a job of which nobody has told yet is asked for elsewhere than at its own server. Each leads to one of n
# servers by chance: of two the right one is missed once in 2**32 searches, of five once in 1200, of ten once in 29. A
# ticket that is nobody's costs as many round trips more.
ELSEWHERE = 32

# What a lost connection looks like once a proxy has put it into words; also the statuses that the first version's
# retry policy named.
_LOST = (Status.INTERNAL, Status.UNAVAILABLE, Status.UNKNOWN, Status.CANCELLED, Status.DEADLINE_EXCEEDED)
# Reasons that say nothing against the request itself.
_TRANSIENT = ("OFFSET_MISMATCH", "UPLOAD_STALLED", "TRUNCATED")
# Reasons with which a job may have been taken on before it ended.
_ENDED = ("CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "INTERRUPTED", "RELEASED")
# Of an epoch: it is a number of 64 bits, and so must be the next one.
_DIGITS = 19


class NoAnswer(Exception):
    """The call ended with status OK, or the server fell silent, without an outcome."""


class BadAnswer(Exception):
    """What arrived is not the answer that was stored."""


class Local(Exception):
    """Carries an exception of the caller's own (payload, callback, file to save to) past the network's."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class Action(enum.Enum):
    """What follows from a failed attempt."""

    STOP = "raise the error"
    RETRY = "connect again, while there is patience"
    ELSEWHERE = "ask for it elsewhere at once: another server may have had to take the job"
    RELEARN = "run again at once: the server has another spool than was thought, and has created nothing"
    ANEW = "run under a new ticket: nothing has run under this one, and nothing ever will"
    OUTBID = "ask again with a higher epoch"


@dataclasses.dataclass(frozen=True)
class Known:
    """What the client knows about a job when an attempt has failed."""

    target: str
    op: Op = Op.RUN
    sent_to: str | None = None  # the spool that `last` was sent to, in this attempt or an earlier one
    sent_ago: float = 0.0  # seconds since then
    phase: Phase = Phase.NONE  # the furthest that was told
    may_outbid: bool = False  # this process has just taken the job over from another one's file
    damaged: int = 0  # times that a chunk arrived damaged, before this attempt
    elsewhere: int = 0  # times that it may still be asked for elsewhere
    spool: str = ""  # the one that the job is in
    receiving: bool = False  # the last word in this attempt was that the payload is not complete: nothing has run


@dataclasses.dataclass(frozen=True)
class Decision:
    """What follows. `error` is what to raise where it is STOP, or where patience is at its end."""

    action: Action
    error: Exception
    cause: BaseException | None = None
    retry_after: float = 0.0  # seconds to wait at least
    within: float | None = None  # seconds for which RETRY makes sense, whatever patience there is
    missed: bool = False  # the job is not where it was asked for
    untouched: bool = False  # the server has done nothing for this attempt
    draining: bool = False  # the server does not create the job, for it drains: another one may, or the next one
    damaged: bool = False
    spool: str = ""  # the server's own
    epoch: int = 0  # the one that won

    @property
    def why(self) -> str:
        """What went wrong, in short: for who watches while it is tried again."""
        if self.cause is None or isinstance(self.cause, BadAnswer):
            return str(self.error)
        looking = ""
        if self.missed:
            long = "until its own server is back" if self.within is None else f"{self.within:g} s long"
            looking = f"; it may be elsewhere, and is looked for {long}"
        return _short(self.cause) + looking


def decide(exc: BaseException, known: Known) -> Decision | None:
    """What follows from `exc`; None where it is not ours to explain."""
    for leaf in leaves(exc):
        decision = _decide(leaf, known)
        if decision is not None:
            return decision
    return None


def _decide(exc: BaseException, known: Known) -> Decision | None:
    if isinstance(exc, Local):
        return Decision(Action.STOP, exc.error, exc.error.__cause__)
    if isinstance(exc, BadAnswer):
        error = AipodError("BAD_ANSWER", f"the answer arrived damaged: {exc}; call again")
        return Decision(Action.STOP if known.damaged else Action.RETRY, error, exc, damaged=True)
    if isinstance(exc, AipodError):
        return Decision(Action.STOP, exc, exc.__cause__)
    if isinstance(exc, StreamRefused):
        return dataclasses.replace(_lost(exc, known), untouched=True)
    if isinstance(exc, GRPCError) and not isinstance(exc, BadMessage):
        return _of_status(exc, known)
    # Not of a job that is known somewhere: its server's certificate may have expired, and be renewed.
    if isinstance(exc, Disagreement) and known.sent_to is None and known.phase == Phase.NONE:
        return dataclasses.replace(_lost(exc, known), action=Action.STOP)
    # OSError: also TimeoutError and ssl.SSLError; GRPCError: what arrived cannot be read.
    if isinstance(exc, OSError | StreamTerminatedError | ProtocolError | NoAnswer | GRPCError):
        return _lost(exc, known)
    return None


def _lost(exc: BaseException, known: Known) -> Decision:
    return Decision(Action.RETRY, gone(known, _short(exc)), exc)


def _short(exc: BaseException) -> str:
    if isinstance(exc, GRPCError):
        info = _info(exc)  # its reason says more: SPOOL_FULL, and not RESOURCE_EXHAUSTED
        name = exc.status.name if info is None else info.reason
        return f"{name}: {exc.message}" if exc.message else name
    return why_unconnected(exc) or "no answer in time"


def _info(exc: GRPCError) -> ErrorInfo | None:
    """aipod's own details; None where a proxy, or another server, has said it."""
    details = exc.details if isinstance(exc.details, list) else []
    return next((d for d in details if isinstance(d, ErrorInfo) and d.domain == DOMAIN), None)


def gone(known: Known, text: str) -> JobLost | Unreachable:
    """The error for a job that is given up, because of `text`."""
    if known.sent_to is None and known.op != Op.ATTACH:
        return Unreachable(f"no lasting connection to {known.target}: {text}")
    if known.op == Op.ATTACH and known.phase == Phase.NONE:
        return JobLost(
            f"no lasting connection to {known.target}: {text}; nothing is known of the job. Where it is, it goes on, "
            "and its ticket finds it there"
        )
    return _lost_job(f"the connection to {known.target} was lost and the job was not found again", text)


def _not_there(known: Known, text: str) -> JobLost | Unreachable:
    """The error for a job that the server which answers does not have."""
    if known.sent_to is None and known.op != Op.ATTACH:
        return gone(known, text)
    return _lost_job(f"{known.target} answers, but the job is not found there", text)


def _lost_job(what: str, text: str) -> JobLost:
    return JobLost(
        f"{what}; it may have run: {text}. Its ticket, or its ticket file, may still find it, at the server that has "
        "it; a call without them is a new job: the method may run twice"
    )


def _of_status(exc: GRPCError, known: Known) -> Decision:
    info = _info(exc)
    details = exc.details if isinstance(exc.details, list) else []
    delay = next((d.retry_delay.seconds + d.retry_delay.nanos / 1e9 for d in details if isinstance(d, RetryInfo)), None)
    text = exc.message or exc.status.name
    if info is not None:
        return _of_reason(info.reason, text, dict(info.metadata), delay, exc, known)
    if exc.status in _LOST:
        return _lost(exc, known)
    error: Exception = Refused(exc.status.name, text)
    if known.sent_to is not None:
        error = gone(known, f"{exc.status.name}: {text}")
    if delay is not None:
        return Decision(Action.RETRY, error, exc, retry_after=delay)
    return Decision(Action.STOP, error, exc)


def _of_reason(
    reason: str, text: str, metadata: dict[str, str], delay: float | None, exc: GRPCError, known: Known
) -> Decision:
    # Who pauses an upload for want of disk has not all of it; other reasons may come when it has.
    paused = reason == "SPOOL_FULL" and (known.receiving or (known.sent_to is None and known.op != Op.ATTACH))
    if paused:
        text += "; the method has not run"
    refused = Refused(reason, text, metadata)
    spool = metadata.get("spool", "")
    ttl = float(metadata["ttl"]) if metadata.get("ttl", "").isdecimal() else 0.0
    if reason == "WRONG_SPOOL" and known.op == Op.RUN:
        return Decision(Action.RELEARN, refused, exc, untouched=True, spool=spool)
    if reason == "NOT_FOUND" and known.op == Op.ATTACH and known.phase == Phase.NONE:
        return Decision(Action.ELSEWHERE if known.elsewhere else Action.STOP, refused, exc)
    if reason in ("WRONG_SPOOL", "NOT_FOUND"):
        # Behind a proxy a server that is away looks like this, and the job is as safe as where nothing answers.
        away = reason == "WRONG_SPOOL" or (spool and known.spool and spool_name(spool) != spool_name(known.spool))
        return Decision(Action.RETRY, _not_there(known, text), exc, within=None if away else OUT_OF_SIGHT, missed=True)
    if reason == "NOT_STARTED":
        if not _anew(spool, ttl, known):
            return Decision(Action.STOP, _not_there(known, text), exc)
        never = Unreachable(f"no lasting connection to {known.target}: the job was lost before it started")
        return Decision(Action.ANEW, never, exc, spool=spool)
    if reason == "SUPERSEDED":
        epoch = metadata.get("epoch", "")
        if known.may_outbid and epoch.isdecimal() and len(epoch) <= _DIGITS:
            return Decision(Action.OUTBID, refused, exc, epoch=int(epoch))
        return Decision(Action.STOP, refused, exc)
    if reason == "BAD_CHUNK":
        return Decision(Action.STOP if known.damaged else Action.RETRY, refused, exc, damaged=True)
    if reason in _TRANSIENT:
        return Decision(Action.RETRY, gone(known, text), exc, retry_after=delay or 0.0)
    if delay is not None:
        # RetryInfo: the server says that nothing was done now. What it did before is another matter.
        if known.op == Op.RUN and "kept" not in metadata:
            draining = reason == "DRAINING"
            return Decision(Action.RETRY, refused, exc, retry_after=delay, untouched=True, draining=draining)
        error = refused if paused or known.sent_to is None else gone(known, text)
        return Decision(Action.RETRY, error, exc, retry_after=delay)
    if reason in _ENDED:
        return Decision(Action.STOP, job_failed(reason, text, metadata), exc)
    return Decision(Action.STOP, refused, exc)


def _anew(spool: str, ttl: float, known: Known) -> bool:
    """Whether NOT_STARTED means that the method has not run.

    The server remembers every job for the `ttl` that it tells, but for those of the last second before a power cut: so
    not where its machine, which the end of the spool's id tells, was started again.
    """
    boot = spool.rpartition("-")[2]
    return (
        known.op == Op.RESUME
        and known.phase <= Phase.RECEIVING
        and known.sent_to is not None
        and bool(boot)
        and boot == known.sent_to.rpartition("-")[2]
        and 0 <= known.sent_ago < ttl
    )


def of_state(state: State) -> JobFailed:
    """The exception for a terminal state without a result."""
    error = state.error
    if state.phase == Phase.RELEASED:
        return job_failed("RELEASED", error.message if error else "the answer was released: it was had by somebody")
    if error is None:
        reason = "CANCELLED" if state.phase == Phase.CANCELLED else "INTERNAL"
        return job_failed(reason, f"the job ended as {state.phase.name} without saying why")
    told = {name: value for name in TOLD if (value := getattr(error, name))}
    return job_failed(error.reason or "INTERNAL", error.message, told)
