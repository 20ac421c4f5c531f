"""What a small job costs its client: counts, which are the same on every machine, and no times.

A bound is what was counted when it was written, where that is certain, else twice as much.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import aipod
from aipod.client import Event
from tests.conftest import Serve, run
from tests.proxy import open_proxy

MODEL = "tests.models_waiting:Waiting"
PAYLOAD = b"\x5a" * 1024
JOBS = 40
HEADERS, DATA, END_STREAM = 1, 0, 1


@contextlib.contextmanager
def counting(counts: Counter[str]) -> Iterator[None]:
    """What this thread does in the body: its calls, its writes to sockets, and what it does a certain way."""

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            counts["calls"] += 1
            counts[frame.f_code.co_name] += 1
            if frame.f_code.co_name == "__init__":
                counts["events"] += isinstance(frame.f_locals.get("self"), Event)
        elif event == "c_call" and arg.__name__ in ("send", "sendmsg") and hasattr(arg.__self__, "getsockname"):
            counts["writes"] += 1

    threads = set(threading.enumerate())
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
    counts["threads"] += len(set(threading.enumerate()) - threads)


def counted(address: str, rpc: str, at_once: int, payload: bytes = PAYLOAD) -> Counter[str]:
    """Of `JOBS` jobs, `at_once` of them at a time."""
    counts: Counter[str] = Counter()

    def new_task(loop: asyncio.AbstractEventLoop, coro: Any, **more: Any) -> asyncio.Task[Any]:
        counts["tasks"] += 1
        return asyncio.Task(coro, loop=loop, **more)

    async def main() -> None:
        async with aipod.Client(address) as client:
            for _ in range(3):  # from the second one on it knows the spool, and has no need to ask
                assert await getattr(client, rpc)(payload) == len(payload)

            async def one_after_the_other() -> None:
                for _ in range(JOBS // at_once):
                    assert await getattr(client, rpc)(payload) == len(payload)

            tasks = [asyncio.create_task(one_after_the_other()) for _ in range(at_once)]
            asyncio.get_running_loop().set_task_factory(new_task)
            with counting(counts):
                for task in tasks:
                    await task
            asyncio.get_running_loop().set_task_factory(None)

    run(main)
    return counts


@pytest.mark.parametrize("at_once", [1, 20])
@pytest.mark.parametrize("rpc", ["chaos", "predict"])
def test_a_small_job_is_one_write_and_has_no_task_and_no_thread(serve: Serve, rpc: str, at_once: int) -> None:
    """Mutants seen: headers and messages by themselves; the upload in a task; a hop into a thread; a timer
    for each message; events for nobody.
    """
    counts = counted(serve(MODEL).address, rpc, at_once)
    assert counts["tasks"] == counts["threads"] == counts["run_in_executor"] == counts["events"] == 0
    # Each PING of ours is answered, each of the server's has an answer: how many there are depends on time.
    assert counts["writes"] <= JOBS + counts["_receive_ping_frame"] + 5
    assert counts["call_at"] <= 3 * JOBS  # silence, the last words, and what h2 and grpclib have
    assert counts["calls"] <= 2000 * JOBS  # 1400, of which the server's messages have some 70 each


@pytest.mark.parametrize("size", [0, 1, 1024, 32768])
@pytest.mark.parametrize("rpc", ["chaos", "predict"])
def test_the_messages_of_a_small_job_come_with_its_headers(serve: Serve, rpc: str, size: int) -> None:
    """One for kwargs, payload and end; on chaos, where the first one's data is the kwargs, two.

    Mutants seen: `last` comes by itself; an empty payload is a message of its own.
    """
    served = serve(MODEL)
    sent: list[bytes] = []

    async def main() -> None:
        async with open_proxy(served.port) as proxy:
            async with aipod.Client(proxy.address) as client:
                await client.chaos(b"first")
                await client.chaos(b"second")
                proxy.tap = lambda: sent.append
            async with aipod.Client(proxy.address) as client:
                await client.chaos(b"first")
                before = len(b"".join(sent))
                assert await getattr(client, rpc)(b"x" * size) == size
        assert frames(b"".join(sent)[before:])[: 2 + (rpc == "chaos" and size > 0)] == [
            (HEADERS, False),
            *([(DATA, False)] if rpc == "chaos" and size else []),
            (DATA, True),
        ]

    run(main)


@pytest.mark.parametrize("rpc", ["chaos", "predict"])
def test_a_small_job_that_was_sent_whole_to_the_wrong_spool_is_one_job_in_the_right_one(
    serve: Serve, tmp_path: Path, rpc: str
) -> None:
    """Mutant seen: its end, sent once, is taken for sent to the right one; then it is never created there."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (serve(MODEL, directory=tmp_path / name) for name in ("one", "two"))

    async def main() -> None:
        async with open_proxy(one.port) as proxy, aipod.Client(proxy.address) as client:
            assert await getattr(client, rpc)(b"x") == 1
            proxy.switch(two.port)
            while client._link.channel().connected:  # else it may be complete in the one that is gone
                await asyncio.sleep(0)
            assert await getattr(client, rpc)(PAYLOAD) == len(PAYLOAD)
        assert [server.log_text().count(" done in ") for server in (one, two)] == [1, 1]

    run(main)


def frames(data: bytes) -> list[tuple[int, bool]]:
    """Headers and data in what was sent: which, and whether that ended the request."""
    found = []
    while data:
        end = 9 + int.from_bytes(data[:3], "big")
        if data[3] in (HEADERS, DATA):
            found.append((data[3], bool(data[4] & END_STREAM)))
        data = data[end:]
    return found
