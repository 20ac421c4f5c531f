"""`links`: whole jobs over slow links, beside HTTP and a raw socket over the same ones.

The link is `bench/peers/link.py`, a process of its own, whose CPU is told ("between" in the table of costs).

    proxy            a raw socket through it without a rate: what it can carry
    raw 1 Gbit/s     a raw socket at 1 Gbit/s and 50 ms, as a part of the rate: below 95 % nothing that follows counts
    50 ms            1 Gbit/s and a round trip of 50 ms, 1 GiB of random bytes, against the raw socket and HTTP
    50 ms tar        the same with the tar, against HTTP
    50 ms result     a result over that link, against HTTP
    100 Mbit/s tar   100 Mbit/s and a round trip of 20 ms, the tar, against HTTP
"""

from __future__ import annotations

import dataclasses

from bench import data
from bench.compare import RATE, Comparison, Figure, Hop, Way
from bench.file import PRODUCT, WEB, send
from bench.options import GIB, MIB, Options
from bench.result import fetch
from bench.wire import RAW

UNSHAPED: Hop = ("link", ())
GIGABIT_FAR: Hop = ("link", ("--rate=1000000000", "--rtt=0.05"))
MEGABITS: Hop = ("link", ("--rate=100000000", "--rtt=0.02"))
OF_THE_RATE = Figure("of the rate", lambda run: run["bytes"] / run["seconds"] * 8 / 1e9)


def through(way: Way, hop: Hop) -> Way:
    return dataclasses.replace(way, hop=hop)


def comparisons(options: Options) -> list[Comparison]:
    size = options.size or (64 * MIB if options.quick else GIB)
    random, tar = (data.make(kind, size, options.data) for kind in ("random", "tar"))
    transfer = (str(size), str(min(size, MIB)))
    raw = dataclasses.replace(RAW, command="send", arguments=transfer)
    web, product = through(WEB, GIGABIT_FAR), through(PRODUCT, GIGABIT_FAR)
    return [
        Comparison("proxy", "send", transfer, through(RAW, UNSHAPED), ()),
        Comparison("raw 1 Gbit/s", "send", transfer, through(RAW, GIGABIT_FAR), (), (OF_THE_RATE, RATE)),
        send("50 ms", random, product, through(raw, GIGABIT_FAR), web),
        send("50 ms tar", tar, product, web),
        fetch("50 ms result", random, product, web),
        send("100 Mbit/s tar", tar, through(PRODUCT, MEGABITS), through(WEB, MEGABITS)),
    ]
