"""The one way to say a comparison, and to run it.

A `Comparison` is a row of a benchmark: what is done (a command of every client, with its arguments), our way to do it,
its peers', and the figures that are compared. A round runs each way once, in turn, the next round in the other order,
so that a machine whose speed drifts slows all. Before a run that writes files nothing is left of the one before: what
it wrote is on the disk, what it removed has been given back (a server may do that when it has answered), and its
servers rest. Where files are large, a round that does not count goes before. A ratio is of the two runs of one round,
and says how many times better ours is; it is quoted as the median over the rounds with its spread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.pages import WORTH, Filler
from bench.processes import Failed, Run, Server, run_client

LOOK = 0.1  # seconds between two looks at whether the last run has left nothing
SETTLE = 10.0  # seconds for that, at most
BUSY = 0.025  # CPU seconds of a server between two looks: two of the system's ticks, but not three
GIVEN_BACK = 256  # blocks of the disk, a MiB as a rule: others on this machine remove files too

Hop = tuple[str, tuple[str, ...]]  # a peer that is between, with its options
Rest = tuple[int, list[float]]  # free blocks of the disk, and the CPU seconds of each server


@dataclasses.dataclass(frozen=True)
class Way:
    """A client and a server, by the names of their modules below bench.peers, and what is said to each.

    `hop` is what the client reaches instead of the server: a process that is told `--to=PORT`. In options `{dir}` is
    a directory of the server's, or the client's, own; all are below the same one. In arguments `{server}` is the
    server's pid. `command` and `arguments` replace the comparison's, where this peer has other words for the same work.
    `apart`: has servers of its own, though another way has the same.
    """

    name: str
    client: str
    server: str
    client_options: tuple[str, ...] = ()
    server_options: tuple[str, ...] = ()
    hop: Hop | None = None
    command: str = ""
    arguments: tuple[str, ...] | None = None
    apart: bool = False

    @property
    def modules(self) -> set[str]:
        return {self.client, self.server} | ({self.hop[0]} if self.hop else set())


def same(name: str, module: str, *options: str, hop: Hop | None = None) -> Way:
    """One module, with the same options, at both ends."""
    return Way(name, module, module, options, options, hop)


@dataclasses.dataclass(frozen=True)
class Figure:
    name: str
    of: Callable[[Run], float]
    more_is_better: bool = True

    def ratio(self, ours: Run, peer: Run) -> float:
        """How many times better ours is."""
        a, b = self.of(ours), self.of(peer)
        return a / b if self.more_is_better else b / a


RATE = Figure("MB/s", lambda run: run["bytes"] / run["seconds"] / 1e6)


@dataclasses.dataclass(frozen=True)
class Comparison:
    row: str
    command: str
    arguments: tuple[str, ...]
    ours: Way
    peers: tuple[Way, ...]
    figures: tuple[Figure, ...] = (RATE,)
    fresh: bool = False  # each round has new servers: what one holds on to would be counted in the next
    writes: int = 0  # bytes, to files; then the disk has what was written before, and memory is full (`pages`)
    answers: tuple[Any, ...] = ()  # what every run must have been answered, one of them; none where nobody knows

    @property
    def ways(self) -> tuple[Way, ...]:
        return self.ours, *self.peers

    def without(self, absent: set[str]) -> Comparison | None:
        """What is left of it without the modules that cannot run here; None where that is nothing."""
        if self.ours.modules & absent:
            return None
        left = tuple(way for way in self.peers if not way.modules & absent)
        return dataclasses.replace(self, peers=left) if left or not self.peers else None


class Measured:
    """A comparison and its runs: a list of rounds, each with one run for each way's name."""

    def __init__(self, benchmark: str, comparison: Comparison) -> None:
        self.benchmark = benchmark
        self.comparison = comparison
        self.rounds: list[dict[str, Run]] = []

    def runs(self, way: Way) -> list[Run]:
        return [each[way.name] for each in self.rounds]

    def summary(self) -> dict[str, Any]:
        """For each peer and each figure: medians of both sides, and of the rounds' ratios with their spread."""
        comparison, versus = self.comparison, {}
        ours = self.runs(comparison.ours)
        for peer in comparison.peers:
            pairs = list(zip(ours, self.runs(peer), strict=True))
            versus[peer.name] = {figure.name: _compare(figure, pairs) for figure in comparison.figures}
        return {
            "benchmark": self.benchmark,
            "row": comparison.row,
            "command": comparison.command,
            "ways": [dataclasses.asdict(way) for way in comparison.ways],
            "ours": {
                figure.name: {
                    "median": statistics.median(map(figure.of, ours)),
                    "min": min(map(figure.of, ours)),
                    "max": max(map(figure.of, ours)),
                }
                for figure in comparison.figures
            },
            "versus": versus,
            "rounds": self.rounds,
        }


