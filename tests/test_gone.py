"""Callers that are gone, in each way in which they can be: a plain client's job is cancelled then, not at a tick."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.calls import marked
from tests.conftest import ROOT, Serve, Served, alive, children, wait_until
from tests.test_hardening import DATA, END_HEADERS, HEADERS_FRAME, Bare, request
from tests.test_nginx import everywhere, proxy
from tests.test_transport import HEADERS, raw_frame

WORK = "tests.models_lifecycle:Work"
# Seconds. Nothing that comes with a tick finds out: all is over before the first one.
OPTIONS = ("--tick", "60", "--cancel-grace", "0.5")
SOON = 20

Leave = Callable[[], None]


@contextlib.contextmanager
def bare(served: Served, how: str, method: str, kwargs: dict[str, str]) -> Iterator[Leave]:
    """A call on a raw connection, which ends by a reset or by a FIN."""
    with Bare(served) as peer:
        headers = peer.encoder.encode([*HEADERS, ("x-func-name", method)])
        peer.send(raw_frame(HEADERS_FRAME, END_HEADERS, 1, headers))
        peer.send(raw_frame(DATA, 1, 1, request(json.dumps(kwargs).encode())))

        def leave() -> None:
            if how == "FIN":
                peer.socket.shutdown(socket.SHUT_WR)
            else:
                peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                peer.socket.close()

        yield leave


@contextlib.contextmanager
def killed(address: str, method: str, kwargs: dict[str, str]) -> Iterator[Leave]:
    """A stock client, which is killed."""
    command = [sys.executable, "-m", "tests.stranger", address, method, json.dumps(kwargs)]
    with subprocess.Popen(command, cwd=ROOT) as client:
        try:
            yield client.kill
        finally:
            client.kill()


@contextlib.contextmanager
def behind_nginx(directory: Path, served: Served, method: str, kwargs: dict[str, str]) -> Iterator[Leave]:
    with proxy(directory, everywhere(served.address)) as nginx, killed(nginx.address, method, kwargs) as leave:
        yield leave


@pytest.mark.parametrize("how", ["RST", "FIN", "kill -9", "kill -9 behind nginx"])
def test_its_job_is_cancelled_and_no_process_is_left(serve: Serve, tmp_path: Path, how: str) -> None:
    """One method obeys, another one has a child and does not."""
    served = serve(WORK, *OPTIONS)
    for method, kwargs in (("predict", {"until": str(tmp_path / "never")}), ("forks", {})):
        mark = tmp_path / method
        call = {"mark": str(mark), **kwargs}
        if how.startswith("kill -9"):
            caller = (
                killed(served.address, method, call)
                if how == "kill -9"
                else behind_nginx(tmp_path, served, method, call)
            )
        else:
            caller = bare(served, how, "predict" if method == "predict" else method, call)
        with caller as leave:
            pids = [int(pid) for pid in marked(mark, seconds=SOON).split()]
            assert all(map(alive, pids))
            leave()
            if method == "predict":
                wait_until(lambda mark=mark: mark.read_text() == "cancelled", seconds=SOON)
            else:
                wait_until(lambda pids=pids: not any(map(alive, pids)), seconds=SOON)
    wait_until(lambda: not list(served.spool.glob("*/state")), seconds=SOON)
    assert not set(pids) & set(children(served.process.pid))
