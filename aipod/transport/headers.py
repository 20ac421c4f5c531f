"""Headers of a request or response, looked at before grpclib does: it would leave some bad ones without any answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from grpclib.const import Status
from h2.errors import ErrorCodes

# https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md: TimeoutValue is at most 8 digits.
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])\Z")
_UNIT = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
# A value of a header whose name ends in -bin, padded or not.
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}\Z")
_ENCODINGS = ("identity", "gzip", "deflate")
_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+\Z")
_VALUE = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)?\Z")  # printable ASCII, without spaces around it
_LENGTH = re.compile(r"[0-9]{1,18}\Z")
_PSEUDO = (":method", ":scheme", ":path", ":authority")
_ONCE = {*_PSEUDO, "host", "te", "content-type", "content-length", "grpc-timeout", "grpc-encoding"}
_OF_CONNECTION = {"connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade"}

# They are kept for as long as their call.
MAX_HEADERS = 100
# Characters of a problem's text that are sent. It may quote what the peer has sent: 15,000 times `%` came back as 45
# KB, which cost 0.1 s of Huffman coding.
MAX_REFUSAL = 200

Headers = list[tuple[str, str]]


class Problem(NamedTuple):
    """Why a request cannot be served, as it is told to the caller."""

    status: Status
    message: str
    headers: Headers = []  # noqa: RUF012 - never changed
    reset: ErrorCodes | None = None  # answered by RST_STREAM alone: it is not even HTTP
    http: int = 200


def parse_timeout(value: str) -> float:
    """Seconds in a grpc-timeout header that `check_headers` has let through."""
    match = _TIMEOUT.match(value)
    assert match is not None
    return int(match[1]) * _UNIT[match[2]]


def apart(headers: Iterable[tuple[Any, Any]]) -> Headers:
    """`headers` with each value of those whose names end in -bin by itself: several may come joined by commas.

    grpclib decodes such a value as if it were one, which fails, or gives nonsense.
    """
    return [
        (name, part) for name, value in headers for part in (value.split(",") if name.endswith("-bin") else (value,))
    ]


def check_headers(headers: Sequence[tuple[str, str]]) -> Problem | None:
    """Why a request cannot be served, or None; its headers are `apart`."""
    if len(headers) > MAX_HEADERS:
        return Problem(Status.RESOURCE_EXHAUSTED, f"more than {MAX_HEADERS} headers")
    seen: dict[str, str] = {}
    for name, value in headers:
        seen.setdefault(name, value)
        is_clean = _VALUE.match(value) is not None
        if not is_clean and not value.isascii():
            return Problem(Status.INVALID_ARGUMENT, f"header {name} has a value that is not ASCII")
        if not _is_base64(name, value):
            return Problem(Status.INVALID_ARGUMENT, f"header {name} is not base64")
        if not is_clean:
            return Problem(
                Status.INVALID_ARGUMENT, f"header {name} has a value with spaces around it or control characters"
            )
    if (malformed := _malformed(headers, seen)) is not None:
        # RFC 9113 section 8.1.1: an error of this stream; h2 would end the connection, and the other calls on it.
        return Problem(Status.INVALID_ARGUMENT, malformed, reset=ErrorCodes.PROTOCOL_ERROR)
    if (refusal := _no_grpc(seen)) is not None:
        return refusal
    timeout = seen.get("grpc-timeout")
    if timeout is not None:
        if not _TIMEOUT.match(timeout):
            return Problem(Status.INVALID_ARGUMENT, "grpc-timeout is not at most 8 digits and a unit")
        if parse_timeout(timeout) == 0:
            return Problem(Status.DEADLINE_EXCEEDED, "the deadline has passed")
    if seen.get("grpc-encoding", "identity") not in _ENCODINGS:
        accepted = [("grpc-accept-encoding", ",".join(_ENCODINGS))]
        return Problem(Status.UNIMPLEMENTED, "grpc-encoding is not one of grpc-accept-encoding", accepted)
    return None


def _no_grpc(headers: Mapping[str, str]) -> Problem | None:
    """Why these are not the headers of a gRPC request with protobuf messages, for those who speak HTTP; or None."""
    if headers[":method"] != "POST":
        return Problem(Status.UNKNOWN, "the method is not POST", http=405)
    if headers.get("content-type") not in ("application/grpc", "application/grpc+proto"):
        return Problem(Status.UNKNOWN, "content-type is not application/grpc or application/grpc+proto", http=415)
    if headers.get("te") != "trailers":
        return Problem(Status.UNKNOWN, "there is no te: trailers", http=400)
    return None


def _malformed(headers: Sequence[tuple[str, str]], seen: dict[str, str]) -> str | None:
    """Why these are not the headers of a request (RFC 9113 sections 8.2 and 8.3), or None."""
    pseudo = True
    for name, _ in headers:
        if name.startswith(":"):
            if not pseudo:
                return f"{name} comes after other headers"
            if name not in _PSEUDO:
                return f"{name} is no pseudo-header of a request"
            continue
        pseudo = False
        if not _NAME.match(name):
            return f"{name!r} is no name of a header"
        if name in _OF_CONNECTION:
            return f"{name} belongs to a connection, not to a request"
    if sum(name in _ONCE for name, _ in headers) != sum(name in seen for name in _ONCE):
        return "a header comes twice that may come once"
    if any(not seen.get(name) for name in (":method", ":scheme", ":path")):
        return "there is no :method, :scheme or :path"
    if not _LENGTH.match(seen.get("content-length", "0")):
        return "content-length is no number"
    if seen.get("te", "trailers") != "trailers":
        return "te is not trailers"
    host = seen.get("host")
    if (host is None and ":authority" not in seen) or host not in (None, seen.get(":authority", host)):
        return "there is no :authority or host, or they differ"
    return None


def response_is_readable(headers: Headers) -> bool:
    """Whether grpclib can read the headers of a response, which are `apart`."""
    return any(name == ":status" for name, _ in headers) and all(_is_base64(*pair) for pair in headers)


def trailers_are_readable(headers: Headers) -> bool:
    """Whether grpclib can read trailers, `apart`; they have no pseudo-headers (RFC 9113 section 8.1)."""
    return all(not name.startswith(":") and _is_base64(name, value) for name, value in headers)


def _is_base64(name: str, value: str) -> bool:
    if not name.endswith("-bin"):
        return True
    return _BASE64.match(value) is not None and len(value.rstrip("=")) % 4 != 1
