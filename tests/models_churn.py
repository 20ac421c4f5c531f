"""A model that many clients call, and that looks into the server that it runs in."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import hashlib
import os
from pathlib import Path

import trio

import aipod
from aipod import Context


def heaps() -> int:
    """Heaps that malloc has made (malloc_info(3)); 0 where it is not glibc's."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_info"):
        return 0
    libc.fdopen.restype = ctypes.c_void_p
    with open(os.memfd_create("heaps"), "rb") as told:
        file = ctypes.c_void_p(libc.fdopen(os.dup(told.fileno()), b"w"))
        libc.malloc_info(0, file)
        libc.fclose(file)
        told.seek(0)
        return told.read().count(b"<heap ")


class Churn(aipod.Model):
    """Async methods: they run in the server's process."""

    async def predict(self, context: Context, path: Path, *, n: int) -> dict[str, object]:
        return {"n": n, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    async def echo(self, context: Context, path: Path) -> Path:
        return path

    async def hang(self, context: Context, path: Path) -> None:
        await trio.sleep_forever()

    async def boom(self, context: Context, path: Path, *, n: int) -> None:
        raise ValueError(f"number {n}")

    @aipod.method(flavor="asyncio")
    async def look(self, context: Context, path: Path) -> dict[str, int]:
        """What there is in the server, this call included."""
        from aipod.job.run import Job
        from aipod.service.viewer import Call
        from aipod.transport.server import ServerProtocol
        from aipod.transport.stream import H2Stream

        gc.collect()
        things = gc.get_objects()
        protocols = [thing for thing in things if isinstance(thing, ServerProtocol)]
        live = [protocol for protocol in protocols if protocol.connection.alive]
        todo, tasks = [trio.lowlevel.current_root_task()], 0
        while todo:
            tasks += 1
            todo += [task for nursery in todo.pop().child_nurseries for task in nursery.child_tasks]
        timers = asyncio.get_running_loop()._timers
        return {
            "connections": len(live),
            "connection objects": len(protocols),
            "streams": sum(len(protocol.processor.streams) for protocol in protocols),
            "stream objects": sum(isinstance(thing, H2Stream) for thing in things),
            "jobs": sum(isinstance(thing, Job) for thing in things),
            "calls": sum(isinstance(thing, Call) for thing in things),
            "handlers": sum(len(protocol.handler._tasks) + len(protocol.handler._cancelled) for protocol in protocols),
            "asyncio tasks": len(asyncio.all_tasks()),
            "trio tasks": tasks,
            "heaps": heaps(),
            "timers": sum(not timer.cancelled() for timer in timers),
            "cancelled timers": sum(timer.cancelled() for timer in timers),
        }
