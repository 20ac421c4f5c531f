"""When an instance may be started again, and whether any can run at all."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import trio

log = logging.getLogger("aipod.pool")

# Failures in a row after which the next start waits: one by chance costs nobody anything.
FREE = 2
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds; each is twice the one before
# Loads that fail, one after the other, before no instance is thought to be able to run.
UNABLE = 3
# Callers choose the names of versions: of so many the failures are remembered, the newest.
VERSIONS = 1000


class Restarts:
    """How instances have fared, by version. Its state changes in the trio thread only.

    To fail is not to load, or to die by itself; a run that its instance survives makes up for all failures before. Of
    versions that are not `known`, a failed load says nothing about the others: anybody may ask for any name.
    """

    def __init__(self, known: Callable[[str], bool], on_change: Callable[[bool], None]) -> None:
        """`on_change` hears whether instances can run, each time that it changes."""
        self._known = known
        self._on_change = on_change
        self._failures: OrderedDict[str, int] = OrderedDict()
        self._due: dict[str, float] = {}
        self._failed_loads = 0  # of known versions, since the last that succeeded
        self._suspect = ""
        self._proven = ""
        self.able = True

    def due(self, version: str) -> float:
        """When the next instance of `version` may be started, by trio's clock."""
        return self._due.get(version, 0.0)

    def failed(self, version: str) -> None:
        """An instance has not loaded, or has died."""
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

    def ran(self, version: str) -> None:
        """A run has ended, and its instance lives on."""
        self._failures.pop(version, None)
        self._due.pop(version, None)

    def loaded(self, version: str) -> None:
        """An instance has loaded."""
        self._proven, self._failed_loads = version, 0
        if not self.able:
            log.info("an instance of version %s has loaded: ready again", version)
            self._become(True)

    def not_loaded(self, version: str, *, others: bool) -> None:
        """An instance has not loaded. `others`: there are some that have."""
        self.failed(version)
        if version != self._proven and not self._known(version):
            return
        self._suspect = version
        self._failed_loads += 1
        if self._failed_loads >= UNABLE and not others and self.able:
            log.error("%d loads in a row have failed: not ready until one succeeds", self._failed_loads)
            self._become(False)

    @property
    def suspects(self) -> list[str]:
        """The versions to try while none can run: what has failed last, and what has loaded last."""
        return [version for version in dict.fromkeys((self._suspect, self._proven)) if version]

    def _become(self, able: bool) -> None:
        self.able = able
        self._on_change(able)
