"""The sockets that a server listens on."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import stat
from collections.abc import Iterator

from aipod.config import Config
from aipod.errors import AipodError

# Connections that wait to be accepted: hundreds may come at once, and asyncio would listen anew with 100.
BACKLOG = 1024


class BindError(AipodError):
    """The server cannot listen there; the text says why and what to do."""


@contextlib.contextmanager
def open_sockets(config: Config) -> Iterator[list[socket.socket]]:
    """A listening socket for each address of `config.bind`. Raises `BindError`."""
    with contextlib.ExitStack() as stack:
        sockets = []
        for address in config.bind:
            try:
                # Who has a token, or a certificate that comes from --tls-ca, is known; others are not let in.
                insecure = config.insecure or bool(config.tokens or (config.tls_cert and config.tls_ca))
                sock = _listen(address, insecure=insecure, reuse_port=config.reuse_port)
            except (OSError, ValueError) as exc:
                raise BindError(
                    "BIND_FAILED", f"cannot listen on {address}: {exc}; choose another with --bind"
                ) from exc
            stack.enter_context(sock)
            if address.startswith("unix:"):
                stack.callback(_remove_socket, os.path.abspath(address.removeprefix("unix:")))
            sockets.append(sock)
        yield sockets


def _listen(address: str, *, insecure: bool, reuse_port: bool) -> socket.socket:
    if address.startswith("unix:"):
        return _listen_unix(address.removeprefix("unix:"))
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:  # getaddrinfo takes 70000 for 4464
        raise ValueError("it is not HOST:PORT, [::1]:PORT or unix:PATH")
    host = host.removeprefix("[").removesuffix("]")
    family, kind, proto, _, where = socket.getaddrinfo(
        host or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        if not insecure and not is_loopback(sock.getsockname()[0]):
            raise ValueError(
                "anybody who can reach it could call the model; ask for tokens (--tokens) or certificates "
                "(--tls-cert, --tls-ca), "
                "or add --insecure if that is meant"
            )
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _listen_unix(path: str) -> socket.socket:
    """Bind beside and rename: an old socket file is replaced, a living server's is not."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError("there is something that is no socket")
            else:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                    try:
                        probe.connect(path)
                    except ConnectionRefusedError:
                        pass
                    else:
                        raise OSError("another server listens there")
        fresh = f"{path}.{secrets.token_hex(4)}"
        sock.bind(fresh)
        os.chmod(fresh, 0o600)
        sock.listen(BACKLOG)
        os.rename(fresh, path)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_socket(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def name_of(sock: socket.socket) -> str:
    where = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        # Bound under another name and renamed (see _listen_unix).
        return f"unix:{where.rpartition('.')[0]}"
    return f"[{where[0]}]:{where[1]}" if sock.family == socket.AF_INET6 else f"{where[0]}:{where[1]}"


@contextlib.contextmanager
def open_metrics_socket(config: Config) -> Iterator[socket.socket | None]:
    """A listening socket for `config.metrics`, None where that is empty. Raises `BindError`.

    Who scrapes has neither a token nor a certificate: that is for a network where everybody may know the numbers.
    """
    if not config.metrics:
        yield None
        return
    try:
        if config.metrics.startswith("unix:"):
            raise ValueError("it is not HOST:PORT or [::1]:PORT")
        sock = _listen(config.metrics, insecure=True, reuse_port=config.reuse_port)
        if not config.insecure and not is_loopback(sock.getsockname()[0]):
            sock.close()
            raise ValueError("anybody who can reach it could read the metrics; add --insecure if that is meant")
    except (OSError, ValueError) as exc:
        text = f"cannot listen for metrics on {config.metrics}: {exc}; choose another with --metrics"
        raise BindError("BIND_FAILED", text) from exc
    with sock:
        yield sock
