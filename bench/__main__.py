"""`python -m bench [NAME] [--size SIZE] [--to HOST:PORT]`: measure the main job on this machine.

    large   a file of random bytes up and back, as one call each; rates and peak memory of both sides
    small   a call with 1 KiB through a warm worker process and on the loop, in turn: p50, p99, the difference
    wire    the transport alone, beside its peers in one run; see `python -m bench wire --help`
    disk    the steps on disk of a small job, also beside 100,000 ended ones; see `python -m bench disk --help`
    faults  no measurement: jobs under random cuts and kills; see `python -m bench faults --help`

Without --to a server is started for the run. Absolute figures say little about another machine; those of `wire` are
ratios of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import filecmp
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from aipod import Client
from aipod.cli.options import Size
from aipod.client import Event
from bench import disk, wire
from bench.faults import run as faults

MODEL = "aipod.examples.basics:Echo"
SMALL_MODELS = {"worker": "bench.models:InWorker", "loop": "bench.models:OnLoop"}
SMALL_CALLS = 1000


@contextlib.contextmanager
def server(model: str, directory: Path) -> Iterator[tuple[str, int]]:
    """A server of `model`; its address and pid."""
    command = [sys.executable, "-m", "aipod", "serve", model, "--bind", "127.0.0.1:0"]
    command += ["--spool", str(directory / "spool"), "--data", str(directory / "data"), "--reserve", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1], process.pid
    finally:
        process.terminate()
        process.communicate()


def peak_memory(pid: int) -> str:
    """Peak resident memory, where the system tells it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "unknown"
    return f"{int(next(line for line in lines if line.startswith('VmHWM')).split()[1]) / 1024:.0f} MB"


def make_random(path: Path, size: int) -> None:
    with path.open("wb") as out:
        for start in range(0, size, 1 << 20):
            out.write(os.urandom(min(1 << 20, size - start)))


async def large(address: str, pid: int | None, size: int, directory: Path) -> None:
    source, back = directory / "source", directory / "back"
    make_random(source, size)
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"        peak memory: client {peak:.0f} MB, server {peak_memory(pid) if pid else 'not ours'}")
    if not same:
        raise SystemExit("what came back is not what was sent")


async def small(directory: Path) -> None:
    payload = os.urandom(1024)
    took: dict[str, list[float]] = {name: [] for name in SMALL_MODELS}
    async with contextlib.AsyncExitStack() as stack:
        clients = {}
        for name, model in SMALL_MODELS.items():
            address, _ = stack.enter_context(server(model, directory / name))
            clients[name] = await stack.enter_async_context(Client(address))
        for n in range(SMALL_CALLS):
            for name in sorted(clients, reverse=n % 2 == 1):
                began = time.monotonic()
                await clients[name].chaos(payload)
                took[name].append((time.monotonic() - began) * 1e3)
    p50 = {}
    for name, times in took.items():
        times = sorted(times[SMALL_CALLS // 10 :])
        p50[name] = statistics.median(times)
        print(f"small   {name:6} p50 {p50[name]:6.2f} ms  p99 {times[int(len(times) * 0.99)]:6.2f} ms")
    print(f"small   a worker process adds {p50['worker'] - p50['loop']:.2f} ms at the median")


def main() -> None:
    if sys.argv[1:2] == ["wire"]:
        wire.main(sys.argv[2:])
        return
    if sys.argv[1:2] == ["disk"]:
        disk.main(sys.argv[2:])
        return
    if sys.argv[1:2] == ["faults"]:
        sys.exit(faults.main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=("large", "small", "wire", "disk", "faults"))
    parser.add_argument("--size", default="1GiB", help="of the large file")
    parser.add_argument(
        "--to", help="HOST:PORT of a running server of aipod.examples.basics:Echo (or of a proxy before it)"
    )
    options = parser.parse_args()
    size = Size().convert(options.size, None, click.Context(click.Command("bench")))
    with tempfile.TemporaryDirectory(prefix="aipod-bench-") as name:
        directory = Path(name)
        if options.name in (None, "large"):
            with contextlib.ExitStack() as stack:
                address, pid = (options.to, None) if options.to else stack.enter_context(server(MODEL, directory))
                asyncio.run(large(address, pid, size, directory))
        if options.name in (None, "small"):
            asyncio.run(small(directory))


if __name__ == "__main__":
    main()
