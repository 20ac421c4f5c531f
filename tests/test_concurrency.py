"""Two hundred jobs at once."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aipod
from aipod.client import Event
from tests.conftest import Serve, run

JOBS = 200
SIZE = 1_000_000


@pytest.mark.slow
def test_two_hundred_jobs_at_once_on_async_methods(serve: Serve) -> None:
    """The model waits until all have arrived: none may wait for another's end."""
    served = serve("tests.models_lifecycle:Together")
    rest = os.urandom(SIZE - 8)

    def payload(number: int) -> Iterator[bytes]:
        yield number.to_bytes(8)
        yield rest

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            answers = await asyncio.gather(*(client.predict(payload(n), count=JOBS) for n in range(JOBS)))
        for number, answer in enumerate(answers):
            assert answer["sha256"] == hashlib.sha256(number.to_bytes(8) + rest).hexdigest()
            assert answer["peak"] == JOBS

    run(main, timeout=120)


@pytest.mark.slow
def test_two_hundred_jobs_in_line_for_one_worker(serve: Serve, tmp_path: Path) -> None:
    """Each is told its place while a first job holds the worker, and then they run in that order."""
    served = serve("tests.models_lifecycle:Work")
    places: dict[int, int] = {}
    all_queued = asyncio.Event()

    def note(number: int, event: Event) -> None:
        if event.phase == "QUEUED" and not all_queued.is_set():
            places[number] = event.place
            if len(places) == JOBS:
                all_queued.set()

    async def main() -> None:
        async with aipod.Client(served.address) as client:

            async def turn(number: int) -> Any:
                return await client.chaos(
                    metadata=[("x-func-name", "turn")], on_event=lambda event: note(number, event)
                )

            async with asyncio.TaskGroup() as group:
                kwargs = {"mark": str(tmp_path / "mark"), "until": str(tmp_path / "until")}
                first = group.create_task(client.predict(kwargs=kwargs))
                while not (tmp_path / "mark").exists():
                    await asyncio.sleep(0.01)
                turns = [group.create_task(turn(number)) for number in range(JOBS)]
                await all_queued.wait()
                (tmp_path / "until").touch()
            assert first.result() == "done"
            assert sorted(places.values()) == list(range(JOBS))
            assert {number: task.result() for number, task in enumerate(turns)} == places

    run(main, timeout=120)
