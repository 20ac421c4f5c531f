"""A crowd of calls when their server is told to leave, and a crowd of uploads while there is no server at all.

AIPOD_TEST_LONG=2 has it away for 30 seconds.
"""

from __future__ import annotations

import asyncio
import collections
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import aipod
from aipod.client import Event
from tests import stranger
from tests.conftest import FIRST, Serve, free_port, run
from tests.phases import until
from tests.rolling import MODEL, STOCK
from tests.test_nginx import everywhere, proxy

LONG = int(os.environ.get("AIPOD_TEST_LONG", "1")) > 1
CROWD = 500 if FIRST else 50
Code = grpc.StatusCode


def test_a_crowd_of_calls_when_the_server_is_told_to_leave(serve: Serve, tmp_path: Path) -> None:
    """Half of them by nginx. Those that end in time are answered, others hear whether they ran; whoever comes later is
    refused before anything was done, so that any client may try again. It leaves in time, with status 0."""
    drain = 10 if FIRST else 5
    served = serve(MODEL, "--drain", str(drain), "--concurrency", "1000", "--tick", "1")
    gate, mark = tmp_path / "gate", tmp_path / "mark"
    # Of ten: seven end in time, two never do, and one is an upload that never ends.
    kinds = ["ends"] * 7 + ["stays"] * 2 + ["upload"]

    async def requests(kind: str) -> AsyncIterator[Any]:
        yield stranger.first_message(
            "chaos", {"mark": str(mark), "gate": str(gate if kind == "ends" else tmp_path / "never")}
        )
        if kind == "upload":
            await asyncio.Event().wait()

    async def main() -> None:
        channels = [grpc.aio.insecure_channel(address, options=STOCK) for address in (served.address, nginx.address)]
        try:
            calls = [
                (kind, asyncio.create_task(stranger.reply_of_aio(stranger.start(channel, "chaos", requests(kind)))))
                for kind, channel in zip(
                    [kinds[number % 10] for number in range(CROWD)],
                    [channels[n % 2] for n in range(CROWD)],
                    strict=True,
                )
            ]
            running = CROWD * 9 // 10
            await until(lambda: mark.exists() and mark.read_text().count("start") == running)
            await until(lambda: len(list(served.spool.glob("*/state"))) == CROWD)
            served.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            await until(lambda: "draining: at most" in served.log_text())
            for address in (served.address, nginx.address):
                async with grpc.aio.insecure_channel(address, options=STOCK) as channel:
                    reply = await stranger.reply_of_aio(stranger.start(channel, "chaos", requests("ends")))
                    assert (reply.code, reply.info.reason, reply.messages) == (Code.UNAVAILABLE, "DRAINING", [])
            gate.touch()
            told: collections.Counter[tuple[str, Any, str]] = collections.Counter()
            for kind, call in calls:
                reply = await call
                told[kind, reply.code, "" if reply.code is Code.OK else reply.info.reason] += 1
            await asyncio.to_thread(served.process.communicate, timeout=drain + 25)
            assert served.process.returncode == 0, served.log_text()
            print(f"it left {time.monotonic() - began:.1f} s after the signal, --drain {drain}")
            assert told == {
                ("ends", Code.OK, ""): CROWD * 7 // 10,
                ("stays", Code.CANCELLED, "CANCELLED"): CROWD * 2 // 10,
                ("upload", Code.UNAVAILABLE, "DRAINING"): CROWD // 10,
            }
            assert mark.read_text().count("start") == running, "what was refused has not run"
        finally:
            for channel in channels:
                await channel.close()

    with proxy(tmp_path, everywhere(served.address)) as nginx:
        run(main, timeout=120)
    assert list(served.spool.glob("*/state")) == []
    assert "Traceback" not in served.log_text()


AWAY = 30.0 if LONG else 4.0
JOBS = 40


def test_jobs_wait_for_a_server_that_is_away_and_go_on_when_it_is_back(serve: Serve, tmp_path: Path) -> None:
    """Their callers do not hammer: together they connect at most 1.2 times as often as their pauses add up to. What
    waited in line runs once, what ran is not run again. Mutant seen: half the pauses."""
    address = f"127.0.0.1:{free_port()}"
    options = ("--tick", "0.2", "--concurrency", "1")
    served = serve(MODEL, *options, bind=address)
    gate, marks = tmp_path / "gate", [tmp_path / f"mark{number}" for number in range(JOBS + 1)]
    phases: list[list[str]] = [[] for _ in marks]

    def note(number: int, event: Event) -> None:
        if event.phase != (phases[number] or [""])[-1]:
            phases[number].append(event.phase)

    async def main() -> None:
        async with aipod.Client(address) as client:
            jobs = []
            for number, mark in enumerate(marks):
                call = client.chaos(
                    kwargs={"mark": str(mark), "gate": str(gate)},
                    on_event=lambda event, number=number: note(number, event),
                )
                jobs.append(asyncio.create_task(call))
                await until(lambda number=number: phases[number][-1:] == ["QUEUED" if number else "RUNNING"])
            served.process.kill()
            await asyncio.to_thread(served.process.communicate)
            await asyncio.sleep(AWAY)
            tries = sum(told[told.index("WAITING") :].count("CONNECTING") for told in phases if "WAITING" in told)
            gate.touch()
            await asyncio.to_thread(serve, MODEL, *options, bind=address)
            returned = time.monotonic()
            await until(lambda: all(told[-1] not in ("WAITING", "CONNECTING") for told in phases))
            took = time.monotonic() - returned
            assert await asyncio.gather(*jobs[1:]) == ["done"] * JOBS
            with pytest.raises(aipod.Interrupted):
                await jobs[0]
            print(f"all back {took:.1f} s after its return; {tries} connections meanwhile, {len(marks) * budget():.0f}")
            assert len(marks) <= tries <= 1.2 * len(marks) * budget()

    run(main, timeout=AWAY + 100)
    assert [mark.read_text().count("start") for mark in marks] == [1] * len(marks)


def budget() -> float:
    """How often one client connects on average while its server is away: full jitter, from 0.5 s doubling to 5 s."""
    clients, tries = 2000, 0
    for _ in range(clients):
        now, limit = random.uniform(0, 0.5), 0.5
        while now < AWAY:
            limit = min(2 * limit, 5.0)
            now += random.uniform(0, limit)
            tries += 1
    return tries / clients
