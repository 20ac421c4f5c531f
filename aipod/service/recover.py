"""What becomes of a job that nobody works on: it goes on, or it ends."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from aipod.errors import JobFailed, job_failed, refused_when_exhausted
from aipod.job.request import Request, stored_request
from aipod.job.times import outcome_of
from aipod.job.watched import phase_of
from aipod.service.forget import forget_answer
from aipod.spool import ENDED, MAX_ATTEMPTS, Entry

log = logging.getLogger("aipod.job")

# Times in a row that a job in line is taken up though nobody asks for it. If each ends with the server, loading its
# model may be what kills it (for want of memory, say), and who starts the server anew would do so for ever.
_UNASKED = 3
# Of a job that was RUNNING when its holder let go of it. The disk may have been full for as long as that tried.
NO_OUTCOME = "the method was started, how it ended is not known: the server was killed, or could not store the outcome"


@dataclasses.dataclass(frozen=True)
class Ended:
    """A job of this method was found dead, and has its outcome now."""

    method: str
    failure: JobFailed


@refused_when_exhausted()
def recover(entry: Entry, methods: Mapping[str, Any], asked: bool) -> Request | Ended | None:
    """What is to be run of a job that nobody worked on; None where there is nothing. Blocks.

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
        return _end(entry, fields, "INTERRUPTED", NO_OUTCOME)
    if not known:
        return _end(entry, fields, "UNKNOWN_METHOD", f"there is no method {method} now")
    if not entry.payload.exists():  # it was cancelled on a full disk, which took no note of that
        return _end(entry, fields, "DAMAGED", "the server has lost the payload")
    times = fields.get("adopted", 0) + 1
    if times > _UNASKED and not asked:
        return None
    if times == _UNASKED:
        text = "job %s: taken up %d times before it began; from now on only for a caller"
        log.warning(text, entry.id, times, extra={"job": entry.id})
    entry.find_log()
    entry.record({"phase": "QUEUED", "adopted": times})
    return stored_request(entry.id, fields, entry.kwargs() if "kwargs" in fields else None)


def end(entry: Entry, release: bool) -> Ended | None:
    """Cancel a job that nobody works on, or forget its answer. Blocks."""
    fields = entry.read()
    phase = fields.get("phase", "RECEIVING")
    if phase == "RUNNING":
        return _end(entry, fields, "INTERRUPTED", NO_OUTCOME)
    if phase not in ENDED:
        return _end(entry, fields, "CANCELLED", "it was cancelled by its client")
    if release:
        forget_answer(entry)
    return None


def _end(entry: Entry, fields: Mapping[str, Any], reason: str, message: str) -> Ended:
    failure = job_failed(reason, message)
    phase = phase_of(failure).name
    entry.store({"phase": phase, "reason": reason, "message": message})
    method, version = fields.get("method", ""), fields.get("version", "")
    told = {"job": entry.id, "method": method, "version": version, "caller": fields.get("owner", "")}
    told |= {"outcome": outcome_of(failure), "reason": reason, "attempts": fields.get("attempt", 0)}
    level = logging.INFO if reason == "CANCELLED" else logging.WARNING
    log.log(level, "job %s %s@%s: %s: %s", entry.id, method, version, reason, message, extra=told)
    return Ended(method, failure)
