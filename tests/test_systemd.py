"""What a service manager is told, and the sockets that it hands down: over real sockets, by its own tools."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aipod.errors import AipodError
from aipod.systemd import ServiceManager
from tests.calls import calls, marked, own
from tests.conftest import ROOT, children, require, wait_until

WORK = "tests.models_lifecycle:Work"


@contextlib.contextmanager
def manager(address: str) -> Iterator[Ears]:
    """A service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0"))
        sock.settimeout(20)
        yield Ears(sock)


class Ears(list[str]):
    """The lines that a service manager was told, as far as it has listened."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock

    def hear(self, pattern: str) -> str:
        """Listen until a line is so."""
        while True:
            for line in (told := self._sock.recv(4096).decode().splitlines()):
                self.append(line)
            if found := [line for line in told if re.fullmatch(pattern, line)]:
                return found[0]

    def hear_the_rest(self) -> None:
        self._sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.extend(self._sock.recv(4096).decode().splitlines())


@contextlib.contextmanager
def serving(directory: Path, *options: str, before: tuple[str, ...] = (), **environment: str) -> Iterator[Any]:
    command = [*before, sys.executable, "-m", "aipod", "serve", WORK, "--spool", "tmp", "--data", str(directory)]
    with (directory / "log").open("w") as stderr:
        process = subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def addresses(process: Any, count: int) -> list[str]:
    return [process.stdout.readline().removeprefix("aipod listening on ").strip() for _ in range(count)]


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_it_is_told_when_health_answers_what_goes_on_and_when_the_end_begins(tmp_path: Path, kind: str) -> None:
    name = f"{tmp_path}/n" if kind == "path" else f"@aipod-{os.urandom(6).hex()}"
    until = tmp_path / "until"
    bind = ("--bind", "127.0.0.1:0", "--drain", "40", "--cancel-grace", "1", "--load-timeout", "100")
    with manager(name) as told, serving(tmp_path, *bind, NOTIFY_SOCKET=name, WATCHDOG_USEC="1000000") as process:
        told.hear(r"STATUS=serving .*")
        (address,) = addresses(process, 1)
        assert told[0] == "EXTEND_TIMEOUT_USEC=100000000"
        assert [line for line in told if not line.startswith("WATCHDOG")] == [
            *(told[0], f"STATUS=loading {WORK}"),
            *("READY=1", f"STATUS=serving {WORK} on {address}"),
        ]
        before = told.count("WATCHDOG=1")
        while told.count("WATCHDOG=1") < before + 3:
            told.hear("WATCHDOG=1")
        with calls() as threads:
            job = threads.submit(own, address, "predict", mark=str(tmp_path / "mark"), until=str(until))
            worker = int(marked(tmp_path / "mark"))
            names = ("NOTIFY_SOCKET", "WATCHDOG_USEC")
            inherited = Path(f"/proc/{worker}/environ").read_text()
            assert not any(name in inherited for name in names), "a model could speak for the server"
            process.send_signal(signal.SIGTERM)
            told.hear("STOPPING=1")
            assert told[-1] == f"EXTEND_TIMEOUT_USEC={(40 + 5 + 15 + 5) * 1_000_000}"
            told.hear("STATUS=draining: 1 jobs and 1 calls under way, at most (40|39|3.) s left")
            told.hear("WATCHDOG=1")
            until.touch()
            assert job.result() == "done"
        assert process.wait(20) == 0
        told.hear_the_rest()
        assert told[-1] == "STATUS=closing the instances"
        assert (told.count("READY=1"), told.count("STOPPING=1")) == (1, 1)


def test_nobody_is_told_where_nobody_listens(tmp_path: Path) -> None:
    """It serves all the same, and says so once."""
    gone = {"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "100000"}
    with serving(tmp_path, "--bind", "127.0.0.1:0", **gone) as process:
        (address,) = addresses(process, 1)
        assert own(address, "chaos")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert (tmp_path / "log").read_text().count("cannot be told") == 1


@pytest.mark.parametrize(
    ("environment", "watchdog", "log"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 3.0, ""),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None, ""),
        ({"WATCHDOG_USEC": "0"}, None, ""),
        ({"WATCHDOG_USEC": "-1"}, None, ""),
        ({"WATCHDOG_USEC": "1"}, 0.1, ""),
        ({"WATCHDOG_USEC": "9" * 400}, None, ""),
        ({"WATCHDOG_USEC": "9" * 5000}, None, ""),
        ({"NOTIFY_SOCKET": "vsock:2:1"}, None, "neither a path nor an abstract name"),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "1"}, None, "start it with exec"),
        ({"LISTEN_FDS": "1"}, None, "start it with exec"),
    ],
)
def test_what_is_not_for_this_process(
    environment: dict[str, str], watchdog: float | None, log: str, caplog: pytest.LogCaptureFixture
) -> None:
    environment |= {"HOME": "/"}
    told = ServiceManager(environment)
    assert (told.watchdog, told.sockets, environment) == (watchdog, [], {"HOME": "/"})
    told.tell("READY=1")
    assert log in caplog.text
    assert bool(caplog.text) == bool(log)


@pytest.mark.parametrize("count", ["-1", "x", "9" * 5000], ids=lambda count: count[:4])
def test_a_count_of_sockets_that_is_none(count: str) -> None:
    with pytest.raises(AipodError, match=r"^LISTEN_FDS=.{1,40} is no number$"):
        ServiceManager({"LISTEN_FDS": count, "LISTEN_PID": str(os.getpid())})


# ---- sockets that are handed down


def test_it_listens_on_what_systemd_hands_down(tmp_path: Path) -> None:
    """By the real tool. Its workers have neither the sockets nor the word of them; the socket's file is not ours."""
    activate = require("systemd-socket-activate")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    before = (activate, "-l", f"127.0.0.1:{port}", "-l", f"{tmp_path}/s", "--fdname=a:b")
    with serving(tmp_path, "--bind", "127.0.0.1:1", before=before) as process:
        wait_until((tmp_path / "s").exists)
        with socket.create_connection(("127.0.0.1", port)):  # with which it starts the server
            told = addresses(process, 2)
            assert told == [f"127.0.0.1:{port}", f"unix:{tmp_path}/s"]
        for address in told:
            worker = own(address, "chaos")
        inodes = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines() if f":{port:04X} " in line}
        assert inodes
        for number in (3, 4):
            flags = re.search(r"flags:\s+(\d+)", Path(f"/proc/{process.pid}/fdinfo/{number}").read_text())
            assert flags is not None
            assert int(flags[1], 8) & os.O_CLOEXEC, "what is started by other means than ours would have it"
        below = children(process.pid)
        assert worker in below
        for pid in below:
            held = {
                os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.exists() or path.is_symlink()
            }
            assert not held & {f"socket:[{inode}]" for inode in inodes}
            assert "LISTEN_" not in Path(f"/proc/{pid}/environ").read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert (tmp_path / "s").is_socket()
    assert "handed down (LISTEN_FDS), not on 127.0.0.1:1" in (tmp_path / "log").read_text()


