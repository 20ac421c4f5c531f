"""Free memory that costs the same for everybody: none, as on a machine that has run for a day.

A host may take back what its guest has free, and then whoever is the first to touch a page again waits for the host:
2 seconds and more of system time for a GiB, where a page that was in use costs 0.1. Whom that hits depends on who was
measured before. So before a run that writes files all that is free is filled with clean page cache, which the system
gives up when it needs pages.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType

MIB = 1 << 20
STEP = 512 * MIB
LEAVE = 768 * MIB  # free memory that the system keeps anyhow, and air
WORTH = 128 * MIB  # bytes that a run writes
MOST = 64 << 30  # of a machine with more of it free nobody waits for


def free() -> int | None:
    """Bytes that nothing is in, where the system tells it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return int(next(line for line in lines if line.startswith("MemFree")).split()[1]) * 1024


class Filler:
    """Holes of a file in `directory`, which take page cache and no disk when they are read."""

    def __init__(self, directory: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  until the `with` ends
        self._file.truncate(2 * MOST)
        self._buffer = memoryview(bytearray(MIB))
        self._at = 0

    def __enter__(self) -> Filler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def fill(self) -> None:
        """Until `LEAVE` is left, or nothing becomes less by it (a file system in memory)."""
        left = free()
        while left is not None and LEAVE < left < MOST:
            before = left
            for _ in range(STEP // MIB):
                self._at = (self._at + os.preadv(self._file.fileno(), [self._buffer], self._at)) % (2 * MOST)
            left = free()
            if left is None or before - left < STEP // 8:
                return
