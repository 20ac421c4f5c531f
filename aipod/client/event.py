"""What a caller is told while a job is under way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


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


OnEvent = Callable[[Event], Any]
