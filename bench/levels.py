"""`levels`: what the client chooses by itself against fixed zstd levels, on four kinds of data and three links.

`adaptive` is the client as it is by default; the others are `Config(level=...)`. One row for each kind and link, whole
jobs of 128 MiB as in `file`: unshaped (no proxy at all), 1 Gbit/s with a round trip of 2 ms (a machine room), 100
Mbit/s with 20 ms (an office). Of each row the worst ratio counts: that against the best of the fixed levels.
`levels-down` is the same for results, whose level is the server's.
"""

from __future__ import annotations

import dataclasses

from bench import data
from bench.compare import Comparison, Hop, Way
from bench.file import PRODUCT, send
from bench.links import MEGABITS
from bench.options import MIB, Options
from bench.required import FIXED, LINKS
from bench.result import fetch

PAIRS = 3
HOPS: dict[str, Hop | None] = dict(
    zip(LINKS, (None, ("link", ("--rate=1000000000", "--rtt=0.002")), MEGABITS), strict=True)
)
ADAPTIVE = dataclasses.replace(PRODUCT, name="adaptive")


def _up(level: str) -> Way:
    return dataclasses.replace(PRODUCT, name=level, client_options=(f"--level={level}",))


def _down(level: str) -> Way:
    return dataclasses.replace(PRODUCT, name=level, server_options=(*PRODUCT.server_options, f"--level={level}"))


def comparisons(options: Options, *, down: bool = False) -> list[Comparison]:
    size = options.size or (8 * MIB if options.quick else 128 * MIB)
    fixed = [_down(level) if down else _up(level) for level in FIXED]
    rows = []
    for link, hop in HOPS.items():
        ways = [dataclasses.replace(way, hop=hop) for way in (ADAPTIVE, *fixed)]
        for kind in data.kinds():
            path = data.make(kind, size, options.data)
            rows.append((fetch if down else send)(f"{kind} {link}", path, *ways))
    return rows
