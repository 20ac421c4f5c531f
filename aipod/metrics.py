"""What a server has done and does, in plain numbers: added to on the way, made into metrics when somebody asks.

`service.figures` asks, and `prometheus` writes them down.

All numbers change in the trio thread only, and are read in it. The names that become labels are the server's own: of
its RPCs, of the methods that its class offers, of outcomes and reasons. What a caller may choose freely, the names of
versions for instance, is none; it counts as `OTHER` where it is asked for.
"""

from __future__ import annotations

import bisect
import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence

OTHER = "other"

# Seconds: a small call takes milliseconds, a training hours.
SECONDS = (0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 24 * 3600.0)
# Seconds that a heartbeat is late: from those that nobody feels to the silence after which clients look for another
# connection.
LAG = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0)

# A job's way through the server; `download` is the way of its answer to one of those who ask for it.
UPLOAD, QUEUE, RUN, DOWNLOAD = PHASES = ("upload", "queue", "run", "download")
DONE, FAILED, CANCELLED, INTERRUPTED = OUTCOMES = ("done", "failed", "cancelled", "interrupted")
# What a connection, or a server, has gone on with: an upload where it was, a job that somebody looks for again, an
# answer where it was, a job whose server is gone, and a method that is started once more.
RESUMED = ("upload", "watch", "download", "job", "run")


class Histogram:
    """How many values were how large."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value, which is not negative."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value


class Rpc:
    """The calls of one gRPC method; `received` and `sent` count messages."""

    __slots__ = ("codes", "kind", "method", "received", "seconds", "sent", "service", "started")

    def __init__(self, service: str, method: str, kind: str) -> None:
        self.service = service
        self.method = method
        self.kind = kind
        self.started = self.received = self.sent = 0
        self.codes: dict[str, int] = {}
        self.seconds = Histogram()

    def ended(self, code: str, seconds: float) -> None:
        """A call that has `started` is over, with the name of its status."""
        self.codes[code] = self.codes.get(code, 0) + 1
        self.seconds.observe(seconds)


class Jobs:
    """The jobs of one method."""

    __slots__ = ("ended", "seconds", "started")

    def __init__(self) -> None:
        self.started = 0
        self.ended = dict.fromkeys(OUTCOMES, 0)
        self.seconds = {phase: Histogram() for phase in PHASES}


@dataclasses.dataclass
class Moved:
    """Bytes of payloads or answers: as they are, and what they were on the wire."""

    data: int = 0
    wire: int = 0


class Metrics:
    """The numbers of one server. `methods`: what its class offers. `reasons`: why calls may fail."""

    def __init__(self, methods: Iterable[str] = (), reasons: Iterable[str] = ()) -> None:
        self.began = time.time()
        self.rpcs: dict[str, Rpc] = {}  # by path
        self.other_rpcs = Rpc(OTHER, OTHER, OTHER)
        self.jobs = {method: Jobs() for method in (*methods, OTHER)}
        self.resumed = dict.fromkeys(RESUMED, 0)
        self.up, self.down = Moved(), Moved()  # payloads, answers
        self.levels: dict[int | None, int] = {}  # chunks of long answers by zstd level; None is stored
        self.errors = dict.fromkeys((*reasons, OTHER), 0)
        self.late = Histogram(LAG)
        self.loads = dict.fromkeys(("ok", "failed"), 0)
        self.load_seconds = Histogram()
        self.died = dict.fromkeys(("run", "idle"), 0)
        self.accepted = self.turned_away = 0  # connections

    def of_method(self, method: str) -> Jobs:
        """The jobs of `method`."""
        return self.jobs.get(method) or self.jobs[OTHER]

    def offer(self, path: str, kind: str) -> None:
        """The server has an RPC with this path, `/SERVICE/METHOD`."""
        service, _, method = path.removeprefix("/").partition("/")
        self.rpcs.setdefault(path, Rpc(service, method, kind))

    def begin(self, path: str) -> Rpc:
        """A call has begun, with whatever its peer has written there as its path."""
        rpc = self.rpcs.get(path, self.other_rpcs)
        rpc.started += 1
        return rpc

    def fail(self, reason: str) -> None:
        """A call has ended with an error; other reasons than those that are known come from models."""
        self.errors[reason if reason in self.errors else OTHER] += 1


@dataclasses.dataclass(frozen=True)
class Now:
    """How a server is this moment. `spool_bytes`, `spool_free`: None where its disk has not told in time."""

    jobs: Mapping[str, int]  # by phase
    in_line: int
    instances: Mapping[str, int]  # by what they do
    connections: int
    draining: bool
    spool_bytes: int | None
    spool_free: int | None
