"""Compression from end to end: what callers are told of it, what a server counts, and levels that were asked for."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import aipod
from aipod.cli.progress import Progress
from aipod.client import Event
from aipod.config import MIB
from tests import stranger
from tests.conftest import ROOT, Serve, run, wait_until
from tests.scrape import Scrape, metrics_of, until

TEXT = b"".join(b'{"number": %d, "text": "one of many"}\n' % number for number in range(400_000))[: 8 * MIB]
ON = ("--metrics", "127.0.0.1:0")
ECHO = [("x-func-name", "echo")]


async def up_and_down(address: str, payload: Path, config: aipod.Config | None = None) -> list[Event]:
    """The events of a call whose answer is its payload, checked."""
    events: list[Event] = []
    back = payload.with_suffix(".back")
    async with aipod.Client(address, config=config) as client:
        await client.chaos(payload, metadata=ECHO, save_to=back, on_event=events.append)
    assert back.read_bytes() == payload.read_bytes()
    return events


def test_a_caller_is_told_what_it_brings(serve: Serve, tmp_path: Path) -> None:
    """Mutants seen: the download does not tell, and shows what the upload had; it shows that until it has a byte."""
    served = serve("aipod.examples.basics:Echo", *ON, "--level", "1")
    text, noise = tmp_path / "text", tmp_path / "noise"
    text.write_bytes(TEXT)
    noise.write_bytes(os.urandom(4 * MIB))

    async def main() -> tuple[list[Event], list[Event]]:
        level = aipod.Config(level=-100)
        return await up_and_down(served.address, text, level), await up_and_down(served.address, noise)

    packed, random = run(main)
    up = [event for event in packed if event.phase == "RECEIVING" and event.sent]
    down = [event for event in packed if event.phase == "DONE" and event.received]
    assert {event.level for event in up} == {-100}
    assert 1.2 < up[-1].ratio < down[-1].ratio
    assert next(event.ratio for event in packed if event.phase == "DONE") == 0
    assert 0.99 < random[-1].ratio < 1
    assert [event.level for event in random if event.phase == "RECEIVING" and event.sent][-1] is None
    until(metrics_of(served), aipod_answer_chunks_total={"1": (len(TEXT) + 4 * MIB) / MIB})


def test_what_a_server_stores_is_counted_as_stored(serve: Serve, tmp_path: Path) -> None:
    """Whatever level is chosen, noise is; but for a chunk by which that is seen. Mutant seen: it counts as chosen."""
    served = serve("aipod.examples.basics:Echo", *ON)
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(8 * MIB))
    run(lambda: up_and_down(served.address, noise))
    until(metrics_of(served), aipod_answer_chunks_total={"1": 1, "stored": 7})


def test_a_server_chooses_by_itself(serve: Serve, tmp_path: Path) -> None:
    """Where nothing else is said. Whatever it chose, it counts each chunk once, and none of a plain client's stream.

    Mutant seen: that counts as stored.
    """
    served = serve("aipod.examples.basics:Echo", *ON)
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    run(lambda: up_and_down(served.address, text))
    address = metrics_of(served)
    wait_until(lambda: sum(Scrape(address).counted("aipod_answer_chunks_total").values()) == len(TEXT) / MIB)
    moved = Scrape(address).counted("aipod_payload_bytes_total")
    assert moved["up identity"] == moved["down identity"] == len(TEXT)
    assert max(moved["up zstd"], moved["down zstd"]) < len(TEXT), "it begins with packed chunks"
    chunks = Scrape(address).counted("aipod_answer_chunks_total")
    stranger.ask(served.address, "echo", {}, stranger.shaped(TEXT, "frame"))
    wait_until(lambda: Scrape(address).counted("aipod_payload_bytes_total")["down identity"] == 2 * len(TEXT))
    assert Scrape(address).counted("aipod_answer_chunks_total") == chunks


@pytest.mark.parametrize("ratio", [0.0, 0.99, 3.14])
def test_the_bar_shows_what_it_brings(ratio: float) -> None:
    event = Event("RECEIVING", sent=5, payload_size=10)
    shown = Progress(io.StringIO())._detail(dataclasses.replace(event, ratio=ratio), 5, 10)
    assert ("3.1:1" in shown) == (ratio > 3)
    assert ":1" not in shown or ratio > 3


# A server in a thread, whose client is too busy to read: what its choosers of levels are told.
TOLD = """
import asyncio, os, sys, threading, time
import aipod, aipod.packing, aipod.testing
from aipod.levels import Levels

MIB, told = 1 << 20, []

class Listener(Levels):
    def sent(self, batch):
        if threading.current_thread().name == "aipod-test-server":
            told.append(batch)
        super().sent(batch)

class Noise(aipod.Model):
    def predict(self, context, path):
        answer = context.work_dir / "answer"
        answer.write_bytes(os.urandom(16 * MIB))
        return answer

async def main(address):
    async with aipod.Client(address) as client:
        busy(100)
        await client.predict(save_to=sys.argv[1])

def busy(times):
    time.sleep(0.01)
    if times:
        asyncio.get_running_loop().call_later(0, busy, times - 1)

aipod.packing.Levels = Listener  # what every Packer makes
with aipod.testing.serve(Noise) as server:
    asyncio.run(main(server.address))
print(sum(batch.data for batch in told) // MIB, max(batch.held for batch in told))
"""


def test_a_server_knows_what_waits_on_its_own_machine(tmp_path: Path) -> None:
    """Else what is in its buffers counts as sent, and looks like a fast wire.

    Mutants seen: its choosers are not told; the connection is not asked.
    """
    done = subprocess.run(
        [sys.executable, "-c", TOLD, str(tmp_path / "answer")], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    data, most = map(int, done.stdout.split())
    assert data == 16
    assert most > 64 * 1024
