"""What hostile peers do to a server, over real sockets: it costs them their call or their connection, and nobody else.

AIPOD_TEST_LONG=N makes floods, and what is counted in thousands, N times as long.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h2.events
import h2.exceptions
import h2.settings
import hpack
import pytest
from grpclib.const import Status
from h2.errors import ErrorCodes

from aipod.codec import Compressor
from aipod.config import Config
from aipod.identity import add_token
from aipod.service.ai import SILENT
from aipod.transport.channel import Channel
from aipod.transport.headers import MAX_REFUSAL
from aipod.wire.ai import Raw
from tests.conftest import FIRST, ROOT, Serve, Served, cpu_seconds, left_in, run, wait_until
from tests.test_transport import HEADERS, REQUEST, Answer, Peer, descriptors, honest, memory, prefixed, raw_frame

KIB, MIB = 1024, 1024 * 1024
LONG = int(os.environ.get("AIPOD_TEST_LONG", "1"))
LIMIT = 2 * MIB  # --max-message
MAX_FRAME, MAX_CONTROL_FRAME = 1088 * KIB, 64 * KIB
# What a server may compute in seconds while a good call beside an attack waits; stock grpclib's loop stands still for
# tens of them.
LATE = 5.0

DATA, HEADERS_FRAME, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 0x1, 0x1, 0x4, 0x8
# What a GOAWAY without an error says: none of the peer's streams is said not to have been processed.
ANY_STREAM = (2**31 - 1).to_bytes(4, "big") + bytes(4)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
UNREADABLE = (ConnectionError, h2.exceptions.ProtocolError)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all who need no special settings; it must still be whole at the end."""
    directory = tmp_path_factory.mktemp("server")
    served = Served(
        "tests.models_under_test:Async", directory, ("--max-message", str(LIMIT), "--tick", "0.1"), "127.0.0.1:0"
    )
    try:
        with Peer(served) as peer:
            honest(peer)
        yield served
        assert served.stop() == 0, served.log_text()
        assert left_in(served.spool) == []
        assert "Traceback" not in served.log_text(), served.log_text()
    finally:
        served.process.kill()
        served.process.communicate()


@pytest.fixture
def peer(served: Served) -> Iterator[Peer]:
    """A connection that must still serve an honest call when the test is over."""
    with Peer(served) as peer:
        yield peer
        honest(peer)


class Beside:
    """Honest calls on a connection of their own, one after the other, for as long as the block lasts.

    `times`: how many seconds the server computed during each.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.times: list[float] = []
        self._error: BaseException | None = None

    def _run(self) -> None:
        try:
            with Peer(self._served) as peer:
                while not self._stop.is_set():
                    began = cpu_seconds(self._served.process.pid)
                    honest(peer)
                    self.times.append(cpu_seconds(self._served.process.pid) - began)
                    self._stop.wait(0.02)
        except BaseException as exc:
            self._error = exc

    def __enter__(self) -> Beside:
        self._thread.start()
        wait_until(lambda: self.times or self._error)
        return self

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    @property
    def longest(self) -> float:
        return max(self.times)


def ending(peer: Peer) -> int | None:
    """Read to the connection's end; the code of the GOAWAY before it, None where there was none."""
    with contextlib.suppress(*UNREADABLE):
        while peer.step():
            pass
    codes = [int(event.error_code or 0) for event in peer.events if isinstance(event, h2.events.ConnectionTerminated)]
    return codes[-1] if codes else None


class Bare:
    """A connection of frames alone, for what h2 would not say and would not understand."""

    def __init__(self, served: Served) -> None:
        self.socket = socket.create_connection(("127.0.0.1", served.port), timeout=30)
        self.encoder = hpack.Encoder()
        self._data = b""
        self.send(PREFACE + raw_frame(SETTINGS, 0, 0, b""))

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *args: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send as much as the server takes before it closes."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def headers(self, stream: int, *, end: bool = False) -> bytes:
        return raw_frame(HEADERS_FRAME, END_HEADERS | end, stream, self.encoder.encode(HEADERS))

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Type, flags, stream and body of every frame, to the connection's end."""
        with contextlib.suppress(ConnectionError):
            while data := self.socket.recv(65536):
                self._data += data
                while len(self._data) >= 9 and len(self._data) >= (end := 9 + int.from_bytes(self._data[:3], "big")):
                    frame, self._data = self._data[:end], self._data[end:]
                    yield frame[3], frame[4], int.from_bytes(frame[5:9], "big"), frame[9:]

    def ending(self) -> int | None:
        """The code of the GOAWAY before the connection's end; None where there was none."""
        codes = [int.from_bytes(body[4:8], "big") for kind, _, _, body in self.frames() if kind == GOAWAY]
        return codes[-1] if codes else None


def closed(sock: socket.socket, seconds: float) -> bool:
    """Whether the other side closes within `seconds`; whatever it says before is dropped."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([sock], [], [], left)[0]:
            try:
                if not sock.recv(65536):
                    return True
            except ConnectionError:
                return True
    return False


def jobs(served: Served) -> set[str]:
    """Entries in the spool; its workers' locks are none."""
    return set(os.listdir(served.spool)) - {"app", "spool-id", "workers", ".probe"}


def request(kwargs: bytes = b"{}") -> bytes:
    return prefixed(bytes(Raw(data=Compressor(1).frame(kwargs))))


def reset(stream: int, code: int = ErrorCodes.CANCEL, *, flags: int = 0) -> bytes:
    return raw_frame(RST_STREAM, flags, stream, int(code).to_bytes(4, "big"))


# --- messages


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


BOMBS = {
    "unknown varints": b"\x78\x00" * 500_000,
    "unknown empty fields": b"\x7a\x00" * 500_000,
    "empty fields": b"\x0a\x00" * 500_000,
    "numbers": b"\x10\x00" * 500_000,
    "empty messages": b"\x22\x00" * 500_000,
    "one long unknown field": b"\x7a" + _varint(1_000_000) + bytes(1_000_000),
    "groups": b"\x0b" * 1_000_000,
    "closed groups": b"\x7b\x7c" * 500_000,
    "nested": b"\x2a" + _varint(1_000_000) + b"\x32\x00" * 500_000,  # a State of many errors
}


@pytest.mark.parametrize("path", ["/ai.AI/chaos", "/ai.AI/predict"])
@pytest.mark.parametrize("name", BOMBS)
def test_a_message_that_is_dear_to_parse(served: Served, peer: Peer, name: str, path: str) -> None:
    """Stock grpclib with betterproto2 stands still for up to 45 s with each of some of them."""
    with Beside(served) as beside:
        for _ in range(5):
            data = BOMBS[name] if path.endswith("chaos") else b"\x1a" + _varint(len(BOMBS[name])) + BOMBS[name]
            stream = peer.open((":path", path), data=b"", end=False)
            upload(peer, stream, prefixed(data))
            assert peer.answer(stream).status == 3
    assert beside.longest < LATE


