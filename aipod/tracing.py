"""OpenTelemetry spans of a call and of a job, where its API is installed (`aipod[traces]`); else nothing, for nothing.

The caller's span, the job's, and one below each for every phase are one trace: the W3C context travels in the call's
metadata (https://www.w3.org/TR/trace-context/) and lies in the spool with it, so that a job which another server goes
on with stays in its trace. Whoever runs the process decides where spans go (the command line: `cli.tracing`); without
that the API makes spans of no cost that record nothing. No payload, argument or message of an error gets into a span.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = propagate = None  # type: ignore[assignment]


class Trace:
    """A span, and one below it for the phase that is under way. A `with` block ends it as it ends. Not thread-safe.

    `remote`: headers with the context that the span belongs to; None: a caller's, in the context of its own code.
    """

    def __init__(self, name: str, remote: Mapping[str, str] | None = None, **attributes: str) -> None:
        self._phase = ""
        self._span: Any = None
        self._child: Any = None  # of the phase
        if trace is None or (remote is not None and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)):
            return  # nobody records here, and what is done with the headers has the caller's context from them
        kind = trace.SpanKind.CLIENT if remote is None else trace.SpanKind.SERVER
        self._tracer = trace.get_tracer("aipod")
        parent = None if remote is None else propagate.extract(_context_of(remote))
        self._span = self._tracer.start_span(name, parent, kind, attributes=_named(attributes))
        self._context = trace.set_span_in_context(self._span, parent)

    def headers(self) -> dict[str, str]:
        """The context of what is done now, to be sent along."""
        carrier: dict[str, str] = {}
        if self._span is not None:
            context = self._context if self._child is None else trace.set_span_in_context(self._child, self._context)
            propagate.inject(carrier, context)
        return carrier

    def enter(self, phase: str) -> None:
        """What is done from now on; "" is nothing. The same again changes nothing."""
        if phase == self._phase or self._span is None or not self._span.is_recording():
            return
        self._phase = phase
        if self._child is not None:
            self._child.end()
        self._child = self._tracer.start_span(phase, self._context) if phase else None

    def tag(self, **attributes: Any) -> None:
        """What is known of it by now."""
        if self._span is not None:
            self._span.set_attributes(_named(attributes))

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        self.end("" if exc is None else getattr(exc, "reason", type(exc).__name__))

    def end(self, reason: str = "") -> None:
        """It is over; `reason`: what the failure is called. Again it changes nothing."""
        if self._span is None:
            return
        self.enter("")
        if reason:
            self._span.set_attribute("error.type", reason)
            self._span.set_status(trace.StatusCode.ERROR, reason)
        self._span.end()
        self._span = None


def _context_of(remote: Mapping[str, str]) -> dict[str, str]:
    """The headers that may have the context: all but baggage, which no span of a server's has a use for.

    8 KiB of it are 35 ms of OpenTelemetry's time on the loop, and 180 warnings in the log, for each phase.
    """
    return {name: value for name, value in remote.items() if name != "baggage"}


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"aipod.{name}": value for name, value in attributes.items()}
