"""Messages to bytes and back, bounded before they are parsed."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, cast

import betterproto2
from grpclib.const import Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError

from aipod.config import KIB
from aipod.wire.ai import Error, Open, Raw, State, StreamInput

# The widest of our messages has 15 fields, nested ones included twice that; `Open.released` repeats, so a few hundred
# are honest.
MAX_FIELDS = 512
# Fields may be added to the schema, so unknown ones are honest too, but betterproto2 keeps them by appending to a bytes
# object, which is quadratic: 1 MB of two-byte ones block the loop for 45 s, 64 MB in 500 of them for 15 s.
MAX_UNKNOWN = 64 * 1024

# A payload above it is not copied more than needed; below it that costs less than the care.
_LARGE = 4 * KIB

M = TypeVar("M", bound=betterproto2.Message)

_NESTED: dict[type, dict[int, type]] = {StreamInput: {3: Raw}, Raw: {4: Open, 5: State}, State: {6: Error}}


def _wire_types(kind: type) -> dict[int, int]:
    """Field number to wire type. betterproto2 takes any, and then `data` may be an int."""
    metas = [field.metadata["betterproto"] for field in dataclasses.fields(kind) if "betterproto" in field.metadata]
    return {meta.number: {"bytes": 2, "string": 2, "message": 2, "float": 5}.get(meta.proto_type, 0) for meta in metas}


_WIRE_TYPES: dict[type, dict[int, int]] = {kind: _wire_types(kind) for kind in (StreamInput, Raw, Open, State, Error)}


def check_fields(data: bytes | memoryview, kind: type, limit: int = MAX_FIELDS) -> int:
    """How many fields `data` has, those of nested messages included; raises ValueError for more than `limit`.

    Walks tags and lengths only; also raises where `data` is no protobuf, a known field has not its wire type, or the
    unknown ones have more than `MAX_UNKNOWN` bytes.
    """
    walk = _Walk(data, limit)
    walk.message(0, len(data), kind)
    return limit - walk.fields


def parse(data: bytes | memoryview, kind: type[M]) -> M:
    """The message of type `kind` in `data`; raises ValueError as `check_fields`, or whatever betterproto2 raises.

    A large `Raw.data` is cut out first: betterproto2 would copy it three times, and twice again in a StreamInput.
    """
    walk = _Walk(data, MAX_FIELDS)
    walk.message(0, len(data), kind)
    if len(walk.payloads) == 1 and len(walk.raws) == (kind is StreamInput):
        start, begin, end = walk.payloads[0]
        if end - begin > _LARGE:
            raw_start, raw_begin, raw_end = walk.raws[0] if walk.raws else (0, 0, len(data))
            raw = Raw.parse(bytes(data[raw_begin:start]) + bytes(data[end:raw_end]))
            raw.data = bytes(data[begin:end])
            if kind is Raw:
                return cast(M, raw)
            message = kind.parse(bytes(data[:raw_start]) + bytes(data[raw_end:]))
            cast(StreamInput, message).raw = raw
            return message
    return kind.parse(bytes(data))


class _Walk:
    """One pass over a message; counts down what it may still have."""

    def __init__(self, data: bytes | memoryview, fields: int) -> None:
        self._data = data
        self.fields = fields
        self.payloads: list[tuple[int, int, int]] = []  # every Raw.data: where its tag, its content, what follows begin
        self.raws: list[tuple[int, int, int]] = []  # every StreamInput.raw, alike
        self._unknown = MAX_UNKNOWN

    def message(self, pos: int, end: int, kind: type) -> None:
        known, nested = _WIRE_TYPES[kind], _NESTED.get(kind, {})
        while pos < end:
            self.fields -= 1
            if self.fields < 0:
                raise ValueError("too many fields in one message")
            start = pos
            tag, pos = _varint(self._data, pos, end)
            number, wire_type = tag >> 3, tag & 7
            if known.get(number, wire_type) != wire_type:
                raise ValueError(f"field {number} of {kind.__name__} has wire type {wire_type}")
            begin, pos = self._skip(wire_type, pos, end)
            if pos > end:
                raise ValueError("a field is longer than its message")
            if number == 1 and kind is Raw:
                self.payloads.append((start, begin, pos))
            elif number == 3 and kind is StreamInput:
                self.raws.append((start, begin, pos))
            if number in nested:
                self.message(begin, pos, nested[number])
            elif number not in known:
                self._unknown -= pos - start
                if self._unknown < 0:
                    raise ValueError("too many bytes in unknown fields")

    def _skip(self, wire_type: int, pos: int, end: int) -> tuple[int, int]:
        """Where a value's content begins, and where it ends."""
        if wire_type == 0:
            return pos, _varint(self._data, pos, end)[1]
        if wire_type == 2:
            length, pos = _varint(self._data, pos, end)
            return pos, pos + length
        if wire_type in (1, 5):
            return pos, pos + (8 if wire_type == 1 else 4)
        raise ValueError(f"wire type {wire_type} is not in use")


def _varint(data: bytes | memoryview, pos: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while pos < end and shift < 64:
        byte = data[pos]
        value |= (byte & 0x7F) << shift
        pos += 1
        if byte < 0x80:
            return value, pos
        shift += 7
    raise ValueError("bad varint")


_DATA = b"\x0a"  # tag of Raw.data
_RAW = b"\x1a"  # tag of StreamInput.raw


def encode_pieces(message: Any) -> list[bytes]:
    """`message` as pieces whose concatenation is its encoding; a large `data` is one of them, not copied."""
    if isinstance(message, Raw) and len(message.data) > _LARGE:
        head = _DATA + _length(message.data)
        return [head, message.data, bytes(dataclasses.replace(message, data=b""))]
    if isinstance(message, StreamInput) and message.raw is not None and len(message.raw.data) > _LARGE:
        pieces = encode_pieces(message.raw)
        size = betterproto2.encode_varint(sum(map(len, pieces)))
        return [bytes(dataclasses.replace(message, raw=None)) + _RAW + size + pieces[0], *pieces[1:]]
    return [bytes(message)]


def _length(data: bytes) -> bytes:
    return betterproto2.encode_varint(len(data))


class BadMessage(GRPCError):
    """What arrived is no message that can be read. A server answers with it; to a client it is a broken connection."""


class Codec(CodecBase):
    """betterproto2 messages (ours) and protobuf ones (health, reflection) on one server."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        if isinstance(message, betterproto2.Message):
            return bytes(message)
        return message.SerializeToString()  # type: ignore[no-any-return]

    def decode(self, data: bytes, message_type: Any) -> Any:
        # Both parsers report bad input by whatever the spot raises (EOFError, KeyError, OverflowError, ...).
        try:
            if issubclass(message_type, betterproto2.Message):
                return parse(data, message_type)
            return message_type.FromString(bytes(data))
        except Exception as exc:
            raise BadMessage(Status.INVALID_ARGUMENT, f"the message cannot be parsed: {exc}") from None
