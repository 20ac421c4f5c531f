"""Which zstd level fits the moment, decided from what the batches before have told. No clock, no I/O, no zstd.

A sender makes batches of chunks and sends them, one thing beside the other, so it takes as long as the slower of the
two. What packing and sending a byte would take at another level is estimated: from what was seen of that level, else
from the level that is used and how levels compare usually. The level with the least of it is used from then on. One
that packs more and is slower for it, because both stages want the same cores or the receiver is what is slow, is left
again, and that is remembered for a while.

Data that does not shrink is no matter of levels: it is found chunk by chunk (`packing`), and stored at any of them.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple

# None is stored, as it is. Above 9 levels of zstd cost several times as much for a percent or two.
LADDER: tuple[int | None, ...] = (None, -5, 1, 3, 6, 9)
# Where to begin: it tells soon whether data shrinks at all (below it zstd leaves the entropy of literals as it is), and
# a wire of 1 Gbit/s is slower.
START = 1
# Seconds for a byte, and bytes saved, beside level 1: chunks of shared libraries, Python sources, JSON lines.
_COSTS = dict(zip(LADDER, (0.05, 0.75, 1.0, 1.4, 4.0, 7.0), strict=True))
_SAVES = dict(zip(LADDER, (0.0, 0.8, 1.0, 1.03, 1.06, 1.07), strict=True))

# Another level must promise at least so much less time: below it guesses are no better than noise.
_GAIN = 0.05
# Batches that are looked at together: of a level that is tried, and of one that has proved good. What they say must be
# said twice then, for machines stand still at times.
_TRIAL, _WINDOW = 3, 4
# So many before them say nothing: they wait for what is in buffers, or fill them, and at the beginning windows grow.
_SKIP = 3
# So many batches that take so much longer than before it are enough to know that a level that packs less is none.
_BAD, _FAR = 2, 2.0
# What packs more must be so much better than what packs less, or it is not worth its heat.
_TIE = 0.01
# How much the newest batch counts in the means.
_WEIGHT = 0.4
# A stage may be what the other waits for where it takes so much of the time. (Packing waits for threads besides.)
_PACKS, _SENDS = 0.35, 0.7
# While the wire waits, it may have become faster: after each look it is taken to be so much faster. Where it proves to
# be slower than hoped, there is half as much hope; and less than that is none.
_HOPE, _LITTLE_HOPE, _SLOWER = 0.7, 0.98, 1.3
# By how much a level was worse than estimated is forgotten like that, look by look.
_MEMORY = 0.9


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
        self.surprise = 1.0  # how many times longer than estimated it took, where it was left for that


class _Left(NamedTuple):
    """A level that was left for another one, and seconds for a byte of data and on the wire, at the end."""

    level: int | None
    took: float
    wire: float


class Levels:
    """The level for the next batch, `level`; `sent` hears of each that was sent, in order."""

    def __init__(self) -> None:
        self.level: int | None = START
        self.is_settled = False  # until then batches had better be small: what is in the making is lost
        self._rungs: dict[int | None, _Rung] = collections.defaultdict(_Rung)
        self._skip = _SKIP  # batches of this level that say nothing
        self._newest: list[Batch] = []  # of this level, after those
        self._bad: list[Batch] = []  # of this level, far worse than the one before
        self._wish: int | None = START  # what the last look was for
        self._left = _Left(START, 0.0, 0.0)
        self._wire = 0.0  # seconds for a byte on the wire
        self._is_sure = False  # the wire was what everything waited for
        self._is_hoped = False  # it was taken to be faster since then
        self._hope = _HOPE

    def sent(self, batch: Batch) -> None:
        """Take note of a batch, and decide where enough is known."""
        rung = self._rungs[batch.level]
        rung.packing = _mean(rung.packing, batch.packing / batch.data, rung.known)
        rung.wire = _mean(rung.wire, batch.wire / batch.data, rung.known)
        rung.known = True
        if batch.level != self.level:
            return  # it was on its way when another one was chosen
        if self._is_far_worse(batch):
            self._bad.append(batch)
        elif self._skip:
            self._skip -= 1
            return
        else:
            self._newest.append(batch)
        enough = len(self._bad) == _BAD or len(self._newest) == (_WINDOW if self.is_settled else _TRIAL)
        if not enough:
            return
        newest, self._newest, self._bad = self._newest + self._bad, [], []
        data = sum(batch.data for batch in newest)
        sending = sum(batch.sending for batch in newest)
        took = (sending + sum(batch.waiting for batch in newest)) / data
        best = self._look(took, sending / data, sending / sum(batch.wire for batch in newest))
        if best != self.level and (best == self._wish or not self.is_settled):
            self._left = _Left(self.level, took, self._wire)
            self.level, self._skip, self.is_settled = best, _SKIP, False
        else:
            self.is_settled = True
        self._wish = best

    def _is_far_worse(self, batch: Batch) -> bool:
        """Of a level that packs less than the one before, which was given up for it: that should have been better."""
        is_trial = not self.is_settled and _packs_more(self._left.level, self.level)
        return is_trial and batch.sending + batch.waiting > _FAR * self._left.took * batch.data

    def _look(self, took: float, sending: float, wire: float) -> int | None:
        """The best level, after seconds for a byte of data, all in all and of sending, and for one on the wire."""
        rung, left = self._rungs[self.level], self._left
        for one in self._rungs.values():
            one.surprise = 1 + (one.surprise - 1) * _MEMORY
        rung.surprise = 1.0
        if not self.is_settled and _packs_more(self.level, left.level) and took > left.took:
            # The wire seems to be slower as well, where both stages want the same cores.
            self._wire = left.wire
            rung.surprise = max(1.0, took / left.took * self._estimate(left.level) / self._estimate(self.level))
            return left.level
        packs, sends = rung.packing > _PACKS * took, sending > _SENDS * took
        if not packs and not sends:
            return self.level  # a slow source: no level helps
        self._note_wire(wire, sends=sends)
        best, least = self.level, self._estimate(self.level) * (1 - _GAIN)
        for level in LADDER:
            estimate = self._estimate(level)
            if estimate < least and (packs or _packs_more(level, self.level)):
                best, least = level, estimate * (1 - _TIE)
        return best

    def _note_wire(self, wire: float, *, sends: bool) -> None:
        """What a byte on the wire has taken now; `sends`: everything has waited for that."""
        if sends or not self._wire:
            if self._is_hoped:
                self._hope = min(_LITTLE_HOPE, self._hope**0.5) if wire > _SLOWER * self._wire else _HOPE
            self._wire, self._is_sure, self._is_hoped = wire, sends, False
        elif self._is_sure:
            self._wire, self._is_hoped = self._wire * self._hope, True
        else:
            self._wire = min(self._wire, wire)

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
            if level is None:
                # Packing takes cores from sending, so the wire may be faster without. The less is saved, the less is
                # lost where it is not.
                wire *= 1 - self._rungs[used].wire / 2
        return max(packing, self._wire * wire) * rung.surprise


def _packs_more(level: int | None, other: int | None) -> bool:
    return LADDER.index(level) > LADDER.index(other)


def _mean(mean: float, value: float, known: bool) -> float:
    return mean + (value - mean) * _WEIGHT if known else value
