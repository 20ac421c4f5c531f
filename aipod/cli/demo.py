"""`aipod demo`: the main job, from start to end, on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from aipod.cli import end_on_signals, run_async
from aipod.cli.progress import Progress
from aipod.client import Client, Event
from aipod.errors import AipodError
from aipod.trash import remove

PREFIX = "aipod-demo-"
_PR_SET_PDEATHSIG = 1  # prctl(2)

LABELS = ("asyncio", "email", "json", "unittest", "xml", "http", "importlib", "multiprocessing", "logging", "sqlite3")


@click.command()
@click.option(
    "--size",
    type=click.IntRange(min=1),
    default=256,
    envvar="AIPOD_SIZE",
    show_default=True,
    help="Megabytes to send there and back.",
)
def demo(size: int) -> None:
    """Start a server, train a model, predict with it, send a large file there and back, and clean up."""
    end_on_signals()
    with _directory() as (directory, lock), _server(directory, lock) as (address, process):
        run_async(_run(directory, address, process.pid, size))
    click.echo("the server has ended; no file is left")


@contextlib.contextmanager
def _directory() -> Iterator[tuple[Path, int]]:
    """A directory of this demo's own, and the descriptor that locks it; those of demos that were killed are removed.

    Whoever removes one has its lock. So has whoever uses one, from the moment on in which it was seen that nobody has
    removed it meanwhile.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if (lock := _locked(old)) is not None:
            remove(old)
            os.close(lock)
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        if (lock := _locked(path)) is not None:
            break
    try:
        yield path, lock
    finally:
        remove(path)
        os.close(lock)


def _locked(path: Path) -> int | None:
    """A descriptor with the lock of a directory of this user's; None where there is none, or somebody has it."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_uid == os.getuid() and os.path.samestat(path.lstat(), os.fstat(lock)):
            return lock
    os.close(lock)
    return None


@contextlib.contextmanager
def _server(directory: Path, lock: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The server; where the demo is killed, it is too, or else keeps the directory's lock."""
    demo = os.getpid()

    def die_with_demo() -> None:
        with contextlib.suppress(AttributeError):  # elsewhere than on Linux it outlives a demo that is killed
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != demo:
                os._exit(1)

    command = [sys.executable, "-m", "aipod", "serve", "aipod.examples.corpus:Corpus", "--bind", "127.0.0.1:0"]
    command += ["--spool", str(directory / "spool"), "--data", str(directory / "data"), "--log-format", "text"]
    click.echo("$ python -m " + " ".join(command[2:7]) + " ...")
    log = directory / "server.log"
    with log.open("w") as stderr:
        # This thread, whose end the kernel looks at, is the main one: it ends with the process.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            pass_fds=(lock,),
            preexec_fn=die_with_demo,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("aipod listening on "):
            raise AipodError("DEMO_FAILED", f"the server did not start: {log.read_text()[-2000:]}")
        click.echo(line.rstrip())
        yield line.split()[-1], process
    finally:
        process.terminate()
        process.communicate()
    if process.returncode != 0:
        raise AipodError("DEMO_FAILED", f"the server ended with status {process.returncode}: {log.read_text()[-2000:]}")


async def _run(directory: Path, address: str, server: int, megabytes: int) -> None:
    sources = await asyncio.to_thread(_pack_sources, directory)
    sample = Path(sysconfig.get_path("stdlib")) / "json" / "decoder.py"
    large = await asyncio.to_thread(_make_large, directory, megabytes * 1_000_000)
    beats = _Beats()
    async with Client(address) as client:
        with Progress(sys.stderr) as progress:
            beats.then = progress.show
            answer = await client.train(sources, version="1", on_event=beats.count)
            _tell(progress, f"train   {sources.stat().st_size / 1e6:.1f} MB of the library's sources: {answer}")
            answer = await client.predict(sample, version="1", top=3, on_event=beats.count)
            _tell(progress, f"predict json/decoder.py: {', '.join(str(guess['label']) for guess in answer)}")
            if answer[0]["label"] != "json":
                raise AipodError("DEMO_FAILED", f"the trained model does not know its own data: {answer}")
            log = await client.log(version="1", on_event=beats.count)
            _tell(progress, f"log     {log.decode().splitlines()[-1]}")
            back = directory / "back"
            began = time.monotonic()
            await client.chaos(
                large, version="1", metadata=[("x-func-name", "echo")], save_to=back, on_event=beats.count
            )
            took = time.monotonic() - began
    same = await asyncio.to_thread(_same, large, back)
    size = large.stat().st_size / 1e6
    up, down = beats.answered - began, began + took - beats.answered
    click.echo(
        f"echo    {size:.0f} MB up in {up:.1f} s ({size / up:.0f} MB/s), down in {down:.1f} s ({size / down:.0f} MB/s)"
    )
    if not same:
        raise AipodError("DEMO_FAILED", "what came back is not what was sent")
    click.echo("        identical, bit for bit")
    click.echo(f"heartbeats seen: {beats.seen}")
    click.echo(f"peak memory: server {_peak(server)}, client {_peak(os.getpid())}")


def _tell(progress: Progress, text: str) -> None:
    """A line on stdout, which may be the terminal that has the live line."""
    progress.pause()
    click.echo(text)
    progress.resume(new_line=False)


class _Beats:
    """Counts heartbeats, and notes when the last call's answer began."""

    def __init__(self) -> None:
        self.seen = 0
        self.answered = 0.0
        self.then: Any = None
        self._last = 0

    def count(self, event: Event) -> None:
        self.seen += max(0, event.heartbeats - self._last)
        self._last = event.heartbeats
        if event.phase == "DONE" and event.received == 0:
            self.answered = time.monotonic()
        self.then(event)


def _pack_sources(directory: Path) -> Path:
    library = Path(sysconfig.get_path("stdlib"))
    target = directory / "sources.tar"
    with tarfile.open(target, "w") as tar:
        for label in LABELS:
            for path in sorted((library / label).rglob("*.py")):
                tar.add(path, arcname=str(path.relative_to(library)), recursive=False)
    return target


def _make_large(directory: Path, size: int) -> Path:
    """A file of real bytes: the interpreter's own files, one after the other, as often as it takes."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(library.rglob("*")) if path.is_file() and not path.is_symlink()]
    target = directory / "large"
    written = 0
    with target.open("wb") as out:
        while written < size:
            for path in files:
                with contextlib.suppress(OSError), path.open("rb") as file:
                    while written < size and (piece := file.read(min(1 << 20, size - written))):
                        written += out.write(piece)
    return target


def _same(one: Path, other: Path) -> bool:
    with one.open("rb") as a, other.open("rb") as b:
        while True:
            left, right = a.read(1 << 20), b.read(1 << 20)
            if left != right:
                return False
            if not left:
                return True


def _peak(pid: int) -> str:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        kib = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        if pid != os.getpid():
            return "unknown on this system"
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{kib / 1024:.0f} MB"
