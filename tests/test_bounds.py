"""Each bound of the transport is the one that was configured."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from aipod.codec import Compressor
from aipod.wire.ai import Raw
from tests.conftest import Served, first_only, wait_until
from tests.test_hardening import DATA, GOAWAY, PING, Bare, reset
from tests.test_transport import HEADERS, Peer, descriptors, honest, prefixed, raw_frame

LOW = (
    *("--max-frame", "16KiB", "--max-headers", "4KiB", "--max-fields", "128"),
    *("--reset-burst", "5", "--reset-rate", "1", "--frame-rate", "100"),
)
CALM = ErrorCodes.ENHANCE_YOUR_CALM


@pytest.fixture(scope="module", params=["low", "default"])
def bounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, bool]]:
    """A server, and whether its bounds are low ones. It must still be whole at the end."""
    low = request.param == "low"
    options = LOW if low else ()
    served = Served(
        "tests.models_under_test:Async", tmp_path_factory.mktemp("server"), (*options, "--tick", "0.1"), "127.0.0.1:0"
    )
    try:
        yield served, low
        with Peer(served) as peer:
            honest(peer)
        assert served.stop() == 0, served.log_text()
        assert "Traceback" not in served.log_text(), served.log_text()
    finally:
        served.process.kill()
        served.process.communicate()


def test_frames(bounded: tuple[Served, bool]) -> None:
    served, low = bounded
    with Peer(served) as peer:
        honest(peer)
        assert peer.h2.remote_settings[SettingCodes.MAX_FRAME_SIZE] == (16 if low else 1088) * 1024
    with Bare(served) as bare:
        bare.send(bare.headers(1) + raw_frame(DATA, 0, 1, bytes(16 * 1024 + 1)) + raw_frame(PING, 0, 0, bytes(8)))
        if low:
            assert bare.ending() == ErrorCodes.FRAME_SIZE_ERROR
        else:
            assert any(kind == PING for kind, *_ in bare.frames())


def test_headers(bounded: tuple[Served, bool]) -> None:
    served, low = bounded
    with Peer(served) as peer:
        honest(peer)
        assert peer.h2.remote_settings[SettingCodes.MAX_HEADER_LIST_SIZE] == (4 if low else 16) * 1024
    with Bare(served) as bare:
        block = bare.encoder.encode([*HEADERS, ("x", "y" * 4096)])
        bare.send(raw_frame(1, 0x4, 1, block) + raw_frame(PING, 0, 0, bytes(8)))
        if low:
            assert bare.ending() == CALM
        else:
            assert any(kind == PING for kind, *_ in bare.frames())


def test_fields(bounded: tuple[Served, bool]) -> None:
    served, low = bounded
    first = bytes(Raw(data=Compressor(1).frame(b"{}")))
    more = b"\x10\x00" * 128  # field 2, again and again
    with Peer(served) as peer:
        answer = peer.call(data=prefixed(first + more))
        assert (answer.status == 3 and "too many fields" in answer.headers["grpc-message"]) == low


def test_resets(bounded: tuple[Served, bool]) -> None:
    served, low = bounded
    with Bare(served) as bare:
        bare.send(b"".join(bare.headers(stream) + reset(stream) for stream in range(1, 21, 2)))
        bare.send(raw_frame(PING, 0, 0, bytes(8)))
        if low:
            assert bare.ending() == CALM
        else:
            assert any(kind == PING for kind, *_ in bare.frames())


def test_resets_in_the_long_run(bounded: tuple[Served, bool]) -> None:
    """One a second after the first five. Mutants seen: 33 a second; none."""
    served, low = bounded
    if not low:
        return
    with Bare(served) as bare:
        streams = iter(range(1, 1000, 2))
        for count in (5, 2):
            for stream in itertools.islice(streams, count):
                bare.send(bare.headers(stream) + reset(stream))
            time.sleep(2.1)
        bare.send(raw_frame(PING, 0, 0, bytes(8)))
        assert any(kind == PING for kind, *_ in bare.frames())
        for stream in itertools.islice(streams, 20):
            bare.send(bare.headers(stream) + reset(stream))
            time.sleep(0.05)
        assert bare.ending() == CALM


@first_only("it waits for half a minute, and computes nothing")
def test_frames_that_are_no_payload(bounded: tuple[Served, bool]) -> None:
    """Too many are read later, as the rate says; never sooner. Mutants seen: another rate; more at once."""
    served, low = bounded
    if not low:
        return
    for count in (700, 4000):  # what is read at once, and more
        with Bare(served) as bare:
            began = time.monotonic()
            bare.send(raw_frame(PING, 0, 0, bytes(8)) * count)
            for last in (b"with it.", b"the next", b"and then"):  # what is owed is waited for behind the next
                bare.send(raw_frame(PING, 0, 0, last))
                assert any(kind == PING and body == last for kind, _, _, body in bare.frames())
            assert time.monotonic() - began > 0.8


def test_a_connection_that_the_server_ends_is_not_reset_under_what_is_still_on_its_way(
    bounded: tuple[Served, bool],
) -> None:
    """Its side ends at once; what comes after that is dropped, a mebibyte at most."""
    served, _ = bounded
    before = descriptors(served)
    with Bare(served) as bare:
        bare.send(raw_frame(GOAWAY, 0, 0, bytes(4) + b"\0\0\0\xff"))
        assert bare.ending() is None
        for _ in range(3):
            bare.socket.sendall(raw_frame(PING, 0, 0, bytes(8)))
            time.sleep(0.05)
        assert bare.socket.recv(1) == b""
        bare.send(bytes(64 * 1024 * 1024))
        with pytest.raises(ConnectionError):
            bare.socket.sendall(b"x")
    wait_until(lambda: descriptors(served) <= before)
