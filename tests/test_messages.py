"""The codec of gRPC messages: bounded, and as betterproto2 and protobuf have it."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.health.v1.health_pb2 import HealthCheckRequest

from aipod.config import Config
from aipod.transport.codec import MAX_UNKNOWN, Codec, encode_pieces
from aipod.wire.ai import Error, Op, Open, Phase, Raw, State, StreamInput
from tests import stranger

CODEC = Codec(Config())

MESSAGES = [
    Raw(),
    Raw(data=b"PONG"),
    Raw(data=b"x" * 1000, offset=1 << 40, last=True, digest=b"d" * 16, sync=True),
    Raw(open=Open(ticket=b"t" * 16, op=Op.RESUME, epoch=5, spool="s", have=1, log_have=2, size=0, source=b"s")),
    Raw(open=Open(released=[bytes([n]) * 16 for n in range(256)])),
    Raw(state=State(phase=Phase.FAILED, progress=0.5, log=b"log", error=Error(type="ValueError", message="é"))),
    StreamInput(kwargs_json=b"kw", version="7", raw=Raw(data=b"x", open=Open(ticket=b"t" * 16), last=True)),
]


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def refusal(data: bytes, kind: type) -> str:
    with pytest.raises(GRPCError) as caught:
        CODEC.decode(data, kind)
    assert caught.value.status is Status.INVALID_ARGUMENT
    return str(caught.value.message)


@pytest.mark.parametrize("message", MESSAGES)
def test_there_and_back(message: Any) -> None:
    assert CODEC.decode(CODEC.encode(message, type(message)), type(message)) == message


def test_messages_of_protobuf_s_own_runtime_pass_as_well() -> None:
    data = CODEC.encode(HealthCheckRequest(service="ai.AI"), HealthCheckRequest)
    assert CODEC.decode(data, HealthCheckRequest).service == "ai.AI"
    with pytest.raises(GRPCError):
        CODEC.decode(b"\xff", HealthCheckRequest)


@pytest.mark.parametrize("message", MESSAGES)
def test_cut_anywhere_a_message_is_refused_or_has_fewer_fields(message: Any) -> None:
    whole = bytes(message)
    for end in range(len(whole)):
        try:
            decoded = CODEC.decode(whole[:end], type(message))
        except GRPCError:
            continue
        assert len(bytes(decoded)) <= end


@pytest.mark.parametrize("tail", [b"\x80", b"\xff" * 11, b"\x0f", b"\x0b\x0c", b"\x0a\x05abcd", b"\x0d123", b"\x09123"])
def test_garbage_behind_a_message_is_refused(tail: bytes) -> None:
    refusal(bytes(MESSAGES[2]) + tail, Raw)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (Raw, field(1, 5)),
        (Raw, field(2, b"\x01\x02")),
        (Raw, field(4, 5)),
        (Raw, b"\x0d1234"),
        (StreamInput, field(3, 5)),
        (Raw, field(4, field(9, 7))),
        (StreamInput, field(3, field(4, field(1, 5)))),
    ],
)
def test_a_known_field_has_its_wire_type(kind: type, data: bytes) -> None:
    assert "wire type" in refusal(data, kind)


def test_unknown_fields_are_ignored_as_newer_peers_may_send_them() -> None:
    data = bytes(Raw(data=b"x")) + field(100, b"new") + field(101, 7) + field(4, field(50, b"newer"))
    assert CODEC.decode(data, Raw).data == b"x"


@pytest.mark.parametrize("number", [15, 20])
def test_a_megabyte_of_two_byte_unknown_fields_is_refused_at_once(number: int) -> None:
    data = field(number, 1) * 500_000
    for attack, kind in ((data, Raw), (field(3, data), StreamInput), (field(3, field(4, data)), StreamInput)):
        began = time.thread_time()
        assert "too many fields" in refusal(attack, kind)
        assert time.thread_time() - began < 0.2  # betterproto2 takes 45 s for it


def test_long_unknown_fields_are_refused_at_once_too() -> None:
    data = field(15, bytes(1 << 17)) * 400
    began = time.thread_time()
    assert "unknown" in refusal(data, Raw)
    assert time.thread_time() - began < 0.2  # betterproto2 takes 10 s for it
    assert "unknown" in refusal(field(4, field(15, bytes(MAX_UNKNOWN // 2))) * 3, Raw)
    assert CODEC.decode(field(15, bytes(MAX_UNKNOWN - 4)), Raw) == Raw()


def random_message(rng: random.Random, kind: type, nested: int = 0) -> Any:
    """Any fields with any values, defaults and extremes among them."""
    values: dict[str, Any] = {}
    for each in dataclasses.fields(kind):
        meta = each.metadata["betterproto"]
        if rng.random() < 0.3 or (meta.proto_type == "message" and rng.random() < nested / 4):
            continue
        one: dict[str, Callable[[], Any]] = {
            "bytes": lambda: rng.randbytes(rng.choice([0, 1, 127, 128, 300, 5000])),
            "string": lambda: rng.choice(["", "x", "é😀", "\0", "y" * 200]),
            "uint64": lambda: rng.choice([0, 1, 127, 128, 1 << 40, (1 << 64) - 1]),
            "uint32": lambda: rng.choice([0, 1, 300, (1 << 32) - 1]),
            "bool": lambda: rng.random() < 0.5,
            "float": lambda: rng.choice([0.0, 0.5, -1.25, float("inf")]),
            "enum": lambda: Phase(rng.randrange(8)) if kind is State else Op(rng.randrange(5)),
            "message": lambda number=meta.number: random_message(rng, NESTED[kind, number], nested + 1),  # type: ignore[misc]
        }
        value = one[meta.proto_type]
        values[each.name] = [value() for _ in range(rng.randrange(4))] if meta.repeated else value()
    return kind(**values)


NESTED = {(StreamInput, 3): Raw, (Raw, 4): Open, (Raw, 5): State, (State, 6): Error}


@pytest.mark.parametrize("kind", [StreamInput, Raw, Open, State, Error])
def test_any_message_is_as_betterproto2_and_protobuf_have_it(kind: type) -> None:
    rng = random.Random(kind.__name__)
    theirs = getattr(stranger, kind.__name__)
    for _ in range(500):
        message = random_message(rng, kind)
        pieces = encode_pieces(message)
        data = b"".join(pieces)
        assert data == bytes(message)
        assert CODEC.decode(data, kind) == CODEC.decode(memoryview(data), kind) == kind.parse(data) == message
        parsed = theirs.FromString(data)
        assert CODEC.decode(parsed.SerializeToString(), kind) == message
        assert max(map(len, pieces)) <= max(5000, 4 * 1024 + 400)


def test_what_is_large_is_sent_from_where_it_lies() -> None:
    data = bytes(100_000)
    for message in (Raw(data=data, last=True), StreamInput(version="7", raw=Raw(data=data, offset=5))):
        assert any(piece is data for piece in encode_pieces(message))


def test_a_message_in_two_parts_is_put_together_and_of_two_values_the_last_one_counts() -> None:
    data = field(4, field(1, b"t") + field(3, 5)) + field(2, 7) + field(4, field(3, 6) + field(9, b"r")) + field(2, 8)
    wanted = Raw(offset=8, open=Open(ticket=b"t", epoch=6, released=[b"r"]))
    assert CODEC.decode(data, Raw) == wanted
    assert stranger.Raw.FromString(data).SerializeToString() == bytes(wanted)


def test_numbers_too_long_are_cut_as_protobuf_cuts_them() -> None:
    data = b"\x10" + b"\xff" * 9 + b"\x7f" + field(5, field(10, (1 << 32) + 5))
    theirs = stranger.Raw.FromString(data)
    ours = CODEC.decode(data, Raw)
    assert (ours.offset, ours.state.ttl) == (theirs.offset, theirs.state.ttl) == ((1 << 64) - 1, 5)


def test_text_that_is_no_utf_8_is_refused() -> None:
    assert "utf-8" in refusal(field(2, b"\xff"), StreamInput)


@pytest.mark.parametrize("more", [0, 1])
def test_the_limit_of_fields_is_exact_nested_ones_included(more: int) -> None:
    for data, kind in (
        (field(2, 1) * (512 + more), Raw),
        (field(3, field(4, field(3, 1) * (512 - 2 + more))), StreamInput),
    ):
        if more:
            assert "too many" in refusal(data, kind)
        else:
            CODEC.decode(data, kind)


def test_fuzz_what_is_decoded_has_the_types_of_the_schema_and_can_be_encoded() -> None:
    """Invariant: whatever bytes come, decode raises INVALID_ARGUMENT or returns a message as the schema has it."""
    rng = random.Random(21)
    refused = 0
    for _ in range(4000):
        message = rng.choice(MESSAGES)
        data = bytearray(bytes(message)[:300])
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(data) + 1)
            data[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        try:
            decoded = CODEC.decode(bytes(data), type(message))
        except GRPCError as exc:
            assert exc.status is Status.INVALID_ARGUMENT  # noqa: PT017
            refused += 1
            continue
        check_types(decoded)
        CODEC.encode(decoded, type(message))
    assert 400 < refused < 3600


def check_types(message: Any) -> None:
    kinds = {"bytes": bytes, "string": str, "uint64": int, "uint32": int, "bool": bool, "enum": int, "float": float}
    for each in dataclasses.fields(message):
        meta = each.metadata.get("betterproto")
        if meta is None:
            continue
        value = getattr(message, each.name)
        for item in value if meta.repeated else [value]:
            if meta.proto_type == "message":
                if item is not None:
                    check_types(item)
            elif item is not None:
                assert isinstance(item, kinds[meta.proto_type]), (each.name, item)
