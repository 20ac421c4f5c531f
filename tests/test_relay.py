"""One server relieves another on the same address, and nobody notices.

AIPOD_TEST_LONG=2 restarts 20 times.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import socket
import threading
from pathlib import Path

import pytest
import trio

from aipod.config import Config
from aipod.transport import bridge
from aipod.transport.listeners import open_sockets
from aipod.transport.server import Server
from tests.conftest import FIRST, left_in, run
from tests.rolling import OWN, PLAIN, Relay, relay_race
from tests.test_hardening import PREFACE, SETTINGS
from tests.test_transport import raw_frame

LONG = int(os.environ.get("AIPOD_TEST_LONG", "1")) > 1
RESTARTS = 20 if LONG else 2 if FIRST else 1
WAYS = ["reuse-port", "handed-down"] if FIRST else ["reuse-port"]
# That connect at once, one connection after the other each.
CROWD = 8
TURNS = 100 if FIRST else 25


@pytest.mark.parametrize("way", WAYS)
def test_100_jobs_and_uploads_do_not_notice_that_servers_are_restarted(tmp_path: Path, way: str) -> None:
    """Neither own clients nor stock ones, which try nothing again: each answer is right, each method started once.

    Mutant seen: the listener that others share is not closed.
    """
    (tmp_path / "marks").mkdir()
    with Relay(tmp_path, way) as relay:
        callers = run(lambda: relay_race(relay, tmp_path / "marks", RESTARTS), timeout=60 + 20 * RESTARTS)
        relay.stop()
    assert callers.done["own"] >= OWN
    assert callers.done["plain"] >= PLAIN
    assert callers.waits > 0, "no upload had to move, so nothing was shown"
    assert left_in(tmp_path / "spool") == []
    assert list((tmp_path / "marks").iterdir()) == []


@pytest.mark.parametrize("way", ["reuse-port", "handed-down"])
async def test_a_crowd_that_connects_meanwhile_loses_no_connection(way: str) -> None:
    """Each hears from a server. Mutants seen, with a few resets each: SYNs are not held back; what waits to be accepted
    is not taken; the listener is closed before what was accepted last has begun."""
    stop = threading.Event()
    seen: collections.Counter[str] = collections.Counter()

    def come_and_go(port: int) -> None:
        while not stop.is_set():
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
                    sock.sendall(PREFACE + raw_frame(SETTINGS, 0, 0, b""))
                    seen["served" if sock.recv(9)[3:4] == bytes([SETTINGS]) else "closed"] += 1
            except OSError as exc:
                seen[type(exc).__name__] += 1

    @bridge.to_trio
    async def main() -> None:
        with contextlib.ExitStack() as stack:
            (stays,) = stack.enter_context(open_sockets(Config(bind=("127.0.0.1:0",), reuse_port=True)))
            address = stays.name
            last = Server([], Config())
            await last.listen([stays.sock])
            crowd = [threading.Thread(target=come_and_go, args=[stays.sock.getsockname()[1]]) for _ in range(CROWD)]
            for one in crowd:
                one.start()
            try:
                for _ in range(TURNS):
                    given = [("one", stays.sock.dup())] if way == "handed-down" else []
                    with open_sockets(Config(bind=(address,), reuse_port=True), given) as (listener,):
                        server = Server([], Config())
                        await server.listen([listener.sock])
                        await asyncio.sleep(0.02)
                        listener.hold_back()
                        await server.leave([listener.sock])
            finally:
                stop.set()
                await asyncio.to_thread(lambda: [one.join() for one in crowd])
            last.stop_listening()

    with trio.fail_after(100):
        async with bridge.open_loop():
            await main()
    assert set(seen) == {"served"}, seen
    assert seen["served"] > TURNS
