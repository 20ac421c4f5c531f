"""The example of a web application, as a process: uvicorn, uvloop, TCP; its server in another one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from aipod.examples import web
from aipod.spool import Journal
from tests.conftest import FIRST, ROOT, Serve, alive, children, free_port, peak_memory, run, wait_until

BINARY = {"content-type": "application/octet-stream"}
MIB = 1024 * 1024


class App:
    """`uvicorn aipod.examples.web:app`."""

    def __init__(self, directory: Path, address: str = "") -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / "app.log"
        self.state = directory / "state"
        environment = {**os.environ, "XDG_STATE_HOME": str(self.state), "AIPOD_TO": address}
        command = [sys.executable, "-m", "uvicorn", "aipod.examples.web:app", "--port", str(self.port)]
        command += ["--timeout-graceful-shutdown", "1"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        wait_until(lambda: "Uvicorn running" in self.text, seconds=60)

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def server(self) -> int:
        """The pid of its server, whose workers are its children."""
        return next(pid for pid in children(self.process.pid) if b"aipod.cli.child" in cmdline(pid))

    def stop(self) -> None:
        below = children(self.process.pid)
        self.process.terminate()
        self.process.wait(30)
        wait_until(lambda: not any(map(alive, below)))


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., App]]:
    apps: list[App] = []

    def start(address: str = "") -> App:
        apps.append(App(tmp_path, address))
        return apps[-1]

    yield start
    for app in apps:
        app.stop()


async def events(client: httpx.AsyncClient, job: str) -> list[tuple[str, dict[str, Any]]]:
    """All that a job's stream of events tells, as a browser would take it apart."""
    told = []
    async with client.stream("GET", job) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        name = ""
        async for line in response.aiter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                told.append((name, json.loads(value)))
    return told


def test_an_upload_becomes_an_answer_and_the_application_ends_with_its_server(start: Callable[..., App]) -> None:
    app = start()
    data = os.urandom(3 * MIB)
    tickets = []

    async def main() -> None:
        async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:
            page = await client.get("/")
            assert "EventSource" in page.text
            response = await client.post("/jobs", content=data, headers=BINARY)
            assert response.status_code == 201, response.text
            (cookie,) = response.headers.get_list("set-cookie")
            ticket = re.match(r"ticket=([0-9a-f]{32,});", cookie)
            assert ticket, "the ticket is in a cookie"
            tickets.append(ticket[1])
            job = response.json()["job"]
            for word in ("HttpOnly", "SameSite=strict", f"Path={job}"):
                assert word in cookie
            answer = ("answer", {"answer": hashlib.sha256(data).hexdigest()})
            for _ in range(2):  # a page that is loaded again asks again
                told = await events(client, job)
                assert told[-1] == answer
                assert {name for name, _ in told[:-1]} == {"progress"}
                assert told[-2][1]["phase"] == "DONE"
        async with httpx.AsyncClient(base_url=app.url) as stranger:
            for cookies in ({}, {"ticket": "0" * 32}, {"ticket": "../../etc"}):
                stranger.cookies.update(cookies)
                assert (await stranger.get(job)).status_code == 404, "who has no ticket has no job"
                assert (await stranger.delete(job)).status_code == 404

    run(main)
    for text in (app.text, *(path.read_text() for path in app.state.rglob("*.log"))):
        assert tickets[0] not in text, "nor is it in any log"

    # What watches the application starts it anew. Mutant seen: uvicorn goes on without a server.
    os.kill(app.server, signal.SIGKILL)
    assert app.process.wait(30) in (0, -signal.SIGTERM)
    assert "ServeError" in app.text