def upload(peer: Peer, stream: int, data: bytes, *, end: bool = True) -> None:
    """Send `data` as the windows let it; stops when the server has ended the stream."""
    view = memoryview(data)
    while view and not peer.answers[stream].ended:
        size = min(len(view), peer.h2.local_flow_control_window(stream), peer.h2.max_outbound_frame_size)
        if size:
            peer.h2.send_data(stream, view[:size].tobytes(), end_stream=end and size == len(view))
            view = view[size:]
            peer.flush()
        else:
            assert peer.step(), "the server has closed the connection"


def test_gzip_bombs_cost_one_limit(served: Served, peer: Peer) -> None:
    """A quarter of a gigabyte in each."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as file:
        for _ in range(256):
            file.write(bytes(MIB))
    before = 0.0
    with Beside(served) as beside:
        for number in range(2 + 8 * LONG):
            if number == 2:
                before = memory(served)
            streams = [peer.open(("grpc-encoding", "gzip"), data=b"", end=False) for _ in range(4)]
            for stream in streams:
                upload(peer, stream, prefixed(out.getvalue(), flag=1))
            assert [peer.answer(stream).status for stream in streams] == [8] * 4
    assert beside.longest < LATE
    assert memory(served) - before < 4 * 2 * LIMIT / MIB + 16


def test_a_length_of_four_gigabytes_is_refused_by_the_prefix(served: Served, peer: Peer) -> None:
    before = memory(served)
    for _ in range(100):
        assert peer.call(data=b"\0\xff\xff\xff\xff", end=False).status == 8
    assert memory(served) - before < 5


# --- frames


@pytest.mark.parametrize(
    ("kind", "length"),
    [(kind, MAX_FRAME + 1) for kind in (DATA, HEADERS_FRAME, SETTINGS, PING, 0xFA)]
    + [(kind, 2**24 - 1) for kind in (DATA, HEADERS_FRAME, 0xFA)]
    + [(kind, MAX_CONTROL_FRAME + 1) for kind in range(HEADERS_FRAME, CONTINUATION + 1)],
)
def test_a_frame_too_long_is_refused_by_its_head(served: Served, kind: int, length: int) -> None:
    """Only the nine bytes of the head are ever sent. Stock grpclib waits for 16 MiB."""
    with Peer(served) as peer:
        honest(peer)
        peer.raw(length.to_bytes(3, "big") + bytes([kind, 0]) + (1).to_bytes(4, "big"))
        assert ending(peer) == ErrorCodes.FRAME_SIZE_ERROR


@pytest.mark.parametrize("length", [0, 1, MAX_CONTROL_FRAME, MAX_CONTROL_FRAME + 1, MAX_FRAME])
def test_an_unknown_frame_of_any_allowed_length_is_skipped(peer: Peer, length: int) -> None:
    """Stock grpclib raises NotImplementedError, and inside trio-asyncio the process ends."""
    frame = raw_frame(0xFA, 0xFF, 0, b"\0" * length)
    stream = peer.open(data=REQUEST[:7], end=False)
    peer.raw(frame[:5])
    peer.raw(frame[5:])
    peer.h2.send_data(stream, REQUEST[7:], end_stream=True)
    peer.raw(frame)
    assert peer.answer(stream).status == 0


@pytest.mark.parametrize("padding", [0, 1, 2, 127, 254, 255])
@pytest.mark.parametrize("cut", [False, True])
def test_padding_is_no_payload(peer: Peer, padding: int, cut: bool) -> None:
    """In frames with no, one and many bytes of payload, whole and in single bytes."""
    peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    pieces = [b"", REQUEST[:1], b"", REQUEST[1:9], REQUEST[9:]]
    stream = peer.open(data=b"", end=False)
    for number, piece in enumerate(pieces):
        flags = PADDED | (END_STREAM if number == len(pieces) - 1 else 0)
        # What looks like a frame in the padding is none.
        body = bytes([padding]) + piece + (raw_frame(GOAWAY, 0, 0, bytes(8)) * 16)[:padding]
        frame = raw_frame(DATA, flags, stream, body)
        for part in (frame[n : n + 1] for n in range(len(frame))) if cut else (frame,):
            peer.raw(part)
    answer = peer.answer(stream)
    assert (answer.status, answer.result) == (0, b'{"size": 0}')


@pytest.mark.parametrize(("length", "padding"), [(0, None), (1, 1), (5, 5), (5, 255)])
def test_padding_longer_than_its_frame_ends_the_connection(served: Served, length: int, padding: int | None) -> None:
    with Peer(served) as peer:
        stream = peer.open(data=b"", end=False)
        body = bytes([padding]) + bytes(length - 1) if padding is not None else b""
        peer.raw(raw_frame(DATA, PADDED, stream, body))
        assert ending(peer) == ErrorCodes.PROTOCOL_ERROR


def test_a_call_cut_at_every_byte(peer: Peer) -> None:
    peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    cut, length = 1, 2
    while cut < length:
        stream = peer.open(data=b"", end=False)
        data = raw_frame(DATA, 0, stream, REQUEST[:8])
        data += raw_frame(DATA, PADDED, stream, b"\x03" + REQUEST[8:] + bytes(3))
        data += raw_frame(DATA, END_STREAM, stream, b"")
        length = len(data)
        peer.raw(data[:cut])
        time.sleep(0.001)  # else both parts come in one read
        peer.raw(data[cut:])
        assert peer.answer(stream).status == 0
        cut += 1


def test_empty_data_frames_are_nothing_but_their_flag(peer: Peer) -> None:
    stream = peer.open(data=b"", end=False)
    for piece in (REQUEST[:3], REQUEST[3:5], REQUEST[5:6], REQUEST[6:]):
        peer.raw(raw_frame(DATA, 0, stream, b"") * 3 + raw_frame(DATA, 0, stream, piece))
    peer.raw(raw_frame(DATA, 0, stream, b"") + raw_frame(DATA, END_STREAM, stream, b""))
    assert peer.answer(stream).status == 0
    # And a request that is nothing else.
    stream = peer.open(data=b"", end=False)
    peer.raw(raw_frame(DATA, END_STREAM, stream, b""))
    assert peer.answer(stream).status == 3


# --- headers

Pairs = list[tuple[str, str]]
MALFORMED = -1  # answered by RST_STREAM(PROTOCOL_ERROR): it is no HTTP request


@pytest.mark.parametrize(
    ("extra", "drop", "expected"),
    [
        ([("x", "a ")], "", 3),
        ([("x", " a")], "", 3),
        ([("x", "a\t")], "", 3),
        ([("x", "a\0b")], "", 3),
        ([("x", "a\r\nb: c")], "", 3),
        ([("x", "\x7f")], "", 3),
        ([("x", "gr\xfc\xdfe")], "", 3),
        ([("grpc-timeout", "1S ")], "", 3),
        ([("content-type", "application/grpc ")], "", 3),
        ([("x-bin", "***")], "", 3),
        ([("x-bin", "A")], "", 3),
        ([("x-bin", "AA=A")], "", 3),
        ([("x-bin", "A,A")], "", 3),
        ([("x-bin", "\xff")], "", 3),
        ([("x-bin", "QQ==,QQ==")], "", 0),  # two values in one
        ([("x-bin", "AA,AAA")], "", 0),
        ([("x", "gr\xfc"), ("content-length", "x")], "", 3),
        ([("content-length", "x"), ("x", "gr\xfc")], "", 3),
        ([("grpc-timeout", "0n")], "", 4),
        ([("grpc-timeout", "00000000H")], "", 4),
        ([("grpc-timeout", "9" * 400 + "S")], "", 3),
        ([("grpc-timeout", "")], "", 3),
        ([("grpc-timeout", "\u0661S".encode().decode("latin-1"))], "", 3),
        ([("grpc-timeout", "99999999H")], "", 0),
        ([("grpc-timeout", "99999999S")], "", 0),
        ([], ":path", MALFORMED),
        ([], ":method", MALFORMED),
        ([], ":scheme", MALFORMED),
        ([(":path", "")], "", MALFORMED),
        ([("Upper", "x")], "", MALFORMED),
        ([("connection", "close")], "", MALFORMED),
        ([("transfer-encoding", "chunked")], "", MALFORMED),
        ([(":unknown", "x")], "", MALFORMED),
        ([(":status", "200")], "", MALFORMED),
        ([("", "x")], "", MALFORMED),
    ],
)
def test_bad_headers_are_answered_and_cost_no_other_call(peer: Peer, extra: Pairs, drop: str, expected: int) -> None:
    """Stock grpclib leaves several of them without any answer, and ends at a value that is not ASCII.

    Mutant seen: content-length is read where an earlier header was refused already.
    """
    other = peer.open(data=REQUEST[:4], end=False)
    answer = peer.call(*extra, drop=drop)
    if expected == MALFORMED:
        assert (answer.reset, answer.headers) == (ErrorCodes.PROTOCOL_ERROR, {})
    else:
        assert answer.status == expected, answer.headers
    peer.h2.send_data(other, REQUEST[4:], end_stream=True)
    peer.flush()
    assert peer.answer(other).status == 0


def test_headers_of_a_call_that_grpclib_serves(peer: Peer) -> None:
    """Mutant seen: joined values are taken apart only for methods of our own; the others have no answer."""
    for extra, status in ((("x-bin", "AA,AAA"), 0), (("x-bin", "A,AA"), 3), (("x", "gr\xfc"), 3)):
        assert peer.call((":path", "/grpc.health.v1.Health/Check"), extra, data=prefixed(b"")).status == status


@pytest.mark.parametrize("value", ["1", "1000000", "x", "-1"])
def test_a_content_length_that_is_wrong_costs_no_other_call(peer: Peer, value: str) -> None:
    """RFC 9113 section 8.1.1: malformed, an error of the stream."""
    other = peer.open(data=REQUEST[:4], end=False)
    answer = peer.call(("content-length", value))
    assert answer.reset == ErrorCodes.PROTOCOL_ERROR or answer.status == 3
    peer.h2.send_data(other, REQUEST[4:], end_stream=True)
    peer.flush()
    assert peer.answer(other).status == 0


def test_a_header_list_over_the_limit_ends_the_connection_or_the_call(served: Served) -> None:
    """16 KiB are announced; HPACK's own bomb is one entry of 4 KiB, named ten thousand times."""
    with Bare(served) as bare:
        bare.send(raw_frame(HEADERS_FRAME, END_HEADERS, 1, bare.encoder.encode([*HEADERS, ("x", "y" * 4000)])))
        bare.send(raw_frame(HEADERS_FRAME, END_HEADERS, 3, bare.encoder.encode(HEADERS) + b"\xbe" * 10_000))
        assert bare.ending() in (ErrorCodes.ENHANCE_YOUR_CALM, ErrorCodes.PROTOCOL_ERROR, ErrorCodes.COMPRESSION_ERROR)


