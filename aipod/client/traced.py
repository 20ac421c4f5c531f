"""The caller's span of a call, and its context in what the call sends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from aipod.client.course import Request
from aipod.client.follow import Follower
from aipod.tracing import Trace


@contextlib.contextmanager
def traced(follower: Follower, request: Request, what: str) -> Iterator[None]:
    """The body does `what`; who serves `request` goes on with its trace, unless the metadata names another."""
    with Trace(what) as trace:
        request.trace = trace
        told = {header for header, _ in request.metadata}
        own = [(header, value) for header, value in trace.headers().items() if header not in told]
        request.metadata = [*request.metadata, *own]
        try:
            yield
        finally:
            trace.tag(job_id=follower.course.id)
