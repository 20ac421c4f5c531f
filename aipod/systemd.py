"""What a service manager and this process tell each other, without its library.

sd_notify(3): datagrams to $NOTIFY_SOCKET. sd_listen_fds(3): listening sockets from descriptor 3 on.
sd_watchdog_enabled(3): how often a sign of life is wanted. Where the environment has none of these, nothing happens.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import MutableMapping

from aipod.errors import AipodError

log = logging.getLogger("aipod.server")

# SD_LISTEN_FDS_START
_FIRST = 3
# No more digits than 64 bits have: Python's own limits on numbers are others for each thing that is done with them.
_COUNT = re.compile(r"[0-9]{1,19}\Z")
# Seconds: who wants to hear more often gets a process that does nothing else.
_LEAST = 0.1
_NAMES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


class ServiceManager:
    """Takes what is for this process out of `environ`, so that its children get neither sockets nor a say.

    `sockets`: what was handed down to listen on, each with its name (FileDescriptorName=). `watchdog`: seconds within
    which `WATCHDOG=1` has to be told, None where nobody waits for it. Raises `AipodError` (BIND_FAILED).
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        told = {name: environ.pop(name, "") for name in _NAMES}
        self.sockets = _take_sockets(told)
        self.watchdog = _watchdog(told)
        self._address = _address(told["NOTIFY_SOCKET"])
        self._silent = False

    def tell(self, *lines: str) -> None:
        """Say `lines` (VARIABLE=VALUE), where somebody wants to hear them. Never blocks."""
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError as exc:
            if not self._silent:  # once: it may be so each second
                log.warning("the service manager cannot be told (NOTIFY_SOCKET): %s", exc.strerror)
            self._silent = True


def microseconds(seconds: float) -> int:
    """As the service manager counts."""
    return int(seconds * 1e6)


def _address(name: str) -> str | None:
    if name.startswith("@"):  # an abstract one
        return "\0" + name[1:]
    if name and not name.startswith("/"):
        log.warning("NOTIFY_SOCKET=%s is neither a path nor an abstract name: nobody is told", name)
        return None
    return name or None


def _watchdog(told: dict[str, str]) -> float | None:
    usec, pid = told["WATCHDOG_USEC"], told["WATCHDOG_PID"]
    if not _COUNT.match(usec) or int(usec) == 0 or (pid and pid != str(os.getpid())):
        return None
    return max(int(usec) / 1e6, _LEAST)


def _take_sockets(told: dict[str, str]) -> list[tuple[str, socket.socket]]:
    count, pid = told["LISTEN_FDS"], told["LISTEN_PID"]
    if not count:
        return []
    if pid != str(os.getpid()):
        log.warning("LISTEN_FDS is not for this process but for %s: start it with exec", pid or "nobody")
        return []
    if not _COUNT.match(count):
        raise AipodError("BIND_FAILED", f"LISTEN_FDS={count[:40]} is no number")
    names = told["LISTEN_FDNAMES"].split(":") if told["LISTEN_FDNAMES"] else []
    found = []
    for number in range(int(count)):
        name = names[number] if number < len(names) else "unknown"
        try:
            sock = socket.socket(fileno=_FIRST + number)
        except OSError as exc:
            text = f"descriptor {_FIRST + number} ({name}), which was handed down, is no socket: {exc.strerror}"
            raise AipodError("BIND_FAILED", text) from exc
        sock.set_inheritable(False)
        found.append((name, sock))
    return found