def test_a_header_block_that_never_ends(served: Served) -> None:
    """h2 counts CONTINUATION frames, but would keep 64 of them of any length."""
    before = memory(served)
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            bare = stack.enter_context(Bare(served))
            bare.send(raw_frame(HEADERS_FRAME, 0, 1, b""))
            bare.send(raw_frame(CONTINUATION, 0, 1, bytes(60_000)) * 10)
            assert bare.ending() == ErrorCodes.ENHANCE_YOUR_CALM
    assert memory(served) - before < 10


def references(bare: Bare, count: int) -> bytes:
    """The headers of a request, and `count` one-byte references to an entry of the table, which they make."""
    block = b"".join(b"\0" + bytes([len(n)]) + n.encode() + bytes([len(v)]) + v.encode() for n, v in HEADERS)
    return block + b"\x40\x01x\x01y" + b"\xbe" * count


def test_requests_with_many_headers_are_refused_and_slowed(served: Served) -> None:
    """One-byte references make long lists cheap for who sends them."""
    before = memory(served)
    with Beside(served) as beside, Bare(served) as bare:
        for stream in range(1, 80, 2):
            bare.send(raw_frame(HEADERS_FRAME, END_HEADERS, stream, references(bare, 300)))
        statuses, decoder = set(), hpack.Decoder()
        for kind, _, stream, body in bare.frames():
            if kind == HEADERS_FRAME:
                statuses.add(dict(decoder.decode(body)).get("grpc-status"))
                if stream == 79:
                    break
    assert statuses == {"8"}
    assert beside.longest < LATE
    assert memory(served) - before < 20


@pytest.mark.parametrize(
    ("extra", "status"),
    [
        ((":path", "/x" + "%" * 15_000), 12),
        (("x" + "%" * 7_000 + "-bin", "*"), 3),
        (("\xfc" * 7_000 + "-bin", "*"), 3),
        (("x" * 15_000, "a "), 3),
        (("x-func-name", "%" * 15_000), 12),
    ],
)
def test_what_a_peer_has_sent_comes_back_as_a_short_text(peer: Peer, extra: tuple[str, str], status: int) -> None:
    """It is coded for the wire in Python: the first of these cost the server 0.1 s."""
    answer = peer.call(extra)
    assert answer.status == status
    assert 0 < len(answer.headers["grpc-message"]) <= 6 * MAX_REFUSAL


def test_much_credit_beside_a_thousand_calls(served: Served) -> None:
    """grpclib wakes every stream for each WINDOW_UPDATE of the connection's window."""
    with Beside(served) as beside, Bare(served) as bare:
        bare.send(b"".join(bare.headers(stream) for stream in range(1, 1000, 2)))
        bare.send(raw_frame(WINDOW_UPDATE, 0, 0, (1 << 16).to_bytes(4)) * 3000)
        bare.send(raw_frame(PING, 0, 0, b"the last"))
        assert any(kind == PING and body == b"the last" for kind, _, _, body in bare.frames())
    assert beside.longest < LATE


# --- streams opened and reset