@pytest.mark.skipif(not FIRST, reason="costs much, and is the same on every Python")
def test_a_limit_holds_where_nothing_was_announced(monkeypatch: pytest.MonkeyPatch, serve: Serve) -> None:
    """Of what comes in pieces, the size is known when it is too late to refuse it first. Mutant seen: not counted."""
    served = serve("aipod.examples.basics:Echo")
    monkeypatch.setenv("AIPOD_TO", served.address)
    monkeypatch.setattr(web, "LIMIT", 1 * MIB)

    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield bytes(64 * 1024)

    async def main() -> None:
        async with web.lifespan(web.app):
            transport = httpx.ASGITransport(web.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                assert (await client.post("/jobs", content=pieces(16), headers=BINARY)).status_code == 201
                assert (await client.post("/jobs", content=pieces(17), headers=BINARY)).status_code == 413

    run(main)


@pytest.mark.skipif(not FIRST, reason="costs much, and is the same on every Python")
def test_an_answer_of_bytes_is_fetched_by_itself(start: Callable[..., App], serve: Serve) -> None:
    """Mutant seen: it is put into an event, which ends the stream of events in the middle."""
    app = start(serve("tests.models_faces:Copy").address)
    data = os.urandom(3 * MIB)

    async def main() -> None:
        async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:
            job = (await client.post("/jobs", content=data, headers=BINARY)).json()["job"]
            for _ in range(2):
                name, told = (await events(client, job))[-1]
                assert (name, told) == ("answer", {"at": f"{job}/answer"})
                response = await client.get(told["at"])
                assert response.content == data
                assert response.headers["content-disposition"] == "attachment"
        async with httpx.AsyncClient(base_url=app.url) as stranger:
            assert (await stranger.get(f"{job}/answer")).status_code == 404

    run(main)
    assert "Traceback" not in app.text


def refuses_what_is_no_upload(app: App) -> None:
    def status(head: str) -> int:
        with socket.create_connection(("127.0.0.1", app.port), 20) as sock:
            sock.sendall(f"POST /jobs HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
            return int(sock.recv(4096).split()[1])

    binary = "content-type: application/octet-stream"
    assert status(f"{binary}\r\ncontent-length: {web.LIMIT + 1}") == 413, "before a byte of it"
    assert status("content-type: text/plain\r\ncontent-length: 1") == 415, "what another site's form may send"
    assert httpx.post(f"{app.url}/jobs", content=b"", headers=BINARY).status_code == 201, "nothing is a payload too"
    for path in ("/jobs/..%2f..%2fetc%2fpasswd", "/jobs/" + "0" * 32):
        assert httpx.get(app.url + path, cookies={"ticket": "0" * 32}).status_code == 404


@pytest.mark.skipif(not FIRST, reason="costs much, and is the same on every Python")
def test_twenty_uploads_half_of_which_are_cut(start: Callable[..., App], serve: Serve) -> None:
    """Those that are whole get their answers, those whose browser left are given up, and nothing of them is kept.

    Mutant seen: the application goes on with what has arrived.
    """
    served = serve("aipod.examples.basics:Echo")
    app = start(served.address)
    files = [os.urandom(2 * MIB + number) for number in range(20)]

    async def whole(client: httpx.AsyncClient, data: bytes) -> bool:
        response = await client.post("/jobs", content=data, headers=BINARY)
        told = await events(client, response.json()["job"])
        return told[-1] == ("answer", {"answer": hashlib.sha256(data).hexdigest()})

    async def cut(data: bytes) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", app.port)
        head = f"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        writer.write(f"{head}Content-Type: application/octet-stream\r\n\r\n".encode() + data[:MIB])
        await writer.drain()
        while len(phases()) < 20:  # all jobs are at the server, the others perhaps over
            await asyncio.sleep(0.05)
        writer.transport.abort()

    def phases() -> list[str]:
        entries = [path for path in served.spool.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name)]
        return sorted(Journal(path / "state").read().get("phase", "RECEIVING") for path in entries)

    async def main() -> None:
        async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:
            done = await asyncio.gather(
                *(whole(client, data) for data in files[:10]), *(cut(data) for data in files[10:])
            )
            assert done == [True] * 10 + [None] * 10
            while phases() != ["CANCELLED"] * 10 + ["DONE"] * 10:
                await asyncio.sleep(0.05)

    run(main)
    refuses_what_is_no_upload(app)
    assert "Traceback" not in app.text
    wait_until(lambda: not temporary_files(app.process.pid), seconds=20)
    assert peak_memory(app.process.pid) < 300


def temporary_files(pid: int) -> list[str]:
    """Removed files that a process has open."""
    held = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            held.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return [path for path in held if "deleted" in path]


@pytest.mark.skipif(not FIRST, reason="costs much, and is the same on every Python")
def test_two_workers_have_two_servers(tmp_path: Path) -> None:
    """And a worker that leaves takes its own along."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "aipod.examples.web:app", "--port", str(port), "--workers", "2"]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    with (tmp_path / "log").open("w") as log:
        parent = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: (tmp_path / "log").read_text().count("startup complete") == 2, seconds=60)
        below = children(parent.pid)
        assert len([pid for pid in below if b"aipod.cli.child" in cmdline(pid)]) == 2
    finally:
        parent.terminate()
        parent.wait(30)
    wait_until(lambda: not any(map(alive, below)))
    assert "Traceback" not in (tmp_path / "log").read_text()
