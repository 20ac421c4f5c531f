"""A short payload that comes with its request: the job's entry is made with it, complete, and no upload begins.

What is not as it should be is left to `upload`, which says what is wrong with it. No I/O.
"""

from __future__ import annotations

from aipod.codec import decode_chunk, digest, stated_size
from aipod.errors import Refused
from aipod.job.request import Request
from aipod.results import INLINE
from aipod.wire.ai import Op, Raw

# Seconds that such a payload is waited for before the job is begun without it. Clients that name the spool send it
# right behind the request, in two segments perhaps, a millisecond apart where the client is busy.
MOMENT = 0.02


def comes_whole(request: Request) -> bool:
    """Whether an own client that need not hear from the server first sends a short payload."""
    open_ = request.open
    if open_ is None or open_.op != Op.RUN or not open_.spool or request.kwargs is None:
        return False
    return request.size is not None and request.size <= INLINE


def has_nothing(message: Raw) -> bool:
    """Whether a first message brings nothing of a payload, not even its end."""
    return not (message.data or message.last or message.sync or message.offset or message.digest)


def whole_payload(request: Request) -> bytes | None:
    """The payload, where `request.first` has all of it; None where it has not, or something is wrong with it."""
    message = request.first
    if not comes_whole(request) or not message.last or message.offset or message.sync:
        return None
    if not message.data:
        data = b""
    elif stated_size(message.data) != request.size:
        return None
    else:
        try:
            data = decode_chunk(message.data)
        except Refused:
            return None
    if len(data) != request.size or message.digest not in (b"", digest(data)):
        return None
    return data
