"""Large keyword arguments: what they cost a server for as long as their calls are under way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os

import pytest
import zstandard

from aipod.codec import job_id
from aipod.config import MIB
from aipod.service.large import LARGE_KWARGS
from aipod.spool.locks import try_lock
from aipod.wire.ai import Op, Phase
from tests.conftest import Serve, peak_memory, run
from tests.phases import until
from tests.wire import Call, ask, call

CALLS = 24


def test_who_waits_for_an_upload_keeps_no_room_from_others(serve: Serve) -> None:
    """A server that has stopped holds two uploads, and their callers have come to this one; a third brings a new job.

    Mutant seen: the room is given back when the caller has its upload, or is told to come again.
    """
    served = serve("Plain")
    packed = zstandard.compress(json.dumps({"a": "a" * MIB}).encode())

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:

            async def come(ticket: bytes, epoch: int) -> Call:
                return await stack.enter_async_context(
                    call(served.address, ticket, name="predict", data=packed, epoch=epoch)
                )

            tickets = [os.urandom(16) for _ in range(LARGE_KWARGS)]
            locks = [served.spool / f"{job_id(ticket)}.lock" for ticket in tickets]
            for ticket in tickets:
                await (await come(ticket, 1)).state()
            await stack.aclose()
            with contextlib.ExitStack() as held:
                for path in locks:
                    await until(lambda path=path: (lock := try_lock(path)) and held.callback(lock.release))
                waiting = [await come(ticket, 2) for ticket in tickets]
                await until(lambda: len(list(served.spool.glob("*/want-*"))) == LARGE_KWARGS)
                assert (await (await come(os.urandom(16), 1)).state()).phase == Phase.RECEIVING
            for one in waiting:
                assert (await one.state()).phase == Phase.RECEIVING

    run(main)


@pytest.mark.slow
def test_kwargs_of_many_calls_are_not_in_memory_together(serve: Serve) -> None:
    """A few hundred bytes on the wire become 16 MiB of kwargs, for each of many calls that then say nothing.

    Mutants seen: all are parsed at once; the request keeps its kwargs when the entry has them (550 and 470 MB).
    """
    served = serve("Plain")
    text = "\N{GRINNING FACE}" * (4 * MIB - 100)
    packed = zstandard.compress(json.dumps({"a": text}, ensure_ascii=False).encode())
    assert len(packed) < 10_000
    before = peak_memory(served.process.pid)

    async def main() -> None:
        tickets = [os.urandom(16) for _ in range(CALLS)]
        async with contextlib.AsyncExitStack() as stack:
            calls = [
                await stack.enter_async_context(call(served.address, ticket, name="predict", data=packed, epoch=1))
                for ticket in tickets
            ]
            states = await asyncio.gather(*(one.state() for one in calls))
            assert {state.phase for state in states} == {Phase.RECEIVING}
            # The run gets them all the same.
            await calls[0].last(b"")
            assert json.loads((await calls[0].outcome()).data)["kwargs"] == {"a": text}
        for ticket in tickets[1:]:
            assert (await ask(served.address, ticket, Op.CANCEL)).phase == Phase.CANCELLED
        kept = [path.stat().st_size for path in served.spool.glob("*/kw")]
        assert kept == []

    run(main)
    grown = peak_memory(served.process.pid) - before
    assert grown < 400
