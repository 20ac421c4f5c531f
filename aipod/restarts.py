"""When an instance may be started again, and whether any can run at all."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import trio

from aipod.metrics import Metrics

log = logging.getLogger("aipod.pool")

# Failures in a row after which the next start waits: one by chance costs nobody anything.
FREE = 2
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds; each is twice the one before
# Failures, one after the other, before no instance is thought to be able to run: as many as make the next start wait.
UNABLE = FREE + 1
# Callers choose the names of versions: of so many the failures are remembered, the newest.
VERSIONS = 1000


class Restarts:
    """How instances have fared, by version. Its state changes in the trio thread only.

    To fail is not to load, or to die by itself; a run that its instance survives makes up for all failures before. Of
    versions that are not `known`, a failure says nothing about the others: anybody may ask for any name. What has
    loaded can run, until it dies: a server whose runs all end their instances is ready whenever it has one again, and
    not while the next may not be started.
    """

    def __init__(
        self, known: Callable[[str], bool], on_change: Callable[[bool], None], metrics: Metrics | None = None
    ) -> None:
        """`on_change` hears whether instances can run, each time that it changes."""
        self._metrics = metrics or Metrics()
        self._known = known
        self._on_change = on_change
        self._failures: OrderedDict[str, int] = OrderedDict()
        self._due: dict[str, float] = {}
        self._in_row = 0  # failures of known versions, since the last run that its instance survived
        self._suspect = ""
        self._proven = ""
        self.able = True

    def due(self, version: str) -> float:
        """When the next instance of `version` may be started, by trio's clock."""
        return self._due.get(version, 0.0)

    def failed(self, version: str, when: str, *, others: bool) -> None:
        """An instance has not loaded, or has died.

        `when`: "load", "run", or "idle" where nobody used it. `others`: there are some that have loaded and live.
        """
        if when == "load":
            self._metrics.loads["failed"] += 1
        else:
            self.died(when)
        count = self._failures.pop(version, 0) + 1
        self._failures[version] = count
        if len(self._failures) > VERSIONS:
            forgotten, _ = self._failures.popitem(last=False)
            self._due.pop(forgotten, None)
        if count > FREE:
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(count - FREE - 1, 10))
            self._due[version] = trio.current_time() + pause
            text = "version %s: %d instances in a row have died or not loaded; the next in %g s"
            log.warning(text, version, count, pause)
        if version != self._proven and not self._known(version):
            return
        self._suspect = version
        self._in_row += 1
        if self._in_row >= UNABLE and not others and self.able:
            log.error("%d instances in a row have died or not loaded: not ready until one is loaded", self._in_row)
            self._become(False)

    def died(self, when: str) -> None:
        """An instance has died by itself, in a "run" or "idle"."""
        self._metrics.died[when] += 1

    def ran(self, version: str) -> None:
        """A run has ended, and its instance lives on."""
        self._in_row = 0
        self._failures.pop(version, None)
        self._due.pop(version, None)

    def loaded(self, version: str, seconds: float) -> None:
        """An instance has loaded, which took so long."""
        self._metrics.loads["ok"] += 1
        self._metrics.load_seconds.observe(seconds)
        self._proven = version
        if not self.able:
            log.info("an instance of version %s has loaded: ready again", version)
            self._become(True)

    @property
    def suspects(self) -> list[str]:
        """The versions to try while none can run, what may be started first: what has failed last, what loaded last."""
        return sorted(filter(None, dict.fromkeys((self._suspect, self._proven))), key=self.due)

    def _become(self, able: bool) -> None:
        self.able = able
        self._on_change(able)
