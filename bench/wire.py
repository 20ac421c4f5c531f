"""`python -m bench wire [--quick] [--pairs N] [--rows ROW,…]`: what the transport costs, beside its peers.

    up, down      one stream of incompressible 1 MiB messages: raw socket, Arrow Flight, grpcio.aio, grpclib, ours
    up16, down16  the same with HTTP/2 frames of 16 KiB, the default of every stock peer and nginx's only size
    stock         stock clients sending to our server, against the same clients sending to their own servers
    small         two small messages up and one down: p50, p99, and calls/s with 64 at once

Each client and each server is a process of its own (`bench/peers/`); a server stays for its row, every run has a fresh
client. Runs are paired: ours and the peer's back to back, in alternating order, so that a machine whose speed drifts
slows both. A ratio says how many times better ours is, and is quoted as the median over the pairs with its spread.
The peers are an extra: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.peers.common import peak_memory

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
GIB = 1 << 30
MESSAGE = MIB
SLOWEST = 600  # seconds of one run; a peer that hangs ends the benchmark
# Peers that are extras, and what they import.
NEEDS = {"flight": "pyarrow", "grpcio_aio": "grpc", "grpcio_sync": "grpc"}
PACKAGES = ("grpclib", "h2", "trio", "trio-asyncio", "betterproto2", "protobuf", "grpcio", "pyarrow")

Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Way:
    """A client and a server, by the names of their modules, and what is said to both."""

    client: str
    server: str
    client_options: tuple[str, ...] = ()
    server_options: tuple[str, ...] = ()


def _same(name: str, *options: str) -> Way:
    return Way(name, name, options, options)


@dataclasses.dataclass(frozen=True)
class Comparison:
    row: str
    command: str
    ours: Way
    peer: Way
    runs: list[tuple[Run, Run]] = dataclasses.field(default_factory=list, compare=False)


OURS, OURS_16 = _same("ours"), _same("ours", "--frame=16384")
GRPCIO, GRPCIO_STOCK, GRPCLIB = _same("grpcio_aio"), _same("grpcio_aio", "--stock"), _same("grpclib_stock")
GRPCIO_SYNC = _same("grpcio_sync")

# Stock grpcio and grpclib announce frames of 16 KiB and send what the other side allows: to our server 512 KiB.
ROWS: dict[str, list[Comparison]] = {
    "up": [Comparison("up", "send", OURS, peer) for peer in (_same("raw"), _same("flight"), GRPCIO, GRPCLIB)],
    "down": [Comparison("down", "receive", OURS, peer) for peer in (_same("raw"), _same("flight"), GRPCIO, GRPCLIB)],
    "up16": [Comparison("up16", "send", OURS_16, peer) for peer in (GRPCIO_STOCK, GRPCLIB)],
    "down16": [Comparison("down16", "receive", OURS_16, peer) for peer in (GRPCIO_STOCK, GRPCLIB)],
    "stock": [
        Comparison("stock", "send", Way("grpcio_aio", "ours", ("--stock",)), GRPCIO_STOCK),
        Comparison("stock", "send", Way("grpcio_aio", "ours", ("--stock",), ("--frame=16384",)), GRPCIO_STOCK),
        Comparison("stock", "send", Way("grpcio_sync", "ours"), GRPCIO_SYNC),
        Comparison("stock", "send", Way("grpcio_sync", "ours", (), ("--frame=16384",)), GRPCIO_SYNC),
        Comparison("stock", "send", Way("grpclib_stock", "ours", (), ("--frame=16384",)), GRPCLIB),
    ],
    "small": [Comparison("small", "small", OURS, peer) for peer in (GRPCLIB, GRPCIO_STOCK)],
}


@dataclasses.dataclass(frozen=True)
class Figure:
    name: str
    of: Callable[[Run], float]
    more_is_better: bool = True

    def ratio(self, ours: Run, peer: Run) -> float:
        """How many times better ours is."""
        a, b = self.of(ours), self.of(peer)
        return a / b if self.more_is_better else b / a


RATE = [Figure("MB/s", lambda run: run["bytes"] / run["seconds"] / 1e6)]
CALLS = [
    Figure("p50 ms", lambda run: run["p50"] * 1e3, more_is_better=False),
    Figure("p99 ms", lambda run: run["p99"] * 1e3, more_is_better=False),
    Figure("calls/s, 64 at once", lambda run: run["rate"]),
]


def _figures(comparison: Comparison) -> list[Figure]:
    return CALLS if comparison.command == "small" else RATE


class Server:
    """A peer's server process."""

    def __init__(self, name: str, options: tuple[str, ...]) -> None:
        command = [sys.executable, "-m", f"bench.peers.{name}", "serve", *options]
        # It ends with its stdin, whatever happens to this process.
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.stop()
            raise SystemExit(f"{name} does not start: {' '.join(command)}")
        self.port = line.strip()

    def cpu(self) -> float | None:
        """CPU seconds so far, where the system tells it."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak(self) -> float | None:
        return peak_memory(self._process.pid)

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate()


def _run(command: str, way: Way, server: Server, arguments: Sequence[int]) -> Run:
    """One transfer, or one series of calls, by a fresh client."""
    line = [sys.executable, "-m", f"bench.peers.{way.client}", command, server.port, *map(str, arguments)]
    before = server.cpu()
    done = subprocess.run([*line, *way.client_options], cwd=ROOT, capture_output=True, text=True, timeout=SLOWEST)
    if done.returncode:
        raise SystemExit(f"{_label(way)} failed at {command}:\n{done.stderr}")
    after = server.cpu()
    run: Run = json.loads(done.stdout)
    if before is not None and after is not None:
        run["server_cpu"] = after - before
    run["server_peak_mb"] = server.peak()
    if command != "small":
        run["bytes"] = arguments[0]
    return run


def measure(comparisons: list[Comparison], pairs: int, size: int, calls: int) -> None:
    """All pairs of one row. The comparisons take turns, so that each sees the whole of the row's time."""
    with contextlib.ExitStack() as stack:
        servers: dict[tuple[str, tuple[str, ...]], Server] = {}
        for way in (way for comparison in comparisons for way in (comparison.ours, comparison.peer)):
            key = way.server, way.server_options
            if key not in servers:
                servers[key] = Server(*key)
                stack.callback(servers[key].stop)
        for number in range(pairs):
            for comparison in comparisons:
                arguments = [calls] if comparison.command == "small" else [size, min(size, MESSAGE)]
                order = [comparison.ours, comparison.peer]
                took = {
                    way: _run(comparison.command, way, servers[way.server, way.server_options], arguments)
                    for way in (order if number % 2 == 0 else reversed(order))
                }
                comparison.runs.append((took[comparison.ours], took[comparison.peer]))


