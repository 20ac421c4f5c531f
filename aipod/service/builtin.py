"""The server's own methods, called through chaos by names with a dot, which no class can have."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from aipod.codec import digest
from aipod.errors import Refused
from aipod.identity import Caller
from aipod.job.watched import Answer
from aipod.runner import Description
from aipod.spool import Spool

# Jobs in one list, the ones that something happened to last: a list is for a person.
MAX_LISTED = 1000


def _jobs(spool: Spool, caller: Caller) -> list[dict[str, Any]]:
    """What is the caller's in the spool, last change first: id, method, version, phase, attempt, progress, message.

    No tickets. `received`: durable bytes of the payload; `size`: all that were announced, None where nobody has said
    how many. `quiet`: seconds since a running method was last heard of.
    """
    listed = []
    for look in spool.newest(MAX_LISTED):
        try:
            fields, live = look.read(), look.live()
        except (Refused, OSError):
            continue  # one that is damaged must not hide the others
        if "method" in fields and caller.owns(fields):
            told = {name: fields[name] for name in ("method", "version")}
            told |= {"phase": fields.get("phase", "RECEIVING"), "attempt": fields.get("attempt", 0)}
            told |= {"received": fields.get("offset", 0), "size": fields.get("size")}
            told["quiet"] = look.quiet() if told["phase"] == "RUNNING" else 0
            listed.append({"id": look.id, **told, "progress": 0.0, "message": "", **live})
    return listed


def _methods(description: Description) -> dict[str, Any]:
    """What the class offers: name of the class, and its methods as `methods.describe` tells them."""
    return {"class": description.name, "async": description.is_async, "methods": dict(description.methods)}


_METHODS: dict[str, Callable[[Spool, Description, Caller], Any]] = {
    "aipod.jobs": lambda spool, _, caller: _jobs(spool, caller),
    "aipod.methods": lambda _, description, __: _methods(description),
}


def is_builtin(rpc: str, method: str) -> bool:
    """Whether a call is for the server itself."""
    return rpc == "chaos" and method.startswith("aipod.")


def answer_of(method: str, spool: Spool, description: Description, caller: Caller) -> Answer:
    """What the method returns. Blocks. Raises `Refused(UNKNOWN_METHOD)`."""
    if method not in _METHODS:
        raise Refused("UNKNOWN_METHOD", f"the server has no method {method[:80]!r}; it has: {', '.join(_METHODS)}")
    data = json.dumps(_METHODS[method](spool, description, caller)).encode()
    return Answer("json", data, len(data), digest(data))
