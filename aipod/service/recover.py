"""What becomes of a job that nobody works on: it goes on, or it ends."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from aipod.errors import refused_when_exhausted
from aipod.job.request import Request, stored_request
from aipod.service.forget import forget_answer
from aipod.spool import ENDED, MAX_ATTEMPTS, Entry

log = logging.getLogger("aipod.job")

# Times in a row that a job in line is taken up though nobody asks for it. If each ends with the server, loading its
# model may be what kills it (for want of memory, say), and who starts the server anew would do so for ever.
_UNASKED = 3
# Of a job that was RUNNING when its holder let go of it. The disk may have been full for as long as that tried.
NO_OUTCOME = "the method was started, how it ended is not known: the server was killed, or could not store the outcome"


@refused_when_exhausted()
def recover(entry: Entry, methods: Mapping[str, Any], asked: bool) -> Request | None:
    """What is to be run of a job that nobody worked on; None where there is nothing, perhaps only now. Blocks.

    `asked`: there is a caller who waits for it. Raises `Refused` (SPOOL_FULL, OVERLOADED).
    """
    fields = entry.read()
    phase = fields.get("phase", "RECEIVING")
    if phase in ENDED or phase == "RECEIVING":
        return None
    method = fields["method"]
    known = method in methods
    again = known and methods[method].get("restartable") and fields.get("attempt", 0) < MAX_ATTEMPTS
    if phase == "RUNNING" and not (again and entry.payload.exists()):
        log.warning("job %s %s@%s: %s", entry.id, method, fields.get("version", ""), NO_OUTCOME)
        entry.store({"phase": "FAILED", "reason": "INTERRUPTED", "message": NO_OUTCOME})
        return None
    if not known:
        entry.store({"phase": "FAILED", "reason": "UNKNOWN_METHOD", "message": f"there is no method {method} now"})
        return None
    if not entry.payload.exists():  # it was cancelled on a full disk, which took no note of that
        entry.store({"phase": "FAILED", "reason": "DAMAGED", "message": "the server has lost the payload"})
        return None
    times = fields.get("adopted", 0) + 1
    if times > _UNASKED and not asked:
        return None
    if times == _UNASKED:
        log.warning("job %s: taken up %d times before it began; from now on only for a caller", entry.id, times)
    entry.record({"phase": "QUEUED", "adopted": times})
    return stored_request(entry.id, fields, entry.kwargs() if "kwargs" in fields else None)


def end(entry: Entry, release: bool) -> None:
    """Cancel a job that nobody works on, or forget its answer. Blocks."""
    phase = entry.read().get("phase", "RECEIVING")
    if phase == "RUNNING":
        entry.store({"phase": "FAILED", "reason": "INTERRUPTED", "message": NO_OUTCOME})
    elif phase not in ENDED:
        entry.store({"phase": "CANCELLED", "reason": "CANCELLED", "message": "it was cancelled by its client"})
    if release and phase in ENDED:
        forget_answer(entry)
