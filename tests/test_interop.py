"""gRPC's interoperability cases for bidirectional streams, with stock grpcio on either end.

https://github.com/grpc/grpc/blob/master/doc/interop-test-descriptions.md. Each runs with grpcio's two faces against
aipod's transport, with aipod's client against grpcio's server, and with grpcio against itself, which shows that the
test asks for nothing but what stock programs do.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import queue
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc
from grpclib.client import Stream
from grpclib.const import Cardinality
from grpclib.exceptions import GRPCError
from grpclib.metadata import Deadline

from aipod.config import Config
from aipod.transport.channel import Channel, open_call, read_status, reset, send_message
from aipod.transport.codec import BadMessage
from aipod.wire.ai import Raw as OurRaw
from tests import stranger
from tests.conftest import FIRST, Serve, run, wait_until
from tests.interop import PATH, Child, Metadata, body, child
from tests.stranger import Raw, start

OK = 0
CODES = {code.value[0]: code for code in grpc.StatusCode}
MIB = 1024 * 1024
# What a message may have on either side in the tests of limits; grpcio's default is as much.
LIMIT = 4 * MIB


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request: `up` bytes, to be answered with `down`."""

    up: int
    down: int


@dataclasses.dataclass
class Reply:
    code: int
    message: str
    initial: Metadata
    trailers: Metadata
    messages: list[tuple[bytes, bytes]]

    def check(self, asks: Sequence[Ask]) -> None:
        """Everything arrived as it was sent, both ways."""
        assert (self.code, self.message) == (OK, "")
        assert self.messages == [(body(ask.down), hashlib.sha256(body(ask.up)).digest()) for ask in asks]


# grpcio would else share connections between channels, and refuse on its own to send what is too long.
OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]


def stock_channel(address: str) -> grpc.Channel:
    return grpc.insecure_channel(address, options=OPTIONS)


def theirs(items: Any) -> Metadata:
    return [(name, value) for name, value in items or ()]


class Sync:
    """grpcio's threaded face."""

    def call(
        self,
        address: str,
        asks: Sequence[Ask] = (),
        *,
        metadata: Metadata = (),  # type: ignore[assignment]
        lockstep: bool = False,
        path: str = PATH,
        timeout: float | None = 30,
        compression: Any = None,
    ) -> Reply:
        turn: queue.Queue[None] = queue.Queue()

        def requests() -> Iterator[Any]:
            for n, ask in enumerate(asks):
                if lockstep and n:
                    turn.get(timeout=30)
                yield Raw(data=body(ask.up), offset=ask.down)
            if lockstep and asks:
                turn.get(timeout=30)

        with stock_channel(address) as channel:
            stub = channel.stream_stream(path, Raw.SerializeToString, Raw.FromString)
            call = stub(requests(), metadata=metadata, timeout=timeout, compression=compression)
            messages = []
            with contextlib.suppress(grpc.RpcError):
                for message in call:
                    messages.append((message.data, message.digest))
                    turn.put(None)
            return Reply(
                call.code().value[0],
                call.details() or "",
                theirs(call.initial_metadata()),
                theirs(call.trailing_metadata()),
                messages,
            )


class Aio:
    """grpcio's asyncio face."""

    def call(
        self,
        address: str,
        asks: Sequence[Ask] = (),
        *,
        metadata: Metadata = (),  # type: ignore[assignment]
        lockstep: bool = False,
        path: str = PATH,
        timeout: float | None = 30,
        compression: Any = None,
    ) -> Reply:
        async def main() -> Reply:
            async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
                stub = channel.stream_stream(path, Raw.SerializeToString, Raw.FromString)
                call = stub(metadata=metadata, timeout=timeout, compression=compression)
                messages = []

                async def read() -> None:
                    message = await call.read()
                    if message is not grpc.aio.EOF:
                        messages.append((message.data, message.digest))

                # grpcio says the last where the call ends while its half-close is under way.
                with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError, cygrpc.ExecuteBatchError):
                    for ask in asks:
                        await call.write(Raw(data=body(ask.up), offset=ask.down))
                        if lockstep:
                            await read()
                    await call.done_writing()
                    while not call.done() and len(messages) < len(asks):
                        await read()
                return Reply(
                    (await call.code()).value[0],
                    await call.details() or "",
                    theirs(await call.initial_metadata()),
                    theirs(await call.trailing_metadata()),
                    messages,
                )

        return run(main)


