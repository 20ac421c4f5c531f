"""What a caller asks for, checked and made ready to be sent, before anything is sent."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from typing import Any

from grpclib.metadata import encode_metadata

from aipod.client.course import Course, Request
from aipod.client.link import Link
from aipod.client.reader import Payload
from aipod.client.source import Source
from aipod.client.ticket import TicketFile
from aipod.codec import Compressor, frame
from aipod.config import KIB, Config
from aipod.errors import UsageError

Place = tuple[str, int, str | None, dict[Any, Any]]

# Above it bytes are better in a file, and kwargs better in the payload: both are held in memory whole.
WARN_ABOVE = 32 * KIB
RPCS = ("chaos", "train", "predict", "log")
# The place in the caller's code of what calls from another thread, as `warnings.warn_explicit` takes it.
CALLED_AT: contextvars.ContextVar[Place] = contextvars.ContextVar("CALLED_AT")
# Bytes of `max_headers` for what every call brings besides metadata: path, authority, job, token, trace.
OWN_HEADERS = 2 * KIB


async def prepare(
    link: Link,
    rpc: str,
    payload: Payload,
    version: str,
    metadata: Sequence[tuple[str, str]],
    ticket_file: str | os.PathLike[str] | None,
    kwargs: dict[str, Any],
    *,
    stacklevel: int,
) -> tuple[Request, Course]:
    """What is asked for, and what is known of the job: something where the ticket file tells of one.

    Raises `UsageError`. This is an asyncio-flavored function; `stacklevel`: of the caller's code, from here.
    """
    if not isinstance(version, str):
        raise UsageError(f"version={version!r} is no text; write version={str(version)!r}")
    metadata = checked(metadata, link.config)
    if rpc == "chaos" and version:
        kwargs = {**kwargs, "version": version}  # Raw has no field for it
    in_memory = isinstance(payload, bytes | bytearray | memoryview)
    if isinstance(payload, bytes | bytearray | memoryview) and len(payload) > WARN_ABOVE:
        _warn(f"{len(payload)} bytes of payload in memory; a path is sent without loading it", stacklevel + 1)
    text = _text(kwargs, link.config, stacklevel + 1)
    level = link.config.small_level
    # What is large would have the loop's own one keep as much memory.
    packed = frame(text, level) if len(text) <= WARN_ABOVE else Compressor(level).frame(text)
    in_thread = link.in_thread
    source = Source(payload, in_thread) if in_memory else await asyncio.to_thread(Source, payload, in_thread)
    request = Request(rpc, metadata, packed, version, source)
    if ticket_file is None:
        return request, Course()
    request.goes_on = request.durable = True
    request.fingerprint = await asyncio.to_thread(_fingerprint, request, text, source)
    file = ticket_file if isinstance(ticket_file, TicketFile) else TicketFile(ticket_file)
    course = Course(file=file)
    saved = await asyncio.to_thread(file.create, course.saved(request))
    if saved.ticket == course.ticket:
        return request, course
    file.check(saved, request.fingerprint)
    return request, Course.of_file(file, saved)


def _text(kwargs: dict[str, Any], config: Config, stacklevel: int) -> bytes:
    for name in kwargs:
        if name.startswith("_aipod"):
            raise UsageError(f"keyword argument {name!r}: names that begin with _aipod are aipod's own")
    try:
        text = json.dumps(kwargs, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError) as exc:
        raise UsageError(f"the keyword arguments are not JSON: {exc}; send other data as the payload") from None
    if len(text) > config.kwargs_limit:
        raise UsageError(f"{len(text)} bytes of keyword arguments; the limit is {config.kwargs_limit}")
    if len(text) > WARN_ABOVE:
        _warn(f"{len(text)} bytes of keyword arguments; send large data as the payload", stacklevel + 1)
    return text


def _warn(text: str, stacklevel: int) -> None:
    place = CALLED_AT.get(None)
    if place is None:
        warnings.warn(text, stacklevel=stacklevel)
    else:
        warnings.warn_explicit(text, UserWarning, *place)


def _fingerprint(request: Request, kwargs: bytes, source: Source) -> str:
    """What a ticket file knows its request by. Blocks: bytes in memory are hashed."""
    method = next((value for name, value in request.metadata if name == "x-func-name"), "")
    fields = [request.rpc, method, request.version, kwargs.decode(), source.size, source.content_tag()]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def named(method: str, metadata: Sequence[tuple[str, str]], config: Config) -> tuple[str, list[tuple[str, str]]]:
    """The gRPC method that carries a call of `method`, and the metadata that say so. Raises `UsageError`."""
    headers = checked(metadata, config)
    if method in RPCS:
        return method, headers
    return "chaos", [*(pair for pair in headers if pair[0] != "x-func-name"), ("x-func-name", method)]


def check_timeout(timeout: object) -> None:
    """Raises `UsageError` for what would fail as something else later on."""
    if timeout is not None and (not isinstance(timeout, int | float) or not timeout >= 0):
        raise UsageError(f"timeout={timeout!r} is not a number of seconds")


def checked(metadata: Sequence[tuple[str, str]], config: Config) -> list[tuple[str, str]]:
    """Raises `UsageError` for what cannot be sent, or is more than a server takes: it would end the connection."""
    try:
        headers = [(name.lower(), value) for name, value in metadata]
    except (AttributeError, TypeError, ValueError):
        raise UsageError(f"metadata={metadata!r} is not a list of pairs of text: [('x-upstream', 'a')]") from None
    try:
        encode_metadata(headers)
    except (TypeError, ValueError) as exc:
        raise UsageError(f"metadata cannot be sent: {exc}") from None
    # As HTTP/2 counts them (RFC 9113 section 6.5.2).
    size = sum(len(name) + len(value) + 32 for name, value in headers)
    if size > config.max_headers - OWN_HEADERS:
        most = config.max_headers - OWN_HEADERS
        raise UsageError(f"{size} bytes of metadata; at most {most} (Config.max_headers); send more as the payload")
    return headers
