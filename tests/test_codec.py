"""Frames, streams and kwargs: whole, byte by byte, cut, with garbage behind, and as bombs."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import random
import time
from collections.abc import Iterator

import pytest
import zstandard

from aipod.codec import (
    PIECE,
    SLICE,
    Compressor,
    StreamDecoder,
    cut,
    decode_chunk,
    digest,
    json_string_pieces,
    new_hasher,
    parse_kwargs,
    plain_pieces,
    unframe,
)
from aipod.config import CHUNK, KIB, MIB
from aipod.errors import Refused

SKIPPABLE = b"\x5f\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"


def frame(data: bytes, *, sized: bool = True, checksum: bool = True) -> bytes:
    """One zstd frame, with or without its size in it."""
    if sized:
        return zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=True).compress(data)
    compressor = zstandard.ZstdCompressor(write_checksum=checksum).compressobj()
    return compressor.compress(data) + compressor.flush()


@functools.cache
def bomb(size: int = 1 << 30, *, sized: bool = False) -> bytes:
    """A frame of about 32 KiB per GiB."""
    compressor = zstandard.ZstdCompressor().compressobj(size=size if sized else -1)
    zeros = bytes(MIB)
    return b"".join(compressor.compress(zeros) for _ in range(size // MIB)) + compressor.flush()


def refusal(data: bytes, *, limit: int = 1000) -> str:
    with pytest.raises(Refused) as caught:
        unframe(data, limit, "SOME_REASON")
    assert caught.value.reason == "SOME_REASON"
    return str(caught.value)


class Collector:
    """Where a decoder writes to; remembers the longest piece."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.longest = 0

    def write(self, piece: bytes) -> None:
        self.longest = max(self.longest, len(piece))
        self.data += piece


def decode(data: bytes, step: int) -> bytes:
    return decode_pieces(*(data[start : start + step] for start in range(0, len(data), step)))


def decode_pieces(*pieces: bytes) -> bytes:
    collector = Collector()
    decoder = StreamDecoder(collector.write)
    for piece in pieces:
        decoder.feed(piece)
    decoder.finish()
    assert collector.longest <= 128 * KIB
    return bytes(collector.data)


def test_a_digest_is_xxh3_128_in_network_order() -> None:
    # The value that https://github.com/Cyan4973/xxHash prints for an empty file (xxhsum -H2).
    assert digest().hex() == "99aa06d3014798d86001c324468d497f"
    hasher = new_hasher()
    hasher.update(b"ab")
    hasher.update(b"c")
    assert hasher.digest() == digest(b"abc") == digest(b"a", b"bc")


@pytest.mark.parametrize("sized", [True, False])
def test_a_frame_is_decoded_up_to_the_limit(sized: bool) -> None:
    assert unframe(frame(b"x" * 1000, sized=sized), 1000, "SOME_REASON") == b"x" * 1000
    assert "1000" in refusal(frame(b"x" * 1001, sized=sized))


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("checksum", [True, False])
def test_a_frame_cut_anywhere_is_refused(sized: bool, checksum: bool) -> None:
    whole = frame(b"some text, some text", sized=sized, checksum=checksum)
    for end in range(len(whole)):
        refusal(whole[:end])


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("size", [0, 20])
@pytest.mark.parametrize("garbage", [b"\0", b"garbage", frame(b"another"), frame(b"another", sized=False)])
def test_nothing_may_follow_a_frame(sized: bool, size: int, garbage: bytes) -> None:
    refusal(frame(b"x" * size, sized=sized) + garbage)


def test_a_flipped_bit_is_found_by_the_checksum() -> None:
    data = os.urandom(500)
    whole = bytearray(frame(data))
    whole[100] ^= 1
    refusal(bytes(whole))


@pytest.mark.parametrize("sized", [True, False])
def test_a_bomb_is_refused_before_it_goes_off(sized: bool) -> None:
    assert "1000" in refusal(bomb(sized=sized))


def test_a_window_that_costs_more_memory_than_the_limit_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    wide = compressor.compress(bytes(1000)) + compressor.flush()
    assert "window" in refusal(wide)
    with pytest.raises(Refused):
        decode(wide, len(wide))


@pytest.mark.parametrize("size", [1, 100, CHUNK])
def test_a_chunk_is_one_sized_frame(size: int) -> None:
    data = os.urandom(size)
    assert decode_chunk(Compressor(3).frame(data)) == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no zstd",
        frame(b""),
        frame(b"x", sized=False),
        frame(bytes(CHUNK + 1)),
        frame(b"one") + frame(b"two"),
        frame(b"one")[:-1],
        SKIPPABLE,
        frame(b"one") + SKIPPABLE,
        bomb(sized=True),
    ],
    ids=["empty", "garbage", "no bytes", "unsized", "too long", "two", "cut", "skippable", "skippable behind", "bomb"],
)
def test_anything_else_is_no_chunk(data: bytes) -> None:
    with pytest.raises(Refused) as caught:
        decode_chunk(data)
    assert caught.value.reason == "BAD_CHUNK"


