"""`aipod.serving`: a server that belongs to an asyncio application, or to a thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aipod
from aipod import Config
from aipod.spool import SpoolError
from aipod.transport.listeners import BindError
from aipod.transport.tls import TLSError
from tests.conftest import FIRST, ROOT, alive, children, left_in, run, wait_until

MODELS = "tests.models_embedded"


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(children(os.getpid()))
    yield
    left = wait_until(lambda: [pid for pid in children(os.getpid()) if pid not in before] or "none")
    assert left == "none"


def config(tmp_path: Path, name: str = "Upper", **settings: Any) -> Config:
    usual = {"model": f"{MODELS}:{name}", "bind": ("127.0.0.1:0",), "reserve": 0}
    return Config(**{**usual, "spool": str(tmp_path / "spool"), "data": str(tmp_path / "data"), **settings})


async def exists(path: Path) -> None:
    async with asyncio.timeout(20):
        while not path.exists() or not path.read_text():
            await asyncio.sleep(0.01)


def test_a_server_lives_as_long_as_its_scope(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        counting = asyncio.create_task(count())
        async with aipod.serving(config(tmp_path)) as server:
            assert turns > 100, "the loop goes on while the server starts"
            assert server.running
            async with aipod.Client(server.addresses[0]) as client:
                assert await client.predict(b"abc") == "ABC"
            turns = 0
        assert turns > 10, "and while it drains"
        assert not server.running
        assert not alive(server.pid)
        counting.cancel()

    run(main)
    assert left_in(tmp_path / "spool") == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not FIRST, reason="costs much, and is the same on every Python")
def test_a_thread_may_have_one_and_learns_of_its_end_when_it_leaves(tmp_path: Path) -> None:
    def serve() -> None:
        with aipod.serving(config(tmp_path, bind=(f"unix:{tmp_path}/socket",))) as server:
            assert server.addresses == [f"unix:{tmp_path}/socket"]

            async def call() -> Any:
                async with aipod.Client(server.addresses[0]) as client:
                    return await client.predict(b"abc")

            assert run(call) == "ABC"
            os.kill(server.pid, signal.SIGKILL)
            wait_until(lambda: not server.running)

    with pytest.raises(aipod.ServeError, match="signal 9"):
        serve()


@pytest.mark.skipif(not FIRST, reason="is the same on every Python")
def test_a_second_entry_is_refused(tmp_path: Path) -> None:
    """Mutant seen: it gives the addresses of the server that has ended."""
    served = aipod.serving(config(tmp_path, spool="/dev/null/spool"))
    with pytest.raises(SpoolError), served:
        pass
    for _ in range(2):
        with pytest.raises(aipod.UsageError, match="entered before"), served:
            pass


@pytest.mark.skipif(not FIRST, reason="costs much, and is the same on every Python")
@pytest.mark.parametrize(
    ("settings", "kind", "reason"),
    [
        ({"spool": "/dev/null/spool"}, SpoolError, "SPOOL_UNUSABLE"),
        ({"tls_cert": "/no/certificate"}, TLSError, "USAGE"),
        ({"model": f"{MODELS}:Reverse", "runner": "thread"}, aipod.ServeError, "BAD_RUNNER"),
    ],
)
def test_what_keeps_it_from_starting_is_raised(
    tmp_path: Path, settings: dict[str, Any], kind: type[aipod.AipodError], reason: str
) -> None:
    """The same classes, reasons and texts as in a trio application. Mutant seen: all are ServeErrors."""

    async def main() -> None:
        async with aipod.serving(config(tmp_path, **settings)):
            pytest.fail("it has started")

    with pytest.raises(kind) as caught:
        run(main)
    assert (type(caught.value), caught.value.reason) == (kind, reason)
    assert str(caught.value)


def test_its_log_is_the_applications(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "aipod.server")
    caplog.set_level(logging.INFO)
    jobs = []

    async def main() -> int:
        async with (
            aipod.serving(config(tmp_path, "Reverse")) as server,
            aipod.Client(server.addresses[0]) as client,
        ):
            with pytest.raises(aipod.ModelError):
                await client.chaos(metadata=[("x-func-name", "fail")])
            assert await client.predict(b"abc", on_event=lambda event: jobs.append(event.job_id)) == "cba"
            return server.pid

    pid = run(main)
    told = {record.getMessage(): record for record in caplog.records}
    printed = told[f"job {jobs[-1]}: printed by Reverse"]
    assert (printed.name, printed.levelno, printed.process) == ("aipod.model", logging.INFO, pid)
    assert vars(printed)["job"] == jobs[-1]
    logged = told["logged by Reverse"]
    assert (logged.name, logged.levelno, vars(logged)["job"]) == ("embedded.model", logging.WARNING, jobs[-1])
    assert [record.name for record in caplog.records if record.name == "aipod.server"] == [], "that is below its level"
    assert told["the server says: native"].name == "aipod.serving", "what comes from C code, to whichever descriptor"
    (failed,) = [record for record in caplog.records if record.exc_text]
    assert failed.name == "aipod.job"
    assert "ValueError: no good" in logging.Formatter().format(failed), "a traceback comes with its line"


@pytest.mark.skipif(not FIRST, reason="costs much, and is the same on every Python")
def test_a_handler_that_waits_holds_nothing_up(tmp_path: Path) -> None:
    """Mutant seen: the lines are logged on the loop."""
    come, go = threading.Event(), threading.Event()

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            come.set()
            go.wait(20)

    slow, logger = Slow(), logging.getLogger("aipod.job")
    logger.addHandler(slow)
    logger.setLevel(logging.INFO)

    async def main() -> None:
        async with aipod.serving(config(tmp_path)) as server, aipod.Client(server.addresses[0]) as client:
            assert await client.predict(b"abc") == "ABC"
            await asyncio.to_thread(come.wait, 20)
            assert come.is_set()
            assert await client.predict(b"def") == "DEF"
            assert not go.is_set()
            go.set()

    try:
        run(main)
    finally:
        logger.removeHandler(slow)
        logger.setLevel(logging.NOTSET)


def test_an_application_learns_that_its_server_has_ended(tmp_path: Path) -> None:
    async def main() -> None:
        left = []

        async def serve() -> None:
            async with aipod.serving(config(tmp_path)) as server:
                os.kill(server.pid, signal.SIGKILL)
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    left.append("cancelled")
                    raise

        with pytest.raises(aipod.ServeError, match="signal 9") as caught:
            await serve()
        assert (caught.value.reason, left) == ("SERVER_ENDED", ["cancelled"])
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(0)

    run(main)


@pytest.mark.skipif(not FIRST, reason="costs much, and is the same on every Python")
def test_who_cancels_the_application_is_heard_though_its_server_has_ended(tmp_path: Path) -> None:
    """Mutant seen: ServeError takes the place of any CancelledError."""

    async def main() -> None:
        served = asyncio.Event()

        async def body() -> None:
            async with aipod.serving(config(tmp_path)) as server:
                served.set()
                try:
                    await asyncio.sleep(60)
                finally:
                    os.kill(server.pid, signal.SIGKILL)
                    await asyncio.to_thread(wait_until, lambda: not server.running)

        task = asyncio.create_task(body())
        await served.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)


@pytest.mark.skipif(not FIRST, reason="costs much, and is the same on every Python")
def test_what_the_body_raises_is_raised(tmp_path: Path) -> None:
    async def main() -> int:
        with pytest.raises(KeyError):
            await serve()
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    async def serve() -> None:
        async with aipod.serving(config(tmp_path)) as server:
            os.kill(server.pid, signal.SIGKILL)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                raise KeyError("mine") from None

    assert run(main) == 0


@pytest.mark.skipif(not FIRST, reason="costs much, and is the same on every Python")
def test_leaving_waits_for_jobs_that_run(tmp_path: Path) -> None:
    async def main() -> None:
        begun, until = tmp_path / "begun", tmp_path / "until"
        async with contextlib.AsyncExitStack() as stack:
            async with aipod.serving(config(tmp_path, drain=60)) as server:
                client = await stack.enter_async_context(aipod.Client(server.addresses[0]))
                metadata = [("x-func-name", "wait")]
                calling = asyncio.create_task(client.chaos(metadata=metadata, begun=str(begun), until=str(until)))
                await exists(begun)

                def soon() -> None:
                    assert not calling.done()
                    until.touch()

                asyncio.get_running_loop().call_later(0.3, soon)
            assert await calling == "waited"

    run(main)


@pytest.mark.parametrize("at", ["start", "drain"])
def test_cancelled_it_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    """And in order, without being killed. Mutant seen: it goes on with its drain."""
    begun = tmp_path / "begun"
    if at == "start":
        monkeypatch.setenv("AIPOD_TEST_SLOW_IMPORT", str(begun))

    async def main() -> None:
        async def body() -> None:
            async with contextlib.AsyncExitStack() as stack:
                async with aipod.serving(config(tmp_path, drain=3600, cancel_grace=0.1)) as server:
                    client = await stack.enter_async_context(aipod.Client(server.addresses[0]))
                    calling = asyncio.create_task(client.chaos(metadata=[("x-func-name", "hang")], begun=str(begun)))
                    stack.callback(calling.cancel)
                    await exists(begun)
                    leaving.set()

        leaving = asyncio.Event()
        task = asyncio.create_task(body())
        if at == "start":
            await exists(begun)
        else:
            await leaving.wait()
            await asyncio.sleep(0.3)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not alive(int(begun.read_text().split()[0])), "neither is the worker left"

    run(main)
    assert "killing it" not in caplog.text


def test_signals_are_the_applications(tmp_path: Path) -> None:
    """A service manager sends them to all processes of a service. Mutants seen: it drains; its workers ignore them."""

    async def main() -> None:
        async with aipod.serving(config(tmp_path)) as server:
            assert os.getsid(server.pid) != os.getsid(0), "nor does it get Ctrl-C from a terminal"
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(server.pid, number)
            async with aipod.Client(server.addresses[0]) as client:
                assert await client.predict(b"abc") == "ABC"
            (worker,) = children(server.pid)
            ignored = Path(f"/proc/{worker}/status").read_text().partition("SigIgn:")[2].split()[0]
            assert not int(ignored, 16) & 1 << (signal.SIGTERM - 1)

    run(main)


APP = """
import asyncio, os, sys, time, aipod
from tests.test_embedded import config
from pathlib import Path

