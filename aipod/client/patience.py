"""How long and how often a job is tried again. No I/O; the clock is given."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from aipod.config import Config

# (first, limit) seconds of a pause that doubles, with full jitter, so that clients cut off together do not come back
# together (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
_BEFORE_ANY_ANSWER = (1.0, 30.0)
_RECONNECT = (0.5, 5.0)
# Seconds of a pause that a server may ask for: ours asks for a few, a hostile one for years.
_LONGEST = 600.0


class Patience:
    """What is left of the tries for one job.

    Until anything was heard of the job, or its request was complete, `attempts` connections. From then on connections
    for as long as they bring progress, and `reconnect` seconds without any; so long also for a server that drains to be
    followed by another one. `clock` says seconds.
    """

    def __init__(
        self, config: Config, *, clock: Callable[[], float] = time.monotonic, rng: random.Random | None = None
    ) -> None:
        self._attempts = config.attempts
        self._reconnect = config.reconnect
        self._clock = clock
        self._uniform = (rng or random).uniform
        self._failures = 0  # since the last progress
        self._since: float | None = None  # the first of them
        self._out_of_sight: float | None = None  # since when the job is not where it was
        self._grudged = False  # the free try was taken

    @property
    def attempt(self) -> int:
        """The number of the next connection."""
        return self._failures + 1

    def progress(self) -> None:
        """The job has come a step nearer to its end."""
        self._failures = 0
        self._since = None
        self.seen()

    def seen(self) -> None:
        """The server has spoken of the job."""
        self._out_of_sight = None
        self._grudged = False

    def pause(
        self,
        *,
        known: bool,
        draining: bool = False,
        at_least: float = 0.0,
        free: bool = False,
        within: float | None = None,
    ) -> float | None:
        """Seconds to wait before the next connection; None where there must be none.

        `known`: the server knows the job, or may. `draining`: it drains, and has nothing of the job. `at_least`: the
        pause that the server asked for. `free`: the failure was that of a connection that had been idle; one of a kind
        costs neither time nor an attempt. `within`: seconds for which the job may be somewhere else than it was.
        """
        now = self._clock()
        known = known or (draining and self._attempts > 1)  # else what fails once is not to be tried again
        if free and not self._grudged and not at_least:
            self._grudged = True
            return 0.0
        self._failures += 1
        self._since = now if self._since is None else self._since
        left = float("inf")
        if known:
            left = self._since + self._reconnect - now
        elif self._failures >= self._attempts:
            return None
        if within is not None:
            self._out_of_sight = now if self._out_of_sight is None else self._out_of_sight
            left = min(left, self._out_of_sight + within - now)
        if left <= 0:
            return None
        first, limit = _RECONNECT if known else _BEFORE_ANY_ANSWER
        jittered = self._uniform(0, min(limit, first * 2 ** min(self._failures - 1, 30)))
        return min(max(jittered, min(at_least, _LONGEST)), left)
