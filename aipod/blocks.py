"""Buffers for the chunks of one transfer, used again and again: it takes what it has in hands, and no more.

Were each chunk an object of its own, every thread that makes some would leave its heap in pieces: 25 MB for each of
them, as much again with bad luck, and pages that have to be zeroed.
"""

from __future__ import annotations

import sys
import threading


class Blocks:
    """Buffers of `size` bytes; at most `most` are kept, and more are made where as many are in use.

    One is free when nothing outside refers to it: no view of it, nor a socket that has not taken it yet. So nobody has
    to give one back, whichever way a transfer ends. For all threads.
    """

    def __init__(self, size: int, most: int) -> None:
        self._size = size
        self._most = most
        self._blocks: list[bytearray] = []
        self._lock = threading.Lock()

    def take(self) -> bytearray:
        """One that nobody uses, with anything in it."""
        with self._lock:
            for place in range(len(self._blocks)):
                if _references(self._blocks, place) == _NONE:
                    return self._blocks[place]
            made = bytearray(self._size)
            if len(self._blocks) < self._most:
                self._blocks.append(made)
            return made


def _references(blocks: list[bytearray], place: int) -> int:
    return sys.getrefcount(blocks[place])


# Of what only the list refers to: how many the question itself makes is the interpreter's affair.
_NONE = _references([bytearray()], 0)
