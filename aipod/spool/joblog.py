"""The log of a job: appended to, never over its bound."""

from __future__ import annotations

import os

from aipod.config import MIB
from aipod.spool.regular import open_regular

MAX_LOG = 16 * MIB  # a model that logs in a loop must not fill the disk; what is over it is dropped and said so


def append_log(path: str, text: str, size: int) -> int:
    """Append to a log of `size` bytes, up to `MAX_LOG` and a line that says so. How many bytes were added.

    Blocks. Raises `Refused` (DAMAGED), `OSError`.
    """
    data = text.encode("utf-8", "replace")
    room = MAX_LOG - size
    if room < 0:
        return 0
    if len(data) > room:
        # Cut at a character: `read_log` counts what it can decode.
        data = data[:room].decode("utf-8", "ignore").encode() + b"\n[the log is full; the rest is dropped]\n"
    with os.fdopen(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)[0], "ab") as file:
        file.write(data)
    return len(data)
