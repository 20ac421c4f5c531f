"""What every peer does alike: make the messages, count them, watch the clock, and speak to the harness.

    python -m bench.peers.NAME serve [OPTION…]             prints the port of 127.0.0.1 that it serves until stdin ends
    python -m bench.peers.NAME send PORT SIZE MESSAGE      one transfer to the server, in messages of MESSAGE bytes
    python -m bench.peers.NAME receive PORT SIZE MESSAGE   one transfer from the server
    python -m bench.peers.NAME small PORT CALLS            calls of two small messages up and one down (gRPC peers)
    python -m bench.peers.NAME calls PORT COUNT AT_ONCE    small jobs: 1 KiB up, 1 KiB down
    python -m bench.peers.NAME file PORT PATH              the file to the model, which reads it, and its answer
    python -m bench.peers.NAME result PORT PATH SAVE_TO    the server's file to one of the client's

All but the first print JSON: seconds, CPU seconds (user and system) and peak memory of their own process. Whoever
receives counts what arrives and tells the sender, who checks it: `up`, the messages and then the Receipt back; `down`,
an order with size and message length, the messages, then the Receipt up.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import resource
import stat
import statistics
import sys
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

# Paths of the gRPC peers: each of their clients can talk to each of their servers. Messages are `ai.Raw`.
UP, DOWN, ECHO = "/bench.Wire/up", "/bench.Wire/down", "/bench.Wire/echo"
# Distinct blocks, so that no cache makes a transfer look cheap; one in CHECKED is looked into.
BLOCKS, CHECKED, HEAD = 16, 64, 64
WARM_UP = 8  # messages on the fresh connection before the clock starts
SMALL, SMALL_MESSAGES, AT_ONCE = 100, 2, 64
JOB = 1024  # bytes of a small job, each way


class WrongData(Exception):
    """What arrived is not what was sent."""


class Receipt:
    """Counts messages: their total length, and a checksum of the first bytes of every 64th."""

    def __init__(self) -> None:
        self.total = 0
        self._count = 0
        self._crc = 0

    def add(self, data: Any) -> None:
        if self._count % CHECKED == 0:
            self._crc = zlib.crc32(data[:HEAD], self._crc)
        self._count += 1
        self.total += len(data)

    def seal(self) -> bytes:
        return b"%d bytes in %d messages, %08x" % (self.total, self._count, self._crc)


@functools.cache
def _blocks(message: int) -> list[bytes]:
    return [os.urandom(message) for _ in range(BLOCKS)]


def messages(size: int, message: int) -> Iterator[tuple[bytes, bool]]:
    """Incompressible messages of `size` bytes in all, each with whether it is the last."""
    blocks = _blocks(message)
    for index, start in enumerate(range(0, size, message)):
        left = size - start
        block = blocks[index % BLOCKS]
        yield (block, False) if left > message else (block[:left], True)


def check(receipt: bytes, size: int, message: int) -> None:
    """Raises WrongData where `receipt` is not for what this process has sent."""
    expected = Receipt()
    for data, _ in messages(size, message):
        expected.add(data)
    if bytes(receipt) != expected.seal():
        raise WrongData(f"sent {expected.seal()!r}, the receiver has {bytes(receipt)!r}")


def make_order(size: int, message: int) -> bytes:
    return b"%d %d" % (size, message)


def read_order(order: bytes) -> tuple[int, int]:
    size, message = bytes(order).split()
    return int(size), int(message)


class Clock:
    """Seconds and CPU seconds (all threads) of the body of a `with`."""

    def __enter__(self) -> Clock:
        self._began, self._usage = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds = time.perf_counter() - self._began
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.user = usage.ru_utime - self._usage.ru_utime
        self.sys = usage.ru_stime - self._usage.ru_stime

    def report(self) -> Report:
        return {"seconds": self.seconds, "client_user": self.user, "client_sys": self.sys}


Report = dict[str, Any]
Transfer = Callable[[int, int], Awaitable[None]]
Job = Callable[[bytes], Awaitable[bytes]]


async def time_transfer(transfer: Transfer, size: int, message: int) -> Report:
    """Time one `transfer(size, message)` over a warm connection. This is an asyncio-flavored function."""
    await transfer(min(size, WARM_UP * message), message)
    with Clock() as clock:
        await transfer(size, message)
    return clock.report() | {"bytes": size}


async def time_calls(call: Transfer, count: int) -> Report:
    """Time `count` small calls one after another, and as many with 64 at once. This is an asyncio-flavored function."""

    async def one() -> float:
        began = time.perf_counter()
        await call(SMALL * SMALL_MESSAGES, SMALL)
        return time.perf_counter() - began

    async def several(times: int) -> None:
        for _ in range(times):
            await one()

    await several(max(1, count // 10))
    with Clock() as clock:
        took = sorted([await one() for _ in range(count)])
        each = -(-count // AT_ONCE)
        began = time.perf_counter()
        await asyncio.gather(*(several(each) for _ in range(AT_ONCE)))
        rate = each * AT_ONCE / (time.perf_counter() - began)
    p99 = took[min(len(took) - 1, int(len(took) * 0.99))]
    return clock.report() | {
        "calls": count + each * AT_ONCE,
        "p50": statistics.median(took),
        "p99": p99,
        "rate": rate,
    }


async def time_jobs(job: Job, count: int, at_once: int) -> Report:
    """Time `count` jobs, `at_once` under way: each takes 1 KiB and must give it back. Asyncio-flavored."""
    payload = os.urandom(JOB)
    took: list[float] = []
    left = 0

    async def several() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            began = time.perf_counter()
            answer = await job(payload)
            took.append(time.perf_counter() - began)
            if answer != payload:
                raise WrongData(f"{len(payload)} bytes were sent, {answer[:99]!r} came back")

    async def all_of(number: int) -> None:
        nonlocal left
        left = number
        await asyncio.gather(*(several() for _ in range(at_once)))

    warm_up = max(at_once, count // 10)
    await all_of(warm_up)
    took.clear()
    with Clock() as clock:
        await all_of(count)
    took.sort()
    p99 = took[min(count - 1, int(count * 0.99))]
    figures = {"p50": statistics.median(took), "p99": p99, "rate": count / clock.seconds}
    return clock.report() | figures | {"jobs": count, "warm_up": warm_up / count}


def announce(port: int) -> None:
    """Print the port, and end this process when its stdin does."""
    print(port, flush=True)
    end_with_stdin()


def end_with_stdin() -> None:
    """End this process when its stdin does: nothing outlives a harness that was killed."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_wait_for_eof, daemon=True).start()


def _wait_for_eof() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def peak_memory(pid: int | str = "self") -> float | None:
    """Peak resident memory in MB, where the system tells it. (ru_maxrss would count the parent before exec.)"""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6


def memory(pid: int) -> int:
    """Resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_times(pid: int) -> tuple[float, float]:
    """CPU seconds so far, of the user and of the system. Raises OSError where the system does not tell."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / tick, int(fields[12]) / tick


def main(serve: Callable[..., None], commands: dict[str, Callable[..., Report]]) -> None:
    """Run the command line of one peer; options are `--NAME` or `--NAME=VALUE`. What looks like a number is one."""
    name, *rest = sys.argv[1:] or ["help"]
    words = [word.removeprefix("--").partition("=") for word in rest if word.startswith("--")]
    options: dict[str, Any] = {option.replace("-", "_"): _value(value) if value else True for option, _, value in words}
    if name == "serve":
        serve(**options)
    elif name in commands:
        end_with_stdin()
        report = dict(commands[name](*(_value(word) for word in rest if not word.startswith("--")), **options))
        print(json.dumps(report | {"client_peak_mb": peak_memory()}))
    else:
        raise SystemExit(__doc__)


def _value(word: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    return word
