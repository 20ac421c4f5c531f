"""The bytes of a connection, cut into frames where they lie (RFC 9113 section 4.1).

Payload of DATA frames is handed on piece by piece, as it comes, however large the frame: nothing waits for its end, and
h2 never sees it. Any other frame is handed on whole, and is refused by its length before it is there.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

from h2.exceptions import FrameTooLargeError, ProtocolError

from aipod.config import KIB

_HEAD = struct.Struct(">HBBBL")  # length (24 bits), type, flags, stream
HEAD = _HEAD.size
DATA, HEADERS, SETTINGS, WINDOW_UPDATE = 0x0, 0x1, 0x4, 0x8
_KNOWN = 0xA  # types up to it mean something to h2
END_STREAM, _END_HEADERS, PADDED = 0x1, 0x4, 0x8
_PREFACE = 24  # bytes

# Headers are the longest of the others; with their CONTINUATIONs they may have as much in all.
MAX_CONTROL_FRAME = 64 * KIB

Take = Callable[[memoryview], None]


class Receiver(Protocol):
    """What a FrameReader hands frames to."""

    def begin_data(self, stream_id: int, length: int, size: int, end: bool) -> Take | None:
        """A DATA frame of `length` bytes, `size` of them payload, begins: where the payload goes, or None."""

    def end_data(self, stream_id: int) -> None:
        """The DATA frame that ends `stream_id` is complete; only for frames that `begin_data` took."""

    def control(self, frame: bytes) -> None:
        """Another frame, whole; at first the client's preface, in pieces."""


def empty_data(stream_id: int, end: bool) -> bytes:
    """A DATA frame without payload."""
    return _HEAD.pack(0, 0, DATA, END_STREAM if end else 0, stream_id)


def data_head(size: int, stream_id: int, *, end: bool) -> bytes:
    """The head of a DATA frame with `size` bytes of payload."""
    return _HEAD.pack(size >> 8, size & 0xFF, DATA, END_STREAM if end else 0, stream_id)


def headers_head(size: int, stream_id: int, *, end: bool) -> bytes:
    """The head of a HEADERS frame with a whole header block of `size` bytes."""
    return _HEAD.pack(size >> 8, size & 0xFF, HEADERS, _END_HEADERS | (END_STREAM if end else 0), stream_id)


def is_whole_block(frame: bytes) -> bool:
    """Whether `frame` has a header block from beginning to end, and nothing else."""
    return len(frame) > HEAD and frame[3] == HEADERS and frame[4] & ~END_STREAM == _END_HEADERS


def ends_stream(frame: bytes) -> bool:
    """Whether `frame`, of headers or data, is the last one of its stream's."""
    return bool(frame[4] & END_STREAM)


def frame_stream(frame: bytes) -> int:
    """The stream that `frame` is about."""
    return int.from_bytes(frame[5:HEAD]) & 0x7FFFFFFF


class FrameReader:
    """Cuts the byte stream of one connection. Mutable state: the frame under way."""

    def __init__(self, receiver: Receiver, max_frame: int, *, preface: bool) -> None:
        self._receiver = receiver
        self._max_frame = max_frame
        self._preface = _PREFACE if preface else 0
        self._take: Take | None = None  # where the payload under way goes
        self._payload = 0  # bytes of it still to come
        self._skip = 0  # bytes to drop after it: padding, or a whole frame that nobody knows
        self._ends = 0  # the stream that ends with it
        self.closed = False
        self.held = False  # nothing more is taken for now

    @property
    def owed(self) -> int:
        """Bytes of payload that the frame under way has announced, and that were not taken."""
        return self._payload

    def passed(self, size: int) -> None:
        """So much of the payload under way has come, and gone where it goes, past `feed`: which is to be called next,
        with nothing perhaps.
        """
        self._payload -= size

    def feed(self, data: memoryview) -> int:
        """Take what has come. Returns how many bytes at its end must come again: an incomplete frame, or all that is
        left where `held` was set meanwhile.

        Keeps no reference to `data`. Raises ProtocolError, whose code is for the GOAWAY.
        """
        pos, end = 0, len(data)
        if self._preface:
            pos = min(self._preface, end)
            self._preface -= pos
            self._receiver.control(bytes(data[:pos]))
        while not self.closed:
            if self.held:
                return end - pos
            if self._payload and pos < end:
                piece = data[pos : pos + self._payload]
                pos += len(piece)
                self._payload -= len(piece)
                if self._take is not None:
                    self._take(piece)
            if self._payload:
                return 0
            self._take = None
            if self._skip:
                skipped = min(self._skip, end - pos)
                pos += skipped
                self._skip -= skipped
                if self._skip:
                    return 0
            if self._ends:
                stream_id, self._ends = self._ends, 0
                self._receiver.end_data(stream_id)
                continue
            if end - pos < HEAD:
                return end - pos
            size = self._begin(data, pos, end)
            if size is None:
                return end - pos
            pos += size
        return 0

    def _begin(self, data: memoryview, pos: int, end: int) -> int | None:
        """Begin the frame at `pos`: how many bytes of it are done with, None where more are needed first."""
        head: tuple[int, int, int, int, int] = _HEAD.unpack_from(data, pos)
        high, low, kind, flags, stream_id = head
        length, stream_id = high << 8 | low, stream_id & 0x7FFFFFFF
        if length > self._max_frame:
            raise FrameTooLargeError(f"a frame of {length} bytes; the limit is {self._max_frame}")
        if kind != DATA:
            if length > MAX_CONTROL_FRAME:
                if kind <= _KNOWN:
                    raise FrameTooLargeError(f"a frame of type {kind} with {length} bytes")
                self._skip = length
                return HEAD
            if end - pos < HEAD + length:
                return None
            self._receiver.control(bytes(data[pos : pos + HEAD + length]))
            return HEAD + length
        done = HEAD
        padding: int = 0
        if flags & PADDED:
            if length == 0:
                raise ProtocolError("a padded frame without room for the padding's length")
            if end - pos == HEAD:
                return None
            padding = data[pos + HEAD]
            done += 1
            if padding >= length:
                raise ProtocolError("padding as long as its frame")
        size = length - padding - (done - HEAD)
        self._payload, self._skip = size, padding
        self._take = self._receiver.begin_data(stream_id, length, size, bool(flags & END_STREAM))
        self._ends = stream_id if flags & END_STREAM and self._take is not None else 0
        return done
