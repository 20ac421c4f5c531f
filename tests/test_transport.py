"""HTTP/2 from the other side: a real server process against raw frames, and the client against a scripted h2 server."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import socket
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError
from h2.errors import ErrorCodes
from hyperframe.frame import PriorityFrame, SettingsFrame

import aipod
from aipod.codec import PONG, Compressor, StreamDecoder, digest, job_id
from aipod.transport.channel import open_call, read_status
from aipod.transport.stream import H2Stream
from aipod.wire.ai import Op, Open, Phase, Raw, State, StreamInput
from tests.conftest import FIRST, Serve, Served, left_in, run

MIB = 1024 * 1024
HEADERS = [
    (":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", "/ai.AI/chaos"),
    ("te", "trailers"), ("content-type", "application/grpc"),
]  # fmt: skip


def prefixed(data: bytes, *, flag: int = 0) -> bytes:
    return bytes([flag]) + len(data).to_bytes(4, "big") + data


# A whole request without kwargs and without payload.
REQUEST = prefixed(bytes(Raw(data=Compressor(1).frame(b"{}"))))


class Answer:
    """What came back on one stream."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.data = b""
        self.reset: int | None = None
        self.ended = False

    @property
    def status(self) -> int:
        return int(self.headers["grpc-status"])

    @property
    def messages(self) -> list[bytes]:
        found, rest = [], self.data
        while rest:
            end = 5 + int.from_bytes(rest[1:5], "big")
            found.append(Raw.parse(rest[5:end]).data)
            rest = rest[end:]
        return found

    @property
    def result(self) -> bytes:
        """The answer of a plain call, decompressed."""
        out: list[bytes] = []
        decoder = StreamDecoder(out.append)
        for data in self.messages:
            if data != PONG:
                decoder.feed(data)
        decoder.finish()
        return b"".join(out)


