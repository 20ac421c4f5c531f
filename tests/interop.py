"""One small service, on aipod's transport and on stock grpcio, as programs: `python -m tests.interop aipod|grpcio`.

`/ai.AI/chaos` answers every Raw with one that has `offset` bytes and the SHA-256 of what came. Headers ask for more:

x-initial, x-trailing      sent back, as often as they came, in the initial metadata or the trailers; both also as -bin
x-code, x-message-bin      how the call ends, and with which words
x-early                    end it before any initial metadata
x-compress                 of the answers (grpcio only): gzip or deflate; each second one is sent as it is
x-hang                     do not end when the requests have
x-mark                     a file: "begun", then "ended", or "cancelled" if the call was

The program prints its address. A line on its standard input makes it print what there is in it, as JSON (aipod only);
SIGTERM makes it drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.conftest import ROOT

PATH = "/ai.AI/chaos"
ECHOED = ("x-initial", "x-initial-bin", "x-trailing", "x-trailing-bin")
Metadata = list[tuple[str, str | bytes]]


def body(size: int) -> bytes:
    """`size` bytes that are not all alike."""
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]


class Side(Protocol):
    """The server's end of a call, in whichever library and flavor."""

    headers: Metadata

    async def start(self, metadata: Metadata) -> None: ...
    async def receive(self) -> Any: ...
    async def send(self, data: bytes, digest: bytes) -> None: ...
    async def finish(self, code: int, message: str, metadata: Metadata) -> None: ...
    async def hang(self) -> None: ...


class Busy:
    """How many calls there are, and were at once."""

    now = 0
    most = 0


async def behave(side: Side) -> None:
    """One call. Knows no flavor: it only awaits `side`."""
    asked = dict(side.headers)
    mark = Path(str(asked.get("x-mark", "/dev/null")))
    mark.write_text("begun")
    Busy.now += 1
    Busy.most = max(Busy.most, Busy.now)
    try:
        if "x-early" not in asked:
            await side.start([pair for pair in side.headers if pair[0] in ECHOED[:2]])
            while (message := await side.receive()) is not None:
                await side.send(body(message.offset), hashlib.sha256(message.data).digest())
            if "x-hang" in asked:
                await side.hang()
        text = bytes(asked.get("x-message-bin", b"")).decode()
        await side.finish(int(asked.get("x-code", 0)), text, [pair for pair in side.headers if pair[0] in ECHOED[2:]])
    except BaseException:
        mark.write_text("cancelled")
        raise
    else:
        mark.write_text("ended")
    finally:
        Busy.now -= 1


def serve_aipod(settings: dict[str, Any]) -> None:
    import trio
    from grpclib.const import Cardinality, Status
    from multidict import MultiDict

    from aipod.config import Config
    from aipod.transport import bridge
    from aipod.transport.requests import PEER_GONE, TrioHandler, request_timeout, send_message
    from aipod.transport.server import Server
    from aipod.transport.stream import H2Stream
    from aipod.wire.ai import Raw

    class OurSide:
        def __init__(self, stream: Any) -> None:
            self.stream = stream
            self.headers: Metadata = list(stream.metadata.items())

        async def start(self, metadata: Metadata) -> None:
            await bridge.inline(functools.partial(self.stream.send_initial_metadata, metadata=MultiDict(metadata)))

        async def receive(self) -> Any:
            return await bridge.inline(self.stream.recv_message)

        async def send(self, data: bytes, digest: bytes) -> None:
            await bridge.inline(send_message, self.stream, Raw(data=data, digest=digest))

        async def finish(self, code: int, message: str, metadata: Metadata) -> None:
            trailers = {"status": Status(code), "status_message": message, "metadata": MultiDict(metadata)}
            await bridge.inline(functools.partial(self.stream.send_trailing_metadata, **trailers))

        async def hang(self) -> None:
            await trio.sleep_forever()

    async def chaos(stream: Any) -> None:
        side = OurSide(stream)
        timeout = request_timeout(stream)
        with trio.move_on_after(float("inf") if timeout is None else timeout) as scope:
            with contextlib.suppress(*PEER_GONE):
                await behave(side)
        if scope.cancelled_caught:
            await side.finish(Status.DEADLINE_EXCEEDED.value, "too late", [])

    class Service:
        def __mapping__(self) -> dict[str, TrioHandler]:
            return {PATH: TrioHandler(chaos, Cardinality.STREAM_STREAM, Raw, Raw)}

    def inside(server: Server, loop: Any) -> dict[str, int]:
        gc.collect()
        todo, tasks = [trio.lowlevel.current_root_task()], 0
        while todo:
            tasks += 1
            todo += [task for nursery in todo.pop().child_nurseries for task in nursery.child_tasks]
        protocols = list(server.protocols)
        return {
            "busy": Busy.now,
            "most": Busy.most,
            "connections": len(protocols),
            "streams": sum(len(protocol.processor.streams) for protocol in protocols),
            "stream objects": sum(isinstance(thing, H2Stream) for thing in gc.get_objects()),
            "calls": sum(len(protocol.handler._tasks) + len(protocol.handler._cancelled) for protocol in protocols),
            "asyncio tasks": len(asyncio.all_tasks(loop)),
            "trio tasks": tasks,
            # Of connections that were closed: each may linger.
            "timers": len([timer for timer in loop._timers if not timer.cancelled()]),
            "dead timers": len([timer for timer in loop._timers if timer.cancelled()]),
        }

    # It logs a traceback when a call is reset just as its handler ends.
    logging.getLogger("grpclib.server").setLevel(logging.CRITICAL)

    async def main() -> None:
        config = Config(**settings)
        async with bridge.open_loop() as loop, trio.open_nursery() as calls:

            async def start() -> tuple[Server, int]:
                server = Server([Service()], config, bridge.Spawner(calls))
                with socket.create_server(("127.0.0.1", 0), backlog=1024) as sock:
                    await server.listen([sock])
                    return server, sock.getsockname()[1]

            server, port = await bridge.to_trio(start)()
            async with trio.open_nursery() as nursery:

                async def answer() -> None:
                    async for _ in trio.lowlevel.FdStream(os.dup(0)):
                        print(json.dumps(inside(server, loop)), flush=True)

                with trio.open_signal_receiver(signal.SIGTERM) as signals:
                    nursery.start_soon(answer)
                    print(f"127.0.0.1:{port}", flush=True)
                    await anext(signals)
                    server.stop_listening()
                    while server.protocols:
                        await trio.sleep(0.01)
                nursery.cancel_scope.cancel()

    trio.run(main)


