"""What sending costs, in what no neighbour on the machine can spoil: hops into threads, bytes in memory, copies."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from aipod.blocks import Blocks
from aipod.client.reader import _IN_HANDS, File
from aipod.client.source import Source
from aipod.codec import Laid, decode_chunk, stored
from aipod.config import CHUNK, MIB
from aipod.job.reply import BATCHES, own_messages, send_all
from aipod.job.watched import Answer
from aipod.packing import BATCH, Packer
from aipod.spool import Spool
from aipod.wire.ai import Raw
from tests.conftest import run

SIZE = 64 * MIB


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("payload") / "file"
    with path.open("wb") as out:
        for _ in range(SIZE // MIB):
            out.write(os.urandom(MIB))
    return path


def test_an_upload_hops_twice_for_each_batch(file: Path) -> None:
    """Once to read, once to pack; for each chunk while the level is not settled. Mutant seen: always."""
    hops = 0

    async def in_thread(fn: Callable[..., Any], *args: Any) -> Any:
        nonlocal hops
        hops += 1
        return await asyncio.to_thread(fn, *args)

    async def main() -> None:
        async with Source(file, in_thread) as source:
            packer = Packer("auto")
            async for packed in source.batches(packer):
                with packer.sending(packed):
                    pass

    run(main)
    assert hops <= 2 * SIZE // (BATCH * CHUNK) + 30


def test_an_upload_holds_two_batches_beside_those_that_were_taken(file: Path) -> None:
    """What is read ahead of a sender that stands still, and what all of it takes in memory at once.

    Mutant seen: two batches are read ahead.
    """
    ahead: list[int] = []

    async def main() -> None:
        async with Source(file) as source:
            packer = Packer("auto")
            sent = 0
            async for packed in source.batches(packer):
                with packer.sending(packed):
                    sent += len(packed.messages) * CHUNK
                    await asyncio.sleep(0.002)  # time enough to read more, if anything would
                ahead.append(source.read - sent)
                del packed

    tracemalloc.start()
    try:
        run(main)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(ahead) <= 2 * BATCH * CHUNK + CHUNK
    # Read ahead, and packed where it was read; and what a thread that had no turn since has not let go of.
    assert peak < 4 * BATCH * CHUNK


def cached(path: Path) -> float:
    """How much of a file is in the system's cache, of 1."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        pages = (ctypes.c_ubyte * (len(view) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(view)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view)), pages) == 0
        del start
    return sum(page & 1 for page in pages) / len(pages)


