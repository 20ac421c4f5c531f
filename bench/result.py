"""`result`: a file of the model's to a file of the caller's, against Starlette's FileResponse to httpx.

At both servers the file is there already, and both clients write what comes to a new file; the harness compares its
digest. Nobody syncs: aipod's server has only a link to make before it sends.

    random, tar     1 GiB of that kind
    nginx random    through a real nginx
"""

from __future__ import annotations

from pathlib import Path

from bench import data
from bench.compare import Comparison, Way
from bench.file import PRODUCT, WEB, behind_nginx
from bench.options import GIB, MIB, Options


def fetch(row: str, path: Path, ours: Way, *peers: Way) -> Comparison:
    arguments = (str(path), "{dir}/answer")
    return Comparison(
        row, "result", arguments, ours, peers, writes=path.stat().st_size, answers=(data.described(path),)
    )


def comparisons(options: Options) -> list[Comparison]:
    size = options.size or (64 * MIB if options.quick else GIB)
    paths = {kind: data.make(kind, size, options.data) for kind in ("random", "tar")}
    rows = [fetch(kind, path, PRODUCT, WEB) for kind, path in paths.items()]
    rows.append(fetch("nginx random", paths["random"], behind_nginx(PRODUCT, "grpc"), behind_nginx(WEB, "http")))
    return rows
