"""The one place where an outcome becomes a gRPC status with google.rpc details (https://google.aip.dev/193)."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any
from urllib.parse import unquote

import trio
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import DebugInfo, ErrorInfo, RetryInfo
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import encode_grpc_message

from aipod.errors import DOMAIN, AipodError, JobFailed, job_failed, leaves

log = logging.getLogger("aipod.service")

# Bytes of the text as it is sent. It goes out twice, in grpc-message and (base64) in grpc-status-details-bin, and
# gRPC's C core begins to refuse trailers at 8 KiB (GRPC_ARG_MAX_METADATA_SIZE), with the status that they carry.
MAX_TEXT = 2048
# Bytes of all trailers that leave room for those of the answer. The end of a traceback gets what the rest leaves of
# them, as it is not base64 yet.
MAX_TRAILERS = 7 * 1024
MAX_TRACE = 4096


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a call ends."""

    status: Status = Status.OK
    message: str | None = None
    details: list[Any] | None = None

    @property
    def reason(self) -> str:
        """From the details; empty where there are none."""
        return next((one.reason for one in self.details or () if isinstance(one, ErrorInfo)), "")


def failure_of(exc: BaseException) -> JobFailed:
    """The outcome of a plain client's job whose upload has ended so."""
    known = next((leaf for leaf in leaves(exc) if isinstance(leaf, AipodError)), None)
    if known is not None:
        return job_failed(known.reason, known.message)
    if any(isinstance(leaf, trio.Cancelled) for leaf in leaves(exc)):
        return job_failed("CANCELLED", "its caller has left before the payload was complete")
    return job_failed("BAD_MESSAGE", str(next(leaves(exc))))


def ending_of(exc: BaseException) -> Ending:
    """The status for whatever a call's nursery raised. Text of unknown exceptions stays in the server's log."""
    known = next((leaf for leaf in leaves(exc) if isinstance(leaf, AipodError)), None)
    if known is not None:
        public = {name: value for name, value in known.metadata.items() if name != "trace"}
        details: list[Any] = [ErrorInfo(reason=known.reason, domain=DOMAIN, metadata=public)]
        if known.retry_after is not None:
            details.append(
                RetryInfo(retry_delay=Duration(nanos=int(known.retry_after % 1 * 1e9), seconds=int(known.retry_after)))
            )
        kind = known.metadata.get("type")
        text = _cut(f"{kind}: {known.message}" if kind else known.message)
        if "trace" in known.metadata:
            details.append(DebugInfo(detail=_end_of(known.metadata["trace"], _left(text, details))))
        return Ending(Status(int(known.code)), text, details)
    wire = next((leaf for leaf in leaves(exc) if isinstance(leaf, GRPCError)), None)
    if wire is not None:
        details = [ErrorInfo(reason="BAD_MESSAGE", domain=DOMAIN)]
        return Ending(wire.status, _cut(wire.message or ""), details)
    log.error("a bug of aipod", exc_info=exc)
    return Ending(Status.INTERNAL, "internal error", [ErrorInfo(reason="INTERNAL", domain=DOMAIN)])


def _cut(text: str) -> str:
    """The beginning of `text` that takes at most `MAX_TEXT` bytes as a header."""
    whole = re.sub("%.?\\Z", "", encode_grpc_message(text[:MAX_TEXT])[:MAX_TEXT])
    return unquote(whole, errors="ignore")


def _left(text: str, details: list[Any]) -> int:
    """Bytes that trailers with `text` and `details` leave for a traceback."""
    taken: int = len(text.encode()) + sum(detail.ByteSize() + 64 for detail in details)  # 64: its type's name
    return min(MAX_TRACE, (MAX_TRAILERS - len(encode_grpc_message(text))) * 3 // 4 - taken)


def _end_of(trace: str, size: int) -> str:
    """The last bytes of a traceback, at most `size`: there it says what was raised, and where."""
    data = trace.encode()
    return data[max(0, len(data) - size) :].decode("utf-8", "ignore")
