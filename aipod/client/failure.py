"""What went wrong with a call, as one of aipod's exceptions; the decisions of the retry policy, without I/O."""

from __future__ import annotations

import dataclasses

from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from aipod.errors import DOMAIN, AipodError, JobFailed, JobLost, Refused, Unreachable, job_failed, leaves
from aipod.transport.codec import BadMessage
from aipod.transport.stream import StreamRefused
from aipod.wire.ai import State

# What a lost connection looks like once a proxy has put it into words; also the statuses that the first version's
# retry policy named.
_LOST = (Status.INTERNAL, Status.UNAVAILABLE, Status.UNKNOWN)
# Reasons with which a job may have been taken on before it ended.
_ENDED = ("CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL")


class NoAnswer(Exception):
    """The call ended with status OK, or the server fell silent, without an outcome."""


class Local(Exception):
    """Carries an exception of the caller's own (payload, callback, file to save to) past the network's."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@dataclasses.dataclass(frozen=True)
class Failure:
    """`retry_after`: seconds to wait at least before the same request may be tried again; None: it must not be."""

    error: Exception
    retry_after: float | None
    cause: BaseException | None = None


def explain(exc: BaseException, *, target: str, committed: bool) -> Failure | None:
    """What `exc` means; None where it is not ours to explain.

    `committed`: the request was complete, so the method may have run.
    """
    for leaf in leaves(exc):
        failure = _explain(leaf, target, committed)
        if failure is not None:
            return failure
    return None


def _explain(exc: BaseException, target: str, committed: bool) -> Failure | None:
    if isinstance(exc, Local):
        return Failure(exc.error, None, exc.error.__cause__)
    if isinstance(exc, AipodError):
        return Failure(exc, None, exc.__cause__)
    if isinstance(exc, StreamRefused):
        return _lost(exc, target, committed=False)
    if isinstance(exc, GRPCError) and not isinstance(exc, BadMessage):
        return _from_status(exc, target, committed)
    # OSError: also TimeoutError and ssl.SSLError; GRPCError: what arrived cannot be read.
    if isinstance(exc, OSError | StreamTerminatedError | ProtocolError | NoAnswer | GRPCError):
        return _lost(exc, target, committed)
    return None


def _lost(exc: BaseException, target: str, committed: bool) -> Failure:
    text = str(exc) or "no answer in time"
    if isinstance(exc, GRPCError):
        text = f"{exc.status.name}: {exc.message}"
    if committed:
        error = JobLost(f"the connection to {target} was lost, the method may have run: {text}")
        return Failure(error, None, exc)
    return Failure(Unreachable(f"no lasting connection to {target}: {text}"), 0.0, exc)


def _from_status(exc: GRPCError, target: str, committed: bool) -> Failure:
    details = exc.details if isinstance(exc.details, list) else []
    info = next((d for d in details if isinstance(d, ErrorInfo) and d.domain == DOMAIN), None)
    delay = next((d.retry_delay.seconds + d.retry_delay.nanos / 1e9 for d in details if isinstance(d, RetryInfo)), None)
    text = exc.message or exc.status.name
    if info is not None and info.reason in _ENDED:
        return Failure(job_failed(info.reason, text, dict(info.metadata)), None, exc)
    if info is not None:
        # RetryInfo: the server says that nothing was done.
        return Failure(Refused(info.reason, text, dict(info.metadata)), delay, exc)
    if exc.status in _LOST:
        return _lost(exc, target, committed)
    return Failure(Refused(exc.status.name, text), delay, exc)


def of_state(state: State) -> JobFailed:
    """The exception for a terminal state without a result."""
    error = state.error
    if error is None:
        return job_failed("INTERNAL", f"the job ended as {state.phase.name} without saying why")
    return job_failed(error.reason or "INTERNAL", error.message, {"type": error.type} if error.type else {})