@pytest.mark.parametrize("is_used", [False, True])
def test_a_huge_file_leaves_the_cache_as_it_was(file: Path, is_used: bool) -> None:
    """Mutants seen: it stays; what others use is thrown out."""
    with file.open("rb") as own:
        os.fsync(own.fileno())
        os.posix_fadvise(own.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cached(file) > 0.1:
            pytest.skip("a file system whose files are in memory")
        if is_used:
            while own.read(16 * MIB):
                pass
    reader, size = File(file, huge=SIZE - 1), 0
    while pieces := reader.fresh():
        size += sum(map(len, pieces))
    reader.close()
    assert size == SIZE
    assert cached(file) == 1 if is_used else cached(file) < 0.5


def test_a_file_that_is_not_huge_stays_in_the_cache(file: Path) -> None:
    with file.open("rb") as own:
        os.fsync(own.fileno())
        os.posix_fadvise(own.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reader = File(file, huge=SIZE)
    while reader.fresh():
        pass
    reader.close()
    assert cached(file) == 1


def test_what_is_stored_is_copied_once() -> None:
    data = os.urandom(CHUNK)
    stored(data)
    tracemalloc.start()
    try:
        packed = stored(memoryview(data))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert CHUNK < peak < CHUNK + 20_000
    assert decode_chunk(packed) == data


def test_a_block_is_taken_again_when_nobody_refers_to_it() -> None:
    """Nor to a part of it; all of it is there. Mutants seen: one that is used is given out; none is used again; all are
    kept; the test whether one is free leaves it shorter.
    """
    blocks = Blocks(1000, most=2)
    part, second, third = blocks.take()[5:10], blocks.take(), blocks.take()
    kept = [id(part.obj), id(second.obj)]
    assert id(third.obj) not in kept
    assert [id(block) for block in blocks._blocks] == kept
    del third
    assert id(blocks.take().obj) not in kept
    for _ in range(3):
        del part
        part = blocks.take()[5:10]
        del second
        second = blocks.take()
        assert [id(part.obj), id(second.obj)] == kept
        assert len(second) == 1000


def test_an_upload_of_a_file_has_its_buffers_once(file: Path) -> None:
    """However long it is: no more than a sender has in hands; and nothing that is stored is copied.

    Mutants seen: a buffer for each chunk; chunks that do not shrink are read in one piece.
    """
    buffers: set[int] = set()
    read: list[Any] = []
    copied = 0

    class Noting(Packer):
        def pack(self, pieces: Any) -> Any:
            nonlocal copied
            packed = super().pack(pieces)
            for piece, message in zip(pieces, packed.messages, strict=True):
                read.append(type(piece))
                copied += not isinstance(message.data, memoryview)
                buffers.add(id(message.data.obj if isinstance(message.data, memoryview) else piece.obj))
            return packed

    async def main() -> bytes:
        data = bytearray()
        async with Source(file) as source:
            packer = Noting("auto")
            async for packed in source.batches(packer):
                with packer.sending(packed):
                    while packed.messages:
                        data.extend(decode_chunk(packed.messages.pop(0).data))
                del packed
        return bytes(data)

    assert run(main) == file.read_bytes()
    assert len(buffers) <= _IN_HANDS
    assert read.count(Laid) == SIZE // CHUNK - read.count(memoryview) >= SIZE // CHUNK - 3 * BATCH
    assert copied <= 3 * BATCH


class Counting(Packer):
    """Counts hops, and what was made but not sent."""

    hops = made = most = 0

    def batch(self, messages: Any, most: int = BATCH) -> Any:
        self.hops += 1
        packed = super().batch(messages, most)
        self.made += len(packed.messages)
        self.most = max(self.most, self.made)
        return packed


async def send(file: Path, tmp_path: Path, packer: Counting) -> bytes:
    entry = Spool.open(tmp_path, "app", reserve=0).claim("0" * 32, {})
    assert entry is not None
    os.link(file, entry.result)
    received = bytearray()
    try:

        async def take(message: Raw) -> None:
            packer.made -= 1
            assert message.offset == len(received)
            received.extend(decode_chunk(message.data))
            await trio.sleep(0.001)  # others run ahead, if they may
            assert message.last == (len(received) == SIZE)

        await send_all(own_messages(entry, Answer("bytes", None, SIZE, b""), packer), take, None, packer)
    finally:
        entry.destroy()
    return bytes(received)


async def test_an_answer_hops_once_for_each_batch(file: Path, tmp_path: Path) -> None:
    """Mutant seen: for each chunk."""
    packer = Counting("auto")
    assert await send(file, tmp_path, packer) == file.read_bytes()
    assert packer.hops <= SIZE // (BATCH * CHUNK) + 16
    assert packer.most <= 3 * BATCH
    assert BATCHES.borrowed_tokens == 0


async def test_beside_many_others_an_answer_takes_little_memory(file: Path, tmp_path: Path) -> None:
    """Mutant seen: a thousand slow downloads have batches as well."""
    others = [object() for _ in range(int(BATCHES.total_tokens))]
    for other in others:
        BATCHES.acquire_on_behalf_of_nowait(other)
    try:
        packer = Counting("auto")
        assert await send(file, tmp_path, packer) == file.read_bytes()
    finally:
        for other in others:
            BATCHES.release_on_behalf_of(other)
    assert packer.most <= 3
