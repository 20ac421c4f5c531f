"""What the first message of a call asks for; every name, size and id from outside is checked here. No I/O."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from aipod.codec import MAX_RELEASED, TICKET_MAX, TICKET_MIN, job_id, parse_kwargs, stated_size
from aipod.config import KIB
from aipod.errors import Refused
from aipod.identity import ANYONE, Caller
from aipod.methods import misfit
from aipod.results import INLINE
from aipod.versions import check_version
from aipod.wire.ai import Op, Open, Raw, StreamInput

MAX_SOURCE = 4 * KIB  # a path, a size and a time
_OPS = frozenset(int(op) for op in Op)
_SIZE_KEY = "_aipod_bin_size"
_OWN = "_aipod"
# Headers that a method never sees, and that never come to lie in the spool: what a proxy or an application before this
# server may use to tell who calls.
_CREDENTIAL = re.compile(r"authorization|cookie|token|secret|passw|credential|api[-_]?key")


@dataclasses.dataclass
class Request:
    """A checked first message. `first` is what it carries besides: perhaps already a chunk or `last`.

    Nothing changes but `first` and `kwargs`, once each.
    """

    job_id: str
    method: str
    version: str
    kwargs: bytes | None  # JSON object, without what was aipod's own; None: it is long, and the job's entry has it
    size: int | None  # of the payload, where the caller said it
    open: Open | None  # None: a plain client
    first: Raw
    metadata: Mapping[str, str]
    fingerprint: str = ""  # what must be the same whenever a ticket comes with a request; of an own client's only
    attempt: int = 0  # how often the method was started before this process had the job
    owner: str = ""  # the name of who began the job; empty where the server does not ask

    @property
    def plain(self) -> bool:
        return self.open is None

    @property
    def fields(self) -> dict[str, Any]:
        """The first line of the job's journal: all that another process needs to run it, but for the kwargs."""
        fields: dict[str, Any] = {"ticketed": not self.plain, "method": self.method, "version": self.version}
        fields["size"] = self.size
        if self.open is not None:
            fields |= {"print": self.fingerprint, "epoch": self.open.epoch}
            fields["metadata"] = dict(self.metadata)
        if self.owner:
            fields["owner"] = self.owner
        return fields

    def take_first(self) -> Raw:
        """`first`, which is empty from then on: a job in line must not hold a message's worth of memory."""
        first, self.first = self.first, Raw()
        return first

    def drop_kwargs(self) -> None:
        """The entry has the kwargs: a job in line, or one that runs for days, must not hold megabytes of them."""
        if self.kwargs is not None and len(self.kwargs) > INLINE:
            self.kwargs = None


def has_large_kwargs(message: Raw | StreamInput, limit: int) -> bool:
    """Whether a first message may become more kwargs than every call may hold in memory.

    Raises `Refused(BAD_KWARGS)` where it has more of them than `limit` bytes can be packed into.
    """
    packed = message.kwargs_json if isinstance(message, StreamInput) else message.data
    if len(packed) > limit + limit // 128 + KIB:  # ZSTD_compressBound, and then some
        raise Refused("BAD_KWARGS", f"{len(packed)} bytes of compressed keyword arguments; the limit is {limit}")
    size = stated_size(packed) if packed else 0
    return size is None or size > INLINE


def stored_request(job_id: str, fields: Mapping[str, Any], kwargs: bytes | None) -> Request:
    """The request of a ticketed job as its journal has it."""
    return Request(
        job_id=job_id,
        method=fields["method"],
        version=fields["version"],
        kwargs=kwargs,
        size=fields["size"],
        open=Open(epoch=fields["epoch"]),
        first=Raw(),
        metadata=fields["metadata"],
        fingerprint=fields["print"],
        attempt=fields.get("attempt", 0),
        owner=fields.get("owner", ""),
    )


def is_plain(message: Raw | StreamInput) -> bool:
    """Whether a first message is one of a plain client's."""
    raw = message.raw if isinstance(message, StreamInput) else message
    return raw is None or raw.open is None


def parse_attach(message: Raw | StreamInput, headers: Mapping[str, str]) -> tuple[str, Open] | None:
    """The job id and `open` of a call that needs nothing but a ticket; None for one that brings a request.

    Raises `Refused(BAD_TICKET, BAD_MESSAGE)`.
    """
    raw = message.raw if isinstance(message, StreamInput) else message
    open_ = raw.open if raw is not None else None
    if open_ is None or open_.op in (Op.RUN, Op.RESUME):
        return None
    return _identify(open_, headers), open_


