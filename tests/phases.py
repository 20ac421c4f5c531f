"""A job that something is done to in one of its phases: what it was told, how often it ran, what it answered."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import aipod
from aipod.client import Event
from aipod.config import MIB
from tests.conftest import Served, wait_until
from tests.models_survive import answer_to

MODEL = "tests.models_survive:Survivor"
PHASES = ("upload", "queued", "running", "download")
# Longer than what is on the way between server and client, so that a download stands still with its client.
DOWNLOAD = 24 * MIB

Metadata = Sequence[tuple[str, str]]


async def until(condition: Callable[[], Any], *, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


class Trial:
    """A job that stands still in `phase` until `go_on`; the server has one instance.

    `act` is called once, on the loop, in the middle of what the client is told of that phase. `reached` is set then.
    """

    def __init__(
        self, directory: Path, phase: str, act: Callable[[], None] = lambda: None, *, method: str = "work"
    ) -> None:
        directory = directory / f"{phase}-{method}"
        directory.mkdir()
        self.phase = phase
        self.mark, self.gate, self.before = directory / "mark", directory / "gate", directory / "before"
        self.method = method
        self.events: list[Event] = []
        self.reached = asyncio.Event()
        self._act = act
        self._durable, self._go = asyncio.Event(), asyncio.Event()
        self._sent = hashlib.sha256()
        self.length = DOWNLOAD if phase == "download" else 100
        if phase != "running":
            self.gate.touch()
        if phase != "upload":
            self._go.set()

    def note(self, event: Event) -> None:
        self.events.append(event)
        if event.offset:
            self._durable.set()
        if not self.reached.is_set() and self._here(event):
            self.reached.set()
            self._act()

    def _here(self, event: Event) -> bool:
        match self.phase:
            case "upload":
                return event.phase == "RECEIVING" and event.offset > 0
            case "queued":
                return event.phase == "QUEUED"
            case "running":
                return event.phase == "RUNNING" and "started" in "".join(one.log for one in self.events)
            case _:
                return event.phase == "DONE" and event.received > 0

    async def _payload(self) -> AsyncIterator[bytes]:
        """Goes on until a part is durable, pauses until `go_on`, and ends."""
        while self.phase == "upload" and not self._durable.is_set():
            yield self._piece(500_000)
            await asyncio.sleep(0.05)
        await self._go.wait()
        yield self._piece(3_000_000)

    def _piece(self, size: int) -> bytes:
        piece = os.urandom(size)
        self._sent.update(piece)
        return piece

    def metadata(self, more: Metadata) -> list[tuple[str, str]]:
        return [*more, ("x-func-name", self.method)]

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"mark": str(self.mark), "gate": str(self.gate), "length": self.length}

    @property
    def expected(self) -> bytes:
        return answer_to(self._sent.hexdigest(), self.length)

    @property
    def starts(self) -> int:
        return self.mark.read_text().count("start") if self.mark.exists() else 0

    @property
    def connections(self) -> int:
        """How often it connected; a heartbeat before the first state is told as CONNECTING too."""
        beats = [0, *(event.heartbeats for event in self.events)]
        return sum(
            one.phase == "CONNECTING" and one.heartbeats == beat for beat, one in zip(beats, self.events, strict=False)
        )

    async def block(self, *clients: aipod.Client) -> None:
        """Have a job before this one at each server that a client is for, where it is to wait in line."""
        for number, client in enumerate(clients if self.phase == "queued" else ()):
            mark = self.before.with_suffix(f".mark{number}")
            await client.submit("again", mark=str(mark), gate=str(self.before))
            await until(mark.exists)

    def call(self, client: aipod.Client, metadata: Metadata = (), **more: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(
            client.chaos(
                self._payload(), metadata=self.metadata(metadata), kwargs=self.kwargs, on_event=self.note, **more
            )
        )

    def go_on(self) -> None:
        self._go.set()
        self.gate.touch()
        self.before.touch()

    def check(self, answer: bytes, *, starts: int = 1) -> None:
        """The right answer, from one start."""
        assert answer == self.expected, self.phase
        assert self.starts == starts, self.phase


class Stand:
    """Jobs that stand still in all phases at the same time, at servers with one instance.

    `act` is called once, on the loop, in the middle of a download.
    """

    def __init__(self, directory: Path, act: Callable[[], None]) -> None:
        self.trials = {phase: Trial(directory, phase) for phase in ("download", "running", "queued", "upload")}
        self.trials["download"]._act = act
        self.calls: dict[str, asyncio.Task[Any]] = {}

    async def take_place(self, client: aipod.Client, metadata: Metadata = ()) -> None:
        """Until there is a job in each phase, and `act` was called."""
        download = self.trials["download"]
        job = await client.submit(
            "work", download._payload(), metadata=download.metadata(metadata), kwargs=download.kwargs
        )
        async with contextlib.aclosing(job.events()) as events:
            async for _ in events:
                pass
        for phase in ("running", "queued", "upload"):
            self.calls[phase] = self.trials[phase].call(client, metadata)
            await self.trials[phase].reached.wait()
        assert {phase: trial.starts for phase, trial in self.trials.items()} == {
            "download": 1,
            "running": 1,
            "queued": 0,
            "upload": 0,
        }
        self.calls["download"] = asyncio.create_task(job.wait(on_event=download.note))
        await download.reached.wait()

    async def lost(self) -> None:
        """Until each has lost its connection. It may have another one by now, and have come to its end."""
        for trial in self.trials.values():
            await until(lambda trial=trial: any(event.phase == "WAITING" for event in trial.events))

    def go_on(self) -> None:
        for trial in self.trials.values():
            trial.go_on()

    async def check(self, *phases: str) -> None:
        for phase in phases:
            self.trials[phase].check(await self.calls[phase])


def holder(servers: Sequence[Served], job_id: str) -> Served:
    """The server that works on the job: it has the job's lock file open. Fails the test where there is none."""

    def find() -> Served | None:
        return next((one for one in servers if any(f"/{job_id}.lock" in name for name in open_files(one))), None)

    found = wait_until(find, seconds=5)
    assert isinstance(found, Served)
    return found


def connected(servers: Sequence[Served]) -> list[Served]:
    """The servers that somebody is connected to."""
    return [one for one in servers if connections(one)]


def connections(served: Served) -> int:
    """How many connections a server has."""
    return len(established({served.port}).intersection(open_files(served)))


def open_files(served: Served) -> list[str]:
    names = []
    for path in Path(f"/proc/{served.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(os.readlink(path))
    return names


def established(ports: set[int]) -> set[str]:
    """The connections that local servers have accepted on `ports`, as /proc/PID/fd names them."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "01" and int(fields[1].rpartition(":")[2], 16) in ports:
            found.add(f"socket:[{fields[9]}]")
    return found
