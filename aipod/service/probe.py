"""`aipod.probe`: does what `aipod doctor` asks for, so that it shows what the proxies on the way make of it.

A plain call (no `open`) of chaos with x-func-name aipod.probe; it needs an identity as any other. The first message's
data is zstd(JSON) with any of:

    silent  seconds in which this side says nothing and reads nothing
    beat    true: a PONG every tick all the same
    take    bytes to be read and dropped, up to the half-close
    give    bytes to be sent
    error   true: end with an error as large as aipod's can be

They happen in this order. The answer's first message is zstd(JSON) with this server's version and limits, before
anything else; after `take` there is another one, `{"took": bytes}`. What is given are random bytes. Nothing is stored,
no job begins, and no method runs. A drain ends it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import trio

from aipod import __version__
from aipod.codec import frame, parse_kwargs
from aipod.config import CHUNK, KIB, MIB, MINUTES, Config
from aipod.errors import Refused
from aipod.job.upload import check_limit
from aipod.service.refusals import Refusals
from aipod.service.status import MAX_TEXT, MAX_TRACE
from aipod.service.viewer import Call, Writer
from aipod.wire.ai import Raw, StreamInput

# The longest timeouts that proxies are usually given, and nobody waits for more.
MAX_SECONDS = 10 * MINUTES
# Each way: seconds of a fast line, and no more than a small job may bring as well.
MAX_BYTES = 256 * MIB
# Of all callers together. A doctor has eight at once; each costs what a call costs that waits for its job.
AT_ONCE = 64
# What is asked for takes some 60 bytes.
_MAX_ASKED = 4 * KIB

# What of the configuration a caller may run into.
_LIMITS = (
    "tick", "upload_stall", "send_stall", "max_payload", "max_kwargs", "max_message", "max_headers", "max_streams",
    "stream_window", "max_window", "max_frame", "max_age", "max_idle",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one probe is to do."""

    silent: float = 0.0
    beat: bool = False
    take: int = 0
    give: int = 0
    error: bool = False


_MOST = {"silent": MAX_SECONDS, "take": MAX_BYTES, "give": MAX_BYTES}


def parse_asked(kwargs: Mapping[str, Any]) -> Asked:
    """Raises `Refused(BAD_KWARGS)` for what is unknown, of another type, or out of bounds."""
    fields = {field.name: field.default for field in dataclasses.fields(Asked)}
    for name, value in kwargs.items():
        if name not in fields:
            raise Refused("BAD_KWARGS", f"aipod.probe has no {name[:80]!r}; it has: {', '.join(fields)}")
        wanted = (int, float) if name == "silent" else (type(fields[name]),)
        if type(value) not in wanted:
            raise Refused("BAD_KWARGS", f"{name} is not of type {wanted[-1].__name__}")
        if name in _MOST and not 0 <= value <= _MOST[name]:
            raise Refused("BAD_KWARGS", f"{name} must be between 0 and {_MOST[name]:g}")
    return Asked(**kwargs)


class Probes:
    """Runs probes. The mutable state is how many there are."""

    def __init__(self, config: Config, draining: Callable[[], bool]) -> None:
        self._config = config
        self._draining = draining
        self._running = 0

    async def run(self, first: Raw | StreamInput, call: Call, writer: Writer) -> None:
        """Do what the first message asks for. This is a trio-flavored async function.

        Raises `Refused`: for what it cannot do, where there are too many, in a drain, and where the error was asked
        for (PROBE).
        """
        if isinstance(first, StreamInput) or first.open is not None:
            raise Refused("BAD_MESSAGE", "aipod.probe is a plain call of chaos, without open")
        asked = parse_asked(parse_kwargs(first.data, _MAX_ASKED))
        check_limit(asked.take, self._config.max_payload)
        if self._running >= AT_ONCE:
            raise Refused("OVERLOADED", f"{AT_ONCE} probes are under way; try again later")
        self._running += 1
        try:
            with trio.move_on_after(MAX_SECONDS) as patience:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._beat, asked.beat, writer)
                    await self._do(asked, call, writer)
                    nursery.cancel_scope.cancel()
            if patience.cancelled_caught:
                raise Refused("UPLOAD_STALLED", f"a probe takes at most {MAX_SECONDS:g} s")
        finally:
            self._running -= 1
        if asked.error:
            raise Refused("PROBE", "x" * MAX_TEXT, {"trace": "y" * MAX_TRACE})

    async def _do(self, asked: Asked, call: Call, writer: Writer) -> None:
        pack = functools.partial(frame, level=self._config.small_level)
        about = {"version": __version__, "limits": {name: getattr(self._config, name) for name in _LIMITS}}
        await writer.send(Raw(data=pack(json.dumps(about).encode())))
        await trio.sleep(asked.silent)
        if asked.take:
            took = await self._take(asked.take, call)
            await writer.send(Raw(data=pack(json.dumps({"took": took}).encode())))
        noise = os.urandom(min(CHUNK, asked.give))
        for start in range(0, asked.give, CHUNK):
            await writer.send(Raw(data=noise[: asked.give - start], offset=start))

    async def _take(self, size: int, call: Call) -> int:
        took = 0
        while took < size:
            with trio.move_on_after(self._config.upload_stall) as patience:
                message = await call.receive()
                if message is None:
                    break
                took += len(message.data)
            if patience.cancelled_caught:
                raise Refused("UPLOAD_STALLED", f"nothing came for {self._config.upload_stall:g} s (--upload-stall)")
        return took

    async def _beat(self, aloud: bool, writer: Writer) -> None:
        while True:
            if self._draining():
                raise Refusals.draining()
            if aloud:
                writer.beat(None)
            await trio.sleep(self._config.tick)
