"""A server of stock grpclib on plain asyncio, for tests that show what aipod's transport adds.

`python -m tests.stock_server` listens on a free port of 127.0.0.1 and writes one line, as `aipod serve` does. It takes
ai.AI/chaos with raw bytes for messages, and answers with how many it got.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Any

from grpclib.const import Cardinality, Handler
from grpclib.encoding.base import CodecBase
from grpclib.server import Server

from aipod.wire.ai import Raw


class Betterproto(CodecBase):
    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return bytes(message)

    def decode(self, data: bytes, message_type: Any) -> Any:
        return message_type.parse(data)


class Chaos:
    def __mapping__(self) -> dict[str, Handler]:
        return {"/ai.AI/chaos": Handler(self.chaos, Cardinality.STREAM_STREAM, Raw, Raw)}

    async def chaos(self, stream: Any) -> None:
        await stream.send_message(Raw(data=b"PONG"))
        count = 0
        async for _ in stream:
            count += 1
        await stream.send_message(Raw(data=b"%d" % count))


async def main() -> None:
    server = Server([Chaos()], codec=Betterproto())
    await server.start("127.0.0.1", 0)
    assert server._server is not None
    port = server._server.sockets[0].getsockname()[1]
    print(f"aipod listening on 127.0.0.1:{port}", flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


if __name__ == "__main__":
    asyncio.run(main())
