"""Buffers for the chunks of one transfer, used again and again: it takes what it has in hands, and no more.

Were each chunk an object of its own, every thread that makes some would leave its heap in pieces: 25 MB for each of
them, as much again with bad luck, and pages that have to be zeroed.
"""

from __future__ import annotations

import threading


class Blocks:
    """Buffers of `size` bytes; at most `most` are kept, and more are made where as many are in use.

    One is free when there is no view of it any more: a part of it, or what a socket has not taken yet. So nobody has to
    give one back, whichever way a transfer ends. For all threads.
    """

    def __init__(self, size: int, most: int) -> None:
        self._size = size
        self._most = most
        self._blocks: list[bytearray] = []  # that which was taken last is the last one
        self._lock = threading.Lock()

    def take(self) -> memoryview:
        """All of one that nobody uses, with anything in it."""
        with self._lock:
            for place, block in enumerate(self._blocks):
                if _is_free(block):
                    self._blocks.append(self._blocks.pop(place))
                    return memoryview(block)
            made = bytearray(self._size)
            if len(self._blocks) < self._most:
                self._blocks.append(made)
            return memoryview(made)


def _is_free(block: bytearray) -> bool:
    """Whether there is no view of it: while there is one, its size cannot be changed (docs of memoryview.release)."""
    try:
        block.append(block.pop())  # neither moves anything
    except BufferError:
        return False
    return True
