"""The answer as messages, made in threads; never whole in memory, but for the one message of a plain client's JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence

import trio

from aipod.codec import PIECE, Compressor, json_string_pieces, plain_pieces
from aipod.config import CHUNK
from aipod.errors import job_failed
from aipod.job.run import cancellable
from aipod.job.times import Download
from aipod.job.upload import BULK
from aipod.job.watched import Answer
from aipod.spool import Look
from aipod.wire.ai import Raw

Messages = Generator[Raw, None, None]

# `plain_pieces` may exceed its limit by what one step of the compressor gives (a piece of READ bytes, incompressible);
# the message's own fields come on top.
_SLACK = CHUNK + CHUNK // 2


def own_messages(look: Look, answer: Answer, have: int, level: int, download: Download | None = None) -> Messages:
    """The result from byte `have` on, in chunks of one zstd frame each; the last one says so. Blocks."""
    compressor = Compressor(level)
    offset = min(have, answer.size)
    for piece in _counted(_pieces(look, answer, offset), download):
        end = offset + len(piece)
        yield Raw(data=compressor.frame(piece), offset=offset, last=end == answer.size)
        offset = end
    if have >= answer.size:
        yield Raw(offset=offset, last=True)


def plain_messages(
    look: Look, answer: Answer, level: int, max_message: int, download: Download | None = None
) -> Messages:
    """The result as the first version sent it. Blocks. Raises `JobFailed(RESULT_NOT_TEXT)` before the first message."""
    if answer.inline is not None and answer.kind == "json":
        # The usual small answer: a stream compressor would hold a megabyte for each of a thousand jobs.
        yield from (Raw(data=Compressor(level).frame(whole)) for whole in _counted([answer.inline], download))
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
    messages: Messages, send: Callable[[Raw], Awaitable[None]], download: Download | None = None
) -> None:
    """Make messages in a thread while earlier ones are sent, and close them. This is a trio-flavored async function."""
    # Two: one that is being sent, one ready; with the one in the making that is 3 MiB for a result in chunks.
    ready, todo = trio.open_memory_channel[Raw](1)

    async def make() -> None:
        async with ready:
            while (message := await trio.to_thread.run_sync(next, messages, None, limiter=BULK)) is not None:
                await ready.send(message)

    with contextlib.closing(messages):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(make)
            async for message in todo:
                await send(message)
                if download is not None:
                    download.sent(len(message.data))
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
