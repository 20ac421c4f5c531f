"""Every failure that crosses the wire: one table, one exception tree, the same classes on both sides.

    AipodError                   has .reason (UPPER_SNAKE) and .metadata
      UsageError                 the caller's mistake, found before anything was sent
      Refused                    the server said no; this call did not run the method
      JobFailed                  the job ended without a result; the method may have run
        ModelError               the model raised
        JobCancelled             it was cancelled, or its time was up
        Interrupted              its server or worker was killed while the method ran, or its outcome not stored
      Unreachable                no connection, or none that lasted, before the request was complete
      JobLost                    out of sight after the request was complete: the method may have run
      ServeError                 a server cannot start, or has ended by itself: for whoever starts it, never on the wire

The server raises `Refused` and `JobFailed` with a reason from `TABLE`; `service` turns them into a gRPC status with a
google.rpc.ErrorInfo, and the client turns that back. Error model: https://google.aip.dev/193
"""

from __future__ import annotations

import contextlib
import enum
import errno
from collections.abc import Iterator, Mapping
from typing import NamedTuple

DOMAIN = "aipod"
# In an error's metadata: its reason usually passes, but not here.
NEVER = "never"


class Code(enum.IntEnum):
    """gRPC status codes: https://grpc.github.io/grpc/core/md_doc_statuscodes.html"""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Row(NamedTuple):
    """What a reason means to gRPC. `retry_after`: seconds for google.rpc.RetryInfo, None where a retry cannot help."""

    code: Code
    retry_after: float | None = None


TABLE: Mapping[str, Row] = {
    # who calls
    "UNAUTHENTICATED": Row(Code.UNAUTHENTICATED),
    "PERMISSION_DENIED": Row(Code.PERMISSION_DENIED),
    # the request
    "BAD_KWARGS": Row(Code.INVALID_ARGUMENT),
    "BAD_TICKET": Row(Code.INVALID_ARGUMENT),
    "BAD_VERSION": Row(Code.INVALID_ARGUMENT),
    "BAD_MESSAGE": Row(Code.INVALID_ARGUMENT),
    "UNKNOWN_METHOD": Row(Code.UNIMPLEMENTED),
    "NOT_FOUND": Row(Code.NOT_FOUND),
    # RESUME found no job, and from now on none can start under that ticket
    "NOT_STARTED": Row(Code.NOT_FOUND),
    "WRONG_SPOOL": Row(Code.FAILED_PRECONDITION),
    "OTHER_REQUEST": Row(Code.FAILED_PRECONDITION),
    "SUPERSEDED": Row(Code.ABORTED),
    "BUSY": Row(Code.UNAVAILABLE, retry_after=0.5),
    "DAMAGED": Row(Code.DATA_LOSS),
    "DRAINING": Row(Code.UNAVAILABLE, retry_after=1.0),
    # the payload
    "BAD_CHUNK": Row(Code.INVALID_ARGUMENT),
    "TRUNCATED": Row(Code.INVALID_ARGUMENT),
    "SIZE_MISMATCH": Row(Code.INVALID_ARGUMENT),
    "DIGEST_MISMATCH": Row(Code.DATA_LOSS),
    "OFFSET_MISMATCH": Row(Code.OUT_OF_RANGE),
    "PAYLOAD_TOO_LARGE": Row(Code.RESOURCE_EXHAUSTED),
    "UPLOAD_STALLED": Row(Code.DEADLINE_EXCEEDED),
    "SPOOL_FULL": Row(Code.RESOURCE_EXHAUSTED, retry_after=5.0),
    "OVERLOADED": Row(Code.RESOURCE_EXHAUSTED, retry_after=1.0),
    # what `aipod doctor` has asked for
    "PROBE": Row(Code.ABORTED),
    # the run
    "LOAD_FAILED": Row(Code.INTERNAL),
    "MODEL_ERROR": Row(Code.INTERNAL),
    "WORKER_CRASHED": Row(Code.INTERNAL),
    "RESULT_NOT_JSON": Row(Code.INTERNAL),
    "RESULT_NOT_TEXT": Row(Code.INTERNAL),
    "RESULT_NO_FILE": Row(Code.INTERNAL),
    "RESULT_NOT_STORED": Row(Code.INTERNAL),
    "CANCELLED": Row(Code.CANCELLED),
    "DEADLINE_EXCEEDED": Row(Code.DEADLINE_EXCEEDED),
    "INTERRUPTED": Row(Code.INTERNAL),
    "RELEASED": Row(Code.NOT_FOUND),
    "INTERNAL": Row(Code.INTERNAL),
}


