"""What reads from sockets go into, where they do not go into a message at once (`inbox.Inbox.room`)."""

from __future__ import annotations

import threading

from aipod.config import KIB, MIB
from aipod.transport.frames import HEAD, MAX_CONTROL_FRAME

# One read; what is in it is dealt with before the loop does anything else. Payload is cheap (and still in the cache
# when it is copied into its message: 1 MiB would not be), other frames are not.
READ_PAYLOAD = 512 * KIB
READ_FRAMES = 16 * KIB


def _keep_heap() -> None:
    """Have glibc keep up to 64 MiB of freed memory instead of giving each message back to the system and asking anew.

    Its thresholds follow the largest block that was mapped and freed (mallopt(3), M_MMAP_THRESHOLD), and none has to be
    touched for that. Without it page faults cost more than all else in receiving messages of 1 MiB.
    """
    block = bytes(32 * MIB - 64 * KIB)
    del block


_keep_heap()


class Scratch(threading.local):
    """Where reads of all connections of a thread go: what is read is dealt with before the next one reads."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(READ_PAYLOAD + HEAD + MAX_CONTROL_FRAME))


scratch = Scratch()
