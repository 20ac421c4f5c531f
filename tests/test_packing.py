"""Chunks: stored or packed, found to shrink or not, told to whoever decides."""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
from collections.abc import Iterator

import pytest
import zstandard

from aipod.codec import _compressors, decode_chunk, frame, stored, unframe
from aipod.config import CHUNK, KIB
from aipod.errors import Refused
from aipod.levels import LADDER, START, Batch, Levels
from aipod.packing import BATCH, Packer
from aipod.wire.ai import Raw
from tests.conftest import require

TEXT = b"".join(b"line %d of a text that is easily packed\n" % number for number in range(40_000))[:CHUNK]
NOISE = os.urandom(CHUNK)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 65_791, 65_792, 128 * KIB - 1, 128 * KIB, 128 * KIB + 1, CHUNK])
def test_a_stored_chunk_is_a_chunk(size: int) -> None:
    """A header of 9 bytes, one of 3 for each block, a checksum. Mutant seen: the last block does not say so."""
    data = NOISE[:size]
    packed = stored(memoryview(data))
    assert decode_chunk(packed) == data
    assert len(packed) == 9 + 3 * -(-size // (128 * KIB)) + size + 4
    parameters = zstandard.get_frame_parameters(packed)
    assert (parameters.content_size, parameters.has_checksum) == (size, True)
    stream = zstandard.ZstdDecompressor().decompressobj()
    assert stream.decompress(packed + b"more") == data
    assert stream.unused_data == b"more"


@pytest.mark.parametrize("at", [0, 4, 8, 9, 11, 12, 500, -4, -1])
def test_a_stored_chunk_that_is_not_what_was_sent_is_refused(at: int) -> None:
    """Mutant seen: no checksum is announced."""
    packed = bytearray(stored(NOISE[:1000]))
    packed[at] ^= 1
    with pytest.raises(Refused):
        decode_chunk(bytes(packed))
    with pytest.raises(Refused):
        unframe(bytes(stored(NOISE[:1000])[:at]), CHUNK, "BAD_CHUNK")


def test_zstd_itself_takes_it(tmp_path: os.PathLike[str]) -> None:
    program = require("zstd")
    data = NOISE[:300_000]
    done = subprocess.run([program, "-dc"], input=stored(data) + frame(TEXT, 9), capture_output=True, check=True)
    assert done.stdout == data + TEXT


@pytest.mark.parametrize("level", LADDER)
def test_every_level_is_decoded(level: int | None) -> None:
    for data in (TEXT, NOISE, b"x"):
        assert decode_chunk(frame(data, level)) == data


def test_a_thread_keeps_few_compressors() -> None:
    """At level 9 each has 10 MB. Mutant seen: one for each level."""
    kept: list[int] = []

    def work() -> None:
        for level in (1, 3, 6, 9, 1, 3):
            frame(b"data", level)
            kept.append(len(_compressors.newest))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert max(kept) == 2


def sizes(packer: Packer, *pieces: bytes) -> list[int]:
    """What `pieces` become, one batch each. Nobody hears that they were sent, so the level stays as it is."""
    found = []
    for piece in pieces:
        [message] = packer.pack([piece]).messages
        assert decode_chunk(message.data) == piece
        found.append(len(message.data))
    return found


def test_what_does_not_shrink_is_stored_and_what_does_again_is_packed_at_once() -> None:
    """Mutants seen: no sample is taken, so nothing is packed any more; it is taken of what was packed."""
    packer = Packer("auto")
    noise, tail = len(stored(NOISE)), NOISE[:100]
    found = sizes(packer, NOISE, NOISE, NOISE, tail, TEXT, TEXT, NOISE, NOISE)
    assert found[1:3] == [noise, noise]
    assert found[3] == len(stored(tail))
    assert max(found[4:6]) < CHUNK / 4
    assert found[7] == noise


def test_it_tells_what_was_done_not_what_was_chosen() -> None:
    """Mutant seen: the level that was chosen for what is stored."""
    packer = Packer("auto")
    told = []
    for piece in (TEXT, NOISE, NOISE, TEXT):
        packed = packer.pack([piece])
        assert packed.level == START
        told.append((packer.level, dict(packed.levels)))
    assert told == [(START, {START: 1}), (START, {START: 1}), (None, {None: 1}), (START, {START: 1})]
    fixed = Packer(9)
    assert fixed.pack([NOISE, TEXT]).levels == {9: 2}


def test_what_waits_on_this_machine_is_told() -> None:
    """By how much it has grown with each batch. Mutants seen: all of it each time; what it was before is sent."""
    heard: list[Batch] = []

    class Listener(Levels):
        def sent(self, batch: Batch) -> None:
            heard.append(batch)

    waits = iter((500, 2000, 1200, 0))
    packer = Packer("auto", 0, lambda: next(waits))
    packer._levels = Listener()
    for _ in range(4):
        with packer.sending(packer.pack([NOISE])):
            pass
    assert [batch.held for batch in heard] == [500, 1500, -800, -1200]


def test_the_ratio_is_of_what_was_sent() -> None:
    packer = Packer(1)
    packed = packer.pack([TEXT, NOISE])
    assert packer.ratio == 0
    with packer.sending(packed):
        pass
    assert packer.ratio == 2 * CHUNK / sum(len(message.data) for message in packed.messages)


def test_a_part_that_shrinks_is_found_wherever_it_is() -> None:
    """The sample is of all quarters of a chunk."""
    for quarter in range(4):
        packer = Packer("auto")
        mixed = bytearray(NOISE)
        mixed[quarter * CHUNK // 4 : (quarter + 1) * CHUNK // 4] = TEXT[: CHUNK // 4]
        assert sizes(packer, NOISE, NOISE, bytes(mixed))[2] < 0.9 * CHUNK


def test_a_level_that_was_asked_for_is_used_whatever_comes() -> None:
    packer = Packer(9)
    assert packer.chunks == BATCH
    assert sizes(packer, TEXT, NOISE, TEXT) == [len(frame(each, 9)) for each in (TEXT, NOISE, TEXT)]
    assert packer.level == 9


def test_batches_are_small_until_the_level_is_settled() -> None:
    """What is in the making when another level is chosen has the wrong one. Mutant seen: it never settles."""
    packer = Packer("auto")
    counts = []
    messages = (packer.message(piece) for piece in itertools.repeat(NOISE[: 64 * KIB]))
    for _ in range(30):
        packed = packer.batch(messages)
        with packer.sending(packed):
            counts.append(len(packed.messages))
    assert counts[:4] == [1] * 4
    assert counts[-1] == BATCH
    assert len(packer.batch(messages, most=1).messages) == 1
    offsets = [message.offset for message in packer.batch(messages).messages]
    assert offsets == list(range(offsets[0], offsets[0] + BATCH * 64 * KIB, 64 * KIB))
    assert packer.offset == offsets[-1] + 64 * KIB


def test_the_end_is_an_empty_batch_which_tells_nothing() -> None:
    packer = Packer("auto", 7)
    nothing: Iterator[Raw] = iter(())
    packed = packer.batch(nothing)
    with packer.sending(packed):
        assert packed.messages == []
    assert (packer.offset, packer.ratio) == (7, 0.0)