class Peer:
    """A client of raw frames: h2 on a blocking socket."""

    def __init__(self, served: Served, *, receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(30)
        if receive_buffer:  # the system's, which it makes larger by itself where none was chosen
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", served.port))
        config = h2.config.H2Configuration(
            header_encoding="latin-1", validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.answers: dict[int, Answer] = {}
        self.events: list[h2.events.Event] = []
        self.flush()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *args: object) -> None:
        self.socket.close()

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def raw(self, data: bytes) -> None:
        self.flush()
        self.socket.sendall(data)

    def open(self, *extra: tuple[str, str], data: bytes = REQUEST, end: bool = True, drop: str = "") -> int:
        """A new stream with these headers besides the usual ones, and what is sent on it."""
        stream = self.h2.get_next_available_stream_id()
        own = {name for name, _ in extra}
        kept = [(name, value) for name, value in HEADERS if name not in own and name != drop]
        pseudo = [pair for pair in extra if pair[0].startswith(":")]
        self.h2.send_headers(stream, [*pseudo, *kept, *(pair for pair in extra if pair not in pseudo)])
        self.answers[stream] = Answer()
        if data or end:
            self.h2.send_data(stream, data, end_stream=end)
        self.flush()
        return stream

    def step(self, most: int = 65536) -> bool:
        """Take in what has come, `most` bytes of it; False when the server has closed the connection."""
        data = self.socket.recv(most)
        for event in self.h2.receive_data(data) if data else ():
            self.events.append(event)
            answer = self.answers.get(getattr(event, "stream_id", None) or 0, Answer())
            if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                answer.headers |= dict(event.headers)  # type: ignore[arg-type]
            elif isinstance(event, h2.events.DataReceived):
                answer.data += event.data
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                answer.ended = True
            elif isinstance(event, h2.events.StreamReset):
                answer.ended, answer.reset = True, int(event.error_code)
        self.flush()
        return bool(data)

    def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            assert self.step(), "the server has closed the connection"

    def answer(self, stream: int) -> Answer:
        self.until(lambda: self.answers[stream].ended)
        return self.answers[stream]

    def call(self, *extra: tuple[str, str], **options: Any) -> Answer:
        return self.answer(self.open(*extra, **options))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("server")
    served = Served(
        "tests.models_under_test:Async", directory, ("--max-message", "2MiB", "--concurrency", "1000"), "127.0.0.1:0"
    )
    yield served
    assert served.stop() == 0, served.log_text()
    assert left_in(served.spool) == []
    assert "Traceback" not in served.log_text()


@pytest.fixture
def peer(served: Served) -> Iterator[Peer]:
    """A connection that must still serve an honest call when the test is over."""
    with Peer(served) as peer:
        yield peer
        honest(peer)


def honest(peer: Peer) -> None:
    answer = peer.call()
    assert (answer.status, answer.result) == (0, b'{"size": 0}')


# --- messages


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_messages_are_read(peer: Peer, encoding: str) -> None:
    packed = gzip.compress(REQUEST[5:], mtime=0) if encoding == "gzip" else zlib.compress(REQUEST[5:])
    answer = peer.call(("grpc-encoding", encoding), data=prefixed(packed, flag=1))
    assert (answer.status, answer.result) == (0, b'{"size": 0}')
    # The flag is per message: a plain one is as good.
    assert peer.call(("grpc-encoding", encoding)).status == 0


def test_a_compressed_body_of_five_bytes_is_not_taken_for_a_prefix(peer: Peer) -> None:
    """Nor one that is empty: grpclib reads 5 bytes for the prefix, and as many as it says for the body."""
    for body in (b"", bytes(Raw(data=b"abc"))):
        answer = peer.call(("grpc-encoding", "gzip"), data=prefixed(gzip.compress(body, mtime=0), flag=1))
        assert answer.status == (0 if not body else 3)
    assert len(bytes(Raw(data=b"abc"))) == 5


@pytest.mark.parametrize(
    ("extra", "data", "status"),
    [
        ([], prefixed(REQUEST[5:], flag=1), 13),  # flagged, but no grpc-encoding
        ([("grpc-encoding", "gzip")], prefixed(REQUEST[5:], flag=1), 13),  # flagged, but not gzip
        ([("grpc-encoding", "gzip")], prefixed(gzip.compress(REQUEST[5:], mtime=0)[:-4], flag=1), 13),
        ([("grpc-encoding", "gzip")], prefixed(gzip.compress(bytes(3 * MIB), mtime=0), flag=1), 8),  # a bomb
        ([("grpc-encoding", "deflate")], prefixed(zlib.compress(bytes(3 * MIB)), flag=1), 8),
        ([], prefixed(REQUEST[5:], flag=2), 13),  # no such flag
        ([], prefixed(bytes(100))[:50], 13),  # ends inside a message
        ([], b"\0\0\0", 13),  # ends inside a prefix
        ([], prefixed(b"\xff\xff\xff"), 3),  # no protobuf
        ([], b"", 3),  # no message at all
    ],
)
def test_a_bad_message_is_answered(peer: Peer, extra: list[tuple[str, str]], data: bytes, status: int) -> None:
    answer = peer.call(*extra, data=data)
    assert answer.headers[":status"] == "200"
    assert answer.status == status, answer.headers
    assert answer.headers["grpc-message"]


def test_a_message_over_the_limit_is_refused_by_its_length(peer: Peer) -> None:
    """Only the prefix is ever sent: nothing was buffered for it."""
    answer = peer.call(data=b"\0" + (2 * MIB + 1).to_bytes(4, "big"), end=False)
    assert answer.status == 8
    assert (
        f"the%20limit%20is%20{2 * MIB}" in answer.headers["grpc-message"]
        or str(2 * MIB) in answer.headers["grpc-message"]
    )


def test_a_message_cut_into_single_bytes_is_whole(peer: Peer) -> None:
    stream = peer.open(data=b"", end=False)
    for n in range(len(REQUEST)):
        peer.h2.send_data(stream, REQUEST[n : n + 1], end_stream=n == len(REQUEST) - 1)
        peer.flush()
    assert peer.answer(stream).status == 0


# --- headers


@pytest.mark.parametrize(
    ("extra", "status"),
    [
        ([("x-name", "gr\xfc\xdfe")], 3),
        ([("x-data-bin", "***")], 3),
        ([("x-data-bin", "A")], 3),
        ([("grpc-timeout", "1")], 3),
        ([("grpc-timeout", "S")], 3),
        ([("grpc-timeout", "5x")], 3),
        ([("grpc-timeout", "-1S")], 3),
        ([("grpc-timeout", "1.5S")], 3),
        ([("grpc-timeout", "123456789S")], 3),
        ([("grpc-timeout", "0S")], 4),
        ([("grpc-encoding", "br")], 12),
        ([(":path", "/ai.AI/nothing")], 12),
        ([(":path", "/no.Such/service")], 12),
        ([("x-func-name", "load")], 12),
    ],
)
def test_a_bad_header_is_answered(peer: Peer, extra: list[tuple[str, str]], status: int) -> None:
    answer = peer.call(*extra)
    assert answer.headers[":status"] == "200"
    assert answer.status == status
    assert answer.headers["grpc-message"]
    if extra[0][0] == "grpc-encoding":
        assert answer.headers["grpc-accept-encoding"] == "identity,gzip,deflate"


def test_headers_that_are_well_are_let_through(peer: Peer) -> None:
    for pair in (("x-data-bin", "AAEC"), ("x-data-bin", "AAE"), ("grpc-timeout", "99999999u"), ("grpc-timeout", "1H")):
        assert peer.call(pair).status == 0


@pytest.mark.parametrize(
    ("extra", "drop", "status"),
    [
        ([(":method", "GET")], "", "405"),
        ([("content-type", "text/html")], "", "415"),
        ([("content-type", "application/grpc+")], "", "415"),
        ([("content-type", "application/grpc+json")], "", "415"),
        ([], "content-type", "415"),
        ([], "te", "400"),
    ],
)
def test_what_is_no_grpc_request_gets_an_http_status(
    peer: Peer, extra: list[tuple[str, str]], drop: str, status: str
) -> None:
    assert peer.call(*extra, drop=drop).headers[":status"] == status
    honest(peer)


@pytest.mark.parametrize(
    ("name", "values"),
    [("grpc-timeout", ("1S", "x")), ("content-length", ("5", "x")), ("grpc-encoding", ("gzip", "identity"))],
)
def test_a_header_that_comes_twice_costs_its_own_call(peer: Peer, name: str, values: tuple[str, str]) -> None:
    other = peer.open(data=REQUEST[:4], end=False)
    assert peer.call(*((name, value) for value in values)).reset == ErrorCodes.PROTOCOL_ERROR
    peer.h2.send_data(other, REQUEST[4:], end_stream=True)
    peer.flush()
    assert peer.answer(other).status == 0


def test_a_header_table_made_smaller_is_said_in_the_next_block(peer: Peer) -> None:
    """RFC 7541 section 4.2: a peer's decoder ends the connection where it is not."""
    honest(peer)
    for size in (100, 0, 4096):
        peer.h2.update_settings({h2.settings.SettingCodes.HEADER_TABLE_SIZE: size})
        honest(peer)
        honest(peer)


def test_a_header_table_of_the_same_size_again_is_said_too(peer: Peer) -> None:
    """Mutant seen: passed on to hpack, it forgets that there is something to say."""
    honest(peer)
    for size in (0, 50):
        for _ in range(2):
            peer.h2.update_settings({h2.settings.SettingCodes.HEADER_TABLE_SIZE: size})
        honest(peer)


def test_the_header_table_is_never_larger_than_its_default(peer: Peer) -> None:
    """Whatever the peer allows: it holds what the server has sent. Mutant seen: 13 MB after 300 answers."""
    peer.h2.update_settings({h2.settings.SettingCodes.HEADER_TABLE_SIZE: 2**32 - 1})
    for number in range(40):
        assert peer.call((":path", f"/{number}" + "x" * 1000)).status == 12
    assert peer.h2.decoder.header_table_size == 4096
    table = peer.h2.decoder.header_table.dynamic_entries
    assert sum(len(name) + len(value) + 32 for name, value in table) <= 4096


def test_of_many_sizes_of_the_header_table_the_smallest_and_the_last_are_said(peer: Peer) -> None:
    """RFC 7541 section 4.2. Mutant seen: all of them; the peer refuses what is above the last."""
    honest(peer)
    peer.until(lambda: any(isinstance(event, h2.events.RemoteSettingsChanged) for event in peer.events))
    for _ in range(500):
        for size in (3000, 70, 1000):
            peer.h2.update_settings({h2.settings.SettingCodes.HEADER_TABLE_SIZE: size})
    sizes: list[int] = []
    update = peer.h2.decoder._update_encoding_context
    peer.h2.decoder._update_encoding_context = lambda data: sizes.append(used := update(data)) or used  # type: ignore[func-returns-value,method-assign]
    stream = peer.open()
    assert peer.answer(stream).status == 0
    assert len(sizes) == 2
    assert peer.h2.decoder.header_table_size == 1000


# --- frames and connections


def test_a_peer_that_never_ends_its_side_gets_its_answer_and_is_told_to_stop(peer: Peer) -> None:
    """RST_STREAM(NO_ERROR) behind a complete response: RFC 9113 section 8.1."""
    ticket = os.urandom(16)
    request = Raw(data=Compressor(1).frame(b"{}"), open=Open(ticket=ticket, epoch=1, size=0), last=True)
    stream = peer.open(("x-job-id", job_id(ticket)), data=prefixed(bytes(request)), end=False)
    answer = peer.answers[stream]
    peer.until(lambda: answer.reset is not None)
    assert (answer.status, answer.reset) == (0, ErrorCodes.NO_ERROR)
    honest(peer)


@pytest.mark.parametrize(
    ("kind", "flags", "payload", "code"),
    [
        pytest.param(0x1, 0x4, b"\0\6x-test\2ok", ErrorCodes.PROTOCOL_ERROR, id="trailers without END_STREAM"),
        pytest.param(0x1, 0x5, b"\0\7:method\4POST", ErrorCodes.PROTOCOL_ERROR, id="a pseudo-header in trailers"),
        pytest.param(0x8, 0x0, b"\x7f\xff\xff\xff", ErrorCodes.FLOW_CONTROL_ERROR, id="a window over 2^31-1"),
    ],
)
def test_a_frame_that_a_call_must_not_send_ends_it(
    served: Served, kind: int, flags: int, payload: bytes, code: ErrorCodes
) -> None:
    """RFC 9113 sections 6.9.1 and 8.1: an error of the stream, or of the connection."""
    with Peer(served) as peer:
        stream = peer.open(data=REQUEST[:4], end=False)
        peer.raw(raw_frame(kind, flags, stream, payload))
        ends = lambda: [e for e in peer.events if isinstance(e, h2.events.ConnectionTerminated)]  # noqa: E731
        peer.until(lambda: peer.answers[stream].ended or ends())
        assert code in {peer.answers[stream].reset, *(e.error_code for e in ends())}
    with Peer(served) as another:
        honest(another)


def test_unknown_frames_and_settings_are_ignored(peer: Peer) -> None:
    """RFC 9113 section 5.5; before, between and after the frames of a call."""
    data = b"".join(raw_frame(kind, 0xFF, stream, b"x" * 9) for kind in (0x0B, 0x20, 0xFA) for stream in (0, 1, 7))
    data += SettingsFrame(0, settings={0xABCD: 7, h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL: 0}).serialize()
    data += PriorityFrame(3, depends_on=0, stream_weight=1).serialize()
    peer.raw(data)
    stream = peer.open(data=b"", end=False)
    peer.raw(data)
    peer.h2.send_data(stream, REQUEST, end_stream=True)
    peer.flush()
    peer.raw(data)
    assert peer.answer(stream).status == 0


def test_pings_are_answered(peer: Peer) -> None:
    for n in range(20):
        peer.h2.ping(n.to_bytes(8, "big"))
    peer.flush()
    got = lambda: [e.ping_data for e in peer.events if isinstance(e, h2.events.PingAckReceived)]  # noqa: E731
    peer.until(lambda: len(got()) == 20)
    assert got() == [n.to_bytes(8, "big") for n in range(20)]


def test_the_first_settings_frame_says_everything(peer: Peer) -> None:
    codes = h2.settings.SettingCodes
    peer.until(lambda: any(isinstance(event, h2.events.RemoteSettingsChanged) for event in peer.events))
    settings = peer.h2.remote_settings
    assert settings[codes.MAX_CONCURRENT_STREAMS] == 1000
    assert settings[codes.INITIAL_WINDOW_SIZE] == 256 * 1024
    assert settings[codes.MAX_FRAME_SIZE] == 1088 * 1024
    assert settings[codes.MAX_HEADER_LIST_SIZE] == 16 * 1024


def test_the_server_pings_without_calls_and_drops_a_peer_that_never_answers(serve: Serve) -> None:
    served = serve("Async", "--ping-interval", "0.1s", "--ping-timeout", "1s")
    with Peer(served) as peer:
        began = time.monotonic()
        pings = lambda: [event for event in peer.events if isinstance(event, h2.events.PingReceived)]  # noqa: E731
        peer.until(lambda: len(pings()) >= 15)
        assert time.monotonic() - began > 1, "longer than the timeout, because h2 answers each"
        honest(peer)
        # From here on nobody answers.
        with contextlib.suppress(ConnectionResetError):
            while peer.socket.recv(65536):
                pass
        assert time.monotonic() - began < 20


def test_a_thousand_streams_are_served_and_the_excess_is_refused(serve: Serve) -> None:
    """The default."""
    count, options = (1000, ()) if FIRST else (200, ("--max-streams", "200"))
    with Peer(serve("Async", "--concurrency", "1000", *options)) as peer:
        # Before the server's SETTINGS are read, h2 knows no limit.
        extra = (("x-func-name", "gather"),)
        data = prefixed(bytes(Raw(data=Compressor(1).frame(b'{"count": %d}' % count))))
        streams = [peer.open(*extra, data=data) for _ in range(count + 20)]
        answers = [peer.answer(stream) for stream in streams]
        assert [answer.reset for answer in answers[count:]] == [ErrorCodes.REFUSED_STREAM] * 20
        assert [answer.headers["grpc-status"] for answer in answers[:count]] == ["0"] * count
        assert b'"peak": %d' % count in answers[0].result
        honest(peer)


def test_a_client_with_more_calls_than_streams_gets_all_answers(serve: Serve) -> None:
    served = serve("Async", "--max-streams", "20")

    async def main() -> list[Any]:
        async with aipod.Client(served.address, config=aipod.Config(attempts=20)) as client:
            async with asyncio.TaskGroup() as group:
                calls = [group.create_task(client.predict(b"x" * n)) for n in range(70)]
        return [call.result()["size"] for call in calls]

    assert run(main) == list(range(70))


def memory(served: Served) -> float:
    """Resident memory now, in MB."""
    return int(Path(f"/proc/{served.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def descriptors(served: Served) -> int:
    return len(os.listdir(f"/proc/{served.process.pid}/fd"))


def raw_frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


# --- the client against a scripted server

RESULT = b'{"n": 5}'
SCRIPTED: list[Raw] = [
    Raw(data=PONG, state=State(phase=Phase.RUNNING)),
    Raw(
        data=PONG,
        state=State(phase=Phase.DONE, size=len(RESULT), digest=digest(RESULT), content_type="application/json"),
    ),
    Raw(data=Compressor(1).frame(RESULT), last=True),
]


class Scripted:
    """An h2 server that calls `script(connection, stream_id)` when a request is complete, or begun with `early`.

    One that looks for a job (RESUME) is answered once its first message is there: it waits for a state.
    """

    def __init__(self, script: Callable[[Connection, int], Any], *, early: bool) -> None:
        self.script = script
        self.early = early
        self.connections: list[Connection] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(len(self.connections), writer)
        self.connections.append(connection)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while data := await reader.read(65536):
                for event in connection.h2.receive_data(data):
                    if isinstance(event, h2.events.RequestReceived):
                        connection.calls.append(event.stream_id)
                    if isinstance(event, h2.events.DataReceived) and event.stream_id not in connection.ops:
                        connection.ops[event.stream_id] = op_of(event.data)
                        if connection.ops[event.stream_id] is Op.RESUME:
                            self.script(connection, event.stream_id)
                    wanted = h2.events.RequestReceived if self.early else h2.events.StreamEnded
                    if isinstance(event, wanted) and connection.ops.get(event.stream_id) is not Op.RESUME:
                        self.script(connection, event.stream_id)
                connection.flush()
        connection.ended.set()
        writer.transport.abort()


def op_of(data: bytes) -> Op:
    """Of the first message of an own call; `data` has all of it."""
    message = StreamInput.parse(data[5 : 5 + int.from_bytes(data[1:5], "big")])
    assert message.raw is not None
    assert message.raw.open is not None
    return Op(message.raw.open.op)


class Connection:
    """One connection of a `Scripted` server."""

    def __init__(self, number: int, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self.h2.initiate_connection()
        self.calls: list[int] = []
        self.ops: dict[int, Op] = {}
        self.ended = asyncio.Event()
        self.writer = writer
        self.flush()

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())

    def begin(self, stream: int) -> None:
        self.h2.send_headers(stream, [(":status", "200"), ("content-type", "application/grpc")])
        self.flush()

    def finish(self, stream: int) -> None:
        for message in SCRIPTED:
            self.h2.send_data(stream, prefixed(bytes(message)))
        self.h2.send_headers(stream, [("grpc-status", "0")], end_stream=True)
        self.flush()

    def goaway(self, last: int, code: int = 0) -> None:
        """By hand: h2's own close_connection() allows nothing after it."""
        self.flush()
        self.writer.write(raw_frame(7, 0, 0, last.to_bytes(4, "big") + code.to_bytes(4, "big")))


@contextlib.asynccontextmanager
async def scripted(
    script: Callable[[Connection, int], Any], *, early: bool = False
) -> AsyncIterator[tuple[aipod.Client, Scripted]]:
    server = Scripted(script, early=early)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with aipod.Client(address, config=aipod.Config(silence=5, attempts=3)) as client:
        client._link.learn("", "spool-boot")  # it has called before: a small request is complete at once
        yield client, server
    for connection in server.connections:
        await connection.ended.wait()
    listener.close()


def test_a_graceful_goaway_lets_the_call_under_way_finish_and_the_next_one_connects_anew() -> None:
    def script(connection: Connection, stream: int) -> None:
        connection.begin(stream)
        if connection.number == 0:
            connection.goaway(stream)
            asyncio.get_running_loop().call_later(0.1, connection.finish, stream)
        else:
            connection.finish(stream)

    async def main() -> None:
        async with scripted(script) as (client, server):
            assert await client.predict(b"x") == {"n": 5}
            assert await client.predict(b"x") == {"n": 5}
            assert [connection.calls for connection in server.connections] == [[1], [1]]
            await server.connections[0].ended.wait()  # the client closes it when it is empty

    run(main, timeout=20)


@pytest.mark.parametrize("how", ["GOAWAY", "REFUSED_STREAM"])
def test_a_call_that_the_server_says_it_did_not_process_is_made_again(how: str) -> None:
    """Although its request was complete: RFC 9113 section 8.7."""

    def script(connection: Connection, stream: int) -> None:
        if connection.number == 0 and stream == 1:
            if how == "GOAWAY":
                connection.goaway(0)
            else:
                connection.h2.reset_stream(stream, ErrorCodes.REFUSED_STREAM)
            return
        connection.begin(stream)
        connection.finish(stream)

    async def main() -> None:
        async with scripted(script) as (client, server):
            assert await client.predict(b"x") == {"n": 5}
            assert len(server.connections) == (2 if how == "GOAWAY" else 1)

    run(main, timeout=20)


@pytest.mark.parametrize("how", ["GOAWAY", "RST_STREAM"])
def test_after_any_other_end_of_a_complete_request_its_job_is_looked_for_and_not_created_again(how: str) -> None:
    def script(connection: Connection, stream: int) -> None:
        connection.begin(stream)
        if connection.ops[stream] is Op.RESUME:
            connection.finish(stream)
        elif how == "GOAWAY":
            connection.goaway(stream, ErrorCodes.INTERNAL_ERROR)
        else:
            connection.h2.reset_stream(stream, ErrorCodes.INTERNAL_ERROR)

    async def main() -> list[Op]:
        async with scripted(script) as (client, server):
            assert await client.predict(b"x") == {"n": 5}
            return [op for connection in server.connections for op in connection.ops.values()]

    assert run(main, timeout=20) == [Op.RUN, Op.RESUME]


def test_rst_stream_no_error_after_a_complete_response_is_no_error() -> None:
    """RFC 9113 section 8.1: the server has all it needs. The upload is stuck: nobody gives it a window."""

    def script(connection: Connection, stream: int) -> None:
        connection.begin(stream)
        connection.finish(stream)
        connection.h2.reset_stream(stream, ErrorCodes.NO_ERROR)

    async def main() -> None:
        async with scripted(script, early=True) as (client, server):
            for _ in range(3):
                assert await client.predict(iter([os.urandom(1_000_000)])) == {"n": 5}
            assert len(server.connections) == 1

    run(main, timeout=20)


def test_rst_stream_no_error_while_this_side_waits_for_its_socket_to_end_the_call_is_no_error() -> None:
    """What the server of an upload that another call took over does: a status, then the reset, to a full socket."""

    async def main() -> None:
        async with scripted(lambda connection, stream: connection.begin(stream), early=True) as (client, server):
            call = client._link.channel().request("/ai.AI/chaos", Cardinality.STREAM_STREAM, Raw, Raw)
            async with call:
                await open_call(call)
                await call.recv_initial_metadata()
                [peer], stream = server.connections, cast(H2Stream, call._stream)
                peer.h2.send_headers(1, [("grpc-status", str(Status.ABORTED.value))], end_stream=True)
                peer.flush()
                assert await call.recv_message() is None
                stream.connection.pause_writing()
                status = asyncio.create_task(read_status(call))
                await asyncio.sleep(0)  # it waits for the socket
                peer.h2.reset_stream(1, ErrorCodes.NO_ERROR)
                peer.flush()
                while not stream.finished_by_peer:
                    await asyncio.sleep(0)
                stream.connection.resume_writing()
                with pytest.raises(GRPCError) as failure:
                    await status
                assert failure.value.status is Status.ABORTED

    run(main, timeout=20)
