"""A call whose connection is cut, dies or falls silent: its caller does not notice, and the method runs once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpclib.metadata import Deadline

import aipod
from aipod.client import Event
from aipod.client.course import Course, Request
from aipod.client.follow import Follower
from aipod.wire.ai import Op
from tests.conftest import Served, free_port, run
from tests.gates import GATED, PAYLOAD, SMALL, Feed, Gate, runs, server
from tests.phases import until
from tests.proxy import Fault, open_proxy

served = pytest.fixture(scope="module")(server)

# Cuts


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_cut_behind_any_frame_is_not_noticed(served: Served, tmp_path: Path, direction: str) -> None:
    """I5. One call for each frame of a whole one, each cut behind another frame. Mutant: no retry after `last`."""
    data = random.Random(1).randbytes(1_500_000)
    expected = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (tmp_path / "payload").write_bytes(data)

    async def call(frame: int) -> bool:
        """Whether there was so many frames that one was cut."""
        mark = tmp_path / f"mark{direction}{frame}"
        fault = Fault(frames_up=frame) if direction == "up" else Fault(frames_down=frame)
        async with open_proxy(served.port, fault) as proxy, aipod.Client(proxy.address) as client:
            assert await client.chaos(tmp_path / "payload", mark=str(mark)) == expected, frame
            assert runs(mark) == 1, frame
            return proxy.cuts > 0

    async def main() -> int:
        """How many cuts there were."""
        frame = 1
        while True:
            async with asyncio.TaskGroup() as group:
                calls = [group.create_task(call(number)) for number in range(frame, frame + 10)]
            if not all(task.result() for task in calls):
                return frame - 1 + sum(task.result() for task in calls)
            frame += 10

    assert run(main, timeout=180) >= 6  # about a hundred, up


def test_a_cut_while_the_method_runs_is_not_noticed_and_no_log_is_lost_or_doubled(
    served: Served, tmp_path: Path
) -> None:
    """Nor sent again. Mutant seen: `log_have = 0` in every attempt."""
    gate = Gate(tmp_path)
    count = 5000
    log: list[str] = []
    phases: list[str] = []

    def note(event: Event) -> None:
        log.append(event.log)
        if phases[-1:] != [event.phase]:
            phases.append(event.phase)

    async def main() -> Any:
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address) as client:
            call = asyncio.create_task(client.chaos(b"x", metadata=GATED, lines=count, **gate.kwargs, on_event=note))
            await until(lambda: f"line {count - 1}" in "".join(log[-3:]))
            for _ in range(3):
                phases.clear()
                proxy.cut()
                await until(lambda: "CONNECTING" in phases and phases[-1] == "RUNNING")
                assert proxy.down < count  # bytes; the log has fifteen times as many
            gate.gate.touch()
            return await call

    assert run(main) == SMALL
    assert gate.runs == 1
    lines = "".join(log).split()
    assert lines == " ".join([*(f"line {number} grüße" for number in range(count)), "the end"]).split()


# Connections that have died or are silent


@pytest.mark.parametrize("phase", ["RECEIVING", "RUNNING"])
def test_a_silent_connection_is_replaced(served: Served, tmp_path: Path, phase: str) -> None:
    """I6. The old one is open and says nothing. Mutant: without `retire` the next attempt takes it again."""
    gate = Gate(tmp_path)

    async def main() -> None:
        feed = Feed()
        feed.go.set() if phase == "RUNNING" else None
        async with open_proxy(served.port) as proxy:
            async with aipod.Client(proxy.address, config=aipod.Config(silence=0.5)) as client:

                def freeze(event: Event) -> None:
                    feed.note(event)
                    if event.phase == phase and not gate.gate.exists() and feed.durable.is_set():
                        proxy.freeze()
                        feed.go.set()
                        gate.gate.touch()

                answer = await client.chaos(feed.pieces(), metadata=GATED, **gate.kwargs, on_event=freeze)
                assert answer == feed.answer
                assert proxy.connections == 2

    run(main)
    assert gate.runs == 1


@pytest.mark.parametrize("payload", [b"x", PAYLOAD], ids=["small", "large"])
def test_an_idle_connection_that_died_is_not_noticed(served: Served, tmp_path: Path, payload: bytes) -> None:
    """Mutant seen: it counts as an attempt. Where `last` was sent, and swallowed: tests/test_survive.py."""
    mark = tmp_path / "mark"
    phases: list[str] = []

    async def main() -> Any:
        async with open_proxy(served.port) as proxy:
            async with aipod.Client(proxy.address, config=aipod.Config(attempts=1)) as client:
                assert await client.chaos(b"x") == SMALL
                proxy.trap()
                path = tmp_path / "payload"
                path.write_bytes(payload)
                return await client.chaos(path, mark=str(mark), on_event=lambda event: phases.append(event.phase))

    assert run(main)["size"] == len(payload)
    assert runs(mark) == 1


def test_a_time_that_is_over_when_a_connection_begins_is_no_lost_connection(served: Served) -> None:
    """The call's own timer may be a moment later than the one that grpclib looks at."""

    async def main() -> None:
        async with aipod.Client(served.address, config=aipod.Config(attempts=1)) as client:
            request = Request("chaos", GATED, deadline=Deadline.from_timeout(0.0))
            await Follower(client._link, request, Course(op=Op.ATTACH, fresh=False), client._link.closes).run()

    with pytest.raises(aipod.JobCancelled) as caught:
        run(main)
    assert caught.value.reason == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize("complete", [False, True])
def test_a_job_is_given_up_in_the_end(served: Served, tmp_path: Path, complete: bool) -> None:
    """A server that is never found again: the error says whether the method may have run."""
    gate = Gate(tmp_path)
    nowhere = free_port()

    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def main() -> aipod.AipodError:
        config = aipod.Config(reconnect=0.3, connect_timeout=0.5)
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address, config=config) as client:
            heard = asyncio.Event()
            call = asyncio.create_task(
                client.chaos(
                    b"" if complete else never(),
                    metadata=GATED,
                    **gate.kwargs,
                    ticket_file=tmp_path / "ticket",
                    on_event=lambda event: heard.set() if event.phase in ("RECEIVING", "RUNNING") else None,
                )
            )
            await (until(gate.mark.exists) if complete else heard.wait())
            proxy.switch(nowhere)
            with pytest.raises(aipod.JobLost if complete else aipod.Unreachable) as caught:
                await call
            proxy.switch(served.port)
            await client.attach(json.loads((tmp_path / "ticket").read_text())["ticket"]).cancel()
            return caught.value

    error = run(main)
    assert error.reason == ("JOB_LOST" if complete else "UNREACHABLE")
    assert ("may have run" in str(error)) is complete
