"""The numbers as Prometheus metrics. No I/O.

The names `grpc_server_*` and their labels are those of go-grpc-middleware's Prometheus provider, which dashboards and
alerts know. Its buckets end at ten seconds, ours do not; codes have their names in gRPC's specification.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from aipod.metrics import Histogram, Metrics, Moved, Now, Rpc

_RPC = ("grpc_type", "grpc_service", "grpc_method")


def families(metrics: Metrics, now: Now, version: str) -> Iterator[Metric]:
    """All metrics; `version` is aipod's. To be called, and used up, in the trio thread."""
    yield InfoMetricFamily("aipod_build", "What serves.", {"version": version, "python": platform.python_version()})
    yield from _rpcs([*metrics.rpcs.values(), metrics.other_rpcs])
    yield from _jobs(metrics)
    yield from _now(now)
    yield _counter("aipod_resumes", "Gone on with after a cut or a kill.", "what", metrics.resumed)
    yield _bytes({"up": metrics.up, "down": metrics.down})
    yield _counter(
        "aipod_answer_chunks",
        "Chunks of long answers to our own clients, by their zstd level.",
        "level",
        {"stored" if level is None else str(level): count for level, count in metrics.levels.items()},
    )
    yield _counter("aipod_call_errors", "Calls that ended with an error, by its reason.", "reason", metrics.errors)
    yield _histogram("aipod_tick_lag_seconds", "How late heartbeats are.", metrics.late)
    yield _counter("aipod_loads", "Instances of versions that have loaded, or have not.", "outcome", metrics.loads)
    yield _histogram("aipod_load_seconds", "How long it took those that have loaded.", metrics.load_seconds)
    yield _counter(
        "aipod_worker_restarts", "Instances that died by themselves; others take their place.", "died", metrics.died
    )
    yield CounterMetricFamily("aipod_connections_accepted", "Connections that were taken.", metrics.accepted)
    yield CounterMetricFamily(
        "aipod_connections_refused", "Connections for which there was no room.", metrics.turned_away
    )


def _rpcs(rpcs: list[Rpc]) -> Iterator[Metric]:
    started = CounterMetricFamily("grpc_server_started", "Calls that have begun.", labels=_RPC)
    received = CounterMetricFamily("grpc_server_msg_received", "Messages that were received.", labels=_RPC)
    sent = CounterMetricFamily("grpc_server_msg_sent", "Messages that were sent.", labels=_RPC)
    handled = CounterMetricFamily("grpc_server_handled", "Calls that have ended.", labels=(*_RPC, "grpc_code"))
    seconds = HistogramMetricFamily("grpc_server_handling_seconds", "How long they took.", labels=_RPC)
    for rpc in rpcs:
        labels = (rpc.kind, rpc.service, rpc.method)
        started.add_metric(labels, rpc.started)
        received.add_metric(labels, rpc.received)
        sent.add_metric(labels, rpc.sent)
        for code, count in rpc.codes.items():
            handled.add_metric((*labels, code), count)
        seconds.add_metric(labels, *_buckets(rpc.seconds))
    yield from (started, received, sent, handled, seconds)


def _jobs(metrics: Metrics) -> Iterator[Metric]:
    started = CounterMetricFamily("aipod_jobs_started", "Jobs that have begun here.", labels=("method",))
    ended = CounterMetricFamily("aipod_jobs_ended", "Jobs that have ended here.", labels=("method", "outcome"))
    seconds = HistogramMetricFamily(
        "aipod_job_phase_seconds", "How long phases took that are over.", labels=("method", "phase")
    )
    for method, jobs in metrics.jobs.items():
        started.add_metric((method,), jobs.started)
        for outcome, count in jobs.ended.items():
            ended.add_metric((method, outcome), count)
        for phase, histogram in jobs.seconds.items():
            seconds.add_metric((method, phase), *_buckets(histogram))
    yield from (started, ended, seconds)


def _now(now: Now) -> Iterator[Metric]:
    yield _gauge("aipod_jobs", "Jobs that this server works on, by phase.", "phase", now.jobs)
    yield GaugeMetricFamily("aipod_queue_length", "Jobs in line that no instance has taken.", now.in_line)
    yield _gauge("aipod_instances", "Instances of all versions.", "state", now.instances)
    yield GaugeMetricFamily("aipod_connections", "Connections.", now.connections)
    yield GaugeMetricFamily("aipod_draining", "1 while no new jobs are taken.", now.draining)
    if now.spool_bytes is not None:
        yield GaugeMetricFamily(
            "aipod_spool_bytes", "What all jobs in the spool take, or are promised.", now.spool_bytes
        )
    if now.spool_free is not None:
        yield GaugeMetricFamily("aipod_spool_free_bytes", "What is free on the spool's disk.", now.spool_free)


def _bytes(moved: Mapping[str, Moved]) -> Metric:
    family = CounterMetricFamily(
        "aipod_payload_bytes",
        "Payloads (up) and answers (down): as they are (identity), and compressed, as they come and go (zstd).",
        labels=("direction", "encoding"),
    )
    for direction, one in moved.items():
        family.add_metric((direction, "identity"), one.data)
        family.add_metric((direction, "zstd"), one.wire)
    return family


def _counter(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=(label,))
    for value, count in values.items():
        family.add_metric((value,), count)
    return family


def _gauge(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for value, count in values.items():
        family.add_metric((value,), count)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(name, text, labels=())
    family.add_metric((), *_buckets(histogram))
    return family


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """As `HistogramMetricFamily` takes them: each counts what is in those below, too."""
    total, buckets = 0, []
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets, histogram.sum
