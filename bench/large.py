"""`python -m bench large [--size SIZE] [--to HOST:PORT]`: one large file up and back in one call, as a user does it.

Rates of both directions, heartbeats, and peak memory of both sides. Without --to a server is started for the run; with
it, a running server of aipod.examples.basics:Echo (or a proxy before it) is called.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import filecmp
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from aipod import AipodError, Client
from aipod.client import Event
from bench.options import size
from bench.peers.common import peak_memory

MODEL = "aipod.examples.basics:Echo"


@contextlib.contextmanager
def server(model: str, directory: Path) -> Iterator[tuple[str, int]]:
    """A server of `model`; its address and pid."""
    command = [sys.executable, "-m", "aipod", "serve", model, "--bind", "127.0.0.1:0"]
    command += ["--spool", str(directory / "spool"), "--data", str(directory / "data"), "--reserve", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        if not (line := process.stdout.readline()):
            raise SystemExit(f"python -m bench large: the server does not start; try: {shlex.join(command)}")
        yield line.split()[-1], process.pid
    finally:
        process.terminate()
        process.communicate()


def _peak(pid: int | str) -> str:
    peak = peak_memory(pid)
    return "unknown" if peak is None else f"{peak:.0f} MB"


async def large(address: str, pid: int | None, size: int, directory: Path) -> None:
    source, back = directory / "source", directory / "back"
    with source.open("wb") as out:
        for start in range(0, size, 1 << 20):
            out.write(os.urandom(min(1 << 20, size - start)))
    phases: dict[str, float] = {}
    beats = [0]

    def note(event: Event) -> None:
        phases[event.phase] = phases.get(event.phase, 0) or time.monotonic()
        beats[0] = event.heartbeats

    async with Client(address) as client:
        await client.chaos(b"", metadata=[("x-func-name", "chaos")])  # the worker is warm
        began = time.monotonic()
        await client.chaos(source, metadata=[("x-func-name", "echo")], save_to=back, on_event=note)
        ended = time.monotonic()
    up, down = phases["QUEUED"] - began, ended - phases["DONE"]
    same = filecmp.cmp(source, back, shallow=False)
    print(f"large   {size / 1e9:.2f} GB random, one call: identical {same}, {beats[0]} heartbeats")
    print(f"        up   {up:6.1f} s  {size / up / 1e6:6.0f} MB/s")
    print(f"        down {down:6.1f} s  {size / down / 1e6:6.0f} MB/s")
    print(f"        peak memory: client {_peak('self')}, server {_peak(pid) if pid else 'not ours'}")
    if not same:
        raise SystemExit("what came back is not what was sent")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench large", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=size, default=1 << 30, help="of the file (default: 1GiB)")
    parser.add_argument("--to", metavar="HOST:PORT", help="of a running server")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="aipod-bench-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        address, pid = (options.to, None) if options.to else stack.enter_context(server(MODEL, directory))
        try:
            asyncio.run(large(address, pid, options.size, directory))
        except (AipodError, OSError) as exc:
            raise SystemExit(f"python -m bench large: {exc}") from None
        except KeyboardInterrupt:
            raise SystemExit(128 + signal.SIGINT) from None
