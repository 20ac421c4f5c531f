"""Uploads and downloads of a call that go on where they were, and small jobs that wait for nothing."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aipod
from aipod.client import Event
from aipod.config import MIB
from tests.conftest import Served, run
from tests.gates import ANSWER, PAYLOAD, SMALL, payload_file, runs, server
from tests.phases import until
from tests.proxy import Fault, open_proxy

served = pytest.fixture(scope="module")(server)
payload = pytest.fixture(payload_file)


def kinds(path: Path) -> dict[str, Callable[[], Any]]:
    def pieces() -> Iterator[bytes]:
        for start in range(0, len(PAYLOAD), 100_000):
            yield PAYLOAD[start : start + 100_000]

    async def apieces() -> AsyncIterator[bytes]:
        for piece in pieces():
            yield piece

    class Once:
        def __init__(self) -> None:
            self._file = io.BytesIO(PAYLOAD)

        def read(self, size: int) -> bytes:
            return self._file.read(size)

    return {
        "path": lambda: path,
        "file": lambda: io.BytesIO(PAYLOAD),
        "iterator": pieces,
        "async iterator": apieces,
        "stream": Once,
    }


@pytest.mark.parametrize("kind", ["path", "file", "iterator", "async iterator", "stream"])
def test_an_upload_goes_on_where_it_is_durable(served: Served, payload: Path, tmp_path: Path, kind: str) -> None:
    """Cut twice: nothing that was told to be durable is sent again. Mutant: `start = 0` in every attempt."""
    mark = tmp_path / "mark"
    events: list[Event] = []

    async def main() -> int:
        faults = [Fault(stall_up=4_000_000), Fault(stall_up=4_000_000)]
        async with open_proxy(served.port, *faults) as proxy, aipod.Client(proxy.address) as client:

            def note(event: Event) -> None:
                if proxy.connections < 3 and events and event.offset > max(one.offset for one in events):
                    proxy.cut()
                events.append(event)

            answer = await client.chaos(kinds(payload)[kind](), mark=str(mark), on_event=note)
            assert answer == ANSWER
            assert proxy.connections == 3
            return proxy.total_up

    sent = run(main)
    assert runs(mark) == 1
    durable = [event.offset for event in events]
    assert durable == sorted(durable)
    resumed, connecting = [], False
    for event in events:
        if connecting and event.phase == "RECEIVING":
            resumed.append(event.offset)
        connecting = event.phase == "CONNECTING" if event.phase != "WAITING" else False
    assert len(resumed) == 3, "the first states of three connections"
    assert 0 == resumed[0] < resumed[1] < resumed[2]
    again = (4_000_000 - resumed[1]) + (resumed[1] + 4_000_000 - resumed[2])
    assert sent <= len(PAYLOAD) + again + 100_000


@pytest.mark.parametrize("cut", [700, 300_000, 1_500_000, 3_000_000])
@pytest.mark.parametrize("save", [False, True])
def test_a_download_goes_on_at_the_byte_that_is_here(served: Served, tmp_path: Path, cut: int, save: bool) -> None:
    """Mutant: `have = 0` in every attempt sends more than the answer and a window."""
    received: list[int] = []

    def has_all() -> bool:
        """The client has each whole chunk that went down."""
        return max(received, default=0) >= cut // MIB * MIB

    async def main() -> Any:
        async with (
            open_proxy(served.port, Fault(cut_down=cut, fin_down=has_all)) as proxy,
            aipod.Client(proxy.address) as client,
        ):
            answer = await client.chaos(
                metadata=[("x-func-name", "seeded")],
                length=4_000_000,
                save_to=tmp_path / "answer" if save else None,
                on_event=lambda event: received.append(event.received),
            )
            assert proxy.connections == 2
            return answer.read_bytes() if save else answer, proxy.down

    answer, down = run(main)
    assert answer == random.Random(0).randbytes(4_000_000)
    assert received == sorted(received)
    assert down <= 4_000_000 - cut // MIB * MIB + 100_000
    assert not list(tmp_path.glob(".*"))


def test_a_small_job_waits_for_nothing_once_the_spool_is_known(served: Served, tmp_path: Path) -> None:
    """Nothing comes down, and the method runs. Mutant: `last` that waits for the first state never arrives."""
    mark = tmp_path / "mark"

    async def main() -> Any:
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address) as client:
            assert await client.chaos(b"x") == SMALL
            proxy.hold_down()
            for data in (b"", b"x"):
                mark.unlink(missing_ok=True)
                call = asyncio.create_task(client.chaos(data, mark=str(mark)))
                await until(mark.exists)
                proxy.let_down()
                answer = await call
                proxy.hold_down()
            proxy.let_down()
            return answer

    assert run(main) == SMALL
