"""What an operator says of nginx in front of aipod. Checked: no name, address or path can become nginx syntax."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Sequence

from aipod.errors import UsageError

# From here on `http2` is a directive, no parameter of `listen`.
HTTP2_DIRECTIVE = (1, 25, 1)
OLDEST = (1, 22)
LISTEN = ("127.0.0.1:8080",)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
# Words that mean something else in a `map` (ngx_http_map_module).
_RESERVED = {"default", "hostnames", "include", "volatile"}
# RFC 1123 section 2.1, and the underscore of container names.
_HOST = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*\Z"
)
_PATH = re.compile(r"/[A-Za-z0-9._/@+,=-]*\Z")


@dataclasses.dataclass(frozen=True)
class Upstream:
    """A group of servers, which callers name. Raises `UsageError`."""

    name: str
    servers: tuple[str, ...]  # HOST:PORT, [::1]:PORT or unix:/PATH
    shared_spool: bool = False  # they have one spool, so each of them can answer for any job

    def __post_init__(self) -> None:
        lower = self.name.lower()
        if not _NAME.match(self.name) or lower in _RESERVED or lower.startswith("aipod_"):
            raise UsageError(f"{self.name!r} is no name for an upstream; take letters, digits, '.', '_' and '-'")
        if not self.servers:
            raise UsageError(f"upstream {self.name} has no server")
        for server in self.servers:
            _check_address(server)
        if len(set(self.servers)) < len(self.servers):
            raise UsageError(f"upstream {self.name} has a server twice")

    @classmethod
    def parse(cls, text: str, shared: Sequence[str] = ()) -> Upstream:
        """From NAME=ADDRESS,ADDRESS."""
        name, _, servers = text.partition("=")
        return cls(name, tuple(servers.split(",")) if servers else (), name in shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What an operator says. Raises `UsageError`. Paths are absolute."""

    upstreams: tuple[Upstream, ...]
    default: str = ""  # the upstream of calls that name none; the first
    listen: tuple[str, ...] = LISTEN
    insecure: bool = False  # plain HTTP/2 for others than this machine is meant
    tls_cert: str = ""
    tls_key: str = ""
    server_ca: str = ""  # servers speak TLS, with certificates of these authorities ...
    server_name: str = ""  # ... that name this
    server_cert: str = ""  # what nginx shows to servers that ask for a certificate
    server_key: str = ""
    run_dir: str = ""  # where nginx writes, where it is not the system's
    log_stdout: bool = False  # as in a container: calls to stdout, errors to stderr
    nginx: tuple[int, ...] = OLDEST

    def __post_init__(self) -> None:
        names = [upstream.name.lower() for upstream in self.upstreams]
        if not names:
            raise UsageError("no upstream is named; for example --upstream scan=127.0.0.1:50051")
        if len(set(names)) < len(names):
            raise UsageError("two upstreams have one name; nginx does not tell capitals from small letters")
        if self.default and self.default not in {upstream.name for upstream in self.upstreams}:
            raise UsageError(f"the default {self.default!r} is none of the upstreams")
        for path in (self.tls_cert, self.tls_key, self.server_ca, self.server_cert, self.server_key, self.run_dir):
            if path and not _PATH.match(path):
                raise UsageError(
                    f"{path!r} cannot be written into nginx's configuration; take letters, digits and ._/@+,=-"
                )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise UsageError("a certificate and its key go together: --tls-cert and --tls-key")
        if bool(self.server_cert) != bool(self.server_key):
            raise UsageError("a certificate and its key go together: --server-cert and --server-key")
        if bool(self.server_ca) != bool(self.server_name):
            raise UsageError(
                "--server-ca and --server-name go together: who vouches for the servers, and for what name"
            )
        if self.server_cert and not self.server_ca:
            raise UsageError("--server-cert is for servers that speak TLS: name their authority, --server-ca")
        if self.server_name and not _HOST.match(self.server_name):
            raise UsageError(f"{self.server_name!r} is no host's name")
        if not self.listen:
            raise UsageError("there is no address to listen on")
        for address in self.listen:
            _check_listen(address, self.insecure or bool(self.tls_cert))
        if self.nginx < OLDEST:
            raise UsageError(f"nginx {dotted(self.nginx)} is too old; {dotted(OLDEST)} or newer is needed")

    @property
    def arguments(self) -> list[str]:
        """What `aipod nginx-conf` makes the same configuration from."""
        words = [f"--upstream={upstream.name}={','.join(upstream.servers)}" for upstream in self.upstreams]
        words += [f"--shared-spool={upstream.name}" for upstream in self.upstreams if upstream.shared_spool]
        words += [f"--default={self.default}"] if self.default else []
        words += [f"--listen={address}" for address in self.listen]
        words += ["--insecure"] if self.insecure else []
        for name in ("tls_cert", "tls_key", "server_ca", "server_name", "server_cert", "server_key", "run_dir"):
            if value := getattr(self, name):
                words.append(f"--{name.replace('_', '-')}={value}")
        words += ["--log-stdout"] if self.log_stdout else []
        return [*words, f"--nginx={dotted(self.nginx)}"]


def dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _check_address(address: str) -> None:
    if address.startswith("unix:"):
        if not _PATH.match(address.removeprefix("unix:")):
            raise UsageError(f"{address!r} is no socket's path; write unix:/run/aipod/scan.sock")
        return
    _split(address)


def _split(address: str) -> str:
    """The host of HOST:PORT."""
    host, colon, port = address.rpartition(":")
    if not colon or not re.match(r"[0-9]{1,5}\Z", port) or not 0 < int(port) < 65536:
        raise UsageError(f"{address!r} is not HOST:PORT, [::1]:PORT or unix:/PATH")
    if host.startswith("[") and host.endswith("]"):
        bare = host[1:-1]
        try:
            ipaddress.IPv6Address(bare)
        except ValueError:
            raise UsageError(f"{address!r} has no IPv6 address in its brackets") from None
        if "%" in bare:
            raise UsageError(f"{address!r} has a zone, which nginx does not take")
        return bare
    if not _HOST.match(host):
        raise UsageError(f"{address!r} is not HOST:PORT, [::1]:PORT or unix:/PATH")
    return host


def _check_listen(address: str, secure: bool) -> None:
    host = "" if re.match(r"[0-9]+\Z", address) else _split(address)
    if not host:
        _split(f"all:{address}")
    try:
        inside = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = False
    if not inside and not secure:
        raise UsageError(
            f"{address} can be reached from other machines, and nobody's tokens and payloads may pass in the clear; "
            "give --tls-cert and --tls-key, or add --insecure if that is meant"
        )