def new_call(
    channel: Channel,
    metadata: Metadata = (),  # type: ignore[assignment]
    path: str = PATH,
    timeout: float | None = None,
) -> Stream[Any, Any]:
    deadline = None if timeout is None else Deadline.from_timeout(timeout)
    return channel.request(path, Cardinality.STREAM_STREAM, OurRaw, OurRaw, metadata=list(metadata), deadline=deadline)


@contextlib.asynccontextmanager
async def open_ours(address: str, **settings: Any) -> AsyncIterator[Channel]:
    channel = Channel(address, Config(**settings))
    try:
        yield channel
    finally:
        await channel.aclose()


async def converse(channel: Channel, asks: Sequence[Ask], lockstep: bool = False, **options: Any) -> Reply:
    """One call of aipod's transport, read to its end."""
    messages: list[tuple[bytes, bytes]] = []
    received = asyncio.Event()
    code, text = OK, ""
    stream = new_call(channel, **options)

    async def send() -> None:
        for n, ask in enumerate(asks):
            while lockstep and len(messages) < n:
                await received.wait()
                received.clear()
            await send_message(stream, OurRaw(data=body(ask.up), offset=ask.down))
        await stream.end()

    try:
        async with stream:
            await open_call(stream)
            sender = asyncio.create_task(send())
            try:
                while (message := await stream.recv_message()) is not None:
                    messages.append((message.data, message.digest))
                    received.set()
                await read_status(stream)
            finally:
                sender.cancel()
                await asyncio.wait([sender])
                if not sender.cancelled():
                    sender.exception()
                reset(stream)
    except TimeoutError:
        code = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    except GRPCError as exc:
        code, text = exc.status.value, exc.message or ""
    return Reply(
        code,
        text,
        list((stream.initial_metadata or {}).items()),
        list((stream.trailing_metadata or {}).items()),
        messages,
    )


class Ours:
    """aipod's transport."""

    def call(self, address: str, asks: Sequence[Ask] = (), **options: Any) -> Reply:
        async def main() -> Reply:
            async with open_ours(address) as channel:
                return await converse(channel, asks, **options)

        return run(main)


FACES: dict[str, Any] = {"sync": Sync(), "aio": Aio(), "ours": Ours()}
# On every Python each side of ours, against grpcio; the rest once: the other face, ours with ours, and grpcio alone,
# which shows that a test is right.
PAIRS = [("sync", "aipod"), ("ours", "grpcio")]
if FIRST:
    PAIRS += [("aio", "aipod"), ("ours", "aipod"), ("sync", "grpcio")]
STOCK_CLIENTS = pytest.mark.parametrize(
    "pair", [pair for pair in PAIRS if pair[0] != "ours"], indirect=True, ids="-".join
)
OUR_CLIENT = pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[0] == "ours"], indirect=True, ids="-".join)


@dataclasses.dataclass
class Pair:
    """A client's face and a server."""

    face: str
    which: str
    server: Child

    @property
    def address(self) -> str:
        return self.server.address

    def call(self, *args: Any, **options: Any) -> Reply:
        reply = FACES[self.face].call(self.address, *args, **options)
        assert isinstance(reply, Reply)
        return reply


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Child]]:
    with child("aipod", max_message=LIMIT) as aipod, child("grpcio") as grpcio:
        yield {"aipod": aipod, "grpcio": grpcio}


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest, servers: dict[str, Child]) -> Iterator[Pair]:
    """Client and server; afterwards nothing of the client's is left in the server."""
    face, which = request.param
    yield Pair(face, which, servers[which])
    if which == "aipod":
        wait_until(lambda: empty(servers[which]))


def empty(server: Child) -> bool:
    inside = server.inside()
    return not any(inside[name] for name in ("busy", "connections", "streams", "stream objects", "calls"))


# ---- messages


def test_large_messages(pair: Pair) -> None:
    asks = [Ask(271828, 314159)]
    pair.call(asks).check(asks)


PING_PONG = [Ask(27182, 31415), Ask(8, 9), Ask(1828, 2653), Ask(45904, 58979)]


@pytest.mark.parametrize("lockstep", [True, False], ids=["ping_pong", "streaming"])
def test_messages_in_both_directions(pair: Pair, lockstep: bool) -> None:
    pair.call(PING_PONG, lockstep=lockstep).check(PING_PONG)


def test_an_empty_stream(pair: Pair) -> None:
    pair.call().check([])


def test_empty_messages(pair: Pair) -> None:
    asks = [Ask(0, 0)] * 5
    pair.call(asks).check(asks)


