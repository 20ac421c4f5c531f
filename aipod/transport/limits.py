"""Rates that a peer may reach."""

from __future__ import annotations

import time


class Bucket:
    """A token bucket: `burst` events at once, `rate` a second for ever."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._filled_at = time.monotonic()

    def take(self, count: int = 1) -> bool:
        """Count that many events; False where they were too many."""
        if self._tokens < count:
            now = time.monotonic()
            self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
            self._filled_at = now
        self._tokens = max(self._tokens - count, -self._burst)
        return self._tokens >= 0

    @property
    def debt(self) -> float:
        """Seconds until another event may be."""
        return max(0.0, -self._tokens / self._rate)
