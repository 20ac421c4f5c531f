"""The client under uvloop, which most web servers for asyncio use."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

import aipod
from aipod import Config
from tests.conftest import FIRST, Serve
from tests.proxy import Fault, open_proxy
from tests.test_tls import make_files

MIB = 1024 * 1024


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
        async with asyncio.timeout(60):
            await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())


@pytest.mark.parametrize("tls", [False, True] if FIRST else [False])
def test_payload_and_answer_are_whole(serve: Serve, tmp_path: Path, tls: bool) -> None:
    """Through cuts as well, of both. Mutant seen: as a subclass of grpclib's protocol no call is ever answered."""
    options: tuple[str, ...] = ()
    config = Config()
    if tls:
        files = make_files(tmp_path)
        options = ("--tls-cert", files.server)
        config = Config(tls=True, tls_ca=files.ca)
    served = serve("aipod.examples.basics:Echo", *options)
    data = os.urandom(4 * MIB)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 300_000):
            yield data[start : start + 300_000]

    async def main() -> None:
        faults = [Fault(cut_up=2 * MIB), Fault(cut_down=1 * MIB)]
        async with (
            open_proxy(served.port, *faults) as proxy,
            aipod.Client(f"localhost:{proxy.port}", config=config) as client,
        ):
            saved = await client.chaos(pieces(), metadata=[("x-func-name", "echo")], save_to=tmp_path / "answer")
            assert (proxy.connections, saved.read_bytes() == data) == (3, True)
            answers = await asyncio.gather(*(client.predict(b"%d" % number) for number in range(30)))
            assert len(set(answers)) == 30

    run(main)