def test_messages_around_the_sizes_of_frames_and_windows(pair: Pair) -> None:
    asks = [Ask(size + more, size - more) for size in (16384, 65535, 256 * 1024, 512 * 1024) for more in (-5, 0, 1)]
    pair.call(asks).check(asks)


def test_many_megabytes_in_lockstep_and_beside_one_another(pair: Pair) -> None:
    asks = [Ask(LIMIT - 1000, LIMIT - 1000)] * 4
    pair.call(asks, lockstep=True).check(asks)
    pair.call(asks).check(asks)


# ---- metadata and status

TEXTS = ["initial value", "a=b; c, d", "%41", "~!@#$"]
BINS = [b"", b"\0", b"\xab\xab\xab", b"\xff\xfe\xfd\xfc", bytes(range(256))]


def test_custom_metadata(pair: Pair) -> None:
    sent: Metadata = []
    for where in ("x-initial", "x-trailing"):
        sent += [(where, text) for text in TEXTS] + [(f"{where}-bin", value) for value in BINS]
    reply = pair.call([Ask(1, 1)], metadata=sent)
    reply.check([Ask(1, 1)])
    for where, got in (("x-initial", reply.initial), ("x-trailing", reply.trailers)):
        assert [value for name, value in got if name == where] == TEXTS
        assert [value for name, value in got if name == f"{where}-bin"] == BINS


def test_metadata_of_several_kilobytes(pair: Pair) -> None:
    long = "0123456789" * 300
    # With a message: of a call that ends at once grpcio's asyncio face may lose the initial metadata.
    reply = pair.call([Ask(1, 1)], metadata=[("x-initial", long), ("x-trailing", long)])
    assert ("x-initial", long) in reply.initial
    assert ("x-trailing", long) in reply.trailers


WORDS = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("text", ["", "test status message", "100 % über", WORDS], ids=["none", "ascii", "utf8", "all"])
def test_status_code_and_message(pair: Pair, text: str, early: bool) -> None:
    metadata: Metadata = [("x-code", "2"), ("x-message-bin", text.encode()), ("x-trailing", "kept")]
    reply = pair.call(metadata=[*metadata, ("x-early", "yes")] if early else metadata)
    assert (reply.code, reply.message) == (2, text)
    assert ("x-trailing", "kept") in reply.trailers


@pytest.mark.parametrize("code", range(1, 17))
def test_every_status_code_after_messages(pair: Pair, code: int) -> None:
    reply = pair.call(PING_PONG, metadata=[("x-code", str(code)), ("x-message-bin", b"why")])
    assert (reply.code, reply.message) == (code, "why")
    assert len(reply.messages) == len(PING_PONG)


def test_an_early_end_while_the_client_still_sends(pair: Pair) -> None:
    """The status reaches a client that is far from done."""
    if pair.face == "aio":
        pytest.skip("grpcio's asyncio face may lose the status of a call that ends while it sends (grpc/grpc#36066)")
    metadata: Metadata = [("x-early", "yes"), ("x-code", "9"), ("x-message-bin", b"enough")]
    reply = pair.call([Ask(1_000_000, 0)] * 20, metadata=metadata)
    assert (reply.code, reply.message, reply.messages) == (9, "enough", [])


@pytest.mark.parametrize("path", ["/ai.AI/nothing", "/ai.Nothing/chaos"], ids=["method", "service"])
def test_what_is_not_there_is_unimplemented(pair: Pair, path: str) -> None:
    # Without a message: grpcio's asyncio face may lose the status of a call that ends while it sends (grpc/grpc#36066).
    assert pair.call([], path=path).code == grpc.StatusCode.UNIMPLEMENTED.value[0]
    assert pair.call([Ask(1, 1)]).code == OK


# ---- cancellation and deadlines


# With x-hang: to grpcio's asyncio server a cancelled call may look for a moment as if its requests had just ended.


def says(mark: Path, word: str) -> None:
    wait_until(lambda: mark.exists() and mark.read_text() == word, seconds=20)


async def told(mark: Path, word: str) -> None:
    while not mark.exists() or mark.read_text() != word:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("pair", [("sync", "aipod"), ("sync", "grpcio")], indirect=True, ids="-".join)
@pytest.mark.parametrize("after", [0, 1], ids=["begin", "first_response"])
def test_cancel_of_a_stock_client(pair: Pair, after: int, tmp_path: Path) -> None:
    requests: queue.Queue[Any] = queue.Queue()
    mark = tmp_path / "mark"
    with stock_channel(pair.address) as channel:
        call = start(channel, "chaos", iter(requests.get, None), metadata=[("x-hang", "yes"), ("x-mark", str(mark))])
        call.initial_metadata()
        for ask in PING_PONG[:after]:
            requests.put(Raw(data=body(ask.up), offset=ask.down))
            assert next(call).data == body(ask.down)
        says(mark, "begun")
        call.cancel()
        assert call.code() is grpc.StatusCode.CANCELLED
        requests.put(None)
        says(mark, "cancelled")


