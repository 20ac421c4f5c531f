"""The server's own methods, called through chaos by names with a dot, which no class can have."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import trio

from aipod import codec
from aipod.config import Config
from aipod.errors import Refused
from aipod.identity import Caller
from aipod.job.reply import own_messages, send_all
from aipod.job.watched import Answer, Keep, Told
from aipod.packing import Packer
from aipod.runner import Description
from aipod.service.probe import Probes
from aipod.service.viewer import Call, Viewer, Writer
from aipod.spool import Spool
from aipod.wire.ai import Phase, Raw, StreamInput

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


# No answer but a conversation: see `service.probe`.
PROBE = "aipod.probe"

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
        raise Refused(
            "UNKNOWN_METHOD", f"the server has no method {method[:80]!r}; it has: {', '.join((*_METHODS, PROBE))}"
        )
    data = json.dumps(_METHODS[method](spool, description, caller)).encode()
    return Answer("json", data, len(data), codec.digest(data))


class Builtins:
    """Answers calls that are for the server itself: no job, so nothing is stored."""

    def __init__(self, config: Config, spool: Spool, description: Description, draining: Callable[[], bool]) -> None:
        self._config = config
        self._spool = spool
        self._description = description
        self._probes = Probes(config, draining)

    async def run(self, first: Raw | StreamInput, caller: Caller, call: Call, viewer: Viewer, writer: Writer) -> None:
        """Answer one call. This is a trio-flavored async function. Raises `Refused`."""
        method = call.headers["x-func-name"]
        if method == PROBE:
            viewer.stop()
            await self._probes.run(first, call, writer)
            return
        answer = await trio.to_thread.run_sync(answer_of, method, self._spool, self._description, caller)
        viewer.stop()
        level = self._config.small_level
        if isinstance(first, StreamInput) or first.open is None:
            await writer.send(Raw(data=codec.frame(answer.inline or b"", level)))
            return
        told = Told(self._spool.look(codec.job_id(first.open.ticket)), self._spool.id, Keep())
        told.phase, told.answer = Phase.DONE, answer
        await writer.send(Raw(data=codec.PONG, state=told.state()))
        await send_all(own_messages(told.look, answer, Packer(level, first.open.have)), writer.send)
