"""How many heaps the threads of a process have: for programs of aipod's own alone, never for one that embeds it."""

from __future__ import annotations

import contextlib
import ctypes

# Heaps of glibc's malloc that this process may have (`M_ARENA_MAX` of mallopt(3) and <malloc.h>).
_ARENA_MAX = -8
HEAPS = 2


def share_heaps() -> None:
    """Have threads share their heaps. Each would get its own, up to eight for each core, and keep what was freed there.

    That is 10 MB a heap (see `_keep_heap` of `transport.scratch`): a server that stores and compresses in up to 40
    threads would grow by 100 MB and more, later or sooner. Other C libraries than glibc have no such heaps.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, HEAPS)