@OUR_CLIENT
@pytest.mark.parametrize("after", [0, 1], ids=["begin", "first_response"])
@pytest.mark.parametrize("how", ["reset", "task"])
def test_cancel_of_our_client(pair: Pair, after: int, how: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    ready = asyncio.Event()

    async def call(channel: Channel) -> None:
        async with new_call(channel, [("x-hang", "yes"), ("x-mark", str(mark))]) as stream:
            try:
                await open_call(stream)
                await stream.recv_initial_metadata()
                for ask in PING_PONG[:after]:
                    await send_message(stream, OurRaw(data=body(ask.up), offset=ask.down))
                    assert (await stream.recv_message()).data == body(ask.down)
                ready.set()
                if how == "task":
                    await stream.recv_message()
            finally:
                reset(stream)

    async def main() -> None:
        async with open_ours(pair.address) as channel:
            task = asyncio.create_task(call(channel))
            await ready.wait()
            if how == "task":
                task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() == (how == "task")
            await told(mark, "cancelled")
            assert (await converse(channel, PING_PONG)).code == OK  # on the same connection

    run(main)


def test_timeout_on_a_sleeping_server(pair: Pair, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    reply = pair.call([Ask(27182, 3)], metadata=[("x-hang", "yes"), ("x-mark", str(mark))], timeout=2)
    assert reply.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert reply.messages == [(body(3), hashlib.sha256(body(27182)).digest())]
    says(mark, "cancelled")


def test_a_timeout_that_has_passed_already(pair: Pair) -> None:
    assert pair.call([Ask(1, 1)], timeout=-1).code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


# ---- compression and limits

COMPRESSIONS = pytest.mark.parametrize("algorithm", ["gzip", "deflate"])


@STOCK_CLIENTS
@COMPRESSIONS
def test_client_compressed(pair: Pair, algorithm: str) -> None:
    compression = getattr(grpc.Compression, algorithm.title())
    asks = [*PING_PONG, Ask(271828, 314159), Ask(0, 0), Ask(3 * MIB, 1)]
    pair.call(asks, compression=compression).check(asks)


@COMPRESSIONS
@pytest.mark.parametrize("pair", [("ours", "grpcio"), ("sync", "grpcio")], indirect=True, ids="-".join)
def test_server_compressed(pair: Pair, algorithm: str) -> None:
    asks = [*PING_PONG, Ask(271828, 314159), Ask(0, 0), Ask(1, 3 * MIB)]
    pair.call(asks, metadata=[("x-compress", algorithm)]).check(asks)


@STOCK_CLIENTS
@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip], ids=["plain", "gzip"])
def test_a_request_over_the_limit(pair: Pair, compression: grpc.Compression) -> None:
    if pair.face == "aio":
        pytest.skip("grpcio's asyncio face may lose the status of a call that ends while it sends (grpc/grpc#36066)")
    reply = pair.call([Ask(1, 1), Ask(LIMIT + 1000, 1)], compression=compression)
    assert reply.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


@OUR_CLIENT
def test_a_request_of_ours_over_the_servers_limit(pair: Pair) -> None:
    async def main() -> None:
        async with open_ours(pair.address) as channel:
            reply = await converse(channel, [Ask(5 * MIB, 1)])
            assert reply.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            (await converse(channel, PING_PONG)).check(PING_PONG)

    run(main)


@OUR_CLIENT
@pytest.mark.parametrize("compress", ["", "gzip", "deflate"])
def test_an_answer_over_our_limit(pair: Pair, compress: str) -> None:
    if compress and pair.which == "aipod":
        pytest.skip("aipod's server never compresses")

    async def main() -> None:
        async with open_ours(pair.address, max_message=2 * MIB) as channel:
            async with new_call(channel, [("x-compress", compress)] if compress else []) as stream:
                await send_message_and_open(stream, OurRaw(offset=2 * MIB + 1000))
                with pytest.raises(BadMessage) as caught:
                    await stream.recv_message()
                assert caught.value.status.name == "RESOURCE_EXHAUSTED"
                reset(stream)
            (await converse(channel, PING_PONG)).check(PING_PONG)

    run(main)


async def send_message_and_open(stream: Stream[Any, Any], message: OurRaw) -> None:
    await open_call(stream)
    await send_message(stream, message)


