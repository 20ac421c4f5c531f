"""What a program of aipod's own sets for its whole process before it serves; one that embeds a server keeps its own."""

from __future__ import annotations

import contextlib
import resource

from aipod.heaps import share_heaps

# The usual soft limit is 1024; what a connection and a job take says `server`.
MAX_FILES = 65536


def prepare_process() -> int:
    """Share heaps, and let this process have as many files open as it may; the limit that it was started with."""
    share_heaps()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has one more limit, below an infinite hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return soft
