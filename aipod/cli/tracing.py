"""Where the spans of a command go: to an OTLP collector, where the environment names one.

https://opentelemetry.io/docs/specs/otel/protocol/exporter/ has the variables; OTEL_EXPORTER_OTLP_ENDPOINT is the one
that matters. A process that was started by `opentelemetry-instrument` has its own, and is left alone.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import click

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

# Seconds that a command waits at its end for a collector to take its last spans.
FLUSH = 2.0


@contextlib.contextmanager
def exported_spans() -> Iterator[None]:
    """Spans that are made in the block are sent to the collector. Raises click.UsageError where that cannot be."""
    wanted = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    if wanted == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        yield
        return
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        yield
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        text = "OTEL_EXPORTER_OTLP_ENDPOINT is set, and OpenTelemetry is missing: pip install 'aipod[traces]'"
        raise click.UsageError(f"{text}, or set OTEL_TRACES_EXPORTER=none") from exc
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        yield
        return
    if wanted != "otlp":
        raise click.UsageError(f"OTEL_TRACES_EXPORTER={wanted}: only otlp and none are supported")
    named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if named else {"service.name": "aipod"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        # It tries for as long as OTEL_EXPORTER_OTLP_TIMEOUT and longer where no collector answers.
        flush = threading.Thread(target=provider.shutdown, daemon=True, name="aipod-spans")
        flush.start()
        flush.join(FLUSH)