class AipodError(Exception):
    """Base of every error that aipod raises on purpose."""

    def __init__(self, reason: str, message: str, metadata: Mapping[str, str] | None = None) -> None:
        # An exception of a model's may quote a file name that is no UTF-8; on the wire all text is.
        self.message = message.encode("utf-8", "backslashreplace").decode()
        super().__init__(self.message)
        self.reason = reason
        self.metadata = dict(metadata or {})

    @property
    def code(self) -> Code:
        """The gRPC status of this reason; UNKNOWN for one that this version's table does not have."""
        return TABLE[self.reason].code if self.reason in TABLE else Code.UNKNOWN

    @property
    def retry_after(self) -> float | None:
        """Seconds after which the same request may succeed; None where it cannot."""
        return TABLE[self.reason].retry_after if self.reason in TABLE and NEVER not in self.metadata else None


class UsageError(AipodError):
    """The caller's own mistake, found before anything was sent."""

    def __init__(self, message: str) -> None:
        super().__init__("USAGE", message)


class Refused(AipodError):
    """The server refused the request: this call did not run the method. SUPERSEDED: a newer one of the same job may."""


# What is told of a `JobFailed`'s metadata to whoever asks for the outcome, now or later: the exception's class, how the
# worker ended, and the traceback, which a job has only where the server gives it away (Config.tracebacks).
TOLD = ("type", "signal", "exit", "trace")


class JobFailed(AipodError):
    """The job ended without a result. `metadata` says more where there is more: see `TOLD`."""


class ModelError(JobFailed):
    """The model's method raised; `metadata["type"]` is the exception's class name there, `message` its text.

    `metadata["trace"]` is the traceback, where the server tells it (`serve --tracebacks`).
    """

    def __str__(self) -> str:
        """As a traceback's last line has it: of many exceptions, `KeyError` for one, the text alone says nothing."""
        return ": ".join(filter(None, (self.metadata.get("type"), self.message)))


class JobCancelled(JobFailed):
    """The job was cancelled, or its time was up, before it had a result."""


class Interrupted(JobFailed):
    """The server or the worker was killed while the method ran, or the server could not store how the run ended.

    It is not run again unasked.
    """


class Unreachable(AipodError):
    """No server answered, or the connection was lost before the request was complete: the method did not run."""

    def __init__(self, message: str) -> None:
        super().__init__("UNREACHABLE", message)


class JobLost(AipodError):
    """The job went out of sight after its request was complete: the method may have run."""

    def __init__(self, message: str) -> None:
        super().__init__("JOB_LOST", message)


class ServeError(AipodError):
    """A server of one's own cannot start, or has ended unasked (SERVER_ENDED); the text says why and what to do."""


def job_failed(reason: str, message: str, metadata: Mapping[str, str] | None = None) -> JobFailed:
    """The exception for a job that ended with `reason`, of the class that fits it."""
    kinds: dict[str, type[JobFailed]] = {
        "MODEL_ERROR": ModelError,
        "CANCELLED": JobCancelled,
        "DEADLINE_EXCEEDED": JobCancelled,
        "INTERRUPTED": Interrupted,
        "WORKER_CRASHED": Interrupted,
    }
    return kinds.get(reason, JobFailed)(reason, message, metadata)


# EFBIG: a limit of the file system or of this process (RLIMIT_FSIZE).
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)


class _RefusedWhenExhausted(contextlib.ContextDecorator):
    """No generator: each small job goes through a dozen of them."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if isinstance(exc, OSError) and exc.errno in _FULL:
            raise Refused("SPOOL_FULL", "the server's disk is full; try again later") from None
        if isinstance(exc, OSError) and exc.errno in _NO_DESCRIPTOR:
            raise Refused("OVERLOADED", "the server has too many files and connections open; try again later") from None


def refused_when_exhausted() -> _RefusedWhenExhausted:
    """Turn the system's errors that pass, a full disk and a lack of descriptors, into a retryable `Refused`."""
    return _RefusedWhenExhausted()


def leaves(exc: BaseException) -> Iterator[BaseException]:
    """The exceptions in `exc`, whatever exception groups the nurseries on the way put around them."""
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from leaves(inner)
    else:
        yield exc


@contextlib.contextmanager
def bare() -> Iterator[None]:
    """An error of aipod's own, if nothing else went wrong, is raised by itself: without the nurseries' groups."""
    try:
        yield
    except BaseExceptionGroup as group:
        first, *others = leaves(group)
        if others or not isinstance(first, AipodError):
            raise
        raise first from None


def why(exc: BaseException) -> str:
    """What an exception says, to a person: of the system's own the words, without a number and the path again."""
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
