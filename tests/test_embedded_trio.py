"""`aipod.serve` in a trio application, which keeps its signals, limits, logging and loops."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

import aipod
from aipod.errors import bare
from tests.conftest import FIRST, ROOT, left_in


def test_two_servers_in_an_application_and_again(tmp_path: Path) -> None:
    """Mutants seen: stdout stays wrapped after two servers; the limit is raised; warnings without a handler are lost;
    with a handler of its own removed, the other server's model is not heard."""
    command = [sys.executable, "-m", "tests.app_trio", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["right"] == [True] * 4
    assert found["wrapped"] == [["_Stream", 1]] * 2, "for the model that runs inside, with one handler for both servers"
    assert found["restored"] == [True] * 2
    assert found["handlers"] == [0] * 2
    assert len(set(found["descriptors"])) == 1, "nothing is left open"
    assert (found["limits"], found["signals"], found["signal"]) == (True, True, 15)
    assert found["logged"] == [3 * 25] * 2, "in the jobs' logs, also when the other server has ended"
    lines = done.stderr.splitlines()
    assert lines[-1] == "heard, without any handler"
    assert lines.count("logged by Reverse") == 2 * 3 * 25
    assert [name for name in ("Upper", "Reverse") if left_in(tmp_path / name)] == []


class Broken(aipod.Model):
    def load(self) -> None:
        raise LookupError("no weights")

    async def predict(self, context: aipod.Context, path: Path) -> None: ...


@pytest.mark.parametrize(
    ("settings", "cls", "reason"),
    [
        ({"model": "tests.models_embedded:Nobody"}, None, "LOAD_FAILED"),
        ({"preload": ("one",)}, Broken, "LOAD_FAILED"),
        ({"spool": "/dev/null/spool"}, Broken, "SPOOL_UNUSABLE"),
        ({"runner": "process"}, Broken, "BAD_RUNNER"),
    ],
)
def test_what_keeps_it_from_starting_comes_in_no_group(
    tmp_path: Path, settings: dict[str, Any], cls: type | None, reason: str
) -> None:
    """Mutant seen: the nurseries' groups are left around it."""
    usual = {"bind": ("127.0.0.1:0",), "spool": str(tmp_path / "spool"), "data": str(tmp_path / "data")}
    with pytest.raises(aipod.AipodError) as caught:
        trio.run(functools.partial(aipod.serve, aipod.Config(**{**usual, **settings}), cls=cls))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "group",
    [
        BaseExceptionGroup("", [aipod.ServeError("A", "a"), ValueError("b")]),
        BaseExceptionGroup("", [aipod.ServeError("A", "a"), aipod.ServeError("B", "b")]),
        BaseExceptionGroup("", [ExceptionGroup("", [ValueError("a bug")])]),
        BaseExceptionGroup("", [KeyboardInterrupt()]),
    ],
)
def test_nothing_that_went_wrong_besides_is_left_out(group: BaseExceptionGroup) -> None:
    """Mutants seen: the first of them is raised; any kind of it is."""
    with pytest.raises(BaseExceptionGroup) as caught, bare():
        raise group
    assert caught.value is group


IMPORTED = """
import asyncio, threading, sys
{}
import aipod
aipod.serve
loops = []

async def main():
    loops.append(type(asyncio.get_running_loop()).__module__)

def make():
    loop = asyncio.new_event_loop()
    loops.append(type(loop).__module__)
    loop.close()

asyncio.run(main())
make()
for target in (lambda: asyncio.run(main()), make):
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
print(*sorted(set(loops)))
"""


@pytest.mark.parametrize(
    ("before", "loops"), [("", "asyncio.unix_events"), ("import trio_asyncio", "trio_asyncio._sync")]
)
def test_asyncio_keeps_its_loops(before: str, loops: str) -> None:
    """In a process that has imported the server, in any thread; not where the program wants trio_asyncio by itself."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORTED.format(before)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [loops]


@pytest.mark.skipif(not FIRST, reason="costs much, and is the same on every Python")
def test_headers_are_not_logged_unasked() -> None:
    """An application that logs everything at DEBUG would have its callers' tokens in its log."""
    code = """
import logging
logging.basicConfig(level=logging.DEBUG)
{}
import aipod
aipod.Client
print(*[logging.getLogger(f"hpack.{{name}}").isEnabledFor(logging.DEBUG) for name in ("hpack", "table")])
"""
    for before, enabled in (("", "False False"), ('logging.getLogger("hpack").setLevel(logging.DEBUG)', "True True")):
        command = [sys.executable, "-c", code.format(before)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.split() == enabled.split()
