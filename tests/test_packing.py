"""Chunks: stored or packed, found to shrink or not, told to whoever decides."""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import xxhash
import zstandard

from aipod.codec import LAID, Laid, _compressors, chunk_pieces, decode_chunk, frame, stored, stored_pieces, unframe
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


HEAD, BLOCK = 9, 128 * KIB


def altered(name: str) -> bytes:
    """Three blocks, the last of them short, and something about the frame."""
    size = 2 * BLOCK + 1000
    packed = bytearray(stored(NOISE[:size]))
    blocks = [HEAD + number * (3 + BLOCK) for number in range(3)]

    def head(number: int, length: int, kind: int = 0, last: bool = False) -> None:
        packed[blocks[number] : blocks[number] + 3] = (length << 3 | kind << 1 | last).to_bytes(3, "little")

    match name:
        case "cut in its header":
            return bytes(packed[:7])
        case "cut in a block's header":
            return bytes(packed[: blocks[1] + 2])
        case "cut in a block":
            return bytes(packed[: blocks[1] + 500])
        case "cut behind the last block":
            return bytes(packed[:-4])
        case "cut in its checksum":
            return bytes(packed[:-1])
        case "a byte behind it":
            return bytes(packed + b"x")
        case "zeros behind it":
            return bytes(packed + bytes(4))
        case "no block":
            return stored(b"")
        case "a frame behind it":
            return bytes(packed + stored(b"x"))
        case "a skippable frame behind it":
            return bytes(packed) + b"\x50\x2a\x4d\x18\x04\0\0\0more"
        case "a skippable frame before it":
            return b"\x50\x2a\x4d\x18\x04\0\0\0more" + bytes(packed)
        case "the last block ends too early":
            head(1, BLOCK, last=True)
        case "no block is the last":
            head(2, 1000)
        case "one byte repeated":
            head(1, BLOCK, kind=1)
        case "a compressed block":
            head(1, BLOCK, kind=2)
        case "a reserved kind of block":
            head(1, BLOCK, kind=3)
        case "a longer block":
            head(0, BLOCK + 1)
        case "a shorter block":
            head(0, BLOCK - 1)
        case "the last block is longer":
            head(2, 1001, last=True)
        case "the last block is shorter":
            head(2, 999, last=True)
        case "it states more":
            packed[5:9] = (size + 1).to_bytes(4, "little")
        case "it states less":
            packed[5:9] = (size - 1).to_bytes(4, "little")
        case "it states as many blocks of other bytes":
            packed[5:9] = (3 * BLOCK).to_bytes(4, "little")
        case "it states nothing":
            packed[5:9] = bytes(4)
        case "it states gigabytes":
            packed[5:9] = b"\xff" * 4
        case "a dictionary":
            packed[4] |= 1
        case "no checksum":
            packed[4] &= ~4
        case "a reserved bit":
            packed[4] |= 8
        case "a window":
            packed[4] &= ~0x20
        case "another magic number":
            packed[0] ^= 1
        case "another checksum":
            packed[-4] ^= 1
        case "other bytes in the first block":
            packed[blocks[0] + 3] ^= 1
        case "other bytes in the last block":
            packed[-5] ^= 1
        case _:
            raise KeyError(name)
    return bytes(packed)


ALTERED = """cut in its header|cut in a block's header|cut in a block|cut behind the last block|cut in its checksum
a byte behind it|zeros behind it|no block|a frame behind it|a skippable frame behind it|a skippable frame before it
the last block ends too early|no block is the last|one byte repeated|a compressed block|a reserved kind of block
a longer block|a shorter block|the last block is longer|the last block is shorter
it states more|it states less|it states as many blocks of other bytes|it states nothing|it states gigabytes
a dictionary|no checksum|a reserved bit|a window|another magic number
another checksum|other bytes in the first block|other bytes in the last block""".replace("\n", "|").split("|")


@pytest.mark.parametrize("name", ALTERED)
@pytest.mark.parametrize("view", [bytes, memoryview])
def test_a_stored_chunk_that_is_not_taken_as_it_is_is_for_zstd_to_judge(name: str, view: Any) -> None:
    """Whatever zstd refuses is refused, with its reason. Mutants seen, each by a name of its own above: the length of
    the whole, a block's length, kind or last flag, the size's bounds, the flags, the checksum are not looked at.
    """
    packed = altered(name)
    assert packed != stored(NOISE[: 2 * BLOCK + 1000])
    assert stored_pieces(view(packed)) is None
    with pytest.raises(Refused) as caught:
        chunk_pieces(view(packed))
    assert caught.value.reason == "BAD_CHUNK"