def listening(address: str) -> socket.socket:
    return socket.create_server((address, 0))


def connected() -> socket.socket:
    one, other = socket.socketpair()
    other.close()
    return one


@pytest.mark.parametrize(
    ("make", "text", "status"),
    [
        (lambda: listening("0.0.0.0"), "anybody who can reach it", 2),
        (lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "no stream socket", 2),
        (socket.socket, "it does not listen", 2),
        (connected, "it does not listen", 2),
        (lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW), "no stream socket", 2),
        (Path(os.devnull).open, "is no socket", 1),
    ],
    ids=["for anybody", "datagrams", "not bound", "connected", "netlink", "a file"],
)
def test_sockets_that_nobody_could_listen_on_are_refused(tmp_path: Path, make: Any, text: str, status: int) -> None:
    with make() as given:
        script = f'exec 3<&{given.fileno()}; LISTEN_FDS=1 LISTEN_FDNAMES=web LISTEN_PID=$$ exec "$@"'
        command = ["bash", "-c", script, "bash", sys.executable, "-m", "aipod", "serve", WORK, "--spool", "tmp"]
        done = subprocess.run(command, pass_fds=[given.fileno()], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout) == (status, "")
    assert text in done.stderr.splitlines()[-1]
    assert "web" in done.stderr
