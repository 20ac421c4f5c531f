"""A child of the starter is like a new process: the same program finds the same, and ends alike."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import pytest

from tests.conftest import alive, wait_until
from tests.starter import IMPORTS, ROOT, Started, Starter, starter


@pytest.fixture(scope="module", params=["server", "client"])
def buffering(request: pytest.FixtureRequest) -> Starter:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONUNBUFFERED", raising=False)
        return Starter(request.param)


@pytest.fixture
def ready(buffering: Starter, monkeypatch: pytest.MonkeyPatch) -> Starter:
    """A starter and an environment in which something is left to flush at the end."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    return buffering


def start(ready: Starter | None, how: str, directory: Path) -> Started | subprocess.Popen[str]:
    command = ["tests.probe", how]
    with (directory / "stderr").open("w") as stderr:
        if ready is not None:
            return ready.start(command, stderr)
        command = [sys.executable, "-m", *command]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT)


def told(process: Started | subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["return", "3", "some words", "raise"])
def test_it_finds_the_same_and_ends_alike(ready: Starter, tmp_path: Path, how: str) -> None:
    ends = []
    for which in (None, ready):
        process = start(which, how, tmp_path)
        found = told(process)["found"]
        assert process.stdout is not None
        assert process.stdout.read() == "not flushed\n"
        process.communicate(timeout=30)
        words = (tmp_path / "stderr").read_text().splitlines()
        ends.append({**found, "status": (process.returncode, process.poll()), "words": words[-1:]})
    assert ends[0] == ends[1]


def test_it_is_ended_by_signals(ready: Starter, tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGHUP):
        process = start(ready, "wait", tmp_path)
        told(process)
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(number)
        assert process.wait(30) == process.returncode == -number
        assert not alive(process.pid)
        process.send_signal(number)  # as with Popen, nothing happens
        assert process.communicate() == ("", None)
    process = start(ready, "wait", tmp_path)
    told(process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == -signal.SIGINT
    assert (tmp_path / "stderr").read_text().endswith("KeyboardInterrupt\n")
    process = start(ready, "wait", tmp_path)
    process.send_signal(signal.SIGINT)  # also before it runs
    assert process.wait(30) == -signal.SIGINT
    process.communicate()


def test_no_two_have_the_same_random_numbers(ready: Starter, tmp_path: Path) -> None:
    processes = [start(ready, "return", tmp_path) for _ in range(3)]
    numbers = [told(process)["numbers"] for process in processes]
    assert [process.communicate(timeout=30)[0] for process in processes] == ["not flushed\n"] * 3
    assert len({number for pair in numbers for number in pair}) == 6


def test_its_streams_are_those_that_it_was_given(ready: Starter, tmp_path: Path) -> None:
    """Pipes are read while they are written; what it leaves unread is dropped."""
    data = os.urandom(3_000_000)
    with ready.open(["tests.probe", "copy"], dict(os.environ), PIPE, PIPE, PIPE) as process:
        assert process.communicate(data, timeout=30) == (data, b"copied")
    assert process.returncode == 0
    with ready.open(["tests.probe", "copy"], dict(os.environ), PIPE, PIPE, PIPE) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)  # it reads, as nobody has closed its stdin
        assert process.stdin is not None
        process.stdin.close()
        assert process.communicate(timeout=30) == (b"", b"copied")
    with ready.open(["tests.probe", "3"], {**os.environ, "PROBE": "x"}, PIPE, PIPE, DEVNULL) as process:
        out, err = process.communicate(data, timeout=30)
    assert (err, process.returncode) == (None, 3)
    assert json.loads(out.splitlines()[0])["found"]["environment"]["PROBE"] == "x"
    with (tmp_path / "out").open("w+b") as file:
        with ready.open(["tests.probe", "copy"], dict(os.environ), DEVNULL, file, PIPE) as process:
            assert process.communicate(timeout=30) == (None, b"copied")
        assert file.read() == b""


def test_importing_a_client_does_nothing_to_asyncio() -> None:
    """What a child of the client's starter finds is what the real command finds."""
    code = (
        f"import sys, importlib; [importlib.import_module(name) for name in {IMPORTS['client']}]; print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "aipod.client.api" in loaded.split()
    assert not {"trio", "trio_asyncio", "aipod.server", "rich"} & set(loaded.split())


def test_the_starter_is_idle(ready: Starter, tmp_path: Path) -> None:
    """One thread, no event loop, nothing open but its own link, no model."""
    process = start(ready, "return", tmp_path)
    process.communicate(timeout=30)
    home = Path(f"/proc/{ready.process.pid}")
    assert len(list((home / "task").iterdir())) == 1
    wait_until(lambda: len(list((home / "fd").iterdir())) == 4)  # it closes what it had for a child after telling
    assert ready.process.poll() is None


def test_what_python_reads_when_it_starts_needs_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIPOD_TEST_FRESH", raising=False)
    assert starter("server") is not None
    assert starter("server", {**os.environ, "PYTHONPATH": os.fspath(ROOT)}) is None
    monkeypatch.setenv("PYTHONPATH", os.fspath(ROOT))
    assert starter("server") is None
    monkeypatch.undo()
    monkeypatch.setenv("AIPOD_TEST_FRESH", "1")
    assert starter("server") is None
