"""`memory`: peak memory of server and client for a large payload (or result) against one of 256 MiB.

Each way has a server of its own, so a peak is of that size alone; workers are told apart. 2 GiB by itself; 16 GiB with
`--size 16GiB`, which takes as much room for the file, the spool, and the result. The table of costs has the CPU seconds
for a GiB.
"""

from __future__ import annotations

import dataclasses

from bench import data
from bench.compare import RATE, Comparison, Figure
from bench.file import PRODUCT
from bench.options import GIB, MIB, Options
from bench.required import CLIENT_PEAK, SERVER_PEAK

SMALL = 256 * MIB
FIGURES = (
    Figure(CLIENT_PEAK, lambda run: run["client_peak_mb"], more_is_better=False),
    Figure(SERVER_PEAK, lambda run: run["server_peak_mb"], more_is_better=False),
    RATE,
)
PAIRS = 3


def comparisons(options: Options) -> list[Comparison]:
    size = options.size or (512 * MIB if options.quick else 2 * GIB)
    large, small = (data.make("random", each, options.data) for each in (size, min(SMALL, size)))
    answers = data.described(large), data.described(small)
    ours = dataclasses.replace(PRODUCT, apart=True)
    rows = []
    for row, command, rest in (("upload", "file", ()), ("result", "result", ("{dir}/answer",))):
        peer = dataclasses.replace(ours, name="256 MiB", arguments=(str(small), *rest))
        arguments = (str(large), *rest)
        rows.append(Comparison(row, command, arguments, ours, (peer,), FIGURES, writes=size, answers=answers))
    return rows
