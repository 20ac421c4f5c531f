"""`python -m tests.app_trio DIRECTORY`: a trio application with two servers in it, under load.

It has its own signal handling, logging, trio-asyncio loop and limits, and writes one JSON object: what it has found.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import trio
import trio_asyncio

import aipod
from aipod import Config

CALLS = 25
STDOUT, STDERR = sys.stdout, sys.stderr
MODELS = "tests.models_embedded"


async def serve_until(
    where: Path, name: str, scope: trio.CancelScope, *, task_status: Any, runner: str = "auto", **more: Any
) -> None:
    spool, data = str(where / name), str(where / "data")
    model = f"{MODELS}:{name}"
    config = Config(model=model, bind=("127.0.0.1:0",), spool=spool, data=data, reserve=0, runner=runner)
    with scope:
        await aipod.serve(config, task_status=task_status, **more)


@trio_asyncio.aio_as_trio
async def call_many(addresses: list[str], logs: list[str]) -> list[Any]:
    """On the application's own asyncio loop, which is none of the servers'. `logs`: gets what jobs tell."""
    async with aipod.Client(addresses[0]) as one, aipod.Client(addresses[1]) as two:
        calls = [
            client.predict(f"call {number}".encode(), on_event=lambda event: logs.append(event.log))
            for number in range(CALLS)
            for client in (one, two)
        ]
        return await asyncio.gather(*calls)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def rounds(where: Path, found: dict[str, Any]) -> None:
    for runner in ("process", "thread"):
        async with trio.open_nursery() as nursery:
            logs: list[str] = []
            stop, ended, scope = trio.Event(), trio.Event(), trio.CancelScope()

            async def run(
                stop: trio.Event = stop, ended: trio.Event = ended, runner: str = runner, *, task_status: Any
            ) -> None:
                scope = trio.CancelScope()
                await serve_until(where, "Upper", scope, stop=stop, runner=runner, task_status=task_status)
                ended.set()

            upper = await nursery.start(run)
            reverse = await nursery.start(serve_until, where, "Reverse", scope)
            answers = await call_many([upper[0], reverse[0]], logs)
            right = [text for number in range(CALLS) for text in (f"CALL {number}", f"call {number}"[::-1])]
            found["right"].append(answers == right)
            found["wrapped"].append([type(sys.stdout).__name__, len(logging.getLogger().handlers)])
            stop.set()
            await ended.wait()
            again = [f"call {number}"[::-1] for number in range(CALLS) for _ in range(2)]
            found["right"].append(await call_many([reverse[0], reverse[0]], logs) == again)
            scope.cancel()
        found["logged"].append("".join(logs).count("logged by Reverse"))
        found["descriptors"].append(descriptors())
        found["restored"].append(sys.stdout is STDOUT and sys.stderr is STDERR)
        found["handlers"].append(len(logging.getLogger().handlers))


async def main(where: Path) -> None:
    found: dict[str, Any] = {name: [] for name in ("right", "logged", "wrapped", "descriptors", "restored", "handlers")}
    limits, handlers = resource.getrlimit(resource.RLIMIT_NOFILE), [signal.getsignal(n) for n in (1, 2, 15)]
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio_asyncio.open_loop():
            await rounds(where, found)
        signal.raise_signal(signal.SIGTERM)
        async for number in signals:
            found["signal"] = number
            break
    logging.getLogger("application").warning("heard, without any handler")
    found["limits"] = resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    found["signals"] = [signal.getsignal(n) for n in (1, 2, 15)] == handlers
    STDOUT.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
