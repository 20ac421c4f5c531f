"""Payloads that are sent again from any byte, whatever they come from."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import aipod
from aipod.client.reader import Stream
from aipod.client.source import Source
from aipod.codec import decode_chunk, digest
from aipod.config import CHUNK
from aipod.packing import BATCH, Packer
from aipod.wire.ai import Raw
from tests.conftest import run

DATA = os.urandom(CHUNK * 6 + 12345)


class Once:
    """A file that can only be read."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int) -> bytes:
        return self._file.read(size)


def sources(tmp_path: Path, data: bytes) -> dict[str, Any]:
    (tmp_path / "file").write_bytes(data)

    async def asynchronous() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 300_000):
            yield data[start : start + 300_000]

    shifted = io.BytesIO(b"before" + data)
    shifted.seek(6)
    return {
        "bytes": data,
        "path": tmp_path / "file",
        "file": shifted,
        "stream": Once(data),
        "iterator": (data[start : start + 100_000] for start in range(0, len(data), 100_000)),
        "async iterator": asynchronous(),
    }


KINDS = ("bytes", "path", "file", "stream", "iterator", "async iterator")


async def collect(source: Source, start: int, *, most: int | None = None) -> tuple[bytes, list[Raw]]:
    """The payload from `start` on, or its first `most` batches."""
    chunks: list[Raw] = []
    batches = source.batches(Packer(1, start))
    async for batch in batches:
        chunks += batch.messages
        most = None if most is None else most - 1
        if most == 0:
            break
    await batches.aclose()
    data = b"".join(decode_chunk(chunk.data) for chunk in chunks if chunk.data)
    at = start
    for chunk in chunks:
        assert chunk.offset == at
        at += len(decode_chunk(chunk.data)) if chunk.data else 0
    return data, chunks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 1, CHUNK, CHUNK * 4, CHUNK * 4 + 5, len(DATA) - 1, len(DATA)])
def test_a_source_is_sent_from_any_offset_again_and_hashed_once(tmp_path: Path, kind: str, start: int) -> None:
    """First in part, then from `start` on, then whole. Mutant: hashing what is read again gives another digest."""

    async def main() -> None:
        async with Source(sources(tmp_path, DATA)[kind]) as source:
            assert source.size == (len(DATA) if kind in ("bytes", "path") else None)
            first, _ = await collect(source, 0, most=1)
            assert DATA.startswith(first)
            rest, chunks = await collect(source, start)
            assert rest == DATA[start:]
            assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
            assert chunks[-1].digest == digest(DATA)
            assert (await collect(source, 0))[1][-1].digest == digest(DATA)
            assert source.read == len(DATA)

    run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_in_a_new_process_reads_its_beginning_for_the_digest_only(tmp_path: Path, kind: str) -> None:
    async def main() -> None:
        async with Source(sources(tmp_path, DATA)[kind]) as source:
            rest, chunks = await collect(source, CHUNK * 5 + 7)
            assert rest == DATA[CHUNK * 5 + 7 :]
            assert chunks[-1].digest == digest(DATA)

    run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_is_shorter_than_what_was_sent_is_refused(tmp_path: Path, kind: str) -> None:
    async def main() -> None:
        async with Source(sources(tmp_path, b"short")[kind]) as source:
            await collect(source, 6)

    with pytest.raises(aipod.UsageError, match="5 bytes now, but 6"):
        run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_source_is_one_last_message(tmp_path: Path, kind: str) -> None:
    async def main() -> list[Raw]:
        async with Source(sources(tmp_path, b"")[kind]) as source:
            return (await collect(source, 0))[1]

    assert run(main) == [Raw(last=True, digest=digest(b""))]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_read_while_an_attempt_is_given_up_is_not_lost(asynchronous: bool) -> None:
    """The iterator has been asked for a piece when the connection is lost: the next attempt gets that piece."""
    asked, go = threading.Event(), threading.Event()

    def pieces() -> Iterator[bytes]:
        yield DATA[: BATCH * CHUNK]
        asked.set()
        go.wait(10)
        yield DATA[BATCH * CHUNK :]

    async def apieces() -> AsyncIterator[bytes]:
        yield DATA[: BATCH * CHUNK]
        asked.set()
        await asyncio.to_thread(go.wait, 10)
        yield DATA[BATCH * CHUNK :]

    async def main() -> None:
        async with Source(apieces() if asynchronous else pieces()) as source:
            lost = asyncio.create_task(collect(source, 0))
            await asyncio.to_thread(asked.wait, 10)
            lost.cancel()
            with pytest.raises(asyncio.CancelledError):
                await lost
            go.set()
            data, chunks = await collect(source, 100)
            assert data == DATA[100:]
            assert chunks[-1].digest == digest(DATA)

    run(main)


def test_a_source_that_never_gives_anything_can_be_left() -> None:
    released = threading.Event()

    def pieces() -> Iterator[bytes]:
        released.wait(30)
        yield b""

    async def main() -> None:
        async with Source(pieces()) as source:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await collect(source, 0)
        released.set()

    run(main)


def test_a_file_that_changes_between_attempts_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)

    async def main() -> None:
        async with Source(path) as source:
            await collect(source, 0)
            with path.open("r+b") as file:
                file.write(b"changed")
            os.utime(path, ns=(0, 0))
            await collect(source, 0)

    with pytest.raises(aipod.UsageError, match="changed while it was sent"):
        run(main)


def test_a_stream_leaves_no_file_and_closes_what_it_has(tmp_path: Path) -> None:
    async def main() -> Stream:
        async with Source(iter([DATA])) as source:
            await collect(source, 0)
            reader = source._reader
            assert isinstance(reader, Stream)
            assert reader._kept is not None
            assert os.fstat(reader._kept.fileno()).st_nlink == 0
            return reader

    reader = run(main)
    assert reader._kept is not None
    assert reader._kept.closed


def test_tags_tell_sources_apart(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"x")
    other.write_bytes(b"y")
    assert Source(one).tag == Source(str(one)).tag != Source(other).tag
    assert Source(one).content_tag() != Source(other).content_tag()
    assert Source(b"x").tag == b""
    assert Source(b"x").content_tag() == Source(bytearray(b"x")).content_tag() != Source(b"y").content_tag()
    before = Source(one).tag
    os.utime(one, ns=(0, 0))
    assert Source(one).tag != before