def _compare(figure: Figure, pairs: list[tuple[Run, Run]]) -> dict[str, float]:
    ratios = [figure.ratio(*pair) for pair in pairs]
    return {
        "ours": statistics.median(figure.of(ours) for ours, _ in pairs),
        "peer": statistics.median(figure.of(peer) for _, peer in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "difference": statistics.median(figure.of(ours) - figure.of(peer) for ours, peer in pairs),
    }


class Bed:
    """The servers of some ways, each started when it is first needed; all end with the `with`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = contextlib.ExitStack()
        self._servers: dict[Any, Server] = {}
        self._filler = self._stack.enter_context(Filler(directory))

    def __enter__(self) -> Bed:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    def _server(self, key: Any, name: str, options: Iterable[str]) -> Server:
        if key not in self._servers:
            server = self._servers[key] = Server(name, self._placed(options))
            self._stack.callback(server.stop)
        return self._servers[key]

    def _placed(self, options: Iterable[str]) -> list[str]:
        """`options` with a directory of their own in place of `{dir}`."""
        options = list(options)
        if any("{dir}" in option for option in options):
            own = self._stack.enter_context(tempfile.TemporaryDirectory(dir=self._directory))
            options = [option.replace("{dir}", own) for option in options]
        return options

    def _settle(self) -> None:
        """Wait until nobody pays for what another has written or still removes: nothing changes from look to look."""
        before, until = None, time.monotonic() + SETTLE
        while True:
            os.sync()
            cpu = [sum(server.times().values()) for server in self._servers.values()]
            now = os.statvfs(self._directory).f_bfree, cpu
            if before is not None and _rests(before, now):
                return
            if time.monotonic() > until:
                return  # others write on this disk, or something that is measured never rests
            before = now
            time.sleep(LOOK)

    def run(self, comparison: Comparison, way: Way) -> Run:
        """One run by a fresh client. Raises `Failed` where it was not answered what it should."""
        key = (way.server, way.server_options, way.name if way.apart else "")
        server = front = self._server(key, way.server, way.server_options)
        if way.hop is not None:
            name, options = way.hop
            front = self._server((way.hop, *key), name, [f"--to={server.port}", *options])
        if comparison.writes:
            self._settle()
        if comparison.writes >= WORTH:
            self._filler.fill()
        command = way.command or comparison.command
        arguments = comparison.arguments if way.arguments is None else way.arguments
        with tempfile.TemporaryDirectory(dir=self._directory) as own:
            arguments = tuple(argument.replace("{dir}", own) for argument in arguments)
            arguments = tuple(argument.replace("{server}", str(server.pid)) for argument in arguments)
            before = server.times(), front.times()
            run = run_client(way.client, [command, front.port, *arguments, *way.client_options])
            after = server.times(), front.times()
        run |= {f"server_{name}": after[0][name] - before[0][name] for name in after[0].keys() & before[0].keys()}
        if front is not server:
            run["hop_cpu"] = sum(after[1].values()) - sum(before[1].values())
        run |= {f"server_{name}": value for name, value in server.peaks().items()}
        if comparison.answers and "answer" in run and run["answer"] not in comparison.answers:
            raise Failed(f"{comparison.row}, {way.name}: the answer is {run['answer']}, not {comparison.answers}")
        return run


def _rests(before: Rest, now: Rest) -> bool:
    """Whether what a peer removes, or still does, cannot be seen any more."""
    given_back = now[0] - before[0]
    return given_back <= GIVEN_BACK and all(b - a <= BUSY for a, b in zip(before[1], now[1], strict=True))


@contextlib.contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """With the exclusive lock of a file (flock), where others measure on this machine as well."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measure(
    benchmark: str, comparisons: list[Comparison], rounds: int, directory: Path, lock: Path | None = None
) -> Iterator[Measured]:
    """All rounds of one comparison after the other; each of them holds `lock`."""
    for comparison in comparisons:
        measured = Measured(benchmark, comparison)
        with contextlib.ExitStack() as stack:
            bed = stack.enter_context(Bed(directory))
            if comparison.writes >= WORTH and not comparison.fresh:
                with alone(lock):
                    for way in comparison.ways:  # the first to write pays for memory that was cold: nobody's figure
                        bed.run(comparison, way)
            for number in range(rounds):
                order = comparison.ways if number % 2 == 0 else comparison.ways[::-1]
                with alone(lock):
                    measured.rounds.append({way.name: bed.run(comparison, way) for way in order})
                if comparison.fresh:
                    stack.close()
                    bed = stack.enter_context(Bed(directory))
        yield measured
