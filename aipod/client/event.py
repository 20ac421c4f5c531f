"""What a caller is told while a job is under way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

# Seconds between two looks at how far a transfer has come, and over which its rate is smoothed: what is told of a slow
# link would jump with each chunk, and of a fast one with each batch that a thread has done.
_LOOK = 0.1
_SMOOTH = 3.0


@dataclasses.dataclass(frozen=True)
class Event:
    """What a call is doing. Bytes are uncompressed; `log` is what is new since the last event."""

    # CONNECTING, RECEIVING (the upload), QUEUED, RUNNING, DONE (the download), FAILED, CANCELLED; WAITING before
    # another connection: `connection` is that one's number, `message` in short why the last one failed
    phase: str
    sent: int = 0
    payload_size: int | None = None
    received: int = 0
    answer_size: int = 0
    place: int = 0
    progress: float = 0.0
    message: str = ""
    log: str = ""
    heartbeats: int = 0
    content_type: str = ""  # of the answer, once it is known
    connection: int = 1  # counts those for this job; begins again where one has brought progress
    # At most, while nothing was heard of the job; from then on only time counts, and it grows with `connection`.
    connections: int = 1
    offset: int = 0  # bytes of the payload that are durable at the server
    job_id: str = ""
    runs: int = 0  # how often the method was started for this job
    # RECEIVING, DONE: bytes for each byte on the wire, of what was sent or received over this connection; 0 at first
    ratio: float = 0.0
    level: int | None = None  # zstd level of what was packed last of the payload; None where it was stored as it is
    quiet: int = 0  # RUNNING: seconds since it was last heard of: started, progress, log
    rate: float = 0.0  # RECEIVING, DONE: bytes a second, smoothed over some seconds of this phase; 0 at first


OnEvent = Callable[[Event], Any]


class Listener:
    """An `on_event` that hands events on to somebody who may be busy: then no more are read from the server."""

    def __call__(self, event: Event) -> None:
        raise NotImplementedError

    async def taken(self) -> None:
        """Until all events were taken. This is an asyncio-flavored function."""
        raise NotImplementedError


def merged(before: Event, after: Event) -> Event | None:
    """`after`, told instead of both, with the log of both; None where each says something of its own."""
    if before.phase != after.phase:
        return None
    return dataclasses.replace(after, log=before.log + after.log)


class Rate:
    """How fast the transfer under way is."""

    def __init__(self) -> None:
        self._phase = ""
        self._at = 0.0
        self._done = 0
        self._rate = 0.0

    def note(self, phase: str, done: int, now: float) -> float:
        """`done` bytes of `phase` at `now`, in seconds; bytes a second."""
        if phase != self._phase:
            self._phase, self._at, self._done, self._rate = phase, now, done, 0.0
        elif done < self._done:  # another connection goes on at what is durable
            self._at, self._done = now, done
        elif (took := now - self._at) >= _LOOK:
            newest = (done - self._done) / took
            weight = 1 - math.exp(-took / _SMOOTH) if self._rate else 1.0
            self._at, self._done, self._rate = now, done, self._rate + weight * (newest - self._rate)
        return self._rate
