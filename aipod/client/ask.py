"""A word about a job: cancel it, or release it."""

from __future__ import annotations

from collections.abc import Sequence

from grpclib.const import Cardinality

from aipod.client.course import lead_to
from aipod.client.failure import NoAnswer
from aipod.client.link import Link
from aipod.codec import job_id
from aipod.transport.channel import read_status, reset, send_message
from aipod.wire.ai import Op, Open, Raw, State


async def ask(
    link: Link,
    metadata: Sequence[tuple[str, str]],
    ticket: bytes,
    op: Op,
    misses: int = 0,
    spool: str = "",
    released: Sequence[bytes] = (),
) -> State:
    """Cancel or release a job: one message up, one state down. Raises what `decide` reads.

    `spool`: the one that it is in, where that is known.

    This is an asyncio-flavored function.
    """
    channel = await link.choose(spool, misses)
    call = channel.request(
        "/ai.AI/chaos",
        Cardinality.STREAM_STREAM,
        Raw,
        Raw,
        metadata=[*link.identity(metadata), *lead_to(job_id(ticket), misses)],
    )
    state: State | None = None
    message = Raw(open=Open(ticket=ticket, op=op, released=list(released)))
    async with call:
        try:
            if not await call.open(lambda: ([message], True)):
                await send_message(call, message, end=True)
            while (said := await call.recv_message()) is not None:
                state = said.state or state
            await read_status(call)
        finally:
            reset(call)
    if state is None:
        raise NoAnswer("the call ended without a state")
    return state
