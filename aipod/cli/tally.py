"""What a call has moved, and how long each phase took: from its events alone, without I/O."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

from aipod.cli.amounts import seconds, size
from aipod.client.event import Event

# Seconds below which a rate is chance, and a phase is not worth a word.
_LEAST = 0.2
_WORTH = 0.1
# Ratios below it are what compression costs, not what it brings.
_COMPRESSED = 1.05


class Tally:
    """`see` every event, then ask. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._since = clock()
        self._phase = ""
        self._spent: dict[str, float] = collections.defaultdict(float)  # seconds
        self._first: dict[str, int] = {}  # what was done of a phase when this process came to it
        self._last: dict[str, tuple[int, float]] = {}  # what is done, and the ratio

    def see(self, event: Event) -> bool:
        """Take note of an event; whether a phase has begun with it."""
        now, (done, _) = self._clock(), amounts(event)
        is_new = event.phase != self._phase
        if is_new:
            self._spent[self._phase] += now - self._since
            self._phase, self._since = event.phase, now
        if event.phase in ("RECEIVING", "DONE"):
            self._first.setdefault(event.phase, done)
            self._last[event.phase] = done, event.ratio
        return is_new

    def summary(self) -> str:
        """One line on all of it."""
        now = self._clock()
        spent = {**self._spent, self._phase: self._spent[self._phase] + now - self._since}
        parts = [self._moved("RECEIVING", "up", spent)]
        parts += [f"{word} {seconds(spent[phase])}" for phase, word in _WORDS if spent.get(phase, 0) >= _WORTH]
        parts.append(self._moved("DONE", "down", spent))
        return f"done in {seconds(now - self._began)}: " + ", ".join(filter(None, parts))

    def _moved(self, phase: str, way: str, spent: dict[str, float]) -> str:
        done, ratio = self._last.get(phase, (0, 0.0))
        if not done:
            return ""
        took, moved = spent[phase], done - self._first[phase]
        more = [f"{size(moved / took)}/s"] if took > _LEAST and moved else []
        if ratio >= _COMPRESSED:
            more.append(f"{ratio:.1f}:1")
        text = f"{size(done)} {way}"
        return f"{text} in {seconds(took)} ({', '.join(more)})" if more else text


_WORDS = (("QUEUED", "waited"), ("RUNNING", "ran"))


def amounts(event: Event) -> tuple[int, float | None]:
    """What is done of what, in the phase of the event."""
    if event.phase == "RECEIVING":
        return max(event.sent, event.offset), event.payload_size  # who attaches sends nothing
    if event.phase == "DONE":
        return event.received, event.answer_size
    if event.phase == "RUNNING" and event.progress:
        return int(event.progress * 1000), 1000
    return 0, None


def detail(event: Event) -> str:
    """Ratio, rate and time to go of an upload or download; may be empty."""
    done, total = amounts(event)
    told = [f"{event.ratio:.1f}:1"] if event.ratio >= _COMPRESSED else []
    if event.rate:
        told.append(f"{size(event.rate)}/s")
        if total and total > done:
            told.append(f"{seconds((total - done) / event.rate)} left")
    return "  ".join(told)
