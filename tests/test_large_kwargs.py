"""Large keyword arguments: what they cost a server for as long as their calls are under way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os

import pytest
import zstandard

from aipod.config import MIB
from aipod.wire.ai import Op, Phase
from tests.conftest import Serve, peak_memory, run
from tests.wire import ask, call

CALLS = 24


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
