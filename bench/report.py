"""What people read of measurements: tables of ratios, of costs, and of the required figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.compare import Measured, Way
from bench.processes import Run

GIB = 1 << 30
LARGE = 1 << 20  # bytes; below, what a job costs is more than what its bytes do
# CPU seconds of one run: the two sides, what the server has started, and what is between.
COSTS = ("client_user", "client_sys", "server_user", "server_sys", "server_workers", "hop_cpu")
PEAKS = ("client_peak_mb", "server_peak_mb", "server_worker_peak_mb")
SMALLER = "This run has not the usual sizes or numbers: of these figures it is a hint only."


def show(console: Console, several: Sequence[Measured], judged: Sequence[dict[str, Any]], *, smaller: bool) -> None:
    """`smaller`: than what the required figures are of."""
    for table in (_ratios(several), _cost(several), _required(judged, SMALLER if smaller else None)):
        if table.row_count:
            console.print(table)


def _ratios(several: Sequence[Measured]) -> Table:
    table = Table("row", "ours", "peer", "figure", title="Side by side: medians, and how many times better ours is")
    for heading in ("ours", "peer", "ratio", "min", "max"):
        table.add_column(heading, justify="right")
    for measured in several:
        summary, row = measured.summary(), f"{measured.benchmark} {measured.comparison.row}"
        name = measured.comparison.ours.name
        for peer, figures in summary["versus"].items():
            for figure, values in figures.items():
                numbers = [number(values[key]) for key in ("ours", "peer")]
                ratios = [number(values[key]) for key in ("ratio", "ratio_min", "ratio_max")]
                table.add_row(row, name, peer, figure, *numbers, *ratios)
        if not summary["versus"]:
            for figure, values in summary["ours"].items():
                table.add_row(row, name, "", figure, number(values["median"]))
    return table


def _cost(several: Sequence[Measured]) -> Table:
    table = Table("row", "who", "per", title="Cost: CPU seconds, user + system; peak MB")
    for heading in ("client", "server", "workers", "between", "MB client", "MB server", "MB worker"):
        table.add_column(heading, justify="right")
    for measured in several:
        for way in measured.comparison.ways:
            runs = measured.runs(way)
            unit, costs = cost(runs)
            table.add_row(f"{measured.benchmark} {measured.comparison.row}", way.name, unit, *_cells(way, costs))
    return table


def _cells(way: Way, costs: dict[str, float | None]) -> Iterator[str]:
    for side in ("client", "server"):
        user, system = costs[f"{side}_user"], costs[f"{side}_sys"]
        yield "unknown" if user is None or system is None else f"{user:.2f} + {system:.2f}"
    yield number(costs["server_workers"])
    yield number(costs["hop_cpu"]) if way.hop else ""
    for name in PEAKS:
        yield number(costs[name])


def cost(runs: Sequence[Run]) -> tuple[str, dict[str, float | None]]:
    """The unit of work, and the medians of CPU seconds for one and of peak memory."""
    large = runs[0].get("bytes", 0) >= LARGE
    unit, work = ("GiB", lambda run: run["bytes"] / GIB) if large else ("1000", _count)
    costs = {
        name: _median([run[name] / work(run) / _share(name, run) for run in runs if name in run]) for name in COSTS
    }
    peaks = {name: _median([run[name] for run in runs if run.get(name) is not None]) for name in PEAKS}
    return unit, costs | peaks


def _share(name: str, run: Run) -> float:
    """What is known of servers is of their client's whole life, warm-up included; clients watch their own clock."""
    return 1 if name.startswith("client") else 1 + run.get("warm_up", 0)


def _count(run: Run) -> float:
    """Thousands of jobs, or calls; a small file is one job."""
    count = run.get("jobs") or run.get("calls") or 1
    return float(count) / 1000


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _required(judged: Sequence[dict[str, Any]], caption: str | None) -> Table:
    title = "Required: two cores, both ends on one machine, full size"
    table = Table("what", "required", "measured", "", title=title, caption=caption)
    for each in judged:
        if each["reached"] is None and all(bound["measured"] is None for bound in each["bounds"]):
            continue
        bounds = each["bounds"]
        some = f" ({each['enough']} of {len(bounds)})" if each["enough"] < len(bounds) else ""
        table.add_row(
            each["name"] + some,
            "\n".join(bound["required"] for bound in bounds),
            "\n".join(number(bound["measured"]) for bound in bounds),
            verdict(each["reached"]),
        )
    return table


def verdict(reached: bool | None) -> str:
    return {True: "reached", False: "missed", None: "not measured"}[reached]


def number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
