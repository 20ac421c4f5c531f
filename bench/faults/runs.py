"""When each run of a job began and ended, and whether its server was killed meanwhile.

The model writes lines "start NAME PID SECONDS" and "end NAME PID SECONDS": the process is its server's, the seconds are
those of the machine's monotonic clock.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

MOST = {"work": 1, "again": 2}  # starts of a job, by its method
# Seconds after a method's end in which its answer is stored, on a busy disk: until then the job runs.
STORE = 5.0
# Seconds that a worker outlives its server.
WORKER = 1.0


@dataclasses.dataclass
class Ran:
    """One run. `end`: None where the method did not come to it."""

    name: str
    server: int
    begin: float
    end: float | None = None

    def was_killed(self, kills: Mapping[int, float]) -> bool:
        """`kills`: when which server was killed."""
        killed = kills.get(self.server)
        if killed is None or killed < self.begin - WORKER:
            return False
        return self.end is None or killed <= self.end + STORE


def read_runs(text: str) -> list[Ran]:
    """What the model has written."""
    runs: list[Ran] = []
    for line in text.splitlines():
        what, name, server, when = line.split()
        if what == "start":
            runs.append(Ran(name, int(server), float(when)))
            continue
        mine = next(ran for ran in reversed(runs) if (ran.name, ran.server) == (name, int(server)))
        mine.end = float(when)
    return runs


def check_starts(starts: Sequence[str], right: set[str], problems: list[str]) -> dict[str, collections.Counter[int]]:
    """How many jobs of each method were started how often; what must not be goes to `problems`."""
    counts = collections.Counter(starts)
    found: dict[str, collections.Counter[int]] = {method: collections.Counter() for method in MOST}
    for name, count in counts.items():
        method = name.partition("-")[0]
        found[method][count] += 1
        if count > MOST[method]:
            problems.append(f"{name}: {count} starts")
    problems += [f"{name}: an answer without a start" for name in right - counts.keys()]
    return found


def may_be_interrupted(name: str, begun: float, over: float, runs: Sequence[Ran], kills: Mapping[int, float]) -> bool:
    """Whether each start that the job `name` may have had was ended with its server.

    A server that is killed between its note of a start and the method's first line leaves no run to see. For such ones
    there must have been as many kills from when the job was handed over (`begun`) until its outcome was told (`over`)
    as it had starts.
    """
    mine = [ran for ran in runs if ran.name == name]
    most = MOST[name.partition("-")[0]]
    if not all(ran.was_killed(kills) for ran in mine):
        return False
    return len(mine) == most or sum(begun <= when <= over for when in kills.values()) >= most