def parse_request(
    rpc: str,
    message: Raw | StreamInput,
    headers: Mapping[str, str],
    methods: Mapping[str, Any],
    name: str,
    limit: int,
    caller: Caller = ANYONE,
) -> Request:
    """Check the first message of a call of `rpc`. `name` is the served class's. Raises `Refused`."""
    if isinstance(message, StreamInput):
        packed, named_version, first = message.kwargs_json, message.version, message.raw or Raw()
        method = rpc
    else:
        # On chaos the first message's data is the kwargs, so it carries no chunk.
        packed, named_version = message.data, ""
        first = Raw(last=message.last, open=message.open, digest=message.digest, offset=message.offset)
        method = headers.get("x-func-name", "chaos")
    check_method(method, methods, name)
    kwargs = parse_kwargs(packed, limit)
    size = _declared_size(kwargs, first.open)
    version = _version(named_version, kwargs)
    caller.check(method, version)
    kwargs = {key: value for key, value in kwargs.items() if not key.startswith(_OWN)}
    if first.open is None or first.open.op == Op.RUN:  # one that was created has once fitted
        _check_fit(method, methods[method], kwargs)
    text = _text(kwargs)
    return Request(
        job_id=_identify(first.open, headers),
        method=method,
        version=version,
        kwargs=text,
        size=size,
        open=first.open,
        first=first,
        metadata=shown(headers),
        fingerprint="" if first.open is None else _fingerprint(method, version, text, size, first.open.source.hex()),
        owner=caller.name,
    )


def shown(headers: Mapping[str, str]) -> dict[str, str]:
    """The call's metadata that methods and logs may have: without what tells who calls."""
    return {
        name: value
        for name, value in headers.items()
        if not name.startswith(":") and _CREDENTIAL.search(name.lower()) is None
    }


def _text(kwargs: Mapping[str, Any]) -> bytes:
    """`kwargs` as JSON in UTF-8: escaped, each emoji would take three times what it took on the wire.

    Half a surrogate pair, which JSON can name and UTF-8 cannot, stays the escape that it was: Python writes it alike.
    """
    return json.dumps(kwargs, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _fingerprint(method: str, version: str, kwargs: bytes, size: int | None, source: str) -> str:
    parts = [method, version, hashlib.sha256(kwargs).hexdigest(), size, source]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def check_method(method: str, methods: Mapping[str, Any], name: str) -> None:
    """Raises `Refused(UNKNOWN_METHOD)` for what may not be called; the text says what may."""
    if method not in methods:
        raise Refused(
            "UNKNOWN_METHOD", f"{name} has no method {method[:80]!r} to call; it has: {', '.join(sorted(methods))}"
        )


def _check_fit(name: str, method: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    if (wrong := misfit(name, method, kwargs)) is not None:
        raise Refused("BAD_KWARGS", wrong[1], {"parameter": wrong[0][:80]})


def _declared_size(kwargs: Mapping[str, Any], open_: Open | None) -> int | None:
    if open_ is not None:
        return open_.size
    size = kwargs.get(_SIZE_KEY)
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 1 << 63:
        raise Refused("BAD_KWARGS", f"{_SIZE_KEY} is {str(size)[:40]!r}; it must be the payload's size in bytes")
    return size


def _version(named: str, kwargs: dict[str, Any]) -> str:
    """The version, from either place; it is taken out of `kwargs`."""
    told = kwargs.pop("version", "")
    if isinstance(told, int) and not isinstance(told, bool):
        told = str(told)
    if told is None:
        told = ""
    if not isinstance(told, str):
        raise Refused("BAD_VERSION", f"version is a JSON {type(told).__name__}; it must be a string")
    if named and told and named != told:
        raise Refused("BAD_VERSION", f"version is {named[:80]!r} in the message and {told[:80]!r} in the kwargs")
    return check_version(named or told)


def _identify(open_: Open | None, headers: Mapping[str, str]) -> str:
    if open_ is None:
        return job_id(secrets.token_bytes(16))  # a throw-away ticket: nobody can come back to it
    if len(open_.released) > MAX_RELEASED:
        raise Refused("BAD_MESSAGE", f"open.released has {len(open_.released)} tickets; at most {MAX_RELEASED} a call")
    for ticket in (open_.ticket, *open_.released):
        if not TICKET_MIN <= len(ticket) <= TICKET_MAX:
            raise Refused("BAD_TICKET", f"a ticket of {len(ticket)} bytes; it must have {TICKET_MIN} to {TICKET_MAX}")
    if len(open_.source) > MAX_SOURCE:
        raise Refused("BAD_MESSAGE", f"open.source has {len(open_.source)} bytes; it must have at most {MAX_SOURCE}")
    name = job_id(open_.ticket)
    if not hmac.compare_digest(headers.get("x-job-id", "").encode(), name.encode()):
        raise Refused("BAD_TICKET", "header x-job-id is not hex(sha256(ticket))[:32]")
    if int(open_.op) not in _OPS:
        raise Refused("BAD_MESSAGE", f"open.op is {int(open_.op)}; this server knows {sorted(_OPS)}")
    return name