def test_rapid_reset_is_told_to_calm_down(served: Served) -> None:
    """CVE-2023-44487. Stock grpclib keeps 8 kB of each stream, and serves for ever."""
    before = 0.0
    with Beside(served) as beside:
        for number in range(6 + 3 * LONG):
            if number == 6:
                before = memory(served)  # the work of a thousand streams at once has had its peak
            with Bare(served) as bare:
                bare.send(b"".join(bare.headers(stream) + reset(stream) for stream in range(1, 40_000, 2)))
                assert bare.ending() == ErrorCodes.ENHANCE_YOUR_CALM
    assert beside.longest < LATE
    assert memory(served) - before < 15


def test_a_thousand_calls_given_up_at_once_are_no_attack(served: Served) -> None:
    with Peer(served) as peer:
        streams = [peer.open(data=REQUEST, end=False) for _ in range(1000)]
        for stream in streams:
            peer.h2.reset_stream(stream, ErrorCodes.CANCEL)
        # Until their work has really ended they count, so that a call in their place may be refused, unprocessed.
        wait_until(lambda: peer.call().reset != ErrorCodes.REFUSED_STREAM)
        honest(peer)
        wait_until(lambda: not jobs(served))


# Headers that a request may have besides, and a frame behind it for which the server has to reset the stream.
RESETTING: dict[str, tuple[Pairs, tuple[int, int, bytes]]] = {
    "a window beyond its limit": ([], (WINDOW_UPDATE, 0, b"\x7f\xff\xff\xff")),
    "more payload than content-length": ([("content-length", "5")], (DATA, 0, bytes(100))),
    "less payload than content-length": ([("content-length", "5")], (DATA, END_STREAM, b"x")),
    "malformed trailers": ([], (HEADERS_FRAME, END_HEADERS | END_STREAM, b"\0\x05:path\x01/")),
}


@pytest.mark.parametrize("name", RESETTING)
def test_resets_that_a_peer_makes_the_server_send_are_counted_or_cost_nothing(served: Served, name: str) -> None:
    """CVE-2025-8671. Mutant seen: what the server finds itself, and not h2, was not counted."""
    extra, (kind, flags, body) = RESETTING[name]
    before = memory(served)
    with Beside(served) as beside, Bare(served) as bare:
        for first in range(1, 40_000, 2000):
            bare.send(
                b"".join(
                    raw_frame(HEADERS_FRAME, END_HEADERS, stream, bare.encoder.encode([*HEADERS, *extra]))
                    + raw_frame(kind, flags, stream, body)
                    for stream in range(first, first + 2000, 2)
                )
            )
        assert bare.ending() == ErrorCodes.ENHANCE_YOUR_CALM
    assert beside.longest < LATE
    assert memory(served) - before < 15


def test_the_window_of_calls_given_up_comes_back(serve: Serve) -> None:
    """Those that are cancelled before their first step too, and DATA behind the RST_STREAM.

    Stock grpclib gives none of it back: after 4 MiB the connection is dead.
    """
    window = MIB
    served = serve("Async", "--stream-window", "64KiB", "--connection-window", str(window), "--max-message", "2MiB")
    body = prefixed(bytes(MIB))[: 16 * KIB]
    for _ in range(2 * LONG):
        with Bare(served) as bare:
            frames = bare.frames()
            room = 65535
            for stream in range(1, 1800, 2):
                data = raw_frame(DATA, 0, stream, body)
                late = stream % 3 == 0  # the DATA comes behind the RST_STREAM
                bare.send(bare.headers(stream) + (reset(stream) + data if late else data + reset(stream)))
                room -= len(body)
                while room < len(body):
                    room += connection_credit(frames, WINDOW_UPDATE)
            bare.send(raw_frame(PING, 0, 0, b"12345678"))
            room += connection_credit(frames, PING)
            # What is not given back is the half that is not yet due; of calls that have not yet seen their end, later.
            while room < window // 2:
                room += connection_credit(frames, WINDOW_UPDATE)
            bare.send(bare.headers(1801) + raw_frame(DATA, END_STREAM, 1801, REQUEST))
            assert any(kind == DATA and stream == 1801 for kind, _, stream, _ in frames)
    wait_until(lambda: not jobs(served))


def connection_credit(frames: Iterator[tuple[int, int, int, bytes]], until: int) -> int:
    """Read up to a frame of type `until` for the whole connection; what its window has grown by."""
    grown = 0
    for kind, _, stream, body in frames:
        if kind == WINDOW_UPDATE and stream == 0:
            grown += int.from_bytes(body, "big")
        if kind == until and stream == 0:
            return grown
    pytest.fail("the server has closed the connection")


# --- floods

CLOSED_STREAM = 1  # where a call was answered before the flood begins
OPEN_STREAM = 3  # where one waits for its message
FLOODS: dict[str, bytes] = {
    "PING": raw_frame(PING, 0, 0, b"12345678"),
    "PING ACK": raw_frame(PING, ACK, 0, b"12345678"),
    "SETTINGS": raw_frame(SETTINGS, 0, 0, b""),
    "SETTINGS with a value": raw_frame(SETTINGS, 0, 0, b"\0\4\0\1\0\0"),
    "SETTINGS with many ids": b"".join(
        raw_frame(SETTINGS, 0, 0, b"".join(id.to_bytes(2) + b"\0\0\0\7" for id in range(first, first + 10_000)))
        for first in range(16, 60_000, 10_000)
    ),
    "SETTINGS ACK": raw_frame(SETTINGS, ACK, 0, b""),
    "PRIORITY": raw_frame(PRIORITY, 0, 5, bytes(4) + b"\1"),
    "empty DATA": raw_frame(DATA, 0, OPEN_STREAM, b""),
    "padded DATA": raw_frame(DATA, PADDED, CLOSED_STREAM, b"\0"),
    "DATA of a byte": raw_frame(DATA, 0, OPEN_STREAM, b"\0"),
    "DATA for nobody": raw_frame(DATA, 0, CLOSED_STREAM, b"x"),
    "small WINDOW_UPDATE": raw_frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1"),
    "WINDOW_UPDATE for nobody": raw_frame(WINDOW_UPDATE, 0, CLOSED_STREAM, b"\0\1\0\0"),
    "RST_STREAM": reset(CLOSED_STREAM),
    "RST_STREAM with a flag": reset(CLOSED_STREAM, flags=1),
    "unknown": raw_frame(0xFA, 0, 0, b""),
    "CONTINUATION": raw_frame(HEADERS_FRAME, 0, 5, b"") + raw_frame(CONTINUATION, 0, 5, b"") * 1000,
    "GOAWAY": raw_frame(GOAWAY, 0, 0, bytes(8)),
}
LEGAL = {
    "PING", "SETTINGS", "SETTINGS with a value", "SETTINGS with many ids", "PRIORITY", "empty DATA",
    "small WINDOW_UPDATE", "unknown",
}  # fmt: skip


