"""The figures that must be reached: two cores, both ends on one machine, medians of one run's ratios, defaults.

This is data; `judge` compares it with what was measured. Machines differ, so a figure that is missed is told, and is a
failure only for who asks for that (`--require`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

EVERY = "*"  # as a peer: the one against which ours does worst


@dataclasses.dataclass(frozen=True)
class Bound:
    """One number: of `row` in `benchmark`, against `peer` ("" is none: ours alone)."""

    benchmark: str
    row: str
    peer: str
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    of: str = "ratio"  # or "difference", "median"

    def find(self, summaries: Sequence[dict[str, Any]]) -> float | None:
        """What was measured; None where it was not."""
        for summary in summaries:
            if (summary["benchmark"], summary["row"]) != (self.benchmark, self.row):
                continue
            if not self.peer:
                return _number(summary["ours"], self.figure, self.of)
            peers = list(summary["versus"]) if self.peer == EVERY else [self.peer]
            known = [_number(summary["versus"].get(peer, {}), self.figure, self.of) for peer in peers]
            found = [value for value in known if value is not None]
            return min(found) if found else None
        return None

    def holds(self, value: float) -> bool:
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)

    @property
    def text(self) -> str:
        number = f"at least {self.at_least:.3g}" if self.at_least is not None else f"at most {self.at_most:g}"
        against = "the best" if self.peer == EVERY else self.peer
        if self.of == "difference":
            return f"{self.row}: {number} {self.figure} more than {against}"
        return (
            f"{self.row}: {number} x {against}, {self.figure}" if self.peer else f"{self.row}: {number} {self.figure}"
        )


def _number(figures: dict[str, Any], figure: str, of: str) -> float | None:
    return figures[figure][of] if figure in figures else None


@dataclasses.dataclass(frozen=True)
class Required:
    """`enough` of the bounds must hold; 0 is all."""

    name: str
    means: str
    bounds: tuple[Bound, ...]
    enough: int = 0


def _ratio(benchmark: str, row: str, peer: str, figure: str, at_least: float) -> Bound:
    return Bound(benchmark, row, peer, figure, at_least=at_least)


FIXED = ("-5", "1", "3", "6", "9")  # levels that the adaptive one is measured against
NEAR = 0.85  # of the best
LINKS = ("unshaped", "1 Gbit/s", "100 Mbit/s")
DATA = ("random", "tar", "weights", "json")
GAPS, JOB_MEMORY = "gaps under 1.3 s, %", "KB per job"
CLIENT_PEAK, SERVER_PEAK = "client peak MB", "server peak MB"
P50, P99, JOBS = "p50 ms", "p99 ms", "jobs/s"
SMALL_1, SMALL_64 = "1 at once", "64 at once"

REQUIRED = (
    Required(
        "wire, Flight",
        "one stream of incompressible 1 MiB messages up, 1 GiB, against Arrow Flight DoPut",
        (_ratio("wire", "up", "flight", "MB/s", 1.2),),
    ),
    Required(
        "wire, grpcio or socket",
        "the same against grpcio.aio, or as near to a raw socket",
        (_ratio("wire", "up", "grpcio_aio", "MB/s", 2.5), _ratio("wire", "up", "raw", "MB/s", 0.6)),
        enough=1,
    ),
    Required(
        "stock client",
        "a stock grpcio client sends to our server, 16 KiB frames, against grpcio to grpcio",
        (_ratio("wire", "stock 16 KiB", "grpcio_aio", "MB/s", 1.2),),
    ),
    Required(
        "small, p50",
        "1 KiB up and down, async def on the loop: p50 within 1.5 x of a bare grpcio.aio call",
        (_ratio("small", SMALL_1, "grpcio_aio", P50, 1 / 1.5),),
    ),
    Required(
        "small, jobs/s",
        "the same, jobs a second with 64 at once against the bare call",
        (_ratio("small", SMALL_64, "grpcio_aio", JOBS, 1.0),),
    ),
    Required(
        "small, worker",
        "a warm worker process adds at most 0.3 ms at the median",
        (Bound("small", "worker", "loop", P50, at_most=0.3, of="difference"),),
    ),
    Required(
        "file, random",
        "file to model to answer, 1 GiB random: against the first version's design and the HTTP upload",
        (_ratio("file", "random", "first version", "MB/s", 5), _ratio("file", "random", "HTTP", "MB/s", 1.5)),
    ),
    Required(
        "file, tar",
        "the same, 1 GiB of the real tar, unshaped",
        (_ratio("file", "tar", "first version", "MB/s", 5), _ratio("file", "tar", "HTTP", "MB/s", 1.0)),
    ),
    Required(
        "fair copy",
        "of the harness itself: the copy of the first version's design moves random bytes at 0.15 x plain grpcio.aio",
        (_ratio("file", "fair copy", "grpcio_aio", "MB/s", 0.15),),
    ),
    Required(
        "result",
        "result of 1 GiB to a file, against FileResponse to httpx",
        (_ratio("result", "random", "HTTP", "MB/s", 1.0),),
    ),
    Required(
        "memory",
        "peak memory of server and of client, 16 GiB against 256 MiB: within 10 %, under 150 MB each",
        tuple(
            bound
            for row in ("upload", "result")
            for figure in (CLIENT_PEAK, SERVER_PEAK)
            for bound in (
                _ratio("memory", row, "256 MiB", figure, 1 / 1.1),
                Bound("memory", row, "", figure, at_most=150, of="median"),
            )
        ),
    ),
    Required(
        "1000 jobs",
        "1000 running jobs: 99 % of heartbeat gaps under 1.3 s; 200 KB per job",
        (
            Bound("jobs", "1000 at once", "", GAPS, at_least=99, of="median"),
            Bound("jobs", "1000 at once", "", JOB_MEMORY, at_most=200, of="median"),
        ),
    ),
    Required(
        "the link",
        "of the harness itself: a raw socket through the proxy reaches 95 % of 1 Gbit/s at 50 ms",
        (Bound("links", "raw 1 Gbit/s", "", "of the rate", at_least=0.95, of="median"),),
    ),
    Required(
        "50 ms",
        "a job over 1 Gbit/s and 50 ms: 95 % of a raw socket through the same proxy",
        (_ratio("links", "50 ms", "raw", "MB/s", 0.95),),
    ),
    Required(
        "100 Mbit/s",
        "file to model to answer, the tar at 100 Mbit/s, against the HTTP upload",
        (_ratio("links", "100 Mbit/s tar", "HTTP", "MB/s", 2.0),),
    ),
    Required(
        "levels",
        "the adaptive level within 15 % of the best fixed one, but for one of twelve",
        tuple(_ratio("levels", f"{kind} {link}", EVERY, "MB/s", NEAR) for link in LINKS for kind in DATA),
        enough=len(LINKS) * len(DATA) - 1,
    ),
)


def judge(summaries: Sequence[dict[str, Any]], required: Sequence[Required] = REQUIRED) -> list[dict[str, Any]]:
    """For each required figure: what was measured, and whether it is reached (None: not enough was measured)."""
    judged = []
    for each in required:
        found = [(bound, bound.find(summaries)) for bound in each.bounds]
        enough = each.enough or len(each.bounds)
        held = sum(value is not None and bound.holds(value) for bound, value in found)
        unknown = sum(value is None for _, value in found)
        reached = True if held >= enough else None if held + unknown >= enough else False
        judged.append(
            {
                "name": each.name,
                "means": each.means,
                "bounds": [
                    {"required": bound.text, "measured": value, "holds": None if value is None else bound.holds(value)}
                    for bound, value in found
                ],
                "enough": enough,
                "reached": reached,
            }
        )
    return judged
