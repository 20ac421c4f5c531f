"""The codec of gRPC messages: what comes in is bounded before betterproto2 sees it."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.health.v1.health_pb2 import HealthCheckRequest

from aipod.transport.codec import MAX_FIELDS, MAX_UNKNOWN, Codec, check_fields
from aipod.wire.ai import Error, Op, Open, Phase, Raw, State, StreamInput

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
        Codec().decode(data, kind)
    assert caught.value.status is Status.INVALID_ARGUMENT
    return str(caught.value.message)


@pytest.mark.parametrize("message", MESSAGES)
def test_there_and_back(message: Any) -> None:
    codec = Codec()
    assert codec.decode(codec.encode(message, type(message)), type(message)) == message


def test_messages_of_protobuf_s_own_runtime_pass_as_well() -> None:
    codec = Codec()
    data = codec.encode(HealthCheckRequest(service="ai.AI"), HealthCheckRequest)
    assert codec.decode(data, HealthCheckRequest).service == "ai.AI"
    with pytest.raises(GRPCError):
        codec.decode(b"\xff", HealthCheckRequest)


def test_fields_are_counted_nested_ones_included() -> None:
    message = StreamInput(version="7", raw=Raw(data=b"x", open=Open(ticket=b"t", epoch=1), last=True))
    assert check_fields(bytes(message), StreamInput) == 2 + 3 + 2
    assert check_fields(b"", Raw) == 0


@pytest.mark.parametrize("message", MESSAGES)
def test_cut_anywhere_a_message_is_refused_or_has_fewer_fields(message: Any) -> None:
    whole = bytes(message)
    for end in range(len(whole)):
        try:
            fewer = check_fields(whole[:end], type(message))
        except ValueError:
            continue
        assert fewer < check_fields(whole, type(message))


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
    assert Codec().decode(data, Raw).data == b"x"


@pytest.mark.parametrize("number", [15, 20])
def test_a_megabyte_of_two_byte_unknown_fields_is_refused_at_once(number: int) -> None:
    data = field(number, 1) * 500_000
    for attack, kind in ((data, Raw), (field(3, data), StreamInput), (field(3, field(4, data)), StreamInput)):
        began = time.monotonic()
        assert "too many fields" in refusal(attack, kind)
        assert time.monotonic() - began < 0.2  # betterproto2 takes 45 s for it


def test_long_unknown_fields_are_refused_at_once_too() -> None:
    data = field(15, bytes(1 << 17)) * 400
    began = time.monotonic()
    assert "unknown" in refusal(data, Raw)
    assert time.monotonic() - began < 0.2  # betterproto2 takes 10 s for it
    assert "unknown" in refusal(field(4, field(15, bytes(MAX_UNKNOWN // 2))) * 3, Raw)
    assert check_fields(field(15, bytes(MAX_UNKNOWN - 4)), Raw) == 1


def test_the_limit_of_fields_is_exact() -> None:
    assert check_fields(field(2, 1) * MAX_FIELDS, Raw) == MAX_FIELDS
    with pytest.raises(ValueError, match="too many"):
        check_fields(field(2, 1) * (MAX_FIELDS + 1), Raw)


def test_fuzz_what_is_decoded_has_the_types_of_the_schema_and_can_be_encoded() -> None:
    """Invariant: whatever bytes come, decode raises INVALID_ARGUMENT or returns a message as the schema has it."""
    rng = random.Random(21)
    codec = Codec()
    refused = 0
    for _ in range(4000):
        message = rng.choice(MESSAGES)
        data = bytearray(bytes(message)[:300])
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(data) + 1)
            data[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        try:
            decoded = codec.decode(bytes(data), type(message))
        except GRPCError as exc:
            assert exc.status is Status.INVALID_ARGUMENT  # noqa: PT017
            refused += 1
            continue
        check_types(decoded)
        codec.encode(decoded, type(message))
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
