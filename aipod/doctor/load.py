"""What a connection is good for: round trips, calls until it is told to go, and how much it carries each way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import statistics
import time

from aipod.config import KIB, MIB
from aipod.doctor.finding import Finding, Level, said, seconds, size
from aipod.doctor.wire import ANSWER, FAILURES, LOAD, Chain, Fate, alone, fate_of, probing
from aipod.transport.sounding import Sounding
from aipod.wire.ai import Raw

_PINGS = 10
# Calls one after the other; nginx's own default for a connection is 1000.
_CALLS = 200
# Fewer calls a connection than that, and every one of a busy client waits for a new one now and then.
ENOUGH_CALLS = 100
# Seconds that a job's next heartbeat may take.
_BEAT = 5.0
# What is carried each way at most: by then windows have grown.
_AMOUNT = 16 * MIB
# A rate is not told of less.
_ENOUGH = 1 * MIB
# Bytes a second that a window must allow: a GiB in less than two minutes.
_SLOW = 10 * MIB
# What a window should allow: as a disk takes it.
_FAST = 50 * MIB
# Bytes of a DATA frame below which the receiver spends more on frames than on bytes; nginx's default makes 4 KiB.
_SMALL_FRAME = 6 * KIB
# Calls at once that a server must take on a connection (RFC 9113 section 6.5.2 recommends no fewer).
ENOUGH_STREAMS = 100


@dataclasses.dataclass(frozen=True)
class Carried:
    """How a transfer went."""

    amount: int
    seconds: float
    window: int = 0  # bytes that could be sent before anything was acknowledged
    frame: float = 0.0  # mean size of the frames that came
    fate: Fate | None = None  # where it was cut

    @property
    def rate(self) -> float:
        return self.amount / self.seconds if self.seconds else 0.0


async def check_calls(chain: Chain, streams: int, patience: float) -> list[Finding]:
    """Round trips, and what becomes of calls when a connection is told to go. This is an asyncio-flavored function.

    `streams`: calls at once that the next hop allows; `patience`: seconds for the calls.
    """
    async with chain.sound() as channel:
        pings = [await channel.ping() for _ in range(_PINGS)]
        hop, _ = await channel.connect()
        trips: list[float] = []
        survived: bool | None = None

        async def calls() -> None:
            until = time.monotonic() + patience
            while len(trips) < _CALLS and time.monotonic() < until and not hop.ended_at:
                began = time.monotonic()
                with contextlib.suppress(*FAILURES):  # a refusal is a round trip too
                    await alone(_one(chain, channel))
                trips.append(time.monotonic() - began)

        async def held() -> None:
            """Calls beside one that lasts."""
            nonlocal survived
            async with probing(chain, channel) as probe:
                async with asyncio.timeout(ANSWER):
                    await probe.ask({"silent": patience + 4 * _BEAT, "beat": True})
                await calls()
                if not hop.ended_at:
                    return
                survived = False
                async with asyncio.timeout(_BEAT):
                    for _ in range(2):  # one may have come before
                        await probe.receive()
                survived = True

        try:
            await alone(held() if streams > 1 else calls())
        except FAILURES:
            if survived is None and not hop.ended_at:  # the server lets no probe last
                await calls()
        number = len(trips) + (survived is not None)
        ping = statistics.median(pings)
        found = [Finding(Level.NOTE, "ping-hop", f"round trip to the next hop: {seconds(ping)}", value=ping)]
        if trips:
            trip = statistics.median(trips)
            text = f"a call to the server and back: {seconds(trip)}"
            found.append(Finding(Level.NOTE, "ping-server", text, value=trip))
        return found + judge_goaway(number if hop.ended_at else None, len(trips), survived)


async def _one(chain: Chain, channel: Sounding) -> None:
    async with asyncio.timeout(ANSWER), probing(chain, channel) as probe:
        await probe.open({}, end=True)
        while await probe.receive() is not None:
            pass


def judge_goaway(after: int | None, made: int, survived: bool | None) -> list[Finding]:
    """What it means that a connection was told to go `after` calls, or not within those that were `made`."""
    if after is None:
        return [Finding(Level.FINE, "calls-per-connection", f"more than {made} calls on a connection", value=made)]
    found = f"a connection is told to go after {after} calls"
    level = Level.CHANGE if after < ENOUGH_CALLS else Level.FINE
    others = "requests per connection: 1000000"
    findings = [Finding(level, "calls-per-connection", found, "keepalive_requests 1000000;", others, after)]
    if survived is not None:
        text = "a call under way goes on when its connection is told to go"
        ends = "a call under way ends when its connection is told to go"
        others = "GOAWAY must let calls that have begun finish"
        good = Finding(Level.FINE, "goaway", text)
        findings.append(good if survived else Finding(Level.BROKEN, "goaway", ends, "", others))
    return findings


async def check_rate(chain: Chain, patience: float, ping: float, most: int | None, *, direct: bool) -> list[Finding]:
    """How much is carried each way within `patience` seconds. This is an asyncio-flavored function.

    `ping`: seconds of a round trip to the next hop, 0 where that is not known; `most`: the largest payload that gets
    through; `direct`: there is no proxy, whose window would not grow.
    """
    amount = _AMOUNT if most is None else min(_AMOUNT, most * 3 // 4)
    up = await _carry(chain, patience, amount, upward=True)
    down = await _carry(chain, patience, _AMOUNT, upward=False)
    return [*judge_up(up, ping, direct=direct), *judge_down(down, direct=direct)]


async def _carry(chain: Chain, patience: float, most: int, *, upward: bool) -> Carried:
    since, probe, amount, window = time.monotonic(), None, 0, 0
    async with chain.sound() as channel:

        async def call() -> None:
            nonlocal since, probe, amount, window
            async with asyncio.timeout(ANSWER + patience), probing(chain, channel) as probe:
                await probe.ask({"take" if upward else "give": most}, end=not upward)
                window = probe.heard().window
                since = time.monotonic()
                if not upward:
                    while time.monotonic() < since + patience and (data := await probe.receive()) is not None:
                        amount += len(data)
                    return
                piece = Raw(data=os.urandom(min(LOAD, most)))
                while (
                    amount + len(piece.data) <= most and time.monotonic() < since + patience and await probe.send(piece)
                ):
                    amount += len(piece.data)
                await probe.send(Raw(), end=True)
                amount = await probe.receive_count("took", most)

        fate = None
        try:
            await alone(call())
        except FAILURES as exc:
            fate = fate_of(exc, probe, since)
        hop = channel.hop
        frame = hop.data_bytes / hop.data_frames if hop is not None and hop.data_frames else 0.0
        return Carried(amount, time.monotonic() - since, window, frame, fate)


def judge_up(up: Carried, ping: float, *, direct: bool) -> list[Finding]:
    """What follows from an upload."""
    if up.fate is not None:
        nginx = "client_max_body_size 0; client_body_timeout 300s; grpc_send_timeout 300s;"
        return [_cut_off("upload-rate", "an upload", up.amount, up.fate, nginx)]
    few = f"{size(up.amount)} in {seconds(up.seconds)} are too few to tell"
    rate = Finding(Level.FINE, "upload-rate", f"{size(up.rate)}/s up", value=up.rate)
    findings = [rate if up.amount >= _ENOUGH else Finding(Level.UNCHECKED, "upload-rate", few)]
    if direct or not ping:
        return findings
    allowed = up.window / ping
    text = f"the window of {size(up.window)} allows {size(allowed)}/s at this round trip"
    if allowed >= _SLOW or up.rate > 2 * allowed:  # or it grows
        return [*findings, Finding(Level.FINE, "upload-window", text, value=up.window)]
    wanted = 1 << math.ceil(math.log2(ping * _FAST / MIB))
    nginx = f"client_body_buffer_size {max(1, wanted)}m;"
    return [*findings, Finding(Level.CHANGE, "upload-window", text, nginx, "HTTP/2 initial stream window", up.window)]


def judge_down(down: Carried, *, direct: bool) -> list[Finding]:
    """What follows from a download."""
    if down.fate is not None:
        nginx = "grpc_read_timeout 60s; send_timeout 180s;"
        return [_cut_off("download-rate", "a download", down.amount, down.fate, nginx)]
    findings = [Finding(Level.FINE, "download-rate", f"{size(down.rate)}/s down", value=down.rate)]
    if direct:
        return findings
    text = f"answers come in frames of {size(down.frame)}"
    if down.frame >= _SMALL_FRAME:
        return [*findings, Finding(Level.FINE, "download-frames", text, value=down.frame)]
    nginx = "grpc_buffer_size 64k; http2_chunk_size 64k;"
    text += ": each costs the client time"
    return [*findings, Finding(Level.CHANGE, "download-frames", text, nginx, "buffer of a response", down.frame)]


def _cut_off(what: str, which: str, amount: int, fate: Fate, nginx: str) -> Finding:
    """A finding for a transfer that ended early, by one of the limits in `nginx`."""
    text = f"{which} ended after {size(amount)}: {said(str(fate))}"
    if fate.reason or not fate.headers:  # by the server itself, or it had not begun
        return Finding(Level.UNCHECKED, what, text)
    return Finding(Level.BROKEN, what, text, nginx, "limits of a message body and of its silence", amount)
