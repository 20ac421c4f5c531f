"""The sockets that a server listens on."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import ipaddress
import logging
import os
import secrets
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Sequence

from aipod.config import Config
from aipod.errors import ServeError, why

log = logging.getLogger("aipod.transport")

# Connections that wait to be accepted: hundreds may come at once, and asyncio would listen anew with 100.
BACKLOG = 1024

# asm-generic/socket.h; Python has no name for it.
_SO_ATTACH_FILTER = 26


class BindError(ServeError):
    """The server cannot listen there; the text says why and what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Listener:
    """A socket to listen on."""

    sock: socket.socket
    name: str  # as the server tells it
    handed_down: bool = False  # others may have it as well
    reuse_port: bool = False  # others may have one of their own

    @property
    def shared(self) -> bool:
        """Whether other servers accept connections on the same address."""
        return self.handed_down or self.reuse_port

    def hold_back(self) -> None:
        """Have nothing more come into what waits here to be accepted, where that would be lost with the socket."""
        if self.reuse_port:
            _drop_syns(self.sock)


Given = Sequence[tuple[str, socket.socket]]


@contextlib.contextmanager
def open_sockets(config: Config, given: Given = ()) -> Iterator[list[Listener]]:
    """The `given` sockets, which were handed down, each with a name; else one for each address of `config.bind`.

    Closed at the end. Raises `BindError`.
    """
    # Who has a token, or a certificate that comes from --tls-ca, is known; others are not let in.
    insecure = config.insecure or bool(config.tokens or (config.tls_cert and config.tls_ca))
    with contextlib.ExitStack() as stack:
        listeners = []
        for name, sock in given:
            stack.enter_context(sock)
            try:
                _check_given(sock, insecure=insecure)
            except (OSError, ValueError) as exc:
                raise BindError(
                    "BIND_FAILED", f"cannot listen on socket {name}, which was handed down: {why(exc)}"
                ) from exc
            sock.setblocking(False)
            listeners.append(Listener(sock, name_of(sock), handed_down=True))
        for address in () if given else config.bind:
            try:
                sock = _listen(address, insecure=insecure, reuse_port=config.reuse_port)
            except (OSError, ValueError) as exc:
                raise BindError(
                    "BIND_FAILED", f"cannot listen on {address}: {why(exc)}; choose another with --bind"
                ) from exc
            stack.enter_context(sock)
            if is_unix := address.startswith("unix:"):
                stack.callback(_remove_socket, os.path.abspath(address.removeprefix("unix:")))
            name = address if is_unix else name_of(sock)
            listeners.append(Listener(sock, name, reuse_port=config.reuse_port and not is_unix))
        yield listeners


def _check_given(sock: socket.socket, *, insecure: bool) -> None:
    """Raises ValueError for one that nobody can listen on, or that anybody could reach."""
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    if sock.family not in families or sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
        raise ValueError("it is no stream socket; write ListenStream=")
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError("it does not listen; write Accept=no")
    _check_reach(sock, insecure=insecure)


def _check_reach(sock: socket.socket, *, insecure: bool) -> None:
    if sock.family != socket.AF_UNIX and not insecure and not is_loopback(sock.getsockname()[0]):
        raise ValueError(
            "anybody who can reach it could call the model; ask for tokens (--tokens) or certificates "
            "(--tls-cert, --tls-ca), "
            "or add --insecure if that is meant"
        )


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
        _check_reach(sock, insecure=insecure)
        if not reuse_port:  # else it listens when it can answer: another server does that well meanwhile
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


def _drop_syns(sock: socket.socket) -> None:
    """Have the kernel drop what asks this listener for a new connection; the peer asks again after a second (RFC 6298).

    By then another socket of the same port (SO_REUSEPORT) gets it. Without it a peer whose connection comes between the
    last accept() and close() is told that it was reset. Nothing where the system knows no such filters.
    """
    if sys.platform != "linux":
        return
    # Classic BPF on a TCP header: byte 13 is that of the flags, 2 is SYN (socket(7), linux/filter.h).
    program = b"".join(
        struct.pack("=HBBI", *step)
        for step in (
            (0x30, 0, 0, 13),  # ldb [13]
            (0x45, 0, 1, 2),  # jset #2
            (0x06, 0, 0, 0),  # ret #0: drop it
            (0x06, 0, 0, 0xFFFFFFFF),  # ret #-1: take it whole
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    try:
        what = struct.pack("HP", len(program) // 8, ctypes.addressof(code))
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, what)
    except OSError as exc:
        log.info("a connection that comes this moment may be reset: %s", exc.strerror)


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def name_of(sock: socket.socket) -> str:
    """Its address, as the server tells it."""
    where = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return "unix:" + (where if isinstance(where, str) else "@" + where[1:].decode(errors="replace"))
    return f"[{where[0]}]:{where[1]}" if sock.family == socket.AF_INET6 else f"{where[0]}:{where[1]}"


@contextlib.contextmanager
def open_metrics_socket(config: Config, *, shared: bool) -> Iterator[socket.socket | None]:
    """A listening socket for `config.metrics`, None where that is empty. Raises `BindError`.

    `shared`: the next server may have one as well. Who scrapes has neither a token nor a certificate: that is for a
    network where everybody may know the numbers.
    """
    if not config.metrics:
        yield None
        return
    try:
        if config.metrics.startswith("unix:"):
            raise ValueError("it is not HOST:PORT or [::1]:PORT")
        sock = _listen(config.metrics, insecure=True, reuse_port=shared)
        if not config.insecure and not is_loopback(sock.getsockname()[0]):
            sock.close()
            raise ValueError("anybody who can reach it could read the metrics; add --insecure if that is meant")
    except (OSError, ValueError) as exc:
        text = f"cannot listen for metrics on {config.metrics}: {why(exc)}; choose another with --metrics"
        raise BindError("BIND_FAILED", text) from exc
    with sock:
        sock.listen(BACKLOG)
        yield sock