def raw(*blocks: bytes) -> bytes:
    """A frame of raw blocks of any length."""
    data = b"".join(blocks)
    heads = [(len(block) << 3 | (at == len(blocks) - 1)).to_bytes(3, "little") for at, block in enumerate(blocks)]
    body = b"".join(head + block for head, block in zip(heads, blocks, strict=True))
    checksum = xxhash.xxh64_intdigest(data) & 0xFFFFFFFF
    return b"\x28\xb5\x2f\xfd\xa4" + len(data).to_bytes(4, "little") + body + checksum.to_bytes(4, "little")


@pytest.mark.parametrize(
    "blocks",
    [[b"ab", b"c"], [b"", b"abc"], [b"abc", b""], [NOISE[:1000]] * 200, [b"x"] * 50_000],
    ids=["short", "an empty one first", "an empty one last", "many", "a byte each"],
)
def test_raw_blocks_of_other_lengths_are_legal_and_zstds(blocks: list[bytes]) -> None:
    """No Python looks at thousands of blocks. Mutant seen: any length is taken as it is."""
    assert stored_pieces(raw(*blocks)) is None
    assert b"".join(chunk_pieces(raw(*blocks))) == b"".join(blocks)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK])
def test_a_stored_chunk_is_taken_where_it_lies(size: int) -> None:
    """Mutants seen: a copy; at most `CHUNK` - 1."""
    packed = bytearray(stored(NOISE[:size]))
    pieces = stored_pieces(packed)
    assert pieces is not None
    assert b"".join(pieces) == NOISE[:size]
    assert all(piece.obj is packed for piece in pieces)
    assert b"".join(chunk_pieces(memoryview(packed))) == NOISE[:size]


def test_a_stored_chunk_that_is_too_long_is_refused() -> None:
    """Mutant seen: it is taken."""
    packed = raw(*[NOISE[:BLOCK]] * 8, b"x")
    assert stored_pieces(packed) is None
    with pytest.raises(Refused):
        chunk_pieces(packed)


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


def laid(data: bytes) -> Laid:
    """As a file is read."""
    chunk = Laid(memoryview(bytearray(os.urandom(LAID))))
    for number, piece in enumerate(chunk.pieces):
        piece[:] = data[number * BLOCK : (number + 1) * BLOCK]
    return chunk


def test_a_chunk_that_lies_in_its_frame_is_stored_there() -> None:
    """Mutants seen: the checksum is not of all of it; a block more is said to be the last; the size is another."""
    chunk = laid(NOISE)
    assert len(chunk) == CHUNK
    packed = chunk.stored()
    assert packed == stored(NOISE)
    assert packed.obj is chunk.pieces[0].obj


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 5, CHUNK - 1, CHUNK])
def test_a_chunk_that_lies_in_a_frame_is_had_in_one_piece(size: int) -> None:
    """Where it shrinks after all, or its file has ended in it. Mutant seen: the gaps stay."""
    assert laid(NOISE).joined(size) == NOISE[:size]


@pytest.mark.parametrize("level", ["auto", 1])
def test_it_makes_no_difference_where_a_chunk_lies(level: int | str) -> None:
    """Mutants seen: what lies in a frame is stored whatever the level; its sample is of its first quarter."""
    mixed = NOISE[: 3 * CHUNK // 4] + TEXT[: CHUNK // 4]
    one, other = Packer(level), Packer(level)
    for data in (NOISE, NOISE, TEXT, NOISE, NOISE, mixed, TEXT):
        assert one.pack([laid(data)]).messages[0].data == other.pack([data]).messages[0].data
        assert (one.level, one.stores) == (other.level, other.stores)


def test_it_tells_whether_the_next_chunk_is_likely_to_be_stored() -> None:
    """Mutants seen: always; never."""
    packer, fixed, found = Packer("auto"), Packer(1), []
    for data in (TEXT, NOISE, NOISE, TEXT):
        packer.pack([data])
        fixed.pack([data])
        found.append(packer.stores)
        assert not fixed.stores
    assert found == [False, True, True, False]


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
