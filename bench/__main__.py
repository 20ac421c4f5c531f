"""`python -m bench [NAME …] [--quick]`: measure on this machine, beside peers that do the same work.

    small    a small job, beside a bare grpcio.aio call
    wire     the transport alone, beside a raw socket, Arrow Flight, grpcio and grpclib
    file     a file to a model and its answer, beside the first version's design and an HTTP upload
    result   a model's file back, beside an HTTP download
    links    jobs over slow links, beside HTTP and a raw socket
    levels   what the client chooses by itself against fixed zstd levels (levels-down: results)
    jobs     1000 jobs at once: heartbeats, CPU, memory
    memory   peak memory for a large payload against that for a small one

Without a NAME all of these, one after the other. A figure is a median over rounds; in each, ours and its peers run in
turn, in alternating order. Printed are the figures, what they cost, and the figures that must be reached. Peers are
the extra `bench`, each in its own processes: pip install -e '.[bench]'. What is not installed is named and left out.

These have options of their own (`python -m bench NAME --help`):

    large    one large file up and back in one call
    disk     the steps on disk of a small job, also beside 100,000 ended ones
    faults   no measurement: jobs under random cuts and kills
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import file, jobs, levels, links, machine, memory, report, result, small, wire
from bench.compare import Comparison, Measured, measure
from bench.options import GIB, Options, count, seconds, size
from bench.required import judge

BENCHMARKS: dict[str, Callable[[Options], list[Comparison]]] = {
    "small": small.comparisons,
    "wire": wire.comparisons,
    "file": file.comparisons,
    "result": result.comparisons,
    "links": links.comparisons,
    "levels": levels.comparisons,
    "jobs": jobs.comparisons,
    "memory": memory.comparisons,
    "levels-down": functools.partial(levels.comparisons, down=True),
}
UNASKED = tuple(BENCHMARKS)[:-1]
PAIRS = {"levels": levels.PAIRS, "levels-down": levels.PAIRS, "memory": memory.PAIRS}  # of others 5
OWN = {"large": "bench.large", "disk": "bench.disk", "faults": "bench.faults.run"}  # with command lines of their own


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="smaller, and two rounds")
    parser.add_argument("--pairs", type=count, help="rounds of each comparison (default: 5, some 3; 2 with --quick)")
    parser.add_argument("--rows", help="which rows, separated by commas (default: all)")
    parser.add_argument("--size", type=size, default=0, help="of a transfer, as 16GiB")
    parser.add_argument("--jobs", type=count, default=0, help="small jobs of a run, or jobs at once")
    parser.add_argument("--seconds", type=seconds, default=0.0, help="that jobs run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run, the machine and the versions")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the ratios, as SVG and PNG")
    parser.add_argument("--require", action="store_true", help="exit with 1 where a required figure is missed")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where spools and answers lie, and data to send, which stay for the next run (default: %(default)s)",
    )
    parser.add_argument("--lock", type=Path, metavar="FILE", help="for each round, where others measure here as well")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(BENCHMARKS)}")
    if options.plots and importlib.util.find_spec("matplotlib") is None:
        parser.error(f"--plots needs matplotlib: {machine.EXTRA}")
    _check_places(parser, options)
    return options


def _check_places(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Now, and not after an hour: what cannot be written."""
    for name, path in (("--json", options.json), ("--lock", options.lock)):
        if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
            parser.error(f"{name}: {path} cannot be written")
    for name, place in (("--directory", options.directory), ("--plots", options.plots)):
        if place is None:
            continue
        try:
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
        except OSError as exc:
            parser.error(f"{name}: {exc}")


def _choose(options: argparse.Namespace, settings: Options) -> list[tuple[str, Comparison]]:
    """What is to be measured. Exits where there is no such row."""
    names = options.names or UNASKED
    chosen = [(name, each) for name in names for each in BENCHMARKS[name](settings)]
    if options.rows is None:
        return chosen
    rows, known = options.rows.split(","), list(dict.fromkeys(each.row for _, each in chosen))
    if unknown := set(rows) - set(known):
        sys.exit(f"python -m bench: no row {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    return [(name, each) for name, each in chosen if each.row in rows]


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in OWN:
        return importlib.import_module(OWN[arguments[0]]).main(list(arguments[1:])) or 0
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # peers end, and what they wrote goes
    console, notes = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=140)
    absent = machine.absent()
    for what, why in absent.items():
        console.print(f"{what} is left out: {why}", markup=False)
    here = machine.describe()
    load, cores = here["machine"]["load"][0], here["machine"]["cores"]
    console.print(f"Python {here['python']}, {cores} cores, load {load:.1f} before the run")
    several: list[Measured] = []
    stopped = _measure(options, set(absent), notes, several)
    if stopped is not None and several:
        notes.print("stopped; this is what was measured before:")
    summaries = [measured.summary() for measured in several]
    judged = judge(summaries)
    smaller = options.quick or 0 < options.size < GIB or options.jobs or options.seconds
    report.show(console, several, judged, smaller=bool(smaller))
    if options.json and several:
        arguments_used = {key: str(value) for key, value in vars(options).items()}
        result: dict[str, Any] = here | {"arguments": arguments_used, "whole": stopped is None}
        result |= {"comparisons": summaries, "required": judged}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plots and several:
        importlib.import_module("bench.plots").draw(summaries, options.plots)
    if isinstance(stopped, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if stopped is not None:
        raise stopped
    if not several:
        sys.exit("python -m bench: nothing was measured: all peers of these rows are left out")
    return status(judged, require=options.require)


def _measure(
    options: argparse.Namespace, absent: set[str], notes: Console, several: list[Measured]
) -> BaseException | None:
    """Measure all that is asked for; what has stopped that, so that nothing is lost which was measured before."""
    data = options.directory / f"aipod-bench-data-{os.getuid()}"
    try:
        with tempfile.TemporaryDirectory(prefix="aipod-bench-", dir=options.directory) as name:
            settings = Options(Path(name), data, options.quick, options.size, options.jobs, options.seconds)
            for benchmark, whole in _choose(options, settings):
                comparison = whole.without(absent)
                if comparison is None:
                    notes.print(f"{benchmark} {whole.row}: left out, with all its peers")
                    continue
                notes.print(f"{benchmark} {comparison.row}: {', '.join(way.name for way in comparison.ways)}")
                rounds = options.pairs or (2 if options.quick else PAIRS.get(benchmark, 5))
                several += measure(benchmark, [comparison], rounds, settings.directory, options.lock)
    except OSError as exc:  # a disk that is full, above all
        return SystemExit(f"python -m bench: {exc} (--directory {options.directory})")
    except (SystemExit, KeyboardInterrupt) as exc:
        return exc
    return None


def status(judged: Sequence[dict[str, Any]], *, require: bool) -> int:
    """What this exits with: machines differ, so a missed figure is a failure only for who asks."""
    return int(require and any(each["reached"] is False for each in judged))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
