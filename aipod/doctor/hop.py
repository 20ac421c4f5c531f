"""The next hop and the server, by what they say of themselves: HTTP/2 at all, TLS, versions, streams."""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping
from typing import Any

from aipod import __version__
from aipod.doctor.finding import Finding, Level, said
from aipod.doctor.load import ENOUGH_STREAMS
from aipod.doctor.wire import Fate
from aipod.transport.sounding import Hop

# Days in which a certificate is renewed by hand; those that renew it by itself do so a month before.
_DAYS = 14
# What the server says of itself, and what it has told of it in SETTINGS, if it is the next hop.
_OWN = {"max_concurrent_streams": "max_streams", "initial_window_size": "stream_window", "max_frame_size": "max_frame"}


def judge_unconnected(exc: BaseException, hop: Hop | None, *, tls: bool) -> Finding | None:
    """What it means that there is no HTTP/2 connection; None where nobody answers at all."""
    if isinstance(exc.__cause__, ssl.SSLCertVerificationError):
        text = f"the certificate is not accepted: {said(exc.__cause__.verify_message)}"
        return Finding(Level.BROKEN, "tls", text, "ssl_certificate", "or --tls-ca on this side")
    if hop is None:
        return None
    # Some proxies end the handshake (RFC 7301 section 3.2), others choose nothing. ssl has no name for that alert.
    ended = isinstance(exc, ssl.SSLError) and "no application protocol" in str(exc)
    if hop.first.startswith(b"HTTP/") or ended or (hop.tls and hop.alpn != "h2"):
        chosen = f"by ALPN: {said(hop.alpn or 'nothing')}" if tls else said(hop.first[:16].decode("latin-1"))
        text = f"it speaks HTTP/1.1 only ({chosen})" + ("" if tls else ", or wants TLS (--tls)")
        nginx = "listen ... http2; (1.25.1 and newer: http2 on;)"
        return Finding(Level.BROKEN, "http2", text, nginx, "HTTP/2 towards clients (h2 by ALPN, h2c without TLS)")
    return None


def judge_hop(hop: Hop, settings: Mapping[str, int]) -> list[Finding]:
    """What the next hop has said when it was connected."""
    streams = settings["max_concurrent_streams"]
    nginx, others = "http2_max_concurrent_streams 1000;", "concurrent streams per connection"
    text = f"{streams} calls at once on a connection" if streams < 2**31 else "any number of calls at once"
    level = Level.FINE if streams >= ENOUGH_STREAMS else Level.CHANGE
    findings = [Finding(level, "streams", text, nginx, others, streams)]
    if hop.tls:
        findings.append(Finding(Level.NOTE, "tls", said(hop.tls), value=said(hop.tls)))
    if hop.expires:
        days = (ssl.cert_time_to_seconds(hop.expires) - time.time()) / 86400
        text = f"the certificate is good for {days:.0f} days"
        level = Level.FINE if days >= _DAYS else Level.CHANGE
        findings.append(Finding(level, "certificate", text, "ssl_certificate", "the certificate", days))
    return findings


def judge_first(told: Fate, about: Mapping[str, Any]) -> list[Finding]:
    """What the first call shows: whether a server of aipod's answers, and which."""
    proxy = said(told.headers.get("server", ""))
    findings = [Finding(Level.NOTE, "proxy-version", proxy, value=proxy)] if proxy else []
    if about:
        version = said(str(about.get("version")))
        text = f"aipod {version} here and there" if version == __version__ else f"aipod {version}; here {__version__}"
        return [*findings, Finding(Level.NOTE, "server-version", text, value=version)]
    if told.reason == "UNKNOWN_METHOD":
        text = "the server is older than aipod.probe: silence, rates and limits that need it are not checked"
        return [*findings, Finding(Level.UNCHECKED, "server-version", text)]
    text, nginx, others = f"a call is answered by {said(str(told))}", "", ""
    if told.reason in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        others = "call with a token that may: --token-file"
    elif told.http == "404" or told.status in (5, 12):
        nginx = "location /ai.AI/ { grpc_pass ...; } and map $http_x_upstream"
        others = "route /ai.AI/ to the server; --upstream names it"
    elif told.status == 14 or told.http in ("502", "503", "504"):
        nginx, others = "grpc_pass, upstream { server ...; }", "the server is down, or its address is wrong"
    return [*findings, Finding(Level.BROKEN, "server", text, nginx, others)]


def limits_of(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """The server's own limits, by the names of `Config`; empty where it does not tell any."""
    limits = about.get("limits")
    return limits if isinstance(limits, Mapping) else {}


def is_next_hop(about: Mapping[str, Any], settings: Mapping[str, int]) -> bool:
    """Whether the server itself is what was connected: as far as its SETTINGS tell."""
    limits = limits_of(about)
    return all(limits.get(own) == settings.get(name) for name, own in _OWN.items())


def judge_server(about: Mapping[str, Any]) -> list[Finding]:
    """The server's own limits, which are nobody else's: they are set where it is started."""
    limits = limits_of(about)
    if not limits:
        return []
    named = ("max_payload", "max_message", "max_kwargs", "upload_stall", "tick")
    shown = ((name.replace("_", "-"), limits[name]) for name in named if name in limits)
    told = ", ".join(f"--{name} {value:.10g}" for name, value in shown if _is_figure(value))
    return [Finding(Level.NOTE, "server-limits", f"the server's own (0 is none): {told}")]


def _is_figure(value: object) -> bool:
    """Whether it is a number that a setting may have: whole ones come in any length."""
    return isinstance(value, int | float) and 0 <= value < 2**63


def unseen() -> list[Finding]:
    """What nobody can see from here."""
    return [
        Finding(Level.UNCHECKED, what, text)
        for what, text in (
            ("reload", "worker_shutdown_timeout: only a reload shows it; leave it unset"),
            ("connection-age", "keepalive_time: only a connection of that age shows it; 24h is well"),
            ("calls-per-caller", "limit_conn, limit_req: only as many calls at once would show them"),
        )
    ]
