"""Callers that go on while one server relieves another: every answer is checked, every error is one too many.

As a program, `python -m tests.rolling reuse-port|handed-down RESTARTS`, it restarts and says what it saw.
"""

from __future__ import annotations

import asyncio
import collections
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

import aipod
from tests import stranger
from tests.conftest import ROOT, free_port, run

MODEL = "tests.models_rolling:Rolling"
# Callers of each kind: 100 jobs are under way at any moment.
OWN = PLAIN = 50
PIECE = 50_000
# Without the first version's retry policy, which would hide that a call was refused.
STOCK = [option for option in stranger.OPTIONS if option[0] != "grpc.service_config"]


class Callers:
    """Own clients and stock ones, each with one job after the other."""

    def __init__(self, address: str, directory: Path) -> None:
        self._address = address
        self._directory = directory
        self._stopped = asyncio.Event()
        self.done: collections.Counter[str] = collections.Counter()
        self.waits = 0  # times that an own client had to look for its job
        self.under_way = 0

    async def _payload(self, sha256: Any) -> AsyncIterator[bytes]:
        for _ in range(random.randrange(1, 12)):
            piece = os.urandom(PIECE)
            sha256.update(piece)
            yield piece
            await asyncio.sleep(random.uniform(0, 0.1))

    async def _own(self, client: aipod.Client, number: int) -> None:
        def note(event: Any) -> None:
            self.waits += event.phase == "WAITING"

        sha256, mark = hashlib.sha256(), self._mark("own", number)
        kwargs = {"mark": str(mark), "seconds": random.uniform(0, 1.5)}
        assert await client.predict(self._payload(sha256), kwargs=kwargs, on_event=note) == sha256.hexdigest()
        self._check(mark)

    async def _plain(self, channel: Any, number: int) -> None:
        sha256, mark = hashlib.sha256(), self._mark("plain", number)

        async def requests() -> AsyncIterator[Any]:
            kwargs = {"mark": str(mark), "seconds": random.uniform(0, 1.5)}
            yield stranger.first_message("predict", kwargs)
            async for piece in self._payload(sha256):
                for message in stranger.more_messages("predict", stranger.shaped(piece, "frame")):
                    yield message

        reply = await stranger.reply_of_aio(stranger.start(channel, "predict", requests(), timeout=120))
        assert reply.json() == sha256.hexdigest()
        self._check(mark)

    async def _new(self, _: None, number: int) -> None:
        """As one that comes for a single job: each has a connection of its own."""
        async with grpc.aio.insecure_channel(self._address, options=STOCK) as channel:
            await self._plain(channel, number)

    def _mark(self, kind: str, number: int) -> Path:
        return self._directory / f"{kind}-{number}-{self.done[kind]}-{random.randbytes(6).hex()}"

    def _check(self, mark: Path) -> None:
        """The model was started once, by the last line at least of who answered."""
        assert mark.read_text().count("start") == 1
        mark.unlink()

    async def _go_on(self, kind: str, call: Any, caller: Any, number: int) -> None:
        while not self._stopped.is_set():
            self.under_way += 1
            await call(caller, number)
            self.under_way -= 1
            self.done[kind] += 1

    async def __call__(self) -> None:
        """Call until `stop`; raises what went wrong first."""
        async with (
            aipod.Client(self._address) as one,
            aipod.Client(self._address) as two,
            grpc.aio.insecure_channel(self._address, options=STOCK) as three,
            grpc.aio.insecure_channel(self._address, options=STOCK) as four,
            asyncio.TaskGroup() as group,
        ):
            for number in range(OWN):
                group.create_task(self._go_on("own", self._own, (one, two)[number % 2], number))
            for number in range(PLAIN):
                call, channel = (self._plain, (three, four)[number % 2]) if number % 3 else (self._new, None)
                group.create_task(self._go_on("plain", call, channel, number))

    def stop(self) -> None:
        self._stopped.set()


class Relay:
    """One server after the other on one address, with one spool: the next one answers before the last one drains."""

    def __init__(self, directory: Path, way: str) -> None:
        self._directory = directory
        self._listener: socket.socket | None = None
        if way == "handed-down":
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
            self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        else:
            self.address = f"127.0.0.1:{free_port()}"
        self._number = 0
        self._started: list[subprocess.Popen[str]] = []
        self._server = self._start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *args: object) -> None:
        """Whatever went wrong, no server is left."""
        for server in self._started:
            server.kill()
            server.communicate()

    def _start(self) -> subprocess.Popen[str]:
        self._number += 1
        command = [sys.executable, "-m", "aipod", "serve", MODEL, "--tick", "0.2", "--drain", "60", "--reserve", "0"]
        command += ["--spool", str(self._directory / "spool"), "--data", str(self._directory / "data")]
        more: dict[str, Any] = {}
        if self._listener is None:
            command += ["--bind", self.address, "--reuse-port"]
        else:
            # As a service manager does it: descriptor 3, and the pid of who is to have it.
            script = 'exec 3<&"$0"; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
            command = ["bash", "-c", script, str(self._listener.fileno()), *command]
            more["pass_fds"] = [self._listener.fileno()]
        self.log = self._directory / f"server-{self._number}.log"
        with self.log.open("w") as stderr:
            server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT, **more)
        self._started.append(server)
        assert server.stdout is not None
        assert server.stdout.readline() == f"aipod listening on {self.address}\n", self.log.read_text()
        return server

    def relieve(self) -> None:
        """Start the next server, then end the last one, and wait for its end."""
        last, log = self._server, self.log
        self._server = self._start()
        last.send_signal(signal.SIGTERM)
        last.communicate(timeout=90)
        assert last.returncode == 0, log.read_text()
        assert "Traceback" not in log.read_text()

    def stop(self) -> None:
        self._server.send_signal(signal.SIGTERM)
        self._server.communicate(timeout=90)
        assert self._server.returncode == 0, self.log.read_text()
        if self._listener is not None:
            self._listener.close()


async def relay_race(relay: Relay, directory: Path, restarts: int) -> Callers:
    """So many restarts under load. This is an asyncio-flavored function; raises what went wrong."""
    callers = Callers(relay.address, directory)
    async with asyncio.TaskGroup() as group:
        group.create_task(callers())
        for _ in range(restarts):
            await asyncio.to_thread(relay.relieve)
            assert callers.under_way == OWN + PLAIN
        callers.stop()
    return callers


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "marks").mkdir()
        with Relay(Path(name), sys.argv[1]) as race:
            told = run(lambda: relay_race(race, Path(name) / "marks", int(sys.argv[2])), timeout=1200)
            race.stop()
        print(dict(told.done), "own clients looked for their job:", told.waits)
