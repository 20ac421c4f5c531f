"""What is refused: payloads, headers and errors of some size, and calls that go nowhere; and how that is told."""

from __future__ import annotations

import dataclasses
import secrets
import time

from grpclib.health.v1.health_grpc import HealthStub
from grpclib.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from aipod.doctor.finding import Finding, Level, said, size
from aipod.doctor.wire import ANSWER, FAILURES, Chain, Fate, alone, attempt, fate_of

# More than any payload: who lets this through has no limit.
_LARGEST = 1 << 40
_SMALLEST = 1 << 10
# Halvings of what is between them, 30 powers of two, and then of the last one: the limit is told to 1 %.
_STEPS = 12
# Bytes of a header's value, the largest first: a token of an identity provider, with all that one is member of, has a
# few KiB. Each letter takes a byte, also on the wire (RFC 7541 appendix B has 8 bits for it).
_HEADERS = (12_000, 7_000, 3_500, 1_700, 800)
_LETTER = "X"


@dataclasses.dataclass(frozen=True)
class Body:
    """The largest payload that a proxy lets through. `most` is None where there is no limit, or it is not known."""

    finding: Finding
    most: int | None = None


async def measure_body(chain: Chain) -> Body:
    """Find it by content-length: nothing is sent. This is an asyncio-flavored function.

    How it is told says nothing of how an upload without content-length is: nginx looks at content-length once more on
    its way to an error page, and then gives that up.
    """
    told = await _with_length(chain, _LARGEST)
    if told is None:
        return Body(Finding(Level.FINE, "body-limit", "no limit"))
    if not _is_too_large(told):
        why = f"a request with content-length {_LARGEST} ends with {said(str(told))}"
        return Body(Finding(Level.UNCHECKED, "body-limit", f"{why}: what is uploaded below is all that is known"))
    low, high = _SMALLEST, _LARGEST
    for _ in range(_STEPS):
        power = 1 << (low.bit_length() + high.bit_length() - 2) // 2
        middle = power if high > 2 * low else (low + high) // 2
        low, high = (middle, high) if await _with_length(chain, middle) is None else (low, middle)
    return Body(body_limit(low), low)


def body_limit(most: int) -> Finding:
    """A finding for a proxy that lets `most` bytes through, and not many more."""
    found = f"payloads over {size(most)} are refused by a proxy"
    others = "the limit of a request's body: none"
    return Finding(Level.BROKEN, "body-limit", found, "client_max_body_size 0;", others, most)


async def _with_length(chain: Chain, length: int) -> Fate | None:
    """How a call with this content-length is refused; None where it gets to the server."""
    told = await attempt(chain, metadata=[*chain.identity(), ("content-length", str(length))], until_started=True)
    return None if told.reached else told


def _is_too_large(told: Fate) -> bool:
    return told.http == "413" or (told.status == 8 and not told.reason)