def serve_grpcio() -> None:
    import grpc

    from tests.stranger import Raw

    codes = {code.value[0]: code for code in grpc.StatusCode}

    class TheirSide:
        def __init__(self, context: Any) -> None:
            self.context = context
            self.headers: Metadata = [(name, value) for name, value in context.invocation_metadata()]
            self.sent = 0

        async def start(self, metadata: Metadata) -> None:
            algorithm = dict(self.headers).get("x-compress")
            if algorithm:
                self.context.set_compression(getattr(grpc.Compression, str(algorithm).title()))
            await self.context.send_initial_metadata(metadata)

        async def receive(self) -> Any:
            message = await self.context.read()
            return None if message is grpc.aio.EOF else message

        async def send(self, data: bytes, digest: bytes) -> None:
            if self.sent % 2:
                self.context.disable_next_message_compression()
            self.sent += 1
            await self.context.write(Raw(data=data, digest=digest))

        async def finish(self, code: int, message: str, metadata: Metadata) -> None:
            self.context.set_trailing_metadata(metadata)
            self.context.set_code(codes[code])
            self.context.set_details(message)

        async def hang(self) -> None:
            await asyncio.Event().wait()

    async def chaos(_: Any, context: Any) -> None:
        await behave(TheirSide(context))

    async def main() -> None:
        server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(
            chaos, request_deserializer=Raw.FromString, response_serializer=Raw.SerializeToString
        )
        service, method = PATH.strip("/").split("/")
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        print(f"127.0.0.1:{port}", flush=True)
        await stop.wait()
        await server.stop(30)
        # grpcio says that it has stopped before its last call has, which would leave a traceback when it is cancelled.
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=5)

    asyncio.run(main())


class Child:
    """A server of this module in a process of its own."""

    draining = False

    def __init__(self, which: str, **settings: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.interop", which, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, self.process.communicate()

    def inside(self) -> dict[str, int]:
        """What there is in it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]

    def drain(self) -> None:
        """Have it end as soon as its calls have."""
        if not self.draining:
            self.process.terminate()
        self.draining = True

    def stop(self) -> str:
        """Drain it; what it had to say."""
        self.drain()
        _, errors = self.process.communicate(timeout=40)
        assert self.process.returncode == 0, errors
        return errors


@contextlib.contextmanager
def child(which: str, **settings: Any) -> Iterator[Child]:
    """A server that must end cleanly and silently."""
    server = Child(which, **settings)
    try:
        yield server
        errors = server.stop()
        assert not errors, errors
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "grpcio":
        serve_grpcio()
    else:
        serve_aipod(json.loads(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
