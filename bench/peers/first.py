"""The first version's design, on grpcio.aio: written anew from its description, to be compared with.

The client reads pieces of 32 KiB, compresses them with level 3 on its event loop, as one stream, and sends what comes
out. The server writes that to a file, on its loop; when all is there it decompresses it to a second file, whose path
the model gets; it looks once a second whether the model is done, and says PONG. Nothing is synced.
Its random row is checked against plain grpcio.aio (bench.file), so that this is no caricature.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import zstandard

from bench.models import describe
from bench.peers import common
from bench.peers.grpcio_aio import Raw

PIECE = 32 * 1024
LEVEL = 3
POLL = 1.0
PONG = b"PONG"
METHOD = "/bench.First/predict"


async def _predict(directory: str, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.write(Raw(data=PONG))
    kwargs = json.loads(zstandard.decompress((await anext(requests)).data))
    with tempfile.TemporaryDirectory(dir=directory) as name:
        packed, payload = Path(name, "packed"), Path(name, "payload")
        with packed.open("wb") as file:  # noqa: ASYNC230  on the loop, as it was
            async for message in requests:
                file.write(message.data)
        if _unpack(packed, payload) != kwargs["_aipod_bin_size"]:
            await context.abort(grpc.StatusCode.DATA_LOSS, "not the size that was announced")
        task = asyncio.create_task(asyncio.to_thread(describe, payload))
        while not task.done():
            await asyncio.sleep(POLL)
            await context.write(Raw(data=PONG))
        await context.write(Raw(data=zstandard.compress(json.dumps(task.result()).encode())))


def _unpack(packed: Path, payload: Path) -> int:
    """On the loop as well; the size of what came out."""
    with packed.open("rb") as source, payload.open("wb") as target:
        _, size = zstandard.ZstdDecompressor().copy_stream(source, target, read_size=PIECE, write_size=PIECE)
    return size


async def _serve(directory: str) -> None:
    server = grpc.aio.server()
    service, _, method = METHOD.strip("/").rpartition("/")
    predict = functools.partial(_predict, directory)
    handler = grpc.stream_stream_rpc_method_handler(predict, Raw.FromString, Raw.SerializeToString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    common.announce(port)
    await server.wait_for_termination()


def serve(directory: str) -> None:
    asyncio.run(_serve(directory))


def _pieces(path: str) -> Iterator[bytes]:
    """Messages: the arguments, then the file as one zstd stream."""
    yield zstandard.compress(json.dumps({"_aipod_bin_size": os.stat(path).st_size}).encode())
    compressor = zstandard.ZstdCompressor(level=LEVEL).compressobj()
    with open(path, "rb") as file:
        while data := file.read(PIECE):
            yield from _cut(compressor.compress(data))
    yield from _cut(compressor.flush())


def _cut(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]


async def _call(channel: grpc.aio.Channel, path: str) -> Any:
    call = channel.stream_stream(METHOD, Raw.SerializeToString, Raw.FromString)()

    async def send() -> None:
        for piece in _pieces(path):
            await call.write(Raw(data=piece))
        await call.done_writing()

    sending = asyncio.create_task(send())
    answer = b""
    async for message in call:
        if message.data != PONG:
            answer = message.data
    await sending
    return json.loads(zstandard.decompress(answer))


def file(port: int, path: str) -> common.Report:
    async def run() -> common.Report:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await channel.channel_ready()
            with common.Clock() as clock:
                answer = await _call(channel, path)
            return clock.report() | {"answer": answer, "bytes": answer["size"]}

    return asyncio.run(run())


if __name__ == "__main__":
    common.main(serve, {"file": file})