async def check_headers(chain: Chain, most: int) -> list[Finding]:
    """The longest header of a call that gets to the server, whose own limit is `most` bytes for all of them.

    This is an asyncio-flavored function.
    """
    wanted = [length for length in _HEADERS if length <= most * 3 // 4]
    told: Fate | None = None
    for length in wanted:
        fate = await attempt(chain, metadata=[*chain.identity(), ("x-aipod-doctor", _LETTER * length)])
        if fate.reached:
            if told is None:
                return [Finding(Level.FINE, "header-limit", f"headers of {size(length)} get through", value=length)]
            return [header_limit(length, told)]
        told = fate
    assert told is not None, "a server has at least 4 KiB of headers"
    return [header_limit(0, told)]


def header_limit(length: int, told: Fate) -> Finding:
    """A finding for headers of which no more than `length` bytes get through; the next longer one ended as `told`."""
    level = Level.CHANGE if length >= 3_500 else Level.BROKEN
    found = f"call metadata of {size(length)} gets through, more does not: {said(str(told))}"
    nginx = "large_client_header_buffers 4 64k;"
    return Finding(level, "header-limit", found, nginx, "the limit of a request's headers: 64 KiB", length)


async def check_error(chain: Chain) -> list[Finding]:
    """Whether an error of the server's arrives as it was sent, details included. This is an asyncio-flavored function.

    It is as long as they can be: 7 KiB.
    """
    told = await attempt(chain, {"error": True})
    if told.reason == "PROBE":  # the details have it, which are most of it
        return [Finding(Level.FINE, "error-size", "errors with 7 KiB of details arrive")]
    if told.reason:  # the server's, of another kind
        return [Finding(Level.UNCHECKED, "error-size", f"the server answers {said(str(told))}")]
    found = f"an error with 7 KiB of details arrives as {said(str(told))}"
    return [Finding(Level.CHANGE, "error-size", found, "grpc_buffer_size 64k;", "the limit of a response's headers")]


async def check_health(chain: Chain) -> list[Finding]:
    """Whether one can ask the server how it is. This is an asyncio-flavored function."""
    async with chain.sound() as channel:
        since = time.monotonic()
        check = HealthStub(channel).Check(HealthCheckRequest(), timeout=ANSWER, metadata=chain.metadata)
        try:
            status = (await alone(check)).status
        except FAILURES as exc:
            found = f"health is not told: {said(str(fate_of(exc, None, since)))}"
            nginx = "location /grpc.health.v1.Health/ { grpc_pass ...; }"
            return [Finding(Level.NOTE, "health", found, nginx, "route /grpc.health.v1.Health/ to the server")]
    if status == HealthCheckResponse.SERVING:
        return [Finding(Level.FINE, "health", "SERVING")]
    return [Finding(Level.NOTE, "health", "the server says that it takes no jobs now: it drains, or its model fails")]


async def check_routing(chain: Chain, *, named: bool, direct: bool) -> list[Finding]:
    """Where calls go that nobody serves, and how refusals are told. This is an asyncio-flavored function.

    `named`: the caller asks for an upstream by name; `direct`: there is no proxy.
    """
    findings: list[Finding] = []
    pages: list[tuple[str, str]] = []
    told = await attempt(chain, path=f"/aipod.doctor/{secrets.token_hex(4)}")
    if told.http:
        pages.append((told.http, "a method that there is not"))
    if direct:
        return findings
    others = [(name, value) for name, value in chain.identity() if name != "x-upstream"]
    told = await attempt(chain, metadata=[*others, ("x-upstream", f"aipod-doctor-{secrets.token_hex(4)}")])
    if told.http:
        pages.append((told.http, "an upstream that there is not"))
    if told.reached:
        findings.append(unrouted(named))
    else:
        findings.append(Finding(Level.FINE, "routing", f"an unknown x-upstream is refused: {said(str(told))}"))
    return findings + ([unmapped(pages)] if pages else [Finding(Level.FINE, "proxy-errors", "are gRPC's")])


def unrouted(named: bool) -> Finding:
    """A finding for a proxy that brings calls for any upstream to the same server."""
    found = "x-upstream is not looked at: a call for an upstream that there is not gets to this server"
    nginx = "map $http_x_upstream $aipod_upstream { ... } and grpc_pass grpc://$aipod_upstream;"
    level = Level.CHANGE if named else Level.NOTE
    return Finding(level, "routing", found, nginx, "routes by header x-upstream")


def unmapped(pages: list[tuple[str, str]]) -> Finding:
    """A finding for a proxy that refuses by an HTTP status, which gRPC clients know as UNKNOWN. `pages`: when."""
    found = "; ".join(f"{what} is told by HTTP status {said(status)}" for status, what in pages)
    found += ": no gRPC client sees why"
    nginx = "error_page ... = /.grpc-status/N; (see deploy/nginx.conf)"
    return Finding(Level.CHANGE, "proxy-errors", found, nginx, "gRPC-shaped local replies")
