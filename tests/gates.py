"""Methods that stand still until their test lets them go on, and payloads that do, for jobs of aipod's own client."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from aipod.client import Event
from aipod.config import CHUNK
from tests.conftest import Served, left_in

MODEL = "tests.models_faults:Counted"
PAYLOAD = os.urandom(13_000_000)
ANSWER = {"size": len(PAYLOAD), "sha256": hashlib.sha256(PAYLOAD).hexdigest()}
SMALL = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
GATED = [("x-func-name", "gated")]


def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A module's fixture. It ends cleanly and leaves nothing in its spool."""
    served = Served(MODEL, tmp_path_factory.mktemp("server"), ("--tick", "0.1", "--instances", "4"), "127.0.0.1:0")
    yield served
    assert served.stop() == 0, served.log_text()
    assert left_in(served.spool) == []


def payload_file(tmp_path: Path) -> Path:
    """A test's fixture: a file with `PAYLOAD` in it."""
    path = tmp_path / "payload"
    path.write_bytes(PAYLOAD)
    return path


class Gate:
    """The two files of a gated run."""

    def __init__(self, directory: Path, name: str = "") -> None:
        self.mark, self.gate = directory / f"mark{name}", directory / f"gate{name}"

    @property
    def kwargs(self) -> dict[str, str]:
        return {"mark": str(self.mark), "gate": str(self.gate)}

    @property
    def runs(self) -> int:
        return self.mark.read_text().count("run") if self.mark.exists() else 0


class Feed:
    """A payload that goes on until some chunks of it are durable at the server, pauses until `go`, and ends."""

    def __init__(self) -> None:
        self.durable, self.go = asyncio.Event(), asyncio.Event()
        self._sent = bytearray()

    def note(self, event: Event) -> None:
        if event.offset > 2 * CHUNK:
            self.durable.set()

    async def pieces(self) -> AsyncIterator[bytes]:
        while not self.durable.is_set():
            self._sent += (piece := os.urandom(100_000))
            yield piece
            await asyncio.sleep(0.01)
        await self.go.wait()
        self._sent += (piece := os.urandom(5_000_000))
        yield piece

    @property
    def answer(self) -> dict[str, Any]:
        return {"size": len(self._sent), "sha256": hashlib.sha256(self._sent).hexdigest()}


def runs(mark: Path) -> int:
    return mark.read_text().count("run") if mark.exists() else 0
