"""aipod whole: `python -m aipod serve` and `aipod.Client`, with default settings.

    serve --model=CLASS --directory=DIR [--OPTION=VALUE …]    of bench.models, spool and data below DIR
    calls, file, result                                         see bench.peers.common; file has --level=LEVEL
    hold PORT COUNT SECONDS PID                                 jobs that run at once, and their heartbeats

The server is the command itself, run in this process, with a thread that ends it with its stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import Any

from aipod import Client, Config
from aipod.client.event import Event, OnEvent
from bench.models import describe
from bench.peers import common

CONNECTIONS = 4  # of 1000 jobs at once
IN_TIME = 1.3  # seconds between two heartbeats, one of which is due each second
WARM_UP = 32  # jobs, each of which takes longer than one of many
SETTLE = 2.0  # seconds after those, until nothing of them goes on


def serve(model: str, directory: str, **options: Any) -> None:
    common.end_with_stdin()
    sys.argv[1:] = ["serve", f"bench.models:{model}", "--bind", "127.0.0.1:0", "--reserve", "0"]
    sys.argv += ["--spool", f"{directory}/spool", "--data", f"{directory}/data"]
    for name, value in options.items():
        sys.argv += [f"--{name.replace('_', '-')}", str(value)]
    from aipod.__main__ import main

    main()


def settings(level: int | str | None) -> Config:
    return Config() if level is None else Config(level=level)


def calls(port: int, count: int, at_once: int) -> common.Report:
    async def run() -> common.Report:
        async with Client(f"127.0.0.1:{port}") as client:
            return await common.time_jobs(client.chaos, count, at_once)

    return asyncio.run(run())


def file(port: int, path: str, level: int | str | None = None) -> common.Report:
    """The file to the model, and its answer."""

    async def run() -> common.Report:
        async with Client(f"127.0.0.1:{port}", config=settings(level)) as client:
            await client.predict(b"warm")
            with common.Clock() as clock:
                answer = await client.predict(path)
            return clock.report() | {"answer": answer, "bytes": answer["size"]}

    return asyncio.run(run())


def result(port: int, path: str, save_to: str) -> common.Report:
    """The model's file, here. `path` is at the server, `save_to` in the client's directory."""

    async def run() -> common.Report:
        method = [("x-func-name", "fetch")]
        async with Client(f"127.0.0.1:{port}") as client:
            await client.predict(b"warm")
            with common.Clock() as clock:
                await client.chaos(metadata=method, save_to=save_to, kwargs={"name": path})
            return clock.report()

    report, answer = asyncio.run(run()), describe(save_to)
    return report | {"answer": answer, "bytes": answer["size"]}


class Watched:
    """What the callers of many jobs see: when all run, and the gaps between heartbeats from then on."""

    def __init__(self, count: int) -> None:
        self.gaps: list[float] = []
        self.all_run = asyncio.Event()
        self.over = False
        self._left = count

    def watch(self) -> OnEvent:
        """For one job."""
        beats, last = 0, 0.0

        def note(event: Event) -> None:
            nonlocal beats, last
            if event.phase != "RUNNING":
                return
            now = time.monotonic()
            if not last:
                self._left -= 1
                if not self._left:
                    self.all_run.set()
            elif event.heartbeats > beats and self.all_run.is_set() and not self.over:
                self.gaps.append(now - last)
            if not last or event.heartbeats > beats:
                beats, last = event.heartbeats, now

        return note


async def _hold(clients: list[Client], count: int, until: float, watched: Watched) -> None:
    """That many jobs, which run until then."""
    method = [("x-func-name", "hold")]
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            client = clients[number % len(clients)]
            group.create_task(client.chaos(metadata=method, on_event=watched.watch(), until=until))


def hold(port: int, count: int, seconds: float, server: int) -> common.Report:
    """Jobs that run at once, for so long after the last one has begun. `server` is the server's pid."""

    async def run() -> common.Report:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client(f"127.0.0.1:{port}")) for _ in range(CONNECTIONS)]
            began = time.monotonic()
            await _hold(clients, WARM_UP, time.time(), Watched(WARM_UP))
            each = (time.monotonic() - began) / WARM_UP
            await asyncio.sleep(SETTLE)
            memory, watched, began = common.memory(server), Watched(count), time.monotonic()
            async with asyncio.TaskGroup() as group:
                # Until all run: as long as so many have taken before, and half as much again; and a second for pauses.
                until = time.time() + 1.5 * count * each + 1 + seconds
                group.create_task(_hold(clients, count, until, watched))
                await watched.all_run.wait()
                ramp, cpu = time.monotonic() - began, sum(common.cpu_times(server))
                with common.Clock() as clock:
                    await asyncio.sleep(seconds)
                watched.over = True
                cpu, memory = sum(common.cpu_times(server)) - cpu, common.memory(server) - memory
                if time.time() > until:
                    raise common.WrongData(f"it took {ramp:.1f} s until all ran, longer than {WARM_UP} have told")
        gaps = sorted(watched.gaps)
        return clock.report() | {
            "jobs": count,
            "ramp": ramp,
            "gaps": len(gaps),
            "gaps_in_time": sum(gap < IN_TIME for gap in gaps) / len(gaps),
            "gap_p99": gaps[int(len(gaps) * 0.99)],
            "gap_max": gaps[-1],
            "server_cpu_rate": cpu / clock.seconds,
            "client_cpu_rate": (clock.user + clock.sys) / clock.seconds,
            "server_job_kb": memory / count / 1000,
        }

    return asyncio.run(run())


if __name__ == "__main__":
    common.main(serve, {"calls": calls, "file": file, "result": result, "hold": hold})