class Flooder:
    """Sends one thing over and over, as fast as it is taken, and reads what comes (`reads`) or does not."""

    def __init__(self, served: Served, frames: bytes, *, reads: bool = True) -> None:
        self._served = served
        self._frames = frames * max(1, 16 * KIB // len(frames))
        self._reads = reads
        self.connections = 0
        self.sent = 0
        self.seconds = 0.0  # that the flood has lasted

    def _connect(self) -> Peer:
        peer = Peer(self._served)
        # What the kernel holds is not yet the server's work.
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * KIB)
        honest(peer)
        peer.open(data=b"", end=False)
        self.connections += 1
        return peer

    def run(self, seconds: float, enough: Callable[[], bool] = lambda: True) -> Peer:
        """Flood for so long, and until it is `enough`, over again where it is closed; the last connection."""
        began = time.monotonic()
        peer = self._connect()
        rest = memoryview(self._frames)
        while self.seconds < seconds or (not enough() and self.seconds < 60):
            self.seconds = time.monotonic() - began
            try:
                readable, writable, _ = select.select([peer.socket] if self._reads else [], [peer.socket], [], 0.1)
                if readable and not peer.socket.recv(MIB):
                    raise ConnectionResetError
                if writable:
                    count = peer.socket.send(rest, socket.MSG_DONTWAIT)
                    self.sent += count
                    rest = rest[count:] or memoryview(self._frames)
            except BlockingIOError:
                pass
            except ConnectionError:
                peer.socket.close()
                peer = self._connect()
                rest = memoryview(self._frames)
        while rest.nbytes % len(self._frames):  # end with a whole frame
            try:
                rest = rest[peer.socket.send(rest) :]
                if self._reads and select.select([peer.socket], [], [], 0)[0]:
                    peer.socket.recv(MIB)
            except OSError:
                break
        return peer


# One that is answered, one that is not, and one that is an attack, on every Python.
@pytest.mark.parametrize("name", FLOODS if FIRST else ["PING", "empty DATA", "DATA for nobody"])
def test_a_flood_beside_good_calls(served: Served, name: str) -> None:
    """The good ones go on, no memory is taken, and where the frames are legal the flooder is slowed, not punished."""
    before = memory(served)
    with Beside(served) as beside:
        flooder = Flooder(served, FLOODS[name])
        with flooder.run(2.0 * LONG, lambda: len(beside.times) > 2 * LONG):
            pass
        assert len(beside.times) > 2 * LONG, "it is not one call that waits for the flood's end"
    assert beside.longest < LATE
    assert memory(served) - before < 20
    # At most a read of 16 KiB in 0.1 s, and what the kernel holds. Unhindered it is some MiB a second.
    assert flooder.sent < (flooder.seconds * 160 + 1024) * KIB * flooder.connections
    if name in LEGAL:
        assert flooder.connections == 1


def test_a_flood_of_empty_messages_beside_good_calls(served: Served, peer: Peer) -> None:
    """A window holds fifty thousand. Mutant seen: all that are there are read in one turn of the loop."""
    before = memory(served)
    with Beside(served) as beside:
        stream = peer.open(data=REQUEST, end=False)
        began = len(beside.times)
        upload(peer, stream, bytes(5) * 250_000 * LONG)
        assert peer.answer(stream).status == 0
        assert len(beside.times) - began > 2 * LONG, "it is not one call that waits for the flood's end"
    assert beside.longest < LATE
    assert memory(served) - before < 20


@pytest.mark.parametrize("name", ["PING", *(["SETTINGS", "DATA for nobody"] if FIRST else [])])
def test_a_flood_whose_answers_nobody_reads(served: Served, name: str) -> None:
    """What waits to be written is bounded: the server stops reading."""
    before = memory(served)
    with Beside(served) as beside:
        with Flooder(served, FLOODS[name], reads=False).run(2.0 * LONG):
            assert memory(served) - before < 20
    assert beside.longest < LATE


def test_who_pings_ten_times_a_second_stays(served: Served) -> None:
    """A strike for too many pings is what gRPC's C core would give."""
    with Peer(served) as peer:
        for number in range(20 * LONG):
            peer.h2.ping(number.to_bytes(8, "big"))
            peer.flush()
            peer.until(lambda: any(isinstance(event, h2.events.PingAckReceived) for event in peer.events))
            peer.events.clear()
            time.sleep(0.1)
        honest(peer)


# --- connections that say nothing


def silent(served: Served, say: bytes = b"") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    with contextlib.suppress(ConnectionError):
        sock.sendall(say)
    return sock


def test_more_silent_sockets_than_connections(serve: Serve) -> None:
    served = serve("Async", "--max-connections", "20", "--handshake-timeout", "1")
    with Peer(served) as peer:
        honest(peer)
    before = descriptors(served)
    said = [b"", b"P", PREFACE[:-1], PREFACE, PREFACE + b"\0\0", PREFACE + raw_frame(SETTINGS, 0, 0, b"")[:-1]]
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(silent(served, said[n % len(said)])) for n in range(40)]
        assert sum(closed(sock, 10) for sock in socks) == 40
        with Peer(served) as peer:
            honest(peer)
    wait_until(lambda: descriptors(served) <= before)


def lets_in(served: Served) -> bool:
    """Whether a new connection is served."""
    with Bare(served) as bare:
        return answers_pings(bare)


def answers_pings(bare: Bare) -> bool:
    bare.send(raw_frame(PING, 0, 0, b"are you?"))
    return any(kind == PING and flags & ACK and body == b"are you?" for kind, flags, _, body in bare.frames())


def test_the_connection_that_is_idle_longest_makes_room_for_a_new_one(serve: Serve) -> None:
    """Peers that have said hello and no more would keep everybody out. Those with a call stay, and those idle for less.

    Mutants seen: the newest one goes; nobody does.
    """
    served = serve("Async", "--max-connections", "4")
    with Peer(served) as busy, contextlib.ExitStack() as stack:
        stream = busy.open(data=REQUEST[:4], end=False)
        idle = []
        for _ in range(3):
            idle.append(stack.enter_context(Bare(served)))
            assert answers_pings(idle[-1])
        wait_until(lambda: lets_in(served))
        assert idle[0].ending() == ErrorCodes.NO_ERROR
        assert all(answers_pings(bare) for bare in idle[1:])
        busy.h2.send_data(stream, REQUEST[4:], end_stream=True)
        busy.flush()
        assert busy.answer(stream).status == 0


def test_who_is_refused_because_there_are_enough_connections_is_told_of_the_limit(serve: Serve) -> None:
    """As one reason of three: the server says nothing. Mutant seen: only the other two are named (as they were)."""
    served = serve("Async", "--max-connections", "1")

    async def main() -> None:
        channel = Channel(served.address, Config())
        try:
            with pytest.raises(ConnectionResetError, match=r"wants TLS, or a certificate, or .* \(--max-connections\)"):
                await channel.__connect__()
        finally:
            await channel.aclose()

    with Peer(served) as busy:
        stream = busy.open(data=REQUEST[:4], end=False)
        run(main)
        busy.h2.send_data(stream, REQUEST[4:], end_stream=True)
        busy.flush()
        assert busy.answer(stream).status == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/grpc.health.v1.Health/Watch", b""),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", b"\x3a\0"),  # list_services
    ],
)
def test_a_stream_for_which_nobody_needs_a_token_keeps_nobody_out(
    serve: Serve, tmp_path: Path, path: str, message: bytes
) -> None:
    """Mutant seen: one that is open makes its connection a busy one (as it did)."""
    tokens = tmp_path / "tokens"
    add_token(tokens, "somebody", (), ())
    served = serve("Async", "--max-connections", "1", "--tokens", str(tokens))
    with Peer(served) as peer:
        stream = peer.open((":path", path), data=prefixed(message), end=False)
        peer.until(lambda: peer.answers[stream].data)
        wait_until(lambda: lets_in(served))


