"""Calls that go on while a test does something to their server: own and plain clients, each in a thread."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aipod
from aipod.client import Event
from tests import stranger
from tests.conftest import run, wait_until

METHODS = ("train", "predict", "log")
Future = concurrent.futures.Future[Any]


def own(address: str, method: str, payload: Any = b"", *, on_event: Any = None, **kwargs: Any) -> Any:
    """One call of aipod's own client; it looks for a lost job for a second only."""

    async def main() -> Any:
        async with aipod.Client(address, config=aipod.Config(attempts=1, reconnect=1.0)) as client:
            if method in METHODS:
                return await getattr(client, method)(payload, on_event=on_event, **kwargs)
            return await client.chaos(payload, metadata=[("x-func-name", method)], on_event=on_event, **kwargs)

    return run(main)


def plain(address: str, method: str, **kwargs: Any) -> stranger.Reply:
    """One call of a stock client."""
    return stranger.ask(address, method, kwargs)


def plain_version(address: str, method: str, version: str, data: bytes = b"", **kwargs: Any) -> stranger.Reply:
    return stranger.ask(address, method, kwargs, stranger.shaped(data, "frame") if data else (), version=version)


@contextlib.contextmanager
def calls() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """Threads for calls under way. Left when they have all ended."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
        yield threads


def marked(path: Path, *, seconds: float = 10) -> str:
    """What a model wrote into its mark, once it has."""
    wait_until(path.exists, seconds=seconds)
    return path.read_text()


class Pulse:
    """When heartbeats came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._count = 0

    def event(self, event: Event) -> None:
        """`on_event` of an own client."""
        if event.heartbeats > self._count:
            self._count = event.heartbeats
            self.times.append(time.monotonic())

    def read(self, address: str, method: str, **kwargs: Any) -> stranger.Reply:
        """Make a plain call and note when its messages came."""
        with stranger.open_channel(address) as channel:
            call = stranger.start(
                channel, "chaos", iter([stranger.first_message("chaos", kwargs)]), metadata=[("x-func-name", method)]
            )
            messages = []
            for raw in call:
                messages.append(raw.data)
                if raw.data == b"PONG":
                    self.times.append(time.monotonic())
            return stranger.Reply(call.code(), call.details(), {}, {}, messages)

    @property
    def longest_gap(self) -> float:
        return max(after - before for before, after in zip(self.times, self.times[1:], strict=False))