def _median(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _cost(run: Run) -> Iterator[tuple[str, float | None]]:
    """CPU seconds of both sides, per GiB or per 1000 calls, and their peak memory."""
    work = run["bytes"] / GIB if "bytes" in run else run["calls"] / 1000
    for name in ("cpu", "server_cpu"):
        yield name, run[name] / work if name in run else None
    yield "peak_mb", run["peak_mb"]
    yield "server_peak_mb", run["server_peak_mb"]


def summary(comparison: Comparison) -> dict[str, Any]:
    """The figures of one comparison: medians of both sides, and of the ratios with their spread."""
    figures = {}
    for figure in _figures(comparison):
        ratios = [figure.ratio(*pair) for pair in comparison.runs]
        figures[figure.name] = {
            "ours": statistics.median(figure.of(ours) for ours, _ in comparison.runs),
            "peer": statistics.median(figure.of(peer) for _, peer in comparison.runs),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return {
        "row": comparison.row,
        "ours": dataclasses.asdict(comparison.ours),
        "peer": dataclasses.asdict(comparison.peer),
        "figures": figures,
        "runs": [{"ours": ours, "peer": peer} for ours, peer in comparison.runs],
    }


def _show(console: Console, comparisons: list[Comparison]) -> None:
    table = Table("row", "ours", "peer", "figure", title="Side by side: medians, and how many times better ours is")
    for heading in ("ours", "peer", "ratio", "min", "max"):
        table.add_column(heading, justify="right")
    for comparison in comparisons:
        for name, values in summary(comparison)["figures"].items():
            table.add_row(
                *(comparison.row, _label(comparison.ours), _label(comparison.peer), name),
                *(_number(values[key]) for key in ("ours", "peer")),
                *(f"{values[key]:.2f}" for key in ("ratio", "ratio_min", "ratio_max")),
            )
    console.print(table)
    table = Table("row", "who", title="Cost: CPU seconds per GiB (small: per 1000 calls), peak MB")
    for heading in ("CPU client", "CPU server", "MB client", "MB server"):
        table.add_column(heading, justify="right")
    runs: dict[tuple[str, Way], list[Run]] = {}
    for comparison in comparisons:
        for pair in comparison.runs:
            for way, run in zip((comparison.ours, comparison.peer), pair, strict=True):
                runs.setdefault((comparison.row, way), []).append(run)
    for (row, way), several in runs.items():
        columns = zip(*([value for _, value in _cost(run)] for run in several), strict=True)
        table.add_row(row, _label(way), *(_number(_median(iter(column))) for column in columns))
    console.print(table)


def _label(way: Way) -> str:
    """As people read it: a module's options behind its name."""
    names = [
        " ".join([name, *(option.removeprefix("--").replace("=16384", " 16 KiB") for option in options)])
        for name, options in ((way.client, way.client_options), (way.server, way.server_options))
    ]
    return " → ".join(dict.fromkeys(names))


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def where() -> dict[str, Any]:
    """The machine, the versions and the commit: a figure means nothing without them."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "system": platform.platform(),
            "processor": processor or platform.processor(),
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
        },
        "python": platform.python_version(),
        "versions": versions,
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain")),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench wire", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="256 MiB instead of 1 GiB, 500 calls instead of 2000")
    parser.add_argument("--pairs", type=int, default=5, help="of each comparison (default: 5)")
    parser.add_argument("--rows", default=",".join(ROWS), help="which, separated by commas (default: all)")
    parser.add_argument("--size", type=int, help="bytes of a transfer")
    parser.add_argument("--calls", type=int, help="small calls one after another, and again with 64 at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run, the machine and the versions")
    options = parser.parse_args(arguments)
    rows = options.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    if options.pairs < 1:
        parser.error("at least one pair")
    size = options.size or (256 * MIB if options.quick else GIB)
    calls = options.calls or (500 if options.quick else 2000)
    console, notes = Console(), Console(stderr=True)
    absent = {name for name, module in NEEDS.items() if importlib.util.find_spec(module) is None}
    for name in sorted(absent):
        console.print(f"{name} is left out: {NEEDS[name]} is not installed; pip install -e '.\\[bench]'")
    here, measured = where(), list[Comparison]()
    load, cores = here["machine"]["load"][0], here["machine"]["cores"]
    console.print(
        f"Python {here['python']}, {cores} cores, load {load:.1f} before the run, {calls} calls or {size} bytes"
    )
    for row in rows:
        chosen = [
            dataclasses.replace(comparison, runs=[])
            for comparison in ROWS[row]
            if absent.isdisjoint({comparison.ours.client, comparison.peer.client})
        ]
        notes.print(f"{row}: {len(chosen)} comparisons, {options.pairs} pairs each")
        measure(chosen, options.pairs, size, calls)
        measured += chosen
    _show(console if console.is_terminal else Console(width=120), measured)
    console.print("Every transfer was counted by its receiver and checked by its sender.")
    if options.json:
        result = here | {"size": size, "calls": calls, "comparisons": [summary(each) for each in measured]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
