"""`aipod.testing` and its pytest plugin, used as a user's own tests use them: by pytest, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import FIRST, ROOT

MODEL = '''
import asyncio
import aipod

class Scan(aipod.Model):
    """Defined in the test file."""

    made = []

    def load(self):
        self.made.append(self)

    def predict(self, context, path, *, top=5):
        return path.read_text().split()[:top]

    def fail(self, context, path):
        raise ValueError("no good")

async def ask(address, payload=b"a word", **more):
    async with aipod.Client(address) as client:
        return await client.predict(payload, **more)
'''

SYNC = """
import threading, pytest
from model import Scan, ask
import asyncio, aipod, aipod.testing

def test_sync(aipod_server):
    server = aipod_server(Scan)
    assert server.address.startswith("unix:")
    assert asyncio.run(ask(server.address, top=1)) == ["a"]
    assert len(Scan.made) == 1, "it runs here"

def test_two_at_once(aipod_server):
    class Local(aipod.Model):
        async def predict(self, context, path):
            return path.read_text().upper()

    one, two = aipod_server(Scan), aipod_server(Local)
    assert asyncio.run(ask(two.address)) == "A WORD"
    assert asyncio.run(ask(one.address)) == ["a", "word"]

def test_in_processes(aipod_server):
    assert asyncio.run(ask(aipod_server("model:Scan").address)) == ["a", "word"]
    assert len(Scan.made) == 2, "not here"

def test_what_cannot_be_served():
    class Empty(aipod.Model):
        pass

    with pytest.raises(aipod.JobFailed, match="no public method"), aipod.testing.serve(Empty):
        pass

@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.mark.anyio
@pytest.mark.parametrize("again", [False, True])
async def test_a_loop_is_asyncios(aipod_server, again):
    server = aipod_server(Scan)
    assert type(asyncio.get_running_loop()).__module__ == "asyncio.unix_events"
    assert await ask(server.address) == ["a", "word"]

def test_nothing_is_left(aipod_server):
    assert [thread.name for thread in threading.enumerate() if thread.name == "aipod-test-server"] == []
"""

TRIO = """
import asyncio, trio
from model import Scan, ask

async def test_trio(aipod_server):
    server = aipod_server(Scan)
    with trio.fail_after(20):
        assert await trio.to_thread.run_sync(asyncio.run, ask(server.address)) == ["a", "word"]
"""

FAILS = """
import asyncio, threading, time
import aipod, aipod.testing
from model import Scan

def test_fails(aipod_server):
    async def call():
        async with aipod.Client(aipod_server(Scan).address) as client:
            await client.chaos(metadata=[("x-func-name", "fail")])

    asyncio.run(call())

begun = threading.Event()

class Hangs(aipod.Model):
    def predict(self, context, path):
        begun.set()
        time.sleep(1000)

def test_hangs(monkeypatch, aipod_server):
    monkeypatch.setattr(aipod.testing, "LEFT", 0.5)

    async def call():
        async with aipod.Client(aipod_server(Hangs).address) as client:
            await client.submit("predict", b"")
            assert await asyncio.to_thread(begun.wait, 20)

    asyncio.run(call())
"""


def pytest_in(directory: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    (directory / "model.py").write_text(MODEL)
    (directory / "test_mine.py").write_text(text)
    (directory / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:asyncio"]
    command += options
    with tempfile.TemporaryDirectory(prefix="t") as temporary:  # a short one: it has sockets in it
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{directory}", "TMPDIR": temporary}
        done = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert [name for name in os.listdir(temporary) if name.startswith("aipod")] == []
    return done


@pytest.mark.parametrize(
    ("text", "options", "passed"),
    [
        (SYNC, ("-p", "no:trio"), 7),
        (TRIO, ("-p", "no:anyio", "-o", "trio_mode=true"), 1),
    ],
    ids=["asyncio", "trio"],
)
def test_tests_of_any_flavor(tmp_path: Path, text: str, options: tuple[str, ...], passed: int) -> None:
    """Where each warning is an error. Mutant seen: without `_FakedPolicy.policy`, none of asyncio's passes."""
    done = pytest_in(tmp_path, text, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{passed} passed" in done.stdout


@pytest.mark.skipif(not FIRST, reason="costs much, and is the same on every Python")
def test_tests_that_fail(tmp_path: Path) -> None:
    """A model's traceback is in the report; and a method that does not end fails its test."""
    done = pytest_in(tmp_path, FAILS, "-p", "no:logging")
    assert done.returncode == 1
    _, heading, trace = done.stdout.partition("- In the model -")
    assert heading
    assert 'raise ValueError("no good")' in trace
    assert "ModelError: ValueError: no good" in done.stdout
    assert "a method still runs 0.5 s after its test" in done.stdout
    assert "1 failed, 1 passed, 1 error" in done.stdout


def test_pytest_is_for_tests_alone() -> None:
    """The package never imports it, and the plugin nothing heavy before it is used."""
    code = "import aipod, aipod.testing, sys; aipod.Client; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import aipod.testing.plugin, sys; print(*{'trio', 'trio_asyncio', 'grpclib', 'h2'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"
