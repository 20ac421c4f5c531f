"""Which zstd level fits the moment, decided from what the batches before have told. No clock, no I/O, no zstd.

What counts is how long a byte of data takes from end to end. Now and then another level is tried for some chunks:

- Above the one that is used, where the wire is what packing waits for: of those that can keep up the one that promises
  most.
- The next one below it, where packing is what the wire waits for.

What packs more is kept where data takes clearly less time for it, what packs less unless it takes clearly more. So
nothing need be known of what else may be slow, cores that both ends share, or who receives: no level keeps there what
it promises. Where neither waits for the other, the source is slow, and no level helps. A level that has lost is left
alone for a while, each time for twice as long.

What was sent need not have left this machine: buffers take megabytes, and a fast beginning says nothing of the wire. So
bytes that wait in them (`Batch.held`) count as not yet sent.

Data that does not shrink is no matter of levels: it is found chunk by chunk (`packing`), and stored at any of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

# None is stored, as it is. Above 9 levels of zstd cost several times as much for a percent or two.
LADDER: tuple[int | None, ...] = (None, -5, 1, 3, 6, 9)
# Where to begin: it tells soon whether data shrinks at all (below it zstd leaves the entropy of literals as it is), and
# a wire of 1 Gbit/s is slower.
START = 1
# Seconds for a byte, and bytes saved, beside level 1: chunks of shared libraries, Python sources, JSON lines.
_COSTS = dict(zip(LADDER, (0.05, 0.7, 1.0, 1.7, 4.5, 7.0), strict=True))
_SAVES = dict(zip(LADDER, (0.0, 0.8, 1.0, 1.03, 1.06, 1.07), strict=True))

# Another level must promise, and then take, at least so much less time: chunks differ by more than that.
_GAIN = 0.05
# Batches that are looked at together: what is in buffers comes and goes by several of them.
_WINDOW = 4
# So many before them say nothing: at first windows grow, and buffers behind this machine take some megabytes more of
# what packs less.
_SKIP = 3
# The wire is what packing waits for where sending takes at least so much of the time; else the wire waits for packing,
# where that takes so much of it.
_SENDS, _PACKS = 0.4, 0.3
# Looks for which a level that has lost is left alone, at first and at most; one is at 16 MiB of a level that is kept.
_WAIT, _LONGEST = 2, 64


@dataclasses.dataclass(frozen=True)
class Batch:
    """A few chunks that were sent."""

    level: int | None
    data: int  # bytes, at least 1
    wire: int  # of them, packed
    packing: float  # seconds
    sending: float  # seconds from the first to the last of it
    waiting: float  # seconds that the sender had waited for it
    held: int = 0  # so many bytes more than before it wait in buffers here; fewer, where it is negative


class _Look:
    """What batches of one level have told, for each byte of data."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        data = sum(batch.data for batch in batches)
        wire = sum(batch.wire for batch in batches)
        waiting = sum(batch.waiting for batch in batches) / data
        took = sum(batch.sending for batch in batches) / data + waiting
        # What waits in buffers will take as long as the rest. Where nothing has left them, that is very long.
        left = max(1, wire - sum(batch.held for batch in batches))
        self.level = batches[0].level
        self.packing = sum(batch.packing for batch in batches) / data  # seconds
        self.took = took * wire / left  # seconds, all in all
        self.wire = wire / data  # bytes
        self.wire_took = self.took / self.wire  # seconds for each byte on the wire
        self.sends = self.took - waiting > _SENDS * self.took
        self.packs = not self.sends and self.packing > _PACKS * self.took


class Levels:
    """The level for the next batch, `level`; `sent` hears of each that was sent, in order."""

    def __init__(self) -> None:
        self.level: int | None = START
        self.is_settled = False  # until then batches had better be small: what is in the making is lost
        self._skip = _SKIP  # batches of this level that say nothing
        self._batches: list[Batch] = []  # of this level, after those
        self._before: _Look | None = None  # at the level before this one, which is on trial
        self._wished: int | None = START  # after the look before
        self._cost = self._saves = 0.0  # of level 1: seconds to pack a byte, part of it that is saved
        self._looks = 0
        self._lost: dict[int | None, tuple[int, int]] = {}  # for how many looks a level is left alone, and until which

    def sent(self, batch: Batch) -> None:
        """Take note of a batch, and decide where enough is known."""
        if batch.level != self.level:
            return  # it was on its way when another one was chosen
        if self._skip:
            self._skip -= 1
            return
        self._batches.append(batch)
        if len(self._batches) < _WINDOW:
            return
        look, self._batches = _Look(self._batches), []
        self._looks += 1
        if look.level is not None:
            self._cost = look.packing / _COSTS[look.level]
            self._saves = (1 - look.wire) / _SAVES[look.level]
        if self._before is not None:
            before, self._before = self._before, None
            # Less packing need not be better: it may be the next level below that helps.
            gain = -_GAIN if before.packs else _GAIN
            if look.took > before.took * (1 - gain):
                self._leave_alone(look.level)
                self._use(before.level)
                self.is_settled = True
                return
        wished, self._wished = self._wished, self._wish(look)
        # What one look tells may have been a pause of the machine.
        if self._wished == self.level or (self.is_settled and wished == self.level):
            self.is_settled = True
            return
        self._before = look
        self._use(self._wished)
        self.is_settled = False

    def _use(self, level: int | None) -> None:
        self.level, self._skip, self._wished = level, _SKIP, level

    def _leave_alone(self, level: int | None) -> None:
        """It has lost."""
        wait = min(2 * self._lost[level][0], _LONGEST) if level in self._lost else _WAIT
        self._lost[level] = wait, self._looks + wait

    def _may_try(self, level: int | None) -> bool:
        return level not in self._lost or self._lost[level][1] <= self._looks

    def _wish(self, look: _Look) -> int | None:
        """The level to try; the one that is used for none."""
        place = LADDER.index(look.level)
        if look.packs:
            lower = LADDER[max(0, place - 1)]
            return lower if self._may_try(lower) else look.level
        best, least = look.level, look.took * (1 - _GAIN)
        for level in LADDER[place + 1 :] if look.sends else ():
            estimate = max(self._cost * _COSTS[level], look.wire_took * (1 - self._saves * _SAVES[level]))
            if estimate < least and self._may_try(level):
                best, least = level, estimate
        return best
