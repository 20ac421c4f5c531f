"""A line on which one chunk takes longer than either side waits for a sign of the other."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from pathlib import Path

import aipod
from aipod.config import CHUNK
from tests.conftest import Serve, run
from tests.proxy import open_proxy

# Seconds that a chunk takes, and that each side waits. A read of half a chunk, for which the system is told to wait,
# takes longer than any of them waits twice.
TAKES, PATIENCE = 14.0, 2.0
SEEDED = [("x-func-name", "seeded")]


def test_a_chunk_that_takes_long_is_waited_for_as_long_as_some_of_it_comes(serve: Serve, tmp_path: Path) -> None:
    """Else it is sent again and again: lines below 70 KB/s could download nothing, those below 17 KB/s upload nothing,
    and neither could calls that share more.

    The answer to a PING waits behind it, too. Mutants seen: on either side a part of a message is none; what the system
    holds back (SO_RCVLOWAT) is none; a PING has its time, whatever comes.
    """
    pings = "--ping-interval", "0.5", "--ping-timeout", str(PATIENCE)
    served = serve("tests.models_faults:Counted", "--upload-stall", str(PATIENCE), *pings)
    config = aipod.Config(silence=PATIENCE, ping_interval=0.5, ping_timeout=PATIENCE)
    payload = tmp_path / "payload"
    payload.write_bytes(os.urandom(CHUNK))
    told = {"size": CHUNK, "sha256": hashlib.sha256(payload.read_bytes()).hexdigest()}

    async def main() -> None:
        async with open_proxy(served.port) as proxy, asyncio.timeout(100):
            proxy.rate = CHUNK / TAKES
            async with aipod.Client(proxy.address, config=config) as up:
                async with aipod.Client(proxy.address, config=config) as down:
                    async with asyncio.TaskGroup() as group:
                        uploaded = group.create_task(up.chaos(payload))
                        answer = group.create_task(down.chaos(metadata=SEEDED, length=CHUNK))
            assert proxy.connections == 2
        assert uploaded.result() == told
        assert answer.result() == random.Random(0).randbytes(CHUNK)

    run(main)
