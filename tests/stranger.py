"""A stranger's client on stock grpcio: channel options, messages and call shape of the first version.

It shares nothing with aipod but the schema: the messages are made from the descriptor set that is generated with
aipod's own, the stubs are grpcio's generic ones.

As a program, `python -m tests.stranger ADDRESS METHOD KWARGS`, it calls and waits: something to be killed.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import AsyncIterable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import zstandard
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from tests.conftest import ROOT, Served, alive, children, left_in, run, wait_until

RPCS = ("chaos", "train", "predict", "log")
RETRIES = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "1s",
                "maxBackoff": "30s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["INTERNAL", "UNAVAILABLE", "UNKNOWN"],
            },
        }
    ]
}
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.default_compression_algorithm", int(grpc.Compression.Gzip)),
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 120_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 1),
    ("grpc.service_config", json.dumps(RETRIES)),
    # Not the first version's: without it, grpcio shares a connection between channels of the same target and options.
    ("grpc.use_local_subchannel_pool", 1),
]


def _message_classes() -> tuple[Any, ...]:
    files = descriptor_pb2.FileDescriptorSet.FromString((ROOT / "aipod" / "wire" / "ai.binpb").read_bytes()).file
    classes = message_factory.GetMessages(files, descriptor_pool.DescriptorPool())
    return tuple(classes[f"ai.{name}"] for name in ("Raw", "StreamInput", "Open", "State", "Error"))


Raw, StreamInput, Open, State, Error = _message_classes()


def compressed(kwargs: Any) -> bytes:
    return zstandard.compress(json.dumps(kwargs).encode())


def first_message(rpc: str, kwargs: Any, version: str = "") -> Any:
    """The first message; `kwargs` is put in as it is where it is bytes, else as zstd(JSON)."""
    data = kwargs if isinstance(kwargs, bytes) else compressed(kwargs)
    return Raw(data=data) if rpc == "chaos" else StreamInput(kwargs_json=data, version=version)


def more_messages(rpc: str, pieces: Iterable[bytes]) -> Iterator[Any]:
    for piece in pieces:
        yield Raw(data=piece) if rpc == "chaos" else StreamInput(raw=Raw(data=piece))


SHAPES = ("stream", "frames", "frame", "cut")
PIECE = 32 * 1024


def shaped(data: bytes, shape: str) -> list[bytes]:
    """`data` compressed, in pieces: everything that clients of the first version may send."""
    if shape == "frame":
        return [zstandard.compress(data)]
    frames = [zstandard.compress(data[at : at + PIECE]) for at in range(0, len(data), PIECE)]
    if shape == "frames":
        return frames
    if shape == "stream":
        stream = zstandard.ZstdCompressor().compressobj()
        whole = stream.compress(data) + stream.flush()
        return [whole[at : at + PIECE] for at in range(0, len(whole), PIECE)]
    # Frames (an empty one, and one that decoders skip, among them) cut at any place, at nearly every byte at first.
    skippable = b"\x5a\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    whole = b"".join([zstandard.compress(b""), skippable, *frames, skippable])
    dice, pieces, at = random.Random(shape), list[bytes](), 0
    while at < len(whole):
        size = dice.randrange(4) if len(pieces) < 300 else dice.randrange(100_000)
        pieces.append(whole[at : at + size])
        at += size
    return pieces


@dataclasses.dataclass
class Reply:
    """All that came back from a call."""

    code: grpc.StatusCode
    details: str
    initial: dict[str, Any]
    trailers: dict[str, Any]
    messages: list[bytes]

    @property
    def pongs(self) -> int:
        """How many heartbeats came; they all come before the answer."""
        return len(self.messages) - len(self.answer)

    @property
    def answer(self) -> list[bytes]:
        count = 0
        while count < len(self.messages) and self.messages[count] == b"PONG":
            count += 1
        assert b"PONG" not in self.messages[count:]
        assert all(len(message) != 4 for message in self.messages[count:])
        return self.messages[count:]

    def decompressed(self) -> bytes:
        decoder = zstandard.ZstdDecompressor().decompressobj()
        data = b"".join(map(decoder.decompress, self.answer))
        assert decoder.eof, "the answer is not one whole zstd stream"
        assert not decoder.unused_data
        return data

    def json(self) -> Any:
        """The answer, which must be one message."""
        assert self.code is grpc.StatusCode.OK, f"{self.code}: {self.details}"
        assert len(self.answer) == 1
        return json.loads(self.decompressed())

    @property
    def info(self) -> ErrorInfo:
        status = Status.FromString(self.trailers["grpc-status-details-bin"])
        assert status.code == self.code.value[0]
        assert status.message == self.details
        info = ErrorInfo()
        assert status.details[0].Unpack(info)
        return info


def start(channel: Any, rpc: str, requests: Iterable[Any] | AsyncIterable[Any], **options: Any) -> Any:
    """Start a call on a sync or an aio channel."""
    kind = Raw if rpc == "chaos" else StreamInput
    stub = channel.stream_stream(
        f"/ai.AI/{rpc}", request_serializer=kind.SerializeToString, response_deserializer=Raw.FromString
    )
    return stub(requests, **options)


def open_channel(address: str, *extra: tuple[str, Any]) -> grpc.Channel:
    return grpc.insecure_channel(address, options=[*OPTIONS, *extra])


def reply_of(call: Any) -> Reply:
    """Read a sync call to its end."""
    messages = []
    try:
        messages.extend(raw.data for raw in call)
    except grpc.RpcError as error:
        assert error is call  # noqa: PT017 - a call is its own error
    return Reply(call.code(), call.details(), dict(call.initial_metadata()), dict(call.trailing_metadata()), messages)


def ask_sync(address: str, rpc: str, requests: Sequence[Any], **options: Any) -> Reply:
    with open_channel(address) as channel:
        return reply_of(start(channel, rpc, iter(requests), **options))


async def reply_of_aio(call: Any) -> Reply:
    messages = []
    try:
        async for raw in call:
            messages.append(raw.data)
    except grpc.RpcError as error:
        assert error.code() is await call.code()  # noqa: PT017 - a failed call is looked at, not expected
    return Reply(
        await call.code(),
        await call.details(),
        dict(await call.initial_metadata()),
        dict(await call.trailing_metadata()),
        messages,
    )


def ask_aio(address: str, rpc: str, requests: Sequence[Any], **options: Any) -> Reply:
    async def main() -> Reply:
        async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
            return await reply_of_aio(start(channel, rpc, requests, **options))

    return run(main)


FACES = {"sync": ask_sync, "aio": ask_aio}


def ask(
    address: str,
    method: str,
    kwargs: Any = None,
    pieces: Iterable[bytes] = (),
    *,
    face: str = "sync",
    version: str = "",
    metadata: Sequence[tuple[str, str]] = (),
    timeout: float | None = 60,
) -> Reply:
    """Call `method`, by its own RPC where it has one, as a client of the first version does, and read to the end."""
    rpc = method if method in RPCS else "chaos"
    named = [("x-func-name", method)] if method not in RPCS else []
    requests = [first_message(rpc, kwargs or {}, version), *more_messages(rpc, pieces)]
    return FACES[face](address, rpc, requests, metadata=[*named, *metadata], timeout=timeout)


def served_for_the_module(model: str, directory: Path) -> Iterator[Served]:
    served = Served(f"tests.models_strangers:{model}", directory, (), "127.0.0.1:0")
    try:
        yield served
        below = children(served.process.pid)
        assert served.stop() == 0, served.log_text()
        assert left_in(served.spool) == []
        assert not [pid for pid in below if alive(pid)]
        assert "a bug of aipod" not in served.log_text()
    finally:
        if served.process.poll() is None:
            served.process.kill()
            served.process.communicate()


class Mark:
    """A file in which a model says that it was started, and then that it was cancelled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kwargs = {"mark": str(path)}

    def wait(self, word: str) -> None:
        wait_until(lambda: self.path.exists() and self.path.read_text() == word, seconds=20)


if __name__ == "__main__":
    print(ask(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])), flush=True)
