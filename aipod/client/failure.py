"""What went wrong with a call, as one of aipod's exceptions; the decisions of the retry policy, without I/O."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl

from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from aipod.errors import DOMAIN, AipodError, ConnectionLost, JobFailed, Refused, Unreachable, leaves, outcome
from aipod.wire.ai import State

# What a lost connection looks like once a proxy has put it into words; also the statuses that the first version's
# retry policy named.
_LOST = (Status.INTERNAL, Status.UNAVAILABLE, Status.UNKNOWN)


class NoAnswer(Exception):
    """The call ended with status OK, or the server fell silent, without an outcome."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """`retry_after`: seconds to wait at least before the same request may be tried again; None: it must not be."""

    error: AipodError
    retry_after: float | None


def explain(exc: BaseException, *, committed: bool) -> Failure | None:
    """What `exc` means; None where it is not ours to explain.

    `committed`: the request was complete, so the method may have run.
    """
    for leaf in leaves(exc):
        if isinstance(leaf, AipodError):
            return Failure(leaf, None)
        if isinstance(leaf, GRPCError):
            return _from_status(leaf, committed)
        if isinstance(
            leaf, OSError | StreamTerminatedError | ProtocolError | NoAnswer | ssl.SSLError | asyncio.TimeoutError
        ):
            return _lost(str(leaf) or "no connection in time", committed)
    return None


def _lost(text: str, committed: bool) -> Failure:
    if committed:
        return Failure(ConnectionLost(f"the connection was lost, the method may have run: {text}"), None)
    return Failure(Unreachable(f"no lasting connection: {text}"), 0.0)


def _from_status(exc: GRPCError, committed: bool) -> Failure:
    details = exc.details if isinstance(exc.details, list) else []
    info = next((d for d in details if isinstance(d, ErrorInfo) and d.domain == DOMAIN), None)
    delay = next((d.retry_delay.seconds + d.retry_delay.nanos / 1e9 for d in details if isinstance(d, RetryInfo)), None)
    text = exc.message or exc.status.name
    if info is not None:
        # RetryInfo: the server says that nothing was done.
        return Failure(Refused(info.reason, text, dict(info.metadata)), delay)
    if exc.status in _LOST:
        return _lost(f"{exc.status.name}: {text}", committed)
    return Failure(Refused(exc.status.name, text), delay)


def of_state(state: State) -> JobFailed:
    """The exception for a terminal state without a result."""
    error = state.error
    if error is None:
        return outcome("INTERNAL", f"the job ended as {state.phase.name} without saying why")
    return outcome(error.reason or "INTERNAL", error.message, {"type": error.type} if error.type else {})