def test_who_does_not_read_the_answers_to_its_pings_keeps_nobody_out(serve: Serve) -> None:
    """Mutant seen: what has not been taken makes its connection a busy one (as it did)."""
    served = serve("Async", "--max-connections", "1")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        sock.connect(("127.0.0.1", served.port))
        sock.sendall(PREFACE + raw_frame(SETTINGS, 0, 0, b"") + raw_frame(PING, 0, 0, b"17 bytes") * 300)
        wait_until(lambda: lets_in(served))


def test_calls_without_a_first_message_make_room_for_those_that_come_later(serve: Serve) -> None:
    """The one that has waited longest ends; what comes later is served.

    Mutants seen: all of them stay (as they did); the newest ends; a wait that is over still counts.
    """
    served = serve("Async", "--upload-stall", "600")
    with Peer(served) as peer, contextlib.ExitStack() as stack:
        first = peer.open(data=b"", end=False)
        peer.until(lambda: peer.answers[first].data)
        for _ in range(3):
            honest(peer)
        for calls in (700, 700, SILENT - 1401):
            bare = stack.enter_context(Bare(served))
            bare.send(b"".join(bare.headers(2 * n + 1) for n in range(calls)))
            beginnings = (stream for kind, _, stream, _ in bare.frames() if kind == HEADERS_FRAME)
            assert len(set(itertools.islice(beginnings, calls))) == calls
        told = len(peer.answers[first].data)
        peer.until(lambda: peer.answers[first].ended or len(peer.answers[first].data) > told)  # a heartbeat
        assert not peer.answers[first].ended
        late = peer.open(data=b"", end=False)
        wait_until(lambda: peer.step() and peer.answers[first].ended)
        assert peer.answers[first].status == Status.RESOURCE_EXHAUSTED.value
        assert "without a first message" in peer.answers[first].headers["grpc-message"]
        honest(peer)
        peer.h2.send_data(late, REQUEST, end_stream=True)
        peer.flush()
        assert peer.answer(late).status == 0


def test_a_connection_whose_answer_is_on_its_way_makes_no_room(serve: Serve) -> None:
    """The call is over for the server, which has written all of it. Mutant seen: only its streams are looked at."""
    served = serve("Plain", "--max-connections", "1")
    with Peer(served, receive_buffer=32 * KIB) as peer:
        wide(peer)
        stream = peer.open(("x-func-name", "file"), data=request(b'{"length": 2097152}'))
        peer.until(lambda: len(peer.answers[stream].data) > 1000)
        wait_until(lambda: not jobs(served))
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            assert not lets_in(served)
            time.sleep(0.05)
        answer = peer.answer(stream)
        assert (answer.status, len(answer.result)) == (0, 2 * MIB)
        wait_until(lambda: lets_in(served))


def test_a_handshake_in_drops_is_none(serve: Serve) -> None:
    served = serve("Async", "--handshake-timeout", "1")
    with silent(served) as sock:
        for byte in PREFACE:
            with contextlib.suppress(ConnectionError):
                sock.send(bytes([byte]))
            if closed(sock, 0.2):
                break
        else:
            pytest.fail("it was served")


@pytest.mark.parametrize("hello", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" + bytes(100), b"\0" * 5000])
def test_what_is_no_http2_is_closed_at_once(served: Served, hello: bytes) -> None:
    with silent(served, hello) as sock:
        assert closed(sock, 5)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="this system cannot limit another process")
def test_more_sockets_than_descriptors(serve: Serve) -> None:
    """accept() pauses. Stock grpclib inside trio-asyncio ends."""
    served = serve("Async", "--handshake-timeout", "2")
    with Peer(served) as peer:
        honest(peer)
    wait_until(lambda: not left_in(served.spool))  # without descriptors no entry can be removed
    before = descriptors(served)
    limits = resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (before + 10, limits[1]))
        socks = [stack.enter_context(silent(served)) for _ in range(60)]
        wait_until(lambda: "Too many open files" in served.log_text() or descriptors(served) >= before + 9)
        assert sum(closed(sock, 60) for sock in socks[:10]) == 10
        assert served.process.poll() is None
    resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, limits)
    wait_until(lambda: descriptors(served) <= before)
    with Peer(served) as peer:
        honest(peer)


# --- peers that take nothing


def whole(answer: Answer) -> bool:
    """Whether what came on the stream is whole messages."""
    rest = answer.data
    while rest:
        if len(rest) < 5 or len(rest) < (end := 5 + int.from_bytes(rest[1:5], "big")):
            return False
        rest = rest[end:]
    return True


def narrow(served: Served, window: int) -> Peer:
    """A peer whose streams have a window of so many bytes, which it does not open by itself."""
    peer = Peer(served)
    peer.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
    peer.flush()
    changed = h2.events.SettingsAcknowledged
    peer.until(lambda: sum(isinstance(event, changed) for event in peer.events) == 2)
    peer.h2.acknowledge_received_data = lambda size, stream: None  # type: ignore[assignment]
    return peer


@pytest.mark.parametrize("window", [0, 12])
def test_a_stream_without_window_ends_and_the_connection_goes_on(serve: Serve, window: int) -> None:
    """Ended by RST_STREAM where a message was cut: nobody may take a status behind half a message for an end."""
    served = serve("Async", "--send-stall", "1", "--tick", "0.1")
    with narrow(served, window) as peer:
        for _ in range(3):
            streams = [peer.open(("x-func-name", "gather"), data=request(b'{"count": 9}')) for _ in range(3)]
            began = time.monotonic()
            for stream in streams:
                answer = peer.answer(stream)
                assert answer.reset is not None or whole(answer)
                assert answer.headers.get("grpc-status") != "0"
            assert time.monotonic() - began < 10
        peer.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 65535})
        honest(peer)
        wait_until(lambda: not jobs(served))


def test_a_stream_without_window_ends_though_its_connection_gets_credit(serve: Serve) -> None:
    """As from a proxy whose other calls go on. Mutant seen: credit for the connection counts as the stream's."""
    served = serve("Async", "--send-stall", "1", "--tick", "0.1")
    with narrow(served, 0) as peer:
        stream = peer.open(("x-func-name", "gather"), data=request(b'{"count": 9}'))
        peer.socket.settimeout(0.1)
        until = time.monotonic() + 15
        while not peer.answers[stream].ended and time.monotonic() < until:
            peer.h2.increment_flow_control_window(1)
            with contextlib.suppress(TimeoutError):
                peer.flush()
                peer.step()
        assert peer.answers[stream].reset is not None
        wait_until(lambda: not jobs(served))


