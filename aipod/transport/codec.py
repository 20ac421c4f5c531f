"""Messages to bytes and back, bounded before they are parsed."""

from __future__ import annotations

from typing import Any

import betterproto2
from grpclib.const import Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError

from aipod.wire.ai import Error, Open, Raw, State, StreamInput

# The widest of our messages has 15 fields, nested ones included twice that; `Open.released` repeats, so a few hundred
# are honest. betterproto2 keeps unknown fields by appending to a bytes object, which is quadratic: 1 MB of two-byte
# ones block the loop for 45 s.
MAX_FIELDS = 512

_NESTED: dict[type, dict[int, type]] = {StreamInput: {3: Raw}, Raw: {4: Open, 5: State}, State: {6: Error}}


def check_fields(data: bytes, kind: type, limit: int = MAX_FIELDS) -> int:
    """How many fields `data` has, those of nested messages included; raises ValueError for more than `limit`.

    Walks tags and lengths only; also raises where `data` is no protobuf.
    """
    return limit - _walk(data, 0, len(data), kind, limit)


def _walk(data: bytes, pos: int, end: int, kind: type, budget: int) -> int:
    nested = _NESTED.get(kind, {})
    while pos < end:
        budget -= 1
        if budget < 0:
            raise ValueError("too many fields in one message")
        tag, pos = _varint(data, pos, end)
        wire_type = tag & 7
        if wire_type == 0:
            _, pos = _varint(data, pos, end)
        elif wire_type == 2:
            length, pos = _varint(data, pos, end)
            if tag >> 3 in nested and pos + length <= end:
                budget = _walk(data, pos, pos + length, nested[tag >> 3], budget)
            pos += length
        elif wire_type in (1, 5):
            pos += 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} is not in use")
    if pos != end:
        raise ValueError("a field is longer than its message")
    return budget


def _varint(data: bytes, pos: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while pos < end and shift < 64:
        byte = data[pos]
        value |= (byte & 0x7F) << shift
        pos += 1
        if byte < 0x80:
            return value, pos
        shift += 7
    raise ValueError("bad varint")


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
                check_fields(data, message_type)
                return message_type.parse(data)
            return message_type.FromString(data)
        except Exception as exc:
            raise GRPCError(Status.INVALID_ARGUMENT, f"the message cannot be parsed: {exc}") from None
