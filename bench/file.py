"""`file`: a file to a model and its answer back, as whole jobs: aipod, its first version's design, an HTTP upload.

At all peers the model gets the path of a file on the disk, reads it all and answers size and digest (`bench.models`),
which the harness checks. `bench/peers/` says how each is tuned. Everything lies on one disk (--directory).

Page cache: the harness has read the file before, and runs `sync` before each run, so nobody reads from the disk or
pays for what another has written. Durability: aipod syncs a payload once it has 64 MiB of it, or for a second; the HTTP
server syncs payloads of 64 MiB and more, once, before the model gets them; the first version's design syncs nothing.

    random, tar, weights, json    1 GiB of that kind
    random 1 KiB, 1 MiB, 32 MiB   smaller ones
    nginx random, nginx tar       through a real nginx
    fair copy                     the first version's design against plain grpcio.aio, which moves as many random bytes
                                  in messages of 1 MiB and does nothing with them: at 0.15 x it is no caricature
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from aipod.spool import SYNC_BYTES
from bench import data
from bench.compare import Comparison, Way
from bench.options import GIB, MIB, Options
from bench.wire import GRPCIO

PRODUCT = Way("aipod", "product", "product", (), ("--model=InWorker", "--directory={dir}"))
FIRST = Way("first version", "first", "first", (), ("--directory={dir}",))
WEB = Way("HTTP", "web", "web", (), ("--directory={dir}", f"--sync-from={SYNC_BYTES}"))
SMALLER = (("1 KiB", 1024), ("1 MiB", MIB), ("32 MiB", 32 * MIB))


def send(row: str, path: Path, ours: Way, *peers: Way) -> Comparison:
    """One file; every model must say of it what `data` says."""
    return Comparison(
        row, "file", (str(path),), ours, peers, writes=path.stat().st_size, answers=(data.described(path),)
    )


def behind_nginx(way: Way, kind: str) -> Way:
    return dataclasses.replace(way, hop=("nginx", (f"--kind={kind}",)))


def comparisons(options: Options) -> list[Comparison]:
    size = options.size or (64 * MIB if options.quick else GIB)
    paths = {kind: data.make(kind, size, options.data) for kind in data.kinds()}
    rows = [send(kind, path, PRODUCT, FIRST, WEB) for kind, path in paths.items()]
    for name, smaller in SMALLER:
        if smaller < size:
            path = data.make("random", smaller, options.data)
            rows.append(send(f"random {name}", path, PRODUCT, WEB, *([FIRST] if smaller == MIB else [])))
    for kind in ("random", "tar"):
        ways = behind_nginx(PRODUCT, "grpc"), behind_nginx(WEB, "http")
        rows.append(send(f"nginx {kind}", paths[kind], *ways))
    plain = dataclasses.replace(GRPCIO, command="send", arguments=(str(size), str(min(size, MIB))))
    rows.append(send("fair copy", paths["random"], FIRST, plain))
    return rows
