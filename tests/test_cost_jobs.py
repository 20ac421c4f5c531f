"""What a job costs while it only runs: memory on both sides, and nothing that waits beside its caller's task."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tracemalloc
from pathlib import Path

import aipod
from aipod.client import Event
from tests.conftest import Serve, run

MODEL = "tests.models_waiting:Waiting"
JOBS = 300
CLIENTS = 3
# 60 KB and 20 KB were measured.
SERVER_KB = 200
CLIENT_KB = 50


def resident(pid: int) -> int:
    """KB of memory that a process has now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def test_many_jobs_at_once_are_heard_of_and_cost_little(serve: Serve, tmp_path: Path) -> None:
    """Mutants seen: a call keeps 100 KB; a job keeps 300 KB; who watches is a task beside its caller."""
    served = serve(MODEL, "--concurrency", str(JOBS + 1), "--max-queued", str(JOBS + 1))
    gate = tmp_path / "gate"
    beats = [0] * JOBS

    async def main() -> tuple[float, float, int]:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(aipod.Client(served.address)) for _ in range(CLIENTS)]

            def note(number: int, event: Event) -> None:
                beats[number] += event.phase == "RUNNING"

            async def one(number: int, until: str) -> None:
                client = clients[number % CLIENTS]
                assert await client.chaos(b"x" * 1024, until=until, on_event=lambda event: note(number, event)) == 1024

            await asyncio.gather(*(one(number, "") for number in range(30)))  # it has its threads
            beats[:] = [0] * JOBS
            gc.collect()
            server = resident(served.process.pid)
            tracemalloc.start()
            own = asyncio.all_tasks()
            callers = [asyncio.create_task(one(number, str(gate))) for number in range(JOBS)]
            try:
                while min(beats) < 3:
                    await asyncio.sleep(0.1)
                gc.collect()
                client, server = tracemalloc.get_traced_memory()[0], resident(served.process.pid) - server
                beside = len(asyncio.all_tasks() - own - set(callers))
            finally:
                tracemalloc.stop()
                gate.touch()
            await asyncio.gather(*callers)
            return server / JOBS, client / 1024 / JOBS, beside

    server, client, beside = run(main, timeout=90)
    assert beside == 0
    assert client < CLIENT_KB
    assert server < SERVER_KB
