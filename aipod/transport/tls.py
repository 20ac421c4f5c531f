"""TLS for both sides: 1.2 or newer, ALPN `h2` (RFC 9113 sections 3.2 and 9.2), from files that may be replaced."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Callable
from typing import Any

from aipod.config import Config
from aipod.errors import UsageError, why


class Disagreement(ConnectionError):
    """The two sides want different things of TLS, which trying again does not change. The text says what to do."""


class TLSError(UsageError):
    """A certificate or key cannot be used, or would not be; the text says which."""


# What OpenSSL says of a certificate that is another host's (X509_V_ERR_HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH).
_OTHER_HOST = (62, 64)
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")
# The server's words for a client's certificate: its alerts, RFC 8446 section 6.2.
_NOT_KNOWN = ("CERTIFICATE_REQUIRED", "BAD_CERTIFICATE", "UNKNOWN_CA", "CERTIFICATE_EXPIRED", "HANDSHAKE_FAILURE")


def disagreement(exc: BaseException | None, instead: bytes = b"") -> Disagreement | None:
    """What the client's own `exc`, or what the server sent `instead` of HTTP/2, says of TLS; None where nothing."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        advice = "--tls-ca FILE (Config.tls_ca) says which authority the server's certificate comes from"
        if exc.verify_code in _OTHER_HOST:
            advice = "call the server by a name that its certificate has"
        return Disagreement(f"certificate verify failed: {exc.verify_message.rstrip('.')}; {advice}")
    reason = (exc.reason or "") if isinstance(exc, ssl.SSLError) else ""
    if reason in _NO_TLS:
        return Disagreement("the server speaks no TLS: leave out --tls (Config.tls)")
    if reason.endswith(_NOT_KNOWN) and "ALERT" in reason:
        said = reason.partition("ALERT_")[2].replace("_", " ").lower()
        return Disagreement(
            f"the server wants a certificate that it can verify, and says: {said}; --tls-cert FILE (Config.tls_cert)"
        )
    if instead[:2] == b"\x15\x03" or instead == b"HTTP/":  # an alert, or nginx's answer on a port for TLS
        what = "TLS, and no HTTP/2 without it" if instead[:1] == b"\x15" else "HTTP/1, and no HTTP/2 without TLS"
        return Disagreement(f"the server speaks {what}: add --tls (Config.tls), or look for another port")
    return None


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


class Followed:
    """TLS as its files say it now: each connection that begins has what they said last, those under way keep theirs.

    A fresh context for each state of the files, so that nobody comes in by a session ticket of before: who resumes a
    session shows no certificate (RFC 8446 section 2.2). `make` is `server_context` or `client_context`.
    """

    def __init__(self, make: Callable[[Config], ssl.SSLContext | None], config: Config) -> None:
        """Reads the files. Raises TLSError."""
        self._make = make
        self._config = config
        self._seen = self._look()
        newest = make(config)
        #: What to listen or connect with; None where the settings ask for no TLS.
        self.context = None if newest is None else _Newest(newest)

    def renew(self) -> bool | None:
        """Read the files again where they have changed; blocks.

        None where they have not, else whether the authorities are among those that have. Raises TLSError, and what was
        there stays, where they cannot be used: they may be half written, or one of a pair is new and the other is not.
        """
        if self.context is None:
            return None
        seen = self._look()
        if seen == self._seen:
            return None
        for path, found in seen.items():
            if found is not None and not stat.S_ISREG(found[0]):  # opening a FIFO may take for ever
                raise TLSError(f"{path!r} is no regular file")
        newest = self._make(self._config)
        if seen != self._look():
            return None  # they are being written this moment
        assert newest is not None, "the settings are those of the first time"
        ca = self._config.tls_ca
        new_ca = bool(ca) and seen[ca] != self._seen[ca]
        self._seen, self.context.newest = seen, newest
        return new_ca

    def _look(self) -> dict[str, tuple[int, ...] | None]:
        """What tells one state of the files from another; None of those that are not there."""
        config = self._config
        return {path: _look_at(path) for path in (config.tls_cert, config.tls_key, config.tls_ca) if path}


class _Newest(ssl.SSLContext):
    """A context for a listener that hands each connection to the newest one: sockets that listen need not know."""

    def __new__(cls, newest: ssl.SSLContext) -> _Newest:
        self = super().__new__(cls, newest.protocol)
        self.newest = newest
        return self

    newest: ssl.SSLContext

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """What asyncio calls for each connection."""
        return self.newest.wrap_bio(*args, **options)


def _look_at(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)  # of what a link leads to: Kubernetes replaces secrets by switching one
    except OSError:
        return None
    # The change time as well: `cp -p` and `mv` keep the other.
    return (found.st_mode, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)


def _for_http2(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["h2"])
    return context


def _load_own(context: ssl.SSLContext, config: Config) -> None:
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key or None)
    except OSError as exc:  # ssl.SSLError is one
        key = f" with key {config.tls_key!r}" if config.tls_key else ""
        raise TLSError(f"cannot use certificate {config.tls_cert!r}{key}: {why(exc)}") from None


def _load_ca(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as exc:
        raise TLSError(f"cannot use the authorities in {path!r}: {why(exc)}") from None
