"""Which zstd level fits the moment, decided from what the batches before have told. No clock, no I/O, no zstd.

A sender makes batches of chunks and sends them, one thing beside the other, so it takes as long as the slower of the
two. What packing and sending a byte would take at another level is estimated: from what was seen of that level, else
from the level that is used and how levels compare usually. The level with the least of it is used from then on. What
it really brought is compared with what there was before: a level that has disappointed is left, and not tried again
for a while, twice as long each time. That bounds what guesses cost, whatever they overlook (a receiver that is slower
than the wire, cores that both stages want).

Data that does not shrink is no matter of levels: it is found chunk by chunk (`packing`), and stored at any of them.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics

# None is stored, as it is. Above 9 levels of zstd cost several times as much for a percent or two.
LADDER: tuple[int | None, ...] = (None, -10, -1, 1, 3, 6, 9)
# Where to begin: it tells soon whether data shrinks at all (below it zstd leaves the entropy of literals as it is), and
# a wire of 1 Gbit/s is slower.
START = 1
# Seconds for a byte, and bytes saved, beside level 1: chunks of shared libraries, Python sources, JSON lines.
_COSTS = dict(zip(LADDER, (0.05, 0.6, 0.85, 1.0, 1.4, 4.0, 7.0), strict=True))
_SAVES = dict(zip(LADDER, (0.0, 0.7, 0.92, 1.0, 1.03, 1.06, 1.07), strict=True))

# Another level must promise at least so much less time: below it guesses are no better than noise.
_GAIN = 0.03
# A level is judged by so many batches; the first one still waits for those before it, and does not count.
_SETTLE = 4
# Batches that are looked at.
_RECENT = 5
# How much the newest one counts in the means.
_WEIGHT = 0.4
# A stage may be what the other waits for where it takes so much of the time. (Packing waits for threads besides.)
_PACKS, _SENDS = 0.35, 0.7
# For each batch that the wire has waited for, it is taken to be so much faster than it was.
_HOPE = 0.98
# Batches for which a level that has disappointed is not tried again: first, and at most.
_REST, _LONGEST_REST = 24, 768


@dataclasses.dataclass(frozen=True)
class Batch:
    """A few chunks that were sent."""

    level: int | None
    data: int  # bytes, at least 1
    wire: int  # of them, packed
    packing: float  # seconds
    sending: float  # seconds from the first to the last of it
    waiting: float  # seconds that the sender had waited for it


class _Rung:
    """What is known of one level, for each byte of data."""

    def __init__(self) -> None:
        self.packing = 0.0  # seconds
        self.wire = 0.0  # bytes
        self.known = False
        self.seen = 0  # batches since it was chosen last
        self.took = 0.0  # seconds, all in all, when it was used last
        self.rest = _REST  # batches
        self.rests_until = 0


class Levels:
    """The level for the next batch, `level`; `sent` hears of each that was sent, in order."""

    def __init__(self) -> None:
        self.level: int | None = START
        self._rungs: dict[int | None, _Rung] = collections.defaultdict(_Rung)
        self._count = 0
        self._before: int | None = START  # the level that was left for this one
        self._newest: collections.deque[Batch] = collections.deque(maxlen=_RECENT)  # of this level, without the first
        self._wire = 0.0  # seconds for a byte on the wire

    @property
    def is_settled(self) -> bool:
        """The level is known to be good. Until then batches had better be small: what is in the making is lost."""
        return self._rungs[self.level].seen >= _SETTLE

    def sent(self, batch: Batch) -> None:
        """Take note of a batch, and decide where enough is known."""
        self._count += 1
        rung = self._rungs[batch.level]
        rung.packing = _mean(rung.packing, batch.packing / batch.data, rung.known)
        rung.wire = _mean(rung.wire, batch.wire / batch.data, rung.known)
        rung.known = True
        if batch.level != self.level:
            return  # it was on its way when another one was chosen
        rung.seen += 1
        if rung.seen == 1 and self._count > 1:
            return
        self._newest.append(batch)
        if rung.seen >= _SETTLE or self._count == 2:
            self._decide(rung)

    def _decide(self, rung: _Rung) -> None:
        # Medians: a machine that stands still for a moment is no reason to do anything.
        rung.took = statistics.median((batch.sending + batch.waiting) / batch.data for batch in self._newest)
        sending = statistics.median(batch.sending / batch.data for batch in self._newest)
        packs, sends = rung.packing > _PACKS * rung.took, sending > _SENDS * rung.took
        if sends or not self._wire:
            self._wire = statistics.median(batch.sending / batch.wire for batch in self._newest)
        else:
            # The wire has waited: it may be faster than it was, and is at least as fast as it is used now.
            self._wire = min(self._wire * _HOPE, rung.took / rung.wire)
        before = self._rungs[self._before]
        if rung.seen == _SETTLE and before is not rung and rung.took > before.took:
            rung.rests_until = self._count + rung.rest
            rung.rest = min(rung.rest * 2, _LONGEST_REST)
            self._use(self._before)
            return
        best, least = self.level, self._estimate(self.level) * (1 - _GAIN)
        place = LADDER.index(self.level)
        for at, level in enumerate(LADDER):
            rests = self._rungs[level].rests_until > self._count
            if not rests and ((at < place and packs) or (at > place and sends)):
                estimate = self._estimate(level)
                if estimate < least:
                    best, least = level, estimate
        if best != self.level:
            self._use(best)

    def _use(self, level: int | None) -> None:
        self._before, self.level = self.level, level
        self._rungs[level].seen = 0
        self._newest.clear()

    def _estimate(self, level: int | None) -> float:
        """Seconds for a byte at `level`."""
        rung = self._rungs[level]
        packing, wire = rung.packing, rung.wire
        if not rung.known:
            place = LADDER.index(level)
            known = [at for at, one in enumerate(LADDER) if one is not None and self._rungs[one].known]
            used = LADDER[min(known, key=lambda at: abs(at - place))]
            packing = self._rungs[used].packing * _COSTS[level] / _COSTS[used]
            wire = 1 - (1 - self._rungs[used].wire) * _SAVES[level] / _SAVES[used]
        return max(packing, self._wire * wire)


def _mean(mean: float, value: float, known: bool) -> float:
    return mean + (value - mean) * _WEIGHT if known else value
