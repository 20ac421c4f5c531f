"""`python tests/two_servers.py DIRECTORY`: an application that serves a class twice, and asks each for its numbers."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import trio

import aipod
from tests import scrape, stranger

DIRECTORY = Path(sys.argv[1])


def look() -> object:
    root = logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in ("aipod", "grpclib", "hpack", "asyncio", "trio")}
    return root.level, [type(handler) for handler in root.handlers], levels


class Places(logging.Handler):
    """Where the servers say that their metrics are."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "aipod.metrics":
            self.found.append(record.getMessage().removeprefix("metrics are at http://").removesuffix("/metrics"))


async def main() -> None:
    places = Places()
    logging.getLogger("aipod.metrics").addHandler(places)
    logging.getLogger("aipod.metrics").setLevel(logging.INFO)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        addresses = []
        for name in ("a", "b"):
            config = aipod.Config(
                model="aipod.examples.basics:Echo",
                bind=("127.0.0.1:0",),
                metrics="127.0.0.1:0",
                spool=str(DIRECTORY / name / "spool"),
                data=str(DIRECTORY / name / "data"),
                reserve=0,
            )
            addresses += await nursery.start(lambda config, task_status: serve(
                config, stop=stop, task_status=task_status), config)  # fmt: skip
        for address, count in zip(addresses, (1, 2), strict=True):
            for _ in range(count):
                reply = await trio.to_thread.run_sync(stranger.ask, address, "predict")
                reply.json()
        with trio.fail_after(20):
            while len(places.found) < 2:
                await trio.sleep(0.01)
        found = [await trio.to_thread.run_sync(scrape.Scrape, place) for place in places.found]
        print(*(int(one['aipod_jobs_ended_total{method="predict",outcome="done"}']) for one in found))
        stop.set()


serve = aipod.serve  # imported: from then on hpack does not log headers unless the application wants that
before = look()
trio.run(main)
assert look() == before, (before, look())
