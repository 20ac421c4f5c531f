"""Messages to bytes and back, bounded and checked as they are parsed.

The dataclasses are betterproto2's; their bytes are made and read here, in one pass: for a message of 1 KiB betterproto2
takes three to five times as long, for one of 1 MiB it copies the payload five times, and unknown fields cost it
quadratic time (1 MB of them blocks the loop for 45 s).
"""

from __future__ import annotations

import dataclasses
import struct
import typing
from typing import Any, NamedTuple, TypeVar

import betterproto2
from grpclib.const import Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError

from aipod.config import KIB, Config
from aipod.wire.ai import Error, Op, Open, Phase, Raw, State, StreamInput

# Fields may be added to the schema, so unknown ones are honest too; they are skipped.
MAX_UNKNOWN = 64 * 1024

# What is longer is sent from where it lies; to join what is shorter costs less than to write it by itself.
_LARGE = 4 * KIB
# Bytes of a field that is a view of the message that it came in; to copy a shorter one costs less.
_VIEWED = 64 * KIB
_FLOAT = struct.Struct("<f")
_UINT64 = (1 << 64) - 1
# Wire types (https://protobuf.dev/programming-guides/encoding/#structure).
_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
_FIXED = {_VARINT: 0, _I64: 8, _I32: 4}  # bytes behind the tag, and behind the number

_WIRE_TYPES = {
    **dict.fromkeys(("uint32", "uint64", "bool", "enum"), _VARINT),
    **dict.fromkeys(("bytes", "string", "message"), _LEN),
    "float": _I32,
}

_BYTES = [bytes([number]) for number in range(0x80)]

M = TypeVar("M", bound=betterproto2.Message)


class _Field(NamedTuple):
    """One field of a message."""

    name: str
    number: int
    kind: str  # betterproto2's name of its type
    wire_type: int
    tag: bytes
    present: bool  # sent although it has its default value, unless it is None
    repeated: bool
    of: Any  # the class of an enum or message


def _layout(message: type) -> list[_Field]:
    hints = typing.get_type_hints(message)
    layout = []
    for field in dataclasses.fields(message):
        meta = field.metadata["betterproto"]
        wire_type = _WIRE_TYPES[meta.proto_type]
        hint = hints[field.name]
        of = next((kind for kind in typing.get_args(hint) or (hint,) if isinstance(kind, type)), None)
        tag = betterproto2.encode_varint(meta.number << 3 | wire_type)
        layout.append(
            _Field(field.name, meta.number, meta.proto_type, wire_type, tag, meta.optional, meta.repeated, of)
        )
    return layout


_LAYOUT: dict[type, list[_Field]] = {kind: _layout(kind) for kind in (StreamInput, Raw, Open, State, Error)}
_MEMBERS = {kind: {member.value: member for member in kind} for kind in (Op, Phase)}
_BY_NUMBER = {kind: {field.number: field for field in layout} for kind, layout in _LAYOUT.items()}


def encode_pieces(message: betterproto2.Message) -> list[bytes]:
    """`message` as pieces whose concatenation is its encoding; what is large is one of them, not copied."""
    pieces = _encode(message)
    if sum(map(len, pieces)) <= _LARGE:
        return [b"".join(pieces)]
    joined: list[bytes] = []
    small = b""
    for piece in pieces:
        if len(piece) > _LARGE:
            joined += [small, piece] if small else [piece]
            small = b""
        else:
            small += piece
    return [*joined, small] if small or not joined else joined


def _encode(message: betterproto2.Message) -> list[bytes]:
    """The encoding of `message`, in pieces."""
    pieces: list[bytes] = []
    values = vars(message)
    for name, _, kind, wire_type, tag, present, repeated, _ in _LAYOUT[type(message)]:
        value = values[name]
        if value is None or not (present or value):
            continue
        for item in value if repeated else (value,):
            if wire_type == _VARINT:
                pieces += tag, _encode_varint(int(item))
            elif kind == "float":
                pieces += tag, _FLOAT.pack(item)
            elif kind == "message":
                nested = _encode(item)
                pieces += tag, _encode_varint(sum(map(len, nested))), *nested
            else:
                data = item.encode() if kind == "string" else item
                pieces += tag, _encode_varint(len(data)), data
    return pieces


