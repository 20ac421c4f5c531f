"""A message that nobody needs any more is not in memory for as long as its call."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import zstandard
from grpclib.const import Cardinality

from aipod.codec import job_id
from aipod.config import MIB, Config
from aipod.transport.channel import Channel, open_call, reset
from aipod.wire.ai import Op, Open, Phase, Raw, StreamInput
from tests.conftest import Serve, peak_memory, run
from tests.wire import ask, call

WATCHERS = 12
SIZE = 16 * MIB


def test_who_watches_a_job_does_not_keep_the_message_with_which_it_came(serve: Serve, tmp_path: Path) -> None:
    """Of one ticket there may be as many calls as there are streams, with 64 MiB each.

    Mutants seen: the request keeps it; so does what has put it together (180 MB).
    """
    served = serve("Plain", "--instances", "1", "--max-instances", "1", "--drain", "0")
    ticket, nothing = os.urandom(16), zstandard.compress(b"{}")
    opening = Open(ticket=ticket, op=Op.RUN, epoch=1, size=0)
    busy = {"seconds": 300, "mark": str(tmp_path / "mark")}

    async def main() -> float:
        channel, grown = Channel(served.address, Config()), list[float]()
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(channel.aclose)
            one = await stack.enter_async_context(
                call(served.address, os.urandom(16), name="stubborn", kwargs=busy, epoch=1, last=True)
            )
            await one.until(lambda state: state.phase == Phase.RUNNING)
            for number in range(1 + WATCHERS):
                headers = [("x-job-id", job_id(ticket))]
                watcher = channel.request(
                    "/ai.AI/predict", Cardinality.STREAM_STREAM, StreamInput, Raw, metadata=headers
                )
                await stack.enter_async_context(watcher)
                stack.callback(reset, watcher)
                await open_call(watcher)
                raw = Raw(open=opening, last=True, data=os.urandom(SIZE) if number else b"")
                await watcher.send_message(StreamInput(kwargs_json=nothing, raw=raw))
                state = None
                while state is None or state.phase != Phase.QUEUED:
                    message = await watcher.recv_message()
                    assert message is not None
                    state = message.state
                grown.append(peak_memory(served.process.pid))
            await ask(served.address, ticket, Op.CANCEL)
        return grown[-1] - grown[1]  # the first long one is in memory while it comes

    assert run(main) < 4 * SIZE / 1e6
