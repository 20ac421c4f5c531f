"""The answer as messages, made in threads; never whole in memory, but for the one message of a plain client's JSON."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence

import trio

from aipod.codec import PIECE, frame, json_string_pieces, plain_pieces
from aipod.config import CHUNK
from aipod.errors import job_failed
from aipod.job.run import cancellable
from aipod.job.times import Download
from aipod.job.upload import BULK
from aipod.job.watched import Answer
from aipod.packing import Packed, Packer
from aipod.spool import Look
from aipod.wire.ai import Raw

Messages = Generator[Raw, None, None]

# `plain_pieces` may exceed its limit by what one step of the compressor gives (a piece of READ bytes, incompressible);
# the message's own fields come on top.
_SLACK = CHUNK + CHUNK // 2


# Results at once whose chunks are made in batches: 200 MiB of them in memory.
BATCHES = trio.CapacityLimiter(16)


def own_messages(look: Look, answer: Answer, packer: Packer, download: Download | None = None) -> Messages:
    """The result from `packer.offset` on, in chunks of one zstd frame each; the last one says so. Blocks."""
    if packer.offset >= answer.size:
        yield Raw(offset=answer.size, last=True)
        return
    for piece in _counted(_pieces(look, answer, packer.offset), download):
        message = packer.message(piece)
        message.last = packer.offset == answer.size
        yield message


def plain_messages(
    look: Look, answer: Answer, level: int, max_message: int, download: Download | None = None
) -> Messages:
    """The result as the first version sent it. Blocks. Raises `JobFailed(RESULT_NOT_TEXT)` before the first message."""
    if answer.inline is not None and answer.kind == "json":
        # The usual small answer: a stream compressor would hold a megabyte for each of a thousand jobs.
        yield from (Raw(data=frame(whole, level)) for whole in _counted([answer.inline], download))
        return
    limit = max_message - _SLACK
    parts: Iterable[bytes] = _counted(_pieces(look, answer, 0), download)
    if answer.kind == "bytes":
        _check_text(_pieces(look, answer, 0))
        parts = json_string_pieces(parts)
    for data in plain_pieces(parts, level, PIECE if answer.kind == "file" else limit):
        yield Raw(data=data)


def _check_text(pieces: Iterable[bytes]) -> None:
    try:
        for _ in json_string_pieces(pieces):
            pass
    except UnicodeDecodeError:
        raise job_failed(
            "RESULT_NOT_TEXT",
            "the method returned bytes that are not UTF-8 text; return a pathlib.Path, or call with aipod's own client",
        ) from None


def _pieces(look: Look, answer: Answer, offset: int) -> Iterator[bytes]:
    if answer.inline is not None:
        return (answer.inline[start : start + CHUNK] for start in range(offset, len(answer.inline), CHUNK))
    return cancellable(look.read_result(offset))


def _counted(pieces: Iterable[bytes], download: Download | None) -> Iterator[bytes]:
    for piece in pieces:
        if download is not None:
            download.read += len(piece)
        yield piece


async def send_all(
    messages: Messages,
    send: Callable[[Raw], Awaitable[None]],
    download: Download | None = None,
    packer: Packer | None = None,
) -> None:
    """Make messages in a thread while earlier ones are sent, and close them. This is a trio-flavored async function.

    `packer`: what packs them; where few are sent, they are made in batches.
    """
    # Two: one that is being sent, one ready; with the one in the making that is 3 MiB for a result in chunks, 12 MiB
    # where they are made in batches.
    ready, todo = trio.open_memory_channel[Packed](1)

    async def make(take: Callable[[Messages], Packed]) -> None:
        async with ready:
            while (batch := await trio.to_thread.run_sync(take, messages, limiter=BULK)).messages:
                await ready.send(batch)

    with contextlib.closing(messages), _batched(packer) as take:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(make, take)
            async for batch in todo:
                with contextlib.nullcontext() if packer is None else packer.sending(batch):
                    for message in batch.messages:
                        await send(message)
                        if download is not None:
                            download.sent(len(message.data))
                if download is not None and packer is not None:
                    download.packed(batch.levels)
    if download is not None:
        download.end()


async def send_short(
    first: Sequence[Raw], messages: Messages, send: Callable[..., Awaitable[None]], download: Download
) -> None:
    """As `send_all`, of an answer that is in memory and not longer than `INLINE`: a thread would take longer.

    All of it is handed to `send` in one go, behind `first`. This is a trio-flavored async function.
    """
    made = list(messages)
    await send(*first, *made)
    for message in made:
        download.sent(len(message.data))
    download.end()


@contextlib.contextmanager
def _batched(packer: Packer | None) -> Iterator[Callable[[Messages], Packed]]:
    """What makes the next messages, in a thread."""
    if packer is None:
        yield lambda messages: Packed(None, list(itertools.islice(messages, 1)))
        return
    me = object()
    try:
        BATCHES.acquire_on_behalf_of_nowait(me)
    except trio.WouldBlock:
        yield functools.partial(packer.batch, most=1)
        return
    try:
        yield packer.batch
    finally:
        BATCHES.release_on_behalf_of(me)