def test_a_peer_whose_connection_gets_no_credit_is_dropped(serve: Serve) -> None:
    """Mutant seen: only a stream's own window is looked at."""
    served = serve("Plain", "--send-stall", "1", "--tick", "0.1", "--cancel-grace", "0")
    with narrow(served, 2**31 - 1) as peer:
        answer = peer.call(("x-func-name", "file"), data=request(b'{"length": 1}'))
        assert answer.status == 0
        peer.open(("x-func-name", "file"), data=request(b'{"length": 1000000}'))
        peer.until(lambda: peer.h2.inbound_flow_control_window == 0)
        wait_until(lambda: not peer.step(), seconds=20)
    wait_until(lambda: not jobs(served))


def wide(peer: Peer) -> None:
    """Windows as wide as they go: what is not taken is held by TCP alone."""
    peer.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1})
    peer.h2.increment_flow_control_window(2**31 - 1 - 65535)
    peer.flush()


def test_a_peer_that_stops_to_read_is_dropped(serve: Serve) -> None:
    served = serve("Plain", "--send-stall", "1", "--tick", "0.1")
    with Peer(served) as peer:
        honest_plain(peer)
    wait_until(lambda: not jobs(served))
    before = descriptors(served)
    with Peer(served) as peer:
        wide(peer)
        peer.open(("x-func-name", "file"), data=request(b'{"length": 67108864}'))
        wait_until(lambda: jobs(served))
        wait_until(lambda: not jobs(served) and descriptors(served) <= before, seconds=20)
    assert "Traceback" not in served.log_text()


@pytest.mark.parametrize("pings", [0, 350])
def test_a_peer_that_reads_slowly_is_not_one_that_does_not(serve: Serve, pings: int) -> None:
    """It reads 30 kB a second; with pings the server writes 120 kB/s more, so what waits never becomes less.

    The server's system asks for more when a third of its 4 MiB is free: until then only its queue becomes less.
    """
    served = serve("Plain", "--send-stall", "3", "--tick", "0.1", "--frame-rate", "1000000")
    with Peer(served, receive_buffer=32 * KIB) as peer:
        wide(peer)
        stream = peer.open(("x-func-name", "file"), data=request(b'{"length": 16777216}'))
        peer.until(lambda: len(peer.answers[stream].data) > 100_000)
        read = time.monotonic()
        until = read + 7
        while read < until:
            peer.raw(raw_frame(PING, 0, 0, b"17 bytes") * pings)
            time.sleep(0.05)
            now = time.monotonic()
            peer.step(int(30_000 * (now - read)))  # not less on a busy machine
            read = now
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
        answer = peer.answer(stream)
        assert (answer.status, len(answer.result)) == (0, 16 * MIB)


def honest_plain(peer: Peer) -> None:
    assert peer.call(("x-func-name", "hello")).status == 0


def test_a_client_that_is_stopped_is_dropped(serve: Serve) -> None:
    served = serve("Plain", "--send-stall", "1", "--tick", "0.1")
    with Peer(served) as peer:
        honest_plain(peer)
    wait_until(lambda: not jobs(served))
    before = descriptors(served)
    code = (
        "import sys, types\n"
        "from tests.test_hardening import Peer, request, wide\n"
        "peer = Peer(types.SimpleNamespace(port=int(sys.argv[1])))\n"
        "wide(peer)\n"
        "stream = peer.open(('x-func-name', 'file'), data=request(b'{\"length\": 134217728}'))\n"
        "peer.until(lambda: len(peer.answers[stream].data) > 100_000)\n"
        "print('begun', flush=True)\n"
        "peer.answer(stream)\n"
    )
    command = [sys.executable, "-c", code, str(served.port)]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "begun\n"
        client.send_signal(signal.SIGSTOP)
        wait_until(lambda: not jobs(served) and descriptors(served) <= before, seconds=20)
        assert served.process.poll() is None
    finally:
        client.kill()
        client.communicate()
    assert "Traceback" not in served.log_text()


def test_the_work_ends_while_a_heartbeat_is_cut(serve: Serve, tmp_path: Path) -> None:
    """A heartbeat has 11 bytes, so the second one is cut by a window of 12. Stock grpclib sends a status behind it."""
    served = serve("Async", "--tick", "0.05")
    for seconds in (0.0, 0.3):
        with narrow(served, 12) as peer:
            stream = peer.open((":path", "/ai.AI/chaos"), data=request(b'{"seconds": %g}' % seconds))
            peer.until(lambda: len(peer.answers[stream].data) == 12)  # noqa: B023
            wait_until(lambda: not list(served.spool.glob("*/running")))
            time.sleep(seconds + 0.2)
            answer = peer.answers[stream]
            assert not answer.ended
            for _ in range(200):
                if not answer.ended:
                    peer.h2.increment_flow_control_window(7, stream)
                    peer.flush()
                    peer.socket.settimeout(0.02)
                    with contextlib.suppress(TimeoutError):
                        peer.step()
            peer.socket.settimeout(30)
            assert answer.ended
            assert whole(answer)
            assert (answer.status, answer.result) == (0, b'{"size": 0}')


# --- keepalive, age and idleness


def test_a_silent_peer_is_found(serve: Serve) -> None:
    """It has said hello, and never answers a PING: at once, or when it says nothing else any more.

    On a slow line the answer may be on its way as long as other things come.
    """
    served = serve("Async", "--ping-interval", "0.2", "--ping-timeout", "2")
    hello = PREFACE + raw_frame(SETTINGS, 0, 0, b"")
    with silent(served, hello) as quiet, silent(served, hello) as busy:
        until = time.monotonic() + 20
        while not closed(quiet, 0.1):
            assert time.monotonic() < until, "never found"
            busy.send(raw_frame(PING, 0, 0, bytes(8)) + raw_frame(SETTINGS, ACK, 0, b""))
        busy.send(raw_frame(PING, 0, 0, bytes(8)))
        assert not closed(busy, 0.1), "it spoke"
        assert closed(busy, 20)


def test_a_peer_with_a_full_write_buffer_is_found(serve: Serve) -> None:
    """Stock grpclib closes, which waits for the buffer: for ever."""
    served = serve("Plain", "--ping-interval", "0.2", "--ping-timeout", "1")
    with Peer(served) as peer:
        honest_plain(peer)
    wait_until(lambda: not jobs(served))
    before = descriptors(served)
    with Peer(served) as peer:
        wide(peer)
        peer.open(("x-func-name", "file"), data=request(b'{"length": 67108864}'))
        wait_until(lambda: jobs(served))
        wait_until(lambda: not jobs(served) and descriptors(served) <= before, seconds=20)


