"""What cuts a call, or a connection, on which nothing happens: each way it can be, for as long as one waits.

nginx (1.22, measured) resets a call with PROTOCOL_ERROR for timeouts of its client's side, and with INTERNAL_ERROR for
those of its upstream's: that tells apart what one silence would end alike. A server's HTTP/2 PINGs, every 5 s
(Config.ping_interval), are no silence to nginx once a call has been answered: none of longer timeouts for it ends a
call whose server lives, which is well.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aipod.config import MIB
from aipod.doctor.finding import Finding, Level, said, seconds, size
from aipod.doctor.wire import ANSWER, FAILURES, LOAD, TIMED_OUT, Chain, Fate, Probe, alone, fate_of, probing
from aipod.wire.ai import Raw

# Seconds after which aipod's client takes a silent server for lost (Config.silence): nothing in between has to be more
# patient. Heartbeats come every second, so that far less is cut only when a machine stalls.
ENOUGH = 15.0
# Seconds that the server is silent for longer than is waited for.
_LONGER = 5.0
# Bytes for a peer that takes none: more than every buffer on the way has, and no more than a server would take.
_MOST = 128 * MIB
# Seconds of silence that there may be between two heartbeats (Config.tick is 1 s) on a busy machine.
_BEATS = 3.0
# How much earlier a cut may come that the same timer has made.
_EARLIER = 1.0


@dataclasses.dataclass(frozen=True)
class Cuts:
    """How each kind of silence ended; None: it was not cut."""

    both: Fate | None  # neither side says anything, and the request is not complete
    server: Fate | None  # the same with a complete request
    untaken: Fate | None  # the server reads nothing of what the client sends
    unread: Fate | None  # the client reads nothing of what the server sends
    call: Fate | None  # heartbeats all the time


async def check_idle(chain: Chain, wait: float, most: int | None) -> list[Finding]:
    """What cuts a silent call within `wait` seconds. This is an asyncio-flavored function.

    `most`: the largest payload that gets through.
    """
    long = {"silent": wait + _LONGER}
    waits = (
        _cut(chain, wait, long, _listen),
        _cut(chain, wait, long, _listen, end=True),
        _cut(chain, wait, {**long, "take": _MOST}, _push),
        _cut(chain, wait, {"give": _MOST}, _look_away, end=True),
        _cut(chain, wait, {**long, "beat": True}, _listen),
    )
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in waits]
    return judge(Cuts(*(task.result() for task in tasks)), wait, most)


async def _cut(
    chain: Chain, wait: float, asked: dict[str, Any], behave: Callable[[Probe], Awaitable[None]], *, end: bool = False
) -> Fate | None:
    """How a call ends within `wait` seconds in which this side does what `behave` does; None where it does not."""
    since, probe = time.monotonic(), None
    async with chain.sound() as channel:

        async def call() -> None:
            nonlocal since, probe
            async with probing(chain, channel) as probe:
                async with asyncio.timeout(ANSWER):
                    await probe.ask(asked, end=end)
                since = time.monotonic()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await behave(probe)

        try:
            await alone(call())
        except FAILURES as exc:
            return dataclasses.replace(fate_of(exc, probe, since), early=not probe or not probe.about)
    return None


async def _listen(probe: Probe) -> None:
    while await probe.receive() is not None:
        pass


async def _push(probe: Probe) -> None:
    """Send what is not read; what is received tells how that ended."""
    piece = Raw(data=bytes(LOAD))

    async def send() -> None:
        for _ in range(_MOST // LOAD):
            await probe.send(piece)

    sender = asyncio.create_task(send(), name="aipod-push")
    try:
        await _listen(probe)
    finally:
        sender.cancel()
        await asyncio.wait([sender])


async def _look_away(probe: Probe) -> None:
    """Read nothing, so that the window fills, until the call is reset or the connection ends."""
    while probe.heard().reset is None and not probe.hop.ended_at:
        probe.hop.changed.clear()
        await probe.hop.changed.wait()
    await _listen(probe)


async def check_connection(chain: Chain, wait: float) -> list[Finding]:
    """How long a connection without a call stays. This is an asyncio-flavored function.

    Its client's PINGs go on, as ever.
    """
    async with chain.sound() as channel:

        async def call() -> None:
            async with asyncio.timeout(ANSWER), probing(chain, channel) as probe:
                await probe.open({}, end=True)
                await _listen(probe)

        with contextlib.suppress(*FAILURES):  # whatever the answer: a connection that has had a call is idle now
            await alone(call())
        hop, _ = await channel.connect()
        since = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                while not hop.ended_at:
                    hop.changed.clear()
                    await hop.changed.wait()
        return [judge_connection(hop.ended_at - since if hop.ended_at else None, wait)]


def judge_connection(after: float | None, wait: float) -> Finding:
    """What it means that a connection without calls was closed `after` seconds, None: not within `wait`."""
    if after is None:
        return _lasts("idle-connection", "a connection without calls stays open", wait)
    found = f"a connection without calls is closed after {seconds(after)}: the next call connects anew"
    level = Level.CHANGE if after < ENOUGH else Level.FINE
    return Finding(level, "idle-connection", found, "keepalive_timeout 1h;", "idle timeout of a connection", after)


def judge(cuts: Cuts, wait: float, most: int | None) -> list[Finding]:
    """What follows from how silent calls ended."""
    both, server = cuts.both, cuts.server
    read = "a server that sends nothing but PINGs", "grpc_read_timeout 60s;", "idle timeout of the upstream's response"
    body = (
        "a client that sends nothing, as does its server",
        "client_body_timeout 300s;",
        "idle timeout of a request's body",
    )
    findings = [_judge_call(cuts, wait, read[1], body[1]), _judge("idle-response", server, wait, *read)]
    if both is not None and _explains(server, both):
        findings.append(_hidden("idle-request", both))
    else:
        findings.append(_judge("idle-request", both, wait, *body))
    findings.append(_judge_untaken(cuts, wait, most))
    if cuts.unread is not None and _explains(server, cuts.unread):
        findings.append(_hidden("untaken-response", cuts.unread))
    else:
        told = "a client that takes nothing", "send_timeout 180s;", "write timeout to the client"
        findings.append(_judge("untaken-response", cuts.unread, wait, *told))
    return findings


def _judge_untaken(cuts: Cuts, wait: float, most: int | None) -> Finding:
    fate = cuts.untaken
    if fate is not None and most is not None and most < _MOST:
        return Finding(Level.UNCHECKED, "untaken-request", f"payloads over {size(most)} are refused before")
    if fate is not None and (_explains(cuts.both, fate) or _explains(cuts.server, fate)):
        return _hidden("untaken-request", fate)  # who takes nothing is silent too
    taken = "a server that takes nothing", "grpc_send_timeout 300s;", "write timeout to the upstream"
    return _judge("untaken-request", fate, wait, *taken)


def _judge(what: str, fate: Fate | None, wait: float, who: str, nginx: str, others: str) -> Finding:
    if fate is None or fate.fine:
        return _lasts(what, f"{who} is waited for", wait)
    if fate.reason or fate.early:
        return Finding(Level.UNCHECKED, what, f"the probe ended with {said(str(fate))}")
    found = f"{who} is cut after {seconds(fate.after)}: {said(str(fate))}"
    return Finding(Level.CHANGE if fate.after < ENOUGH else Level.FINE, what, found, nginx, others, fate.after)


def _judge_call(cuts: Cuts, wait: float, read: str, body: str) -> Finding:
    fate = cuts.call
    if fate is None or fate.fine:
        return _lasts("call-time", "a call with heartbeats goes on", wait)
    if fate.early and fate.text == TIMED_OUT:  # though one has been answered that was complete at once
        text = "nothing of an answer comes while its request is not complete: one of them is buffered"
        others = "no buffering of requests and responses"
        return Finding(Level.BROKEN, "call-time", text, "grpc_pass, not proxy_pass", others)
    if fate.reason or fate.early:
        return Finding(Level.UNCHECKED, "call-time", f"the probe ended with {said(str(fate))}")
    found = f"a call is cut after {seconds(fate.after)} although there are heartbeats: {said(str(fate))}"
    for silence, nginx in ((cuts.server, read), (cuts.both, body)):
        if silence is not None and silence.after < _BEATS and _explains(silence, fate):
            text = f"{found}; they come no faster than silence is cut"
            return Finding(Level.BROKEN, "call-time", text, nginx, "idle timeouts", fate.after)
    others = "the time of a whole request or stream: none (Envoy: route timeout: 0s)"
    return Finding(Level.BROKEN, "call-time", found, "", others, fate.after)


def _explains(other: Fate | None, fate: Fate) -> bool:
    """Whether the timer that ended `other` may have ended `fate` as well."""
    return other is not None and other.reset == fate.reset and fate.after > other.after - _EARLIER


def _hidden(what: str, fate: Fate) -> Finding:
    return Finding(Level.UNCHECKED, what, f"not below {seconds(fate.after)}: by then another silence is cut")


def _lasts(what: str, text: str, wait: float) -> Finding:
    return Finding(Level.FINE, what, f"{text}: {seconds(wait)} and longer", value=wait)
