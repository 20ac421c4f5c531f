"""The byte stream cut into frames, however it arrives."""

from __future__ import annotations

import random

import pytest
from h2.exceptions import FrameTooLargeError, ProtocolError
from hyperframe.frame import DataFrame, Frame, PingFrame, SettingsFrame

from aipod.transport.frames import MAX_CONTROL_FRAME, FrameReader, Take

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_FRAME = 512 * 1024


class Seen:
    """Writes down what a FrameReader says; takes the payload of odd streams below 100."""

    def __init__(self) -> None:
        self.control_frames = b""
        self.payload: dict[int, bytearray] = {}
        self.begun: list[tuple[int, int, int, bool]] = []
        self.ended: list[int] = []

    def begin_data(self, stream_id: int, length: int, size: int, end: bool) -> Take | None:
        self.begun.append((stream_id, length, size, end))
        return self.payload.setdefault(stream_id, bytearray()).extend if stream_id < 100 else None

    def end_data(self, stream_id: int) -> None:
        assert stream_id not in self.ended
        self.ended.append(stream_id)

    def control(self, frame: bytes) -> None:
        self.control_frames += frame


def read(stream: bytes, cuts: list[int], *, preface: bool = False) -> Seen:
    """Feed `stream` in pieces that end at `cuts`, as a protocol does: what is left comes again."""
    seen = Seen()
    reader = FrameReader(seen, MAX_FRAME, preface=preface)
    rest, pos = b"", 0
    for cut in [*sorted(cuts), len(stream)]:
        piece = rest + stream[pos:cut]
        left = reader.feed(memoryview(piece))
        assert 0 <= left <= len(piece)
        assert left < 9 + MAX_CONTROL_FRAME
        rest, pos = piece[len(piece) - left :], cut
    assert rest == b""
    return seen


def data(stream_id: int, payload: bytes, *, end: bool = False, padding: int | None = None) -> bytes:
    frame = DataFrame(stream_id, payload)
    if end:
        frame.flags.add("END_STREAM")
    if padding is not None:
        frame.flags.add("PADDED")
        frame.pad_length = padding
    return frame.serialize()


def conversation(rng: random.Random) -> tuple[bytes, Seen]:
    """Random frames, and what must be seen of them."""
    stream, wanted = b"", Seen()
    for _ in range(30):
        kind = rng.randrange(4)
        if kind == 0:
            frame: Frame = PingFrame(0, b"12345678")
        elif kind == 1:
            frame = SettingsFrame(0, settings={4: rng.randrange(1 << 20)})
        else:
            stream_id = rng.choice([1, 3, 5, 101])
            payload = rng.randbytes(rng.choice([0, 1, 9, 300, 20_000]))
            padding = rng.choice([None, 0, 1, 255])
            end = stream_id not in wanted.ended and rng.random() < 0.1
            length = len(payload) + (0 if padding is None else 1 + padding)
            stream += data(stream_id, payload, end=end, padding=padding)
            wanted.begun.append((stream_id, length, len(payload), end))
            if stream_id < 100:
                wanted.payload.setdefault(stream_id, bytearray()).extend(payload)
                if end:
                    wanted.ended.append(stream_id)
            continue
        stream += frame.serialize()
        wanted.control_frames += frame.serialize()
    return stream, wanted


@pytest.mark.parametrize("seed", range(20))
def test_frames_are_the_same_wherever_the_stream_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    stream, wanted = conversation(rng)
    for cuts in ([], [rng.randrange(len(stream)) for _ in range(50)], list(range(1, min(len(stream), 3000)))):
        assert vars(read(stream, cuts)) == vars(wanted)


def test_the_preface_comes_before_frames_and_may_be_cut() -> None:
    for cut in range(len(PREFACE) + 12):
        seen = read(PREFACE + data(1, b"abc"), [cut], preface=True)
        assert (seen.control_frames, bytes(seen.payload[1])) == (PREFACE, b"abc")


def test_payload_is_handed_on_before_its_frame_is_complete() -> None:
    seen = Seen()
    reader = FrameReader(seen, MAX_FRAME, preface=False)
    assert reader.feed(memoryview(data(1, bytes(400_000))[:5000])) == 0
    assert len(seen.payload[1]) == 5000 - 9


@pytest.mark.parametrize("kind", [0, 1, 4, 9])
def test_a_frame_that_is_too_long_is_refused_by_its_head(kind: int) -> None:
    length = MAX_FRAME + 1 if kind == 0 else MAX_CONTROL_FRAME + 1
    head = length.to_bytes(3, "big") + bytes([kind, 0, 0, 0, 0, 1])
    with pytest.raises(FrameTooLargeError):
        FrameReader(Seen(), MAX_FRAME, preface=False).feed(memoryview(head))


def test_a_long_frame_that_nobody_knows_is_skipped_without_being_kept() -> None:
    unknown = MAX_FRAME.to_bytes(3, "big") + bytes([0xF0, 0, 0, 0, 0, 0]) + bytes(MAX_FRAME)
    seen = read(unknown + data(1, b"abc"), [100, 200_000])
    assert (seen.control_frames, bytes(seen.payload[1])) == (b"", b"abc")


@pytest.mark.parametrize("body", [b"", b"\1", b"\5abcd"])
def test_padding_as_long_as_its_frame_is_an_error(body: bytes) -> None:
    frame = len(body).to_bytes(3, "big") + bytes([0, 0x8, 0, 0, 0, 1]) + body
    with pytest.raises(ProtocolError):
        read(frame, [])


def test_nothing_is_read_after_it_was_closed() -> None:
    seen = Seen()
    reader = FrameReader(seen, MAX_FRAME, preface=False)
    reader.closed = True
    assert reader.feed(memoryview(data(1, b"abc"))) == 0
    assert seen.begun == []
