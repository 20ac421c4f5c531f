"""The order of the checks: the next hop, one call, and then everything else side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from aipod.config import KIB
from aipod.doctor.finding import Finding, Level, said
from aipod.doctor.hop import is_next_hop, judge_first, judge_hop, judge_server, judge_unconnected, limits_of, unseen
from aipod.doctor.idle import check_connection, check_idle
from aipod.doctor.limits import check_error, check_headers, check_health, check_routing, measure_body
from aipod.doctor.load import check_calls, check_rate
from aipod.doctor.wire import ANSWER, FAILURES, Chain, Fate, Probe, alone, fate_of, probing
from aipod.errors import Unreachable
from aipod.transport.channel import why_unconnected

# Seconds of each transfer, and of the calls that are counted, at most: windows and clocks have settled by then.
_LOADED = 3.0
# They may be shorter, where there is little patience.
_SHARE = 0.25
# What a server has for headers, where it does not say so.
_HEADERS = 16 * KIB

Check = Coroutine[Any, Any, list[Finding]]


async def examine(chain: Chain, wait: float, found: list[Finding], tell: Callable[[int, int], None]) -> None:
    """Append to `found` what is between here and the server. This is an asyncio-flavored function.

    `wait`: seconds that silence is watched for. `tell` is called with the checks that are done and with all of them.
    Raises `Unreachable` where nobody answers, TLSError, and ValueError for a target that is none. Cancelled, what was
    found stays in `found`.
    """
    named = any(name == "x-upstream" for name, _ in chain.metadata)
    settings = await _connect(chain, found)
    if settings is None:
        return
    told, about = await _first(chain)
    found += judge_first(told, about)
    if not told.reached or told.reason in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        found += [Finding(Level.UNCHECKED, "the-rest", "it needs a server that answers")]
        return
    found += judge_server(about)
    direct = is_next_hop(about, settings)
    if direct:
        found.append(Finding(Level.NOTE, "proxy-version", "none: the server itself answers"))
    loaded = min(_LOADED, wait * _SHARE)
    streams = settings["max_concurrent_streams"]

    async def guarded(what: str, check: Check) -> None:
        try:
            found.extend(await check)
        except FAILURES as exc:
            found.append(Finding(Level.UNCHECKED, what, said(str(fate_of(exc, None, 0.0)))))

    # One after the other: a round trip is measured while nothing else goes on, and what is uploaded must get through.
    body = await measure_body(chain)
    found.append(body.finding)
    await guarded("calls-per-connection", check_calls(chain, streams, loaded))
    ping = next((float(one.value or 0) for one in found if one.what == "ping-hop"), 0.0)
    checks: list[tuple[str, Check]] = [
        ("header-limit", check_headers(chain, _most_headers(about))),
        ("health", check_health(chain)),
        ("routing", check_routing(chain, named=named, direct=direct)),
        ("idle-connection", check_connection(chain, wait)),
    ]
    if about:
        checks += [
            ("error-size", check_error(chain)),
            ("idle", check_idle(chain, wait, body.most)),
            ("rates", check_rate(chain, loaded, ping, body.most, direct=direct)),
        ]
    done = 0
    tell(done, len(checks))

    async def run(what: str, check: Check) -> None:
        nonlocal done
        await guarded(what, check)
        done += 1
        tell(done, len(checks))

    async with asyncio.TaskGroup() as group:
        for what, check in checks:
            group.create_task(run(what, check))
    found += [] if direct else unseen()


async def _connect(chain: Chain, found: list[Finding]) -> dict[str, int] | None:
    """The next hop's SETTINGS; None where it has none. Raises `Unreachable`."""
    async with chain.sound() as channel:
        try:
            hop, settings = await channel.connect()
        except FAILURES as exc:
            finding = judge_unconnected(exc, channel.hop, tls=chain.config.tls)
            if finding is None:
                why = said(why_unconnected(exc)) or "timed out"
                raise Unreachable(f"no server answers at {chain.target}: {why}") from None
            found.append(finding)
            return None
        found += judge_hop(hop, settings)
        return settings


async def _first(chain: Chain) -> tuple[Fate, Mapping[str, Any]]:
    """How a first call ends, and what the server says of itself."""
    probe: Probe | None = None
    async with chain.sound() as channel:

        async def call() -> None:
            nonlocal probe
            async with asyncio.timeout(ANSWER), probing(chain, channel) as probe:
                await probe.ask({}, end=True)
                while await probe.receive() is not None:
                    pass

        try:
            await alone(call())
        except FAILURES as exc:
            return fate_of(exc, probe, 0.0), {}
        assert probe is not None, "the call has ended well"
        return fate_of(None, probe, 0.0), probe.about


def _most_headers(about: Mapping[str, Any]) -> int:
    most = limits_of(about).get("max_headers")
    return most if isinstance(most, int) and most >= 4 * KIB else _HEADERS
