"""`small`: what a small job costs, 1 KiB up and 1 KiB down, beside a bare grpcio.aio call with the same bytes.

A job is taken, kept in the spool, run and answered so that no kill of anybody loses it or runs it twice; the bare call
does none of that. `ours bare` is our transport without it, for information. p50 and p99 of one job as its caller sees
it, jobs a second, with 1, 8 and 64 under way on one connection; CPU per 1000 jobs.

    loop       an `async def` in the server's process: the row that is required
    worker     a plain method in a warm worker process (one, so 64 at once stand in line), against `loop`
"""

from __future__ import annotations

from bench.compare import Comparison, Figure, Way, same
from bench.options import Options
from bench.required import JOBS, P50, P99, SMALL_1, SMALL_64

FIGURES = (
    Figure(P50, lambda run: run["p50"] * 1e3, more_is_better=False),
    Figure(P99, lambda run: run["p99"] * 1e3, more_is_better=False),
    Figure(JOBS, lambda run: run["rate"]),
)
LOOP = Way("loop", "product", "product", (), ("--model=OnLoop", "--directory={dir}"))
WORKER = Way("worker", "product", "product", (), ("--model=InWorker", "--directory={dir}"))
GRPCIO = same("grpcio_aio", "grpcio_aio", "--stock")
BARE = same("ours bare", "ours")


def comparisons(options: Options) -> list[Comparison]:
    count = options.jobs or (500 if options.quick else 3000)
    rows = [
        Comparison(row, "calls", (str(count), str(at_once)), LOOP, (GRPCIO, BARE), FIGURES)
        for row, at_once in ((SMALL_1, 1), ("8 at once", 8), (SMALL_64, 64))
    ]
    rows.append(Comparison("worker", "calls", (str(count), "1"), WORKER, (LOOP, GRPCIO), FIGURES))
    rows.append(Comparison("worker 64 at once", "calls", (str(count), "64"), WORKER, (LOOP, GRPCIO), FIGURES))
    return rows
