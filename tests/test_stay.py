"""A client stays attached to the jobs that it has submitted, so that none is taken for abandoned while it is open."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import aipod
from tests.conftest import Serve, free_port, run
from tests.proxy import open_proxy

MODEL = "tests.models_faults:Counted"
# What gives up after a moment: a second or two are as good as ten minutes then.
HASTY = aipod.Config(reconnect=0.2, attempts=1)


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_it_comes_back_after_any_time_and_ends_with_the_job(serve: Serve, tmp_path: Path) -> None:
    """Mutant seen: it goes when whoever waits gives up."""
    served = serve(MODEL, "--tick", "0.1")
    kwargs = {"mark": str(tmp_path / "mark"), "gate": str(tmp_path / "gate")}

    async def main() -> None:
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address, config=HASTY) as client:
            job = await client.submit("gated", b"x", **kwargs)
            for _ in range(2):
                before = proxy.connections
                proxy.switch(free_port())
                for _ in range(2):
                    with pytest.raises(aipod.JobLost):
                        await job.wait()
                await until(lambda before=before: proxy.connections > before + 3)
                assert len(client._link._watches) == 1
                proxy.switch(served.port)
                before = proxy.connections
                await until(lambda before=before: proxy.connections > before and proxy.down > 300)
            (tmp_path / "gate").touch()
            await until(lambda: not client._link._watches)
            assert (await job.wait())["size"] == 1

    run(main)
    assert (tmp_path / "mark").read_text().count("run") == 1


def test_it_ends_where_the_job_is_not_found_any_more(serve: Serve, tmp_path: Path) -> None:
    """Mutant seen: NOT_FOUND is taken for one more reason to come back."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (serve(MODEL, "--tick", "0.1", directory=tmp_path / name) for name in ("one", "two"))
    kwargs = {"mark": str(tmp_path / "mark"), "gate": str(tmp_path / "gate")}

    async def main() -> None:
        async with open_proxy(one.port) as proxy, aipod.Client(proxy.address, config=HASTY) as client:
            job = await client.submit("gated", b"x", **kwargs)
            proxy.switch(two.port)
            await until(lambda: not client._link._watches)
            proxy.switch(one.port)
            (tmp_path / "gate").touch()
            assert (await job.wait())["size"] == 1

    run(main)