def test_max_age_lets_calls_finish(serve: Serve) -> None:
    """No GOAWAY names a last stream: grpcio's core sends what it then takes for unprocessed again by itself, in part.

    Mutants seen: one GOAWAY, of the last stream, refuses what crosses it (as it was); the second one names it.
    """
    served = serve("Async", "--max-age", "1", "--max-age-grace", "60")
    with Bare(served) as bare:
        bare.send(bare.headers(1) + raw_frame(DATA, END_STREAM, 1, request(b'{"seconds": 4}')))
        frames = bare.frames()
        assert next(body for kind, _, _, body in frames if kind == GOAWAY) == ANY_STREAM
        farewell = next(body for kind, flags, _, body in frames if kind == PING and not flags & ACK)
        # A call that crosses the GOAWAY is served; one that comes when its peer has heard of it is not.
        bare.send(bare.headers(3) + raw_frame(DATA, END_STREAM, 3, REQUEST) + raw_frame(PING, ACK, 0, farewell))
        assert next(body for kind, _, _, body in frames if kind == GOAWAY) == ANY_STREAM
        bare.send(bare.headers(5) + raw_frame(DATA, END_STREAM, 5, REQUEST))
        after = list(frames)
        resets = [(stream, body) for kind, _, stream, body in after if kind == RST_STREAM]
        assert resets[0] == (5, b"\0\0\0\7")  # a second one may follow, for the DATA
        answers = [stream for kind, _, stream, body in after if kind == DATA and b"PONG" not in body]
        assert sorted(answers) == [1, 3]


def test_max_age_grace_is_the_end(serve: Serve, tmp_path: Path) -> None:
    served = serve("Async", "--max-age", "1", "--max-age-grace", "1")
    mark = tmp_path / "mark"
    with Bare(served) as bare:
        began = time.monotonic()
        headers = [*HEADERS, ("x-func-name", "forever")]
        bare.send(raw_frame(HEADERS_FRAME, END_HEADERS, 1, bare.encoder.encode(headers)))
        bare.send(raw_frame(DATA, END_STREAM, 1, request(b'{"mark": "%s"}' % str(mark).encode())))
        assert bare.ending() == ErrorCodes.NO_ERROR
        assert 2 <= time.monotonic() - began < 8
    wait_until(mark.exists)
    wait_until(lambda: not jobs(served))


def test_max_idle(serve: Serve) -> None:
    """A call that crosses the GOAWAY is served. Mutant seen: it is refused (as it was)."""
    served = serve("Async", "--max-idle", "1")
    with Bare(served) as bare:  # h2 takes nothing behind a GOAWAY
        frames = bare.frames()
        bare.send(bare.headers(1) + raw_frame(DATA, END_STREAM, 1, request(b'{"seconds": 3}')))
        for kind, flags, stream, _ in frames:
            assert kind != GOAWAY, "a call is no idleness"
            if kind == HEADERS_FRAME and flags & END_STREAM:
                assert stream == 1
                break
        assert next(body for kind, _, _, body in frames if kind == GOAWAY) == ANY_STREAM
        bare.send(bare.headers(3) + raw_frame(DATA, END_STREAM, 3, REQUEST))
        after = list(frames)
        assert [stream for kind, _, stream, body in after if kind == DATA and b"PONG" not in body] == [3]
        assert [body for kind, _, _, body in after if kind == GOAWAY] == [ANY_STREAM]


# --- deadlines


def test_a_deadline_while_a_send_is_blocked(serve: Serve, tmp_path: Path) -> None:
    """The work ends at once; the status follows the rest of the message that was cut."""
    served = serve("Async", "--tick", "0.05")
    mark = tmp_path / "mark"
    with narrow(served, 12) as peer:
        data = request(b'{"mark": "%s"}' % str(mark).encode())
        stream = peer.open(("x-func-name", "forever"), ("grpc-timeout", "1S"), data=data)
        wait_until(mark.exists)
        peer.h2.increment_flow_control_window(1000, stream)
        answer = peer.answer(stream)
        assert answer.reset is not None or (whole(answer) and answer.status == 4)
        wait_until(lambda: not jobs(served))


def test_a_deadline_during_the_upload(served: Served, peer: Peer) -> None:
    for data in (b"", REQUEST[:7], REQUEST, REQUEST + prefixed(bytes(1000))[:500]):
        began = time.monotonic()
        answer = peer.call(("grpc-timeout", "300m"), data=data, end=False)
        assert answer.status == 4
        assert 0.25 < time.monotonic() - began < 20
    wait_until(lambda: not jobs(served))


@pytest.mark.parametrize("method", ["plain", "chaos", "predict"])
def test_a_deadline_while_the_method_runs(served: Served, peer: Peer, method: str) -> None:
    """In a thread, on asyncio, on trio. A thread goes on, but nobody waits for it."""
    began = time.monotonic()
    answer = peer.call(("x-func-name", method), ("grpc-timeout", "300m"), data=request(b'{"seconds": 8}'))
    assert answer.status == 4
    assert 0.25 < time.monotonic() - began < 7


# --- what stock grpclib does


class Stock:
    """A process of tests/stock_server.py."""

    def __enter__(self) -> Stock:
        command = [sys.executable, "-m", "tests.stock_server"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().rpartition(":")[2])
        return self

    def __exit__(self, *args: object) -> None:
        self.process.kill()
        self.process.communicate()


def stuck(peer: Peer, stream: int) -> bool:
    """No end of the stream within a second, or the end of the connection."""
    peer.socket.settimeout(1)
    try:
        peer.answer(stream)
    except (AssertionError, ConnectionError, TimeoutError):
        return True
    return False


def test_stock_grpclib_fails_these_tests() -> None:
    """So the tests above show something. Its answer to an honest call comes first and last."""
    with Stock() as stock:

        def peer() -> Peer:
            return Peer(stock)  # type: ignore[arg-type]

        with peer() as fresh:
            assert fresh.call().status == 0
        for extra in ([("x-bin", "A")], [("grpc-timeout", "9" * 400 + "S")], [("x", "gr\xfc\xdfe")]):
            with peer() as bad:
                assert stuck(bad, bad.open(*extra))
        with peer() as unknown:
            unknown.raw(raw_frame(0xFA, 0, 0, b""))
            assert stuck(unknown, unknown.open())
        with peer() as long:
            assert not closed_after(long, (MAX_FRAME + 1).to_bytes(3, "big") + bytes([DATA, 0]) + bytes(3) + b"\1")
        with peer() as huge:
            assert stuck(huge, huge.open(data=b"\0\xff\xff\xff\xff", end=False))
        with Bare(stock) as bare:  # type: ignore[arg-type]
            bare.send(b"".join(bare.headers(stream) + reset(stream) for stream in range(1, 10_000, 2)))
            bare.send(raw_frame(PING, 0, 0, b"12345678"))
            assert any(kind == PING and flags & ACK for kind, flags, _, _ in bare.frames()), "it serves for ever"
        with peer() as fresh:
            assert fresh.call().status == 0
            stream = fresh.open(data=b"", end=False)
            upload(fresh, stream, prefixed(BOMBS["unknown varints"]))
            assert stuck(fresh, stream), "its loop stands still for seconds"


def closed_after(peer: Peer, data: bytes) -> bool:
    peer.until(lambda: peer.h2.remote_settings.max_concurrent_streams < 1000)
    peer.raw(data)
    return closed(peer.socket, 1)
