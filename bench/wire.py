"""`wire`: what the transport costs, beside its peers.

    up, down      one stream of incompressible 1 MiB messages: raw socket, Arrow Flight, grpcio.aio, grpclib, ours
    up16, down16  the same with HTTP/2 frames of 16 KiB, the default of every stock peer and nginx's only size
    stock         stock clients sending to our server, against the same clients sending to their own servers
    calls         two small messages up and one down: p50, p99, and calls/s with 64 at once

Each client and each server is a process of its own (`bench/peers/`); a server stays for its row, every run has a fresh
client. Every transfer is counted by its receiver and checked by its sender.
"""

from __future__ import annotations

from bench.compare import Comparison, Figure, Way, same
from bench.options import GIB, MIB, Options
from bench.required import P50, P99

CALLS = (
    Figure(P50, lambda run: run["p50"] * 1e3, more_is_better=False),
    Figure(P99, lambda run: run["p99"] * 1e3, more_is_better=False),
    Figure("calls/s, 64 at once", lambda run: run["rate"]),
)

OURS, OURS_16 = same("ours", "ours"), same("ours", "ours", "--frame=16384")
RAW, FLIGHT, GRPCIO = same("raw", "raw"), same("flight", "flight"), same("grpcio_aio", "grpcio_aio")
GRPCIO_STOCK, GRPCIO_SYNC = same("grpcio_aio", "grpcio_aio", "--stock"), same("grpcio_sync", "grpcio_sync")
GRPCLIB = same("grpclib_stock", "grpclib_stock")


def _to_ours(peer: Way, *options: str) -> Way:
    """The client of `peer`, our server."""
    return Way("ours", peer.client, "ours", peer.client_options, options)


def comparisons(options: Options) -> list[Comparison]:
    total = options.size or (256 * MIB if options.quick else GIB)
    count = options.jobs or (500 if options.quick else 2000)
    transfer = (str(total), str(min(total, MIB)))

    def move(row: str, command: str, ours: Way, *peers: Way) -> Comparison:
        return Comparison(row, command, transfer, ours, peers)

    # Stock grpcio and grpclib announce frames of 16 KiB and send what the other side allows: to our server 512 KiB.
    small_frames = "--frame=16384"
    return [
        move("up", "send", OURS, RAW, FLIGHT, GRPCIO, GRPCLIB),
        move("down", "receive", OURS, RAW, FLIGHT, GRPCIO, GRPCLIB),
        move("up16", "send", OURS_16, GRPCIO_STOCK, GRPCLIB),
        move("down16", "receive", OURS_16, GRPCIO_STOCK, GRPCLIB),
        move("stock", "send", _to_ours(GRPCIO_STOCK), GRPCIO_STOCK),
        move("stock 16 KiB", "send", _to_ours(GRPCIO_STOCK, small_frames), GRPCIO_STOCK),
        move("stock sync", "send", _to_ours(GRPCIO_SYNC), GRPCIO_SYNC),
        move("stock sync 16 KiB", "send", _to_ours(GRPCIO_SYNC, small_frames), GRPCIO_SYNC),
        move("stock grpclib 16 KiB", "send", _to_ours(GRPCLIB, small_frames), GRPCLIB),
        Comparison("calls", "small", (str(count),), OURS, (GRPCLIB, GRPCIO_STOCK), CALLS),
    ]
