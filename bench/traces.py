"""Record what the sender of a file is told about its batches: the data of a test (tests/levels_traces.json).

    python -m bench.traces FILE [--kinds tar,json] [--links "1 Gbit/s"] [--levels auto,stored,1]

There is an upload for each kind of data, each link and each level: one level for all batches, or what `Levels` chooses
(auto). What is in FILE already stays, unless it is recorded again. A row is a batch: level, bytes, bytes on the wire,
microseconds of packing, of sending and of waiting, and by how many more bytes than before have not arrived (`Batch`).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aipod import Client, packing
from aipod.levels import LADDER, Batch, Levels
from bench import data
from bench.file import PRODUCT
from bench.levels import HOPS
from bench.options import MIB, size
from bench.processes import Server

Row = list[int | None]


class Recorder(Levels):
    """Notes what it is told. `fixed`: names the level of all batches; "auto" is none."""

    fixed = "auto"
    rows: list[Row]  # of the newest one

    def __init__(self) -> None:
        super().__init__()
        Recorder.rows = self._rows = []
        if self.fixed != "auto":
            self.level, self.is_settled = LADDER[LEVELS.index(self.fixed)], True

    def sent(self, batch: Batch) -> None:
        *counts, packing, sending, waiting, held = dataclasses.astuple(batch)
        self._rows.append([*counts, *(round(each * 1e6) for each in (packing, sending, waiting)), held])
        if self.fixed == "auto":
            super().sent(batch)


LEVELS = ["stored" if level is None else str(level) for level in LADDER]


async def _upload(port: str, path: Path) -> None:
    async with Client(f"127.0.0.1:{port}") as client:
        await client.predict(b"warm")
        await client.predict(path)


def record(path: Path, link: str, levels: Sequence[str]) -> Iterator[tuple[str, list[Row]]]:
    with tempfile.TemporaryDirectory() as own:
        servers = [Server(PRODUCT.server, [option.replace("{dir}", own) for option in PRODUCT.server_options])]
        try:
            if (hop := HOPS[link]) is not None:
                servers.append(Server(hop[0], [f"--to={servers[0].port}", *hop[1]]))
            for Recorder.fixed in levels:
                asyncio.run(_upload(servers[-1].port, path))
                yield Recorder.fixed, Recorder.rows
        finally:
            for server in servers:
                server.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--kinds", default=",".join(data.KINDS))
    parser.add_argument("--links", default=",".join(HOPS))
    parser.add_argument("--levels", default=",".join(LEVELS))
    parser.add_argument("--size", type=size, default=64 * MIB)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where data lie")
    options = parser.parse_args(arguments)
    packing.Levels = Recorder  # type: ignore[misc]  # what every Packer makes
    place = options.directory / f"aipod-bench-data-{os.getuid()}"
    traces: dict[str, Any] = json.loads(options.file.read_text()) if options.file.exists() else {}
    for kind in options.kinds.split(","):
        path = data.make(kind, options.size, place)
        for link in options.links.split(","):
            for level, rows in record(path, link, options.levels.split(",")):
                traces.setdefault(f"{kind} {link}", {})[level] = rows
    lines = (f"{json.dumps(name)}: {json.dumps(levels, separators=(',', ':'))}" for name, levels in traces.items())
    options.file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
