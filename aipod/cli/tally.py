"""What a call has moved so far, at what rate, and how long each phase took: from its events alone, without I/O."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

from aipod.cli.amounts import seconds, size
from aipod.client.event import Event

# Seconds that a rate is the mean of: long enough to be calm, short enough to show what has changed.
WINDOW = 5.0
# Between two samples: events come with every chunk, hundreds a second.
_SAMPLE = 0.1
# Below it a rate is chance.
_LEAST = 0.2
# Ratios below it are what compression costs, not what it brings.
_COMPRESSED = 1.05


class Tally:
    """`see` every event, then ask. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._since = clock()
        self._phase = ""
        self._spent: dict[str, float] = collections.defaultdict(float)  # seconds
        self._samples: collections.deque[tuple[float, int]] = collections.deque()
        self._first: dict[str, int] = {}  # what was done of a phase when this process came to it
        self._last: dict[str, tuple[int, float]] = {}  # what is done, and the ratio

    def see(self, event: Event) -> bool:
        """Take note of an event; whether a phase has begun with it."""
        now, (done, _) = self._clock(), amounts(event)
        is_new = event.phase != self._phase
        if is_new:
            self._spent[self._phase] += now - self._since
            self._phase, self._since = event.phase, now
            self._samples.clear()
        if event.phase in ("RECEIVING", "DONE"):
            self._first.setdefault(event.phase, done)
            self._last[event.phase] = done, event.ratio
            if not self._samples or now - self._samples[-1][0] >= _SAMPLE:
                self._samples.append((now, done))
            while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW:
                self._samples.popleft()
        return is_new

    @property
    def rate(self) -> float:
        """Bytes a second, lately; 0 where that is not known yet."""
        if not self._samples:
            return 0.0
        (then, before), (done, _) = self._samples[0], self._last[self._phase]
        took = self._clock() - then
        return (done - before) / took if took > _LEAST else 0.0

    def detail(self, event: Event) -> str:
        """Rate, ratio and time to go of an upload or download; may be empty."""
        done, total = amounts(event)
        rate = self.rate
        told = [f"{event.ratio:.1f}:1"] if event.ratio >= _COMPRESSED else []
        if rate:
            told.append(f"{size(rate)}/s")
        if rate and total and total > done:
            told.append(f"{seconds((total - done) / rate)} left")
        return "  ".join(told)

    def summary(self) -> str:
        """One line on all of it."""
        now = self._clock()
        spent = {**self._spent, self._phase: self._spent[self._phase] + now - self._since}
        parts = [self._moved("RECEIVING", "up", spent)]
        parts += [f"{word} {seconds(spent[phase])}" for phase, word in _WORDS if spent.get(phase, 0) >= _SAMPLE]
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