def test_a_frame_that_states_less_than_it_holds_is_refused() -> None:
    whole = bytearray(frame(b"x" * 200))
    assert whole[4] >> 6 == 0  # a single segment: the size is the one byte behind the flags
    whole[5] = 100
    with pytest.raises(Refused):
        decode_chunk(bytes(whole))


STREAM = frame(b"a" * 300) + SKIPPABLE + frame(b"", sized=False) + frame(b"b" * 200_000, sized=False) + frame(b"c")


@pytest.mark.parametrize("step", [1, 2, 7, 1000, len(STREAM)])
def test_a_stream_is_any_frames_cut_anywhere(step: int) -> None:
    assert decode(STREAM, step) == b"a" * 300 + b"b" * 200_000 + b"c"


def test_an_empty_stream_is_an_empty_payload() -> None:
    assert decode(b"", 1) == b""


def test_a_stream_cut_inside_a_frame_is_truncated_and_one_cut_between_frames_is_not() -> None:
    ends = {0, *_frame_ends()}
    for end in range(len(STREAM)):
        if end in ends:
            decode(STREAM[:end], 1000)
            continue
        with pytest.raises(Refused) as caught:
            decode(STREAM[:end], 1000)
        assert caught.value.reason == "TRUNCATED"


def _frame_ends() -> Iterator[int]:
    end = 0
    for part in (
        frame(b"a" * 300), SKIPPABLE, frame(b"", sized=False), frame(b"b" * 200_000, sized=False), frame(b"c")
    ):  # fmt: skip
        end += len(part)
        yield end


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("size", [1, 300, 100_000])
def test_a_frame_behind_one_that_is_cut_does_not_take_its_place(size: int, sized: bool) -> None:
    """Mutant seen: the next message is shown to zstd whole, which takes its frame for what the cut header began."""
    whole, other = frame(b"x" * size, sized=sized), frame(b"y" * 500)
    for end in range(1, len(whole)):
        with pytest.raises(Refused):
            decode_pieces(whole[:end], other, other)


@pytest.mark.parametrize("garbage", [b"\0", b"garbage!", b"\x28\xb5\x2f\xfe", b"\x28\xb5\x2f\xfd\xff\xff\xff\xff\xff"])
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_garbage_behind_a_stream_is_refused(garbage: bytes, step: int) -> None:
    with pytest.raises(Refused) as caught:
        decode(STREAM + garbage, step)
    assert caught.value.reason in ("BAD_CHUNK", "TRUNCATED")  # one zero byte might still become a skippable frame


def test_a_stream_s_bomb_comes_in_small_pieces_and_can_be_stopped() -> None:
    seen = 0

    def write(piece: bytes) -> None:
        nonlocal seen
        seen += len(piece)
        if seen > 10 * MIB:
            raise Refused("PAYLOAD_TOO_LARGE", "enough")

    with pytest.raises(Refused, match="enough"):
        StreamDecoder(write).feed(bomb())
    assert seen <= 10 * MIB + 128 * KIB