def _encode_varint(value: int) -> bytes:
    if 0 <= value < 0x80:
        return _BYTES[value]
    if not 0 < value <= _UINT64:
        raise ValueError(f"{value} is no number of 64 bits")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def parse(data: bytes | memoryview, kind: type[M], max_fields: int) -> M:
    """The message of type `kind` in `data`. A long field of bytes may be a view of `data` (`inbox.recycle`).

    Raises ValueError for more than `max_fields` fields, those of nested messages included; for more than `MAX_UNKNOWN`
    bytes in unknown fields, which are dropped; where a field has not its wire type; and where `data` is no protobuf.
    """
    return _Parser(data, max_fields).message(0, len(data), kind, {})


class _Parser:
    """One pass over a message; counts down what it may still have."""

    def __init__(self, data: bytes | memoryview, max_fields: int) -> None:
        self._data = data
        self._fields = max_fields
        self._unknown = MAX_UNKNOWN

    def message(self, pos: int, end: int, kind: type[M], values: dict[str, Any]) -> M:
        """The message between `pos` and `end`, on top of `values`."""
        data, known = self._data, _BY_NUMBER[kind]
        while pos < end:
            self._fields -= 1
            if self._fields < 0:
                raise ValueError("too many fields in one message")
            start = pos
            tag, pos = (data[pos], pos + 1) if data[pos] < 0x80 else _varint(data, pos, end)
            field, wire_type, number = known.get(tag >> 3), tag & 7, 0
            if field is not None and wire_type != field.wire_type:
                raise ValueError(f"field {tag >> 3} of {kind.__name__} has wire type {wire_type}")
            if wire_type in (_VARINT, _LEN):
                short = pos < end and data[pos] < 0x80
                number, pos = (data[pos], pos + 1) if short else _varint(data, pos, end)
            elif wire_type not in (_I32, _I64):
                raise ValueError(f"wire type {wire_type} is not in use")
            begin = pos
            pos += number if wire_type == _LEN else _FIXED[wire_type]
            if pos > end:
                raise ValueError("a field is longer than its message")
            if field is None:
                self._unknown -= pos - start
                if self._unknown < 0:
                    raise ValueError("too many bytes in unknown fields")
            elif field.repeated:
                values.setdefault(field.name, []).append(self._convert(field, number, begin, pos, None))
            else:
                values[field.name] = self._convert(field, number, begin, pos, values.get(field.name))
        return kind(**values)

    def _convert(self, field: _Field, number: int, begin: int, end: int, before: Any) -> Any:
        kind = field.kind
        if kind == "uint64":
            return number
        if kind == "bytes":
            piece = self._data[begin:end]
            # What is most of a message is not copied, and keeps the message: of less, little would keep much.
            if isinstance(piece, memoryview) and len(piece) >= _VIEWED and 2 * len(piece) > len(self._data):
                return piece
            return bytes(piece)
        if kind == "string":
            return str(self._data[begin:end], "utf-8")
        if kind == "bool":
            return number != 0
        if kind == "message":  # one that comes in parts is put together
            parts = {} if before is None else {each.name: getattr(before, each.name) for each in _LAYOUT[field.of]}
            return self.message(begin, end, field.of, parts)
        if kind == "float":
            return _FLOAT.unpack(self._data[begin:end])[0]
        if kind == "enum":
            return _MEMBERS[field.of].get(number) or field.of(number & 0xFFFFFFFF)
        return number & 0xFFFFFFFF


def _varint(data: bytes | memoryview, pos: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while pos < end and shift < 64:
        byte = data[pos]
        value |= (byte & 0x7F) << shift
        pos += 1
        if byte < 0x80:
            return value & _UINT64, pos
        shift += 7
    raise ValueError("bad varint")


class BadMessage(GRPCError):
    """What arrived is no message that can be read. A server answers with it; to a client it is a broken connection."""


class Codec(CodecBase):
    """betterproto2 messages (ours) and protobuf ones (health, reflection) on one server."""

    __content_subtype__ = "proto"

    def __init__(self, config: Config) -> None:
        self._max_fields = config.max_fields

    def encode(self, message: Any, message_type: Any) -> bytes:
        if isinstance(message, betterproto2.Message):
            return b"".join(encode_pieces(message))
        return message.SerializeToString()  # type: ignore[no-any-return]

    def decode(self, data: bytes, message_type: Any) -> Any:
        # Parsers report bad input by whatever the spot raises.
        try:
            if message_type in _LAYOUT:
                return parse(data, message_type, self._max_fields)
            return message_type.FromString(bytes(data))
        except Exception as exc:
            raise BadMessage(Status.INVALID_ARGUMENT, f"the message cannot be parsed: {exc}") from None