# ---- connections


@OUR_CLIENT
def test_many_calls_of_ours_share_a_connection(pair: Pair) -> None:
    async def main() -> None:
        async with open_ours(pair.address) as channel:
            replies = await asyncio.gather(*(converse(channel, PING_PONG) for _ in range(100)))
            for reply in replies:
                reply.check(PING_PONG)
            if pair.which == "aipod":
                assert pair.server.inside()["connections"] == 1

    run(main)


def test_many_calls_of_a_stock_client_share_a_connection(servers: dict[str, Child]) -> None:
    async def main() -> None:
        async with grpc.aio.insecure_channel(servers["aipod"].address) as channel:
            stub = channel.stream_stream(PATH, Raw.SerializeToString, Raw.FromString)

            async def call() -> list[bytes]:
                requests = [Raw(data=body(ask.up), offset=ask.down) for ask in PING_PONG]
                return [message.data async for message in stub(requests)]

            answers = await asyncio.gather(*(call() for _ in range(100)))
            assert answers == [[body(ask.down) for ask in PING_PONG]] * 100
            assert servers["aipod"].inside()["connections"] == 1

    run(main)


@pytest.mark.parametrize("face", ["aio", "ours"])
def test_calls_beyond_max_streams_go_one_after_the_other(face: str) -> None:
    with child("aipod", max_streams=1) as server:

        async def main() -> None:
            if face == "ours":
                async with open_ours(server.address) as ours:
                    (await converse(ours, [Ask(1, 1)])).check([Ask(1, 1)])
                    for reply in await asyncio.gather(*(converse(ours, PING_PONG) for _ in range(15))):
                        reply.check(PING_PONG)
                return
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub = channel.stream_stream(PATH, Raw.SerializeToString, Raw.FromString)

                async def call() -> list[bytes]:
                    return [message.data async for message in stub([Raw(data=b"x", offset=100)])]

                assert await call() == [body(100)]
                assert await asyncio.gather(*(call() for _ in range(15))) == [[body(100)]] * 15

        run(main)
        assert server.inside()["most"] == 1


@pytest.mark.parametrize(("face", "which"), PAIRS, ids=map("-".join, PAIRS))
def test_a_server_that_drains_finishes_what_it_has(face: str, which: str) -> None:
    """It sends GOAWAY; the call under way goes on for as long as it likes."""
    with child(which) as server:
        if face == "sync":
            requests: queue.Queue[Any] = queue.Queue()
            with stock_channel(server.address) as channel:
                call = start(channel, "chaos", iter(requests.get, None))
                for n in range(3):
                    requests.put(Raw(offset=1000))
                    assert next(call).data == body(1000)
                    if n == 0:
                        server.drain()
                        refused(server)
                requests.put(None)
                assert list(call) == []
                assert call.code() is grpc.StatusCode.OK
            return

        async def main() -> None:
            if face == "aio":
                async with grpc.aio.insecure_channel(server.address) as channel:
                    call = channel.stream_stream(PATH, Raw.SerializeToString, Raw.FromString)()
                    for n in range(3):
                        await call.write(Raw(offset=1000))
                        assert (await call.read()).data == body(1000)
                        if n == 0:
                            server.drain()
                            await asyncio.to_thread(refused, server)
                    await call.done_writing()
                    assert await call.code() is grpc.StatusCode.OK
                return
            async with open_ours(server.address) as ours, new_call(ours) as stream:
                await open_call(stream)
                for n in range(3):
                    await send_message(stream, OurRaw(offset=1000))
                    assert (await stream.recv_message()).data == body(1000)
                    if n == 0:
                        server.drain()
                        await asyncio.to_thread(refused, server)
                await stream.end()
                assert await stream.recv_message() is None
                await read_status(stream)

        run(main)


def refused(server: Child) -> None:
    """Wait until it takes no more connections."""
    host, port = server.address.split(":")

    def closed() -> bool:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except ConnectionError:
            return True
        return False

    wait_until(closed)


@pytest.mark.parametrize("kind", ["unix", "ipv6"])
def test_stock_clients_come_by_unix_socket_and_ipv6(serve: Serve, tmp_path: Path, kind: str) -> None:
    address = serve("Async", bind=f"unix:{tmp_path}/s" if kind == "unix" else "[::1]:0").address
    for face in ("sync", "aio"):
        answer = stranger.ask(address, "predict", {"n": 1}, face=face).json()
        assert answer == {"size": 0, "kwargs": {"n": 1}, "loaded": True}