OPENED = b"\x28\xb5\x2f\xfd\0\x58"  # a frame's header: a window of 2 MiB, and nothing is known about its size
NOTHING = {
    "blocks": (OPENED, bytes(3), b"\1\0\0"),
    "skippable frames": (b"", b"\x50\x2a\x4d\x18\0\0\0\0", b""),
    "frames": (b"", frame(b"", sized=False), b""),
    "bytes": (OPENED, b"\x08\0\0a", b"\1\0\0"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_stream_that_holds_next_to_nothing_costs_next_to_nothing(name: str) -> None:
    """gzip makes one of 64 MiB from 64 kB. Mutant seen: frames and blocks are walked in Python, six seconds each."""
    head, part, tail = NOTHING[name]
    data = head + part * (16 * MIB // len(part)) + tail
    collector = Collector()
    began = time.thread_time()
    decoder = StreamDecoder(collector.write)
    decoder.feed(data)
    decoder.finish()
    assert len(collector.data) == (16 * MIB // 4 if name == "bytes" else 0)
    with contextlib.suppress(Refused):
        unframe(data, 16 * MIB, "BAD_KWARGS")
    assert time.thread_time() - began < 4


def test_who_feeds_a_decoder_is_asked_before_every_slice() -> None:
    """Mutant seen: a whole message is decoded first."""
    collector = Collector()
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise Refused("CANCELLED", "enough")

    with pytest.raises(Refused, match="enough"):
        StreamDecoder(collector.write, check).feed(OPENED + b"\x08\0\0a" * SLICE)
    assert len(collector.data) == (2 * SLICE - len(OPENED)) // 4


@pytest.mark.parametrize(
    ("data", "kwargs"),
    [(b"", {}), (frame(b"{}"), {}), (frame(b'{"a": [1, {"b": null}]}', sized=False), {"a": [1, {"b": None}]})],
)
def test_kwargs(data: bytes, kwargs: dict[str, object]) -> None:
    assert parse_kwargs(data, MIB) == kwargs


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"{}", "zstd"),
        (frame(b"{}") + b"x", "zstd"),
        (frame(b""), "JSON"),
        (frame(b"{"), "JSON"),
        (frame(b"[1]"), "list"),
        (frame(b"null"), "NoneType"),
        (frame(b'{"a": "\xff"}'), "JSON"),
        (frame(b'{"a": %s}' % (b"1" * 5000)), "JSON"),
        (frame(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "JSON"),
        (bomb(), "bytes"),
        (bomb(sized=True), "bytes"),
    ],
    ids=["no zstd", "garbage", "empty", "cut", "list", "null", "utf-8", "number", "deep", "bomb", "sized bomb"],
)
def test_kwargs_that_are_none(data: bytes, text: str) -> None:
    with pytest.raises(Refused, match=text) as caught:
        parse_kwargs(data, 16 * MIB)
    assert caught.value.reason == "BAD_KWARGS"


@pytest.mark.parametrize("size", [0, 1, 1000, 5 * MIB])
def test_a_plain_answer_is_one_piece_where_it_fits(size: int) -> None:
    data = os.urandom(size)
    pieces = list(plain_pieces([data[start : start + MIB] for start in range(0, size, MIB)], 3, 64 * MIB))
    assert len(pieces) == 1
    assert decode(pieces[0], 100_000) == data


def test_a_long_plain_answer_is_many_pieces_none_of_which_looks_like_a_heartbeat() -> None:
    data = os.urandom(5 * MIB + 1)
    pieces = list(plain_pieces([data[start : start + 100_000] for start in range(0, len(data), 100_000)], 3, MIB))
    assert decode(b"".join(pieces), MIB) == data
    assert len(pieces) > 4
    assert all(len(piece) >= PIECE for piece in pieces[:-1])
    assert len(pieces[-1]) > 4


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_text_as_a_json_string_cut_anywhere(step: int) -> None:
    text = 'é "quoted" \\ \n 日本 😀 \x00'
    raw = text.encode()
    pieces = json_string_pieces(raw[start : start + step] for start in range(0, len(raw), step))
    assert json.loads(b"".join(pieces)) == text


@pytest.mark.parametrize("raw", [b"\xff", b"abc\xc3", b"\xed\xa0\x80"])
def test_bytes_that_are_no_text(raw: bytes) -> None:
    with pytest.raises(UnicodeDecodeError):
        list(json_string_pieces([raw]))


def test_fuzz_a_stream_decodes_to_what_zstd_says_or_is_refused() -> None:
    """Invariant: whatever bytes come, cut wherever, a decoder refuses them or gives exactly what the frames hold."""
    rng = random.Random(20)
    for _ in range(3000):
        payloads = [rng.randbytes(rng.randrange(300)) * rng.randrange(3) for _ in range(rng.randrange(4))]
        data = bytearray(b"".join(frame(payload, sized=rng.random() < 0.5) for payload in payloads))
        changed = rng.random() < 0.7 and len(data) > 0
        if changed:
            what = rng.randrange(4)
            place = rng.randrange(len(data))
            if what == 0:
                data[place] ^= 1 << rng.randrange(8)
            elif what == 1:
                del data[place:]
            elif what == 2:
                data[place:place] = rng.randbytes(rng.randrange(1, 5))
            else:
                data += rng.randbytes(rng.randrange(1, 20))
        try:
            got = decode(bytes(data), rng.choice([1, 5, 100, 10_000]))
        except Refused as exc:
            assert changed
            assert exc.reason in ("BAD_CHUNK", "TRUNCATED")  # noqa: PT017
            continue
        if not changed:
            assert got == b"".join(payloads)
        else:
            # A change that is not noticed has cut whole frames off, or hit a bit that carries nothing.
            assert b"".join(payloads).startswith(got)


def test_kwargs_that_would_hold_the_interpreter_for_seconds_are_refused() -> None:
    for text in (b'{"a":[' + b"[]," * 200_000 + b"[]]}", b'{"a":[' + b"1," * 2_000_000 + b"1]}"):
        with pytest.raises(Refused, match="too many values") as caught:
            parse_kwargs(Compressor(1).frame(text), 16 * MIB)
        assert caught.value.reason == "BAD_KWARGS"


def test_what_a_short_write_has_not_taken_is_left() -> None:
    """Mutants seen: the rest of a piece is lost; of the piece that was written in part all comes again."""
    pieces = collections.deque(map(memoryview, (b"abc", b"defg", b"hi")))
    assert [bytes(piece) for piece in cut(pieces, 5)] == [b"abc", b"de"]
    assert [bytes(piece) for piece in pieces] == [b"fg", b"hi"]
    assert [bytes(piece) for piece in cut(pieces, 2)] == [b"fg"]
    assert [bytes(piece) for piece in cut(pieces, 2)] == [b"hi"]
    assert not pieces
