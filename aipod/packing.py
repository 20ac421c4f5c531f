"""Chunks for the wire, at the level that fits the moment: the part of a sender that is the same in both directions.

A sender has two stages, one beside the other: `pack` makes messages in threads, and what sends them says so with
`sending`. What either has waited for is what the next level is chosen by. What does not shrink is stored, whatever the
level: a sample tells, where the chunk before did not shrink either.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, cast

from aipod.codec import Laid, frame, stored
from aipod.config import KIB
from aipod.levels import Batch, Levels
from aipod.wire.ai import Raw

# Chunks that are made together: a hop into a thread costs as much as reading 100 KiB. As long as the level is not known
# to be good there is one, for those that are on their way when another one is chosen have the wrong one.
BATCH = 4
# It shrinks where it becomes less than that: below it, packing and unpacking cost more than they save on any wire.
_SHRUNK = 0.98
# A sample has so many pieces of so many bytes: 6 % of a chunk, and packing that takes 10 us where it does not shrink.
_PIECES, _PIECE = 4, 16 * KIB

Piece = bytes | memoryview | Laid


class Chooser(Protocol):
    """Which level the next batch has; see `Levels`."""

    @property
    def level(self) -> int | None: ...

    @property
    def is_settled(self) -> bool: ...

    def sent(self, batch: Batch) -> None: ...


class Fixed:
    """A level that was asked for."""

    is_settled = True

    def __init__(self, level: int) -> None:
        self.level = level

    def sent(self, batch: Batch) -> None:
        pass


@dataclasses.dataclass
class Packed:
    """Messages with a chunk each, and what they have cost."""

    level: int | None  # that was chosen
    messages: list[Raw] = dataclasses.field(default_factory=list)
    levels: collections.Counter[int | None] = dataclasses.field(default_factory=collections.Counter)  # that chunks have
    data: int = 0  # bytes
    wire: int = 0  # bytes
    seconds: float = 0.0


class Packer:
    """Packs what one sender sends, from `offset` on. `level`: fixed, or "auto".

    `held`: how many bytes were sent and have not reached the peer's system, on this machine that is.
    """

    def __init__(self, level: int | str, offset: int = 0, held: Callable[[], int] = lambda: 0) -> None:
        self._levels: Chooser = Fixed(level) if isinstance(level, int) else Levels()
        self.offset = offset  # of what is packed next
        self.level: int | None = None  # what was packed last has it; None is stored
        self._made: Packed | None = None  # the batch in the making
        self._shrinks = True  # what came last
        self._idle_since = time.perf_counter()
        self._get_held, self._held = held, 0
        self._data = self._wire = 0  # bytes that were sent

    @property
    def chunks(self) -> int:
        """How many to pack at once."""
        return BATCH if self._levels.is_settled else 1

    @property
    def stores(self) -> bool:
        """Whether what comes next is most likely stored: then it had better be `Laid`."""
        return self._levels.level is None or not self._shrinks

    @property
    def ratio(self) -> float:
        """Bytes for each byte on the wire, of what was sent; 0 where nothing was."""
        return self._data / self._wire if self._wire else 0.0

    # In threads, one call at a time

    def message(self, piece: Piece) -> Raw:
        """A message with 1 to `CHUNK` bytes, for the batch in the making."""
        if self._made is None:
            self._made = Packed(self._levels.level)
        made, began = self._made, time.perf_counter()
        data = self._frame(piece, made.level)
        made.seconds += time.perf_counter() - began
        made.levels[self.level] += 1
        made.data += len(piece)
        made.wire += len(data)
        offset, self.offset = self.offset, self.offset + len(piece)
        return Raw(data=cast(bytes, data), offset=offset)

    def batch(self, messages: Iterable[Raw], most: int = BATCH) -> Packed:
        """The next of `messages`, which come from `message`, `most` of them at most; none at the end."""
        taken = list(itertools.islice(messages, min(most, self.chunks)))
        made, self._made = self._made or Packed(self._levels.level), None
        made.messages = taken
        return made

    def pack(self, pieces: Iterable[Piece]) -> Packed:
        """`pieces`, at most `chunks`."""
        return self.batch(map(self.message, pieces))

    def _frame(self, piece: Piece, level: int | None) -> bytes | memoryview:
        if level is None:
            return self._store(piece)
        self.level = level
        if isinstance(self._levels, Fixed):
            return frame(_joined(piece), level)
        if not self._shrinks:
            sample = _sample(piece)
            self._shrinks = len(frame(sample, level)) < _SHRUNK * len(sample)
        if not self._shrinks:
            return self._store(piece)
        data = frame(_joined(piece), level)
        self._shrinks = len(data) < _SHRUNK * len(piece)
        return data

    def _store(self, piece: Piece) -> bytes | memoryview:
        self.level = None
        return piece.stored() if isinstance(piece, Laid) else stored(piece)

    # Where they are sent

    @contextlib.contextmanager
    def sending(self, packed: Packed) -> Iterator[None]:
        """The body sends the messages of `packed`; all that were packed before are sent."""
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        waiting, self._idle_since = max(0.0, began - self._idle_since), ended
        before, self._held = self._held, self._get_held()
        self._data += packed.data
        self._wire += packed.wire
        if packed.data:
            took = packed.seconds, ended - began, waiting
            self._levels.sent(Batch(packed.level, packed.data, packed.wire, *took, self._held - before))


def _joined(piece: Piece) -> bytes | memoryview:
    return piece.joined() if isinstance(piece, Laid) else piece


def _sample(piece: Piece) -> bytes | memoryview:
    if isinstance(piece, Laid):
        return b"".join(each[:_PIECE] for each in piece.pieces[:: len(piece.pieces) // _PIECES])
    if len(piece) <= 2 * _PIECES * _PIECE:
        return piece
    view, step = memoryview(piece), len(piece) // _PIECES
    return b"".join(view[start : start + _PIECE] for start in range(0, _PIECES * step, step))
