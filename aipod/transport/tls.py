"""TLS for both sides: 1.2 or newer, ALPN `h2` (RFC 9113 sections 3.2 and 9.2)."""

from __future__ import annotations

import ssl

from aipod.config import Config
from aipod.errors import UsageError


class TLSError(UsageError):
    """A certificate or key cannot be used, or would not be; the text says which."""


def server_context(config: Config) -> ssl.SSLContext | None:
    """What a server listens with, None without `tls_cert`. With `tls_ca` every client needs a certificate of that CA.

    Raises TLSError.
    """
    if not config.tls_cert:
        if config.tls_key or config.tls_ca:
            raise TLSError("a key or authorities without tls_cert: the server would speak no TLS and let everybody in")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_own(context, config)
    if config.tls_ca:
        _load_ca(context, config.tls_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return _for_http2(context)


def client_context(config: Config) -> ssl.SSLContext | None:
    """What a client connects with, None without `tls`. The server's name is checked. Raises TLSError."""
    if not config.tls:
        if config.tls_cert or config.tls_key or config.tls_ca:
            raise TLSError("a certificate, key or authorities without tls: nothing would be encrypted; add it (--tls)")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if config.tls_ca:
        _load_ca(context, config.tls_ca)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if config.tls_cert:
        _load_own(context, config)
    return _for_http2(context)


def _for_http2(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["h2"])
    return context


def _load_own(context: ssl.SSLContext, config: Config) -> None:
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key or None)
    except OSError as exc:  # ssl.SSLError is one
        raise TLSError(f"cannot use certificate {config.tls_cert!r} with key {config.tls_key!r}: {exc}") from None


def _load_ca(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as exc:
        raise TLSError(f"cannot use the authorities in {path!r}: {exc}") from None