async def main():
    where, name, method, forks = Path(sys.argv[1]), *sys.argv[2:]
    async with aipod.serving(config(where, name, drain=3600)) as server, aipod.Client(server.addresses[0]) as client:
        if forks and os.fork() == 0:
            time.sleep(60)
        await client.chaos(metadata=[("x-func-name", method)], begun=str(where / "begun"))

asyncio.run(main())
"""


@pytest.mark.parametrize(("name", "method", "forks"), [("Upper", "hang", "fork"), ("Reverse", "block", "")])
def test_it_dies_with_its_application(tmp_path: Path, name: str, method: str, forks: str) -> None:
    """Whatever the model does, and though a fork has the application's descriptors. Mutants seen: without the thread;
    without the pidfd."""
    command = [sys.executable, "-c", APP, str(tmp_path), name, method, forks]
    app = subprocess.Popen(command, cwd=ROOT)
    wait_until(lambda: (tmp_path / "begun").exists() and (tmp_path / "begun").read_text())
    below = children(app.pid)
    forked = [pid for pid in below if Path(f"/proc/{pid}/cmdline").read_bytes().find(b"-c") > 0]
    assert len(forked) == bool(forks)
    app.kill()
    app.wait()
    try:
        wait_until(lambda: not any(map(alive, set(below) - set(forked))))
    finally:
        for pid in forked:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not FIRST, reason="costs much, and is the same on every Python")
def test_another_server_on_its_address_is_no_mystery(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(BindError, match=address), aipod.serving(config(tmp_path, bind=(address,))):
            pass
