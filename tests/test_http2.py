"""What `http2.H2` does by itself and not as h2 does, against a real h2 at the other end."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import h2.connection
import h2.events
import pytest
from h2.config import H2Configuration
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError, StreamClosedError, TooManyStreamsError
from h2.settings import SettingCodes

from aipod.transport.frames import headers_head
from aipod.transport.http2 import CODED, H2
from aipod.transport.protocol import h2_configuration
from tests.conftest import ROOT

REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/x/y"), (":authority", "x"), ("te", "trailers")]
CODED_BEGIN, CODED_END = map(list, CODED)


def connected(limit: int = 100) -> tuple[H2, h2.connection.H2Connection]:
    """Our side as a client, and a server that takes `limit` streams at once."""
    ours = H2(h2_configuration(client=True))
    ours.initiate_connection()
    server = h2.connection.H2Connection(H2Configuration(client_side=False, header_encoding="ascii"))
    server.local_settings.update({SettingCodes.MAX_CONCURRENT_STREAMS: limit})
    server.local_settings.acknowledge()
    server.initiate_connection()
    ours.receive_data(server.data_to_send())
    server.receive_data(ours.data_to_send())
    return ours, server


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("length", [10, 3000, 5000, 40_000], ids=lambda length: f"{length} bytes")
def test_a_request_is_what_h2_would_send(length: int, end: bool) -> None:
    """Also one whose headers need more than a frame; and a second time. Mutant seen: END_STREAM is left out."""
    ours, server = connected()
    for number in (1, 3):
        headers = [*REQUEST, ("x-long", "~" * length)]
        stream_id, frames = ours.open_stream(headers, end=end)
        assert stream_id == number
        events = server.receive_data(frames)
        (request,) = [event for event in events if isinstance(event, h2.events.RequestReceived)]
        assert request.stream_id == number
        assert request.headers == headers
        assert (request.stream_ended is not None) is end
        if not end:
            ours.send_data(number, b"more", end_stream=True)
            ended = [event for event in server.receive_data(ours.data_to_send()) if event.stream_id == number]
            assert isinstance(ended[-1], h2.events.StreamEnded)


def test_never_more_streams_than_the_peer_takes_and_always_as_many() -> None:
    """Mutants seen: streams that have ended count as open; the limit is not looked at."""
    ours, server = connected(limit=3)
    opened = []
    for _ in range(3):
        stream_id, frames = ours.open_stream(REQUEST, end=False)
        server.receive_data(frames)
        opened.append(stream_id)
    with pytest.raises(TooManyStreamsError):
        ours.open_stream(REQUEST, end=False)
    ours.reset_stream(opened[0], ErrorCodes.CANCEL)  # not forgotten yet
    server.receive_data(ours.data_to_send())
    stream_id, frames = ours.open_stream(REQUEST, end=False)
    server.receive_data(frames)
    assert ours.open_outbound_streams == 3
    with pytest.raises(TooManyStreamsError):
        ours.open_stream(REQUEST, end=False)


def test_of_a_stream_that_is_forgotten_nothing_is_kept_but_how_it_ended() -> None:
    """And of an open one all. Mutant seen: it is forgotten as one of which nothing is known."""
    ours, server = connected()
    for _ in range(2):
        server.receive_data(ours.open_stream(REQUEST, end=False)[1])
    ours.reset_stream(1, ErrorCodes.CANCEL)
    for stream_id in (1, 1, 3):
        ours.forget(stream_id)
    assert list(ours.streams) == [3]
    with pytest.raises(StreamClosedError):
        ours._get_stream_by_id(1)
    # What was on its way when it was reset is no error of the connection (RFC 9113 section 5.1).
    server.send_headers(1, [(":status", "200")])
    server.send_data(1, b"late")
    server.send_headers(3, [(":status", "200")])
    events = ours.receive_data(server.data_to_send())
    assert [event.stream_id for event in events if isinstance(event, h2.events.ResponseReceived)] == [3]


INLINE = """
import asyncio, trio
from aipod.transport import bridge

async def nothing(value):
    return value

async def fails():
    raise KeyError("at once")

async def waits(kinds):
    seen = []
    for kind in kinds:
        if kind == "future":
            future = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(future.set_result, len(seen))
            seen.append(await future)
        elif kind == "broken":
            future = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(future.set_exception, ValueError("from the future"))
            try:
                await future
            except ValueError as exc:
                seen.append(str(exc))
        else:
            await trio.sleep(0)
            seen.append(kind)
    return seen

async def never():
    try:
        await asyncio.get_running_loop().create_future()
    except trio.Cancelled:
        ends.append("cancelled")
        raise

ends = []

async def main():
    async with bridge.open_loop():
        assert await bridge.inline(nothing, 5) == 5
        try:
            await bridge.inline(fails)
        except KeyError:
            ends.append("failed")
        for kinds in (["future"], ["trap"], ["future", "trap", "broken", "future"], ["broken", "trap"]):
            seen = await bridge.inline(waits, kinds)
            wanted = {"future": None, "trap": "trap", "broken": "from the future"}
            assert seen == [n if kind == "future" else wanted[kind] for n, kind in enumerate(kinds)], seen
        for first in (0, 0.01):
            with trio.move_on_after(first) as scope:
                await bridge.inline(never)
            assert scope.cancelled_caught
    assert ends == ["failed", "cancelled", "cancelled"], ends

trio.run(main)
"""


def test_inline_takes_what_waits_for_nothing_for_a_future_or_for_trio() -> None:
    """Errors and cancellation reach it. In a process of its own: the bridge replaces asyncio's loop.

    Mutants seen: what the first step yielded is dropped; an error of a future is not thrown in.
    """
    command: list[Any] = [sys.executable, "-c", INLINE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", range(20))
def test_headers_come_as_they_are_whatever_calls_came_before(seed: int) -> None:
    """Blocks are kept, though the table that they refer to changes: by what enters it, and by the peer's settings, of
    which several may come between two calls.

    Mutants seen: a kept block outlives what enters the table; or a change of its size; or headers too long for a block;
    a size is said that the peer has taken back before, and that is an error of its whole connection.
    """
    dice = random.Random(seed)
    ours, server = connected(limit=1000)
    kinds = [[*REQUEST, ("x-kind", str(kind)), ("x-long", "~" * dice.choice([5, 900]))] for kind in range(5)]
    for number in range(1, 200, 2):
        for _ in range(dice.choice([0] * 20 + [1, 2, 3])):
            server.update_settings({SettingCodes.HEADER_TABLE_SIZE: dice.choice([0, 100, 1000, 4096, 65536])})
            ours.receive_data(server.data_to_send())
            server.receive_data(ours.data_to_send())
        headers = [*dice.choice(kinds)]
        if dice.random() < 0.1:
            headers.append(("x-new", str(number)))
        if dice.random() < 0.05:
            headers.append(("x-longest", "~" * 5000))
        own = [("x-job-id", f"{number:032x}"), ("traceparent", "t" * dice.choice([55, 126, 127]))]
        _, frames = ours.open_stream([*headers, *own], end=True)
        (request,) = [e for e in server.receive_data(frames) if isinstance(e, h2.events.RequestReceived)]
        assert sorted(request.headers) == sorted([*headers, *own])
        assert request.headers[0] == REQUEST[0]


def test_a_header_of_one_call_only_pushes_nothing_out_of_the_table() -> None:
    """Mutant seen: it enters the table, which then has a new place for everything at every call."""
    ours, server = connected(limit=1000)
    sizes = set()
    for number in range(1, 1001, 2):
        _, frames = ours.open_stream([*REQUEST, ("x-job-id", f"{number:032x}")], end=True)
        server.receive_data(frames)
        sizes.add(len(frames))
    assert len(sizes) == 2  # the first, and all others


RESPONSES = {
    "as our server begins and ends": [(CODED_BEGIN, False), (CODED_END, True)],
    "others": [([(":status", "200"), ("x-a", "1")], False), ([("grpc-status", "7"), ("grpc-message", "no")], True)],
    "at once": [([(":status", "200"), ("grpc-status", "7")], True)],
    "100 first": [([(":status", "103")], False), (CODED_BEGIN, False), (CODED_END, True)],
    "trailers that are not the end": [(CODED_BEGIN, False), ([("grpc-status", "0")], False)],
    "no block": [(b"\xff\xff\xff\xff\xff\xff", False)],
    "behind the end": [(CODED_BEGIN, False), (CODED_END, True), (CODED_END, True)],
}


@pytest.mark.parametrize("what", RESPONSES)
def test_a_response_means_what_h2_takes_it_for(what: str) -> None:
    """Mutants seen: the end is not heard of; an error sends no GOAWAY."""
    heard = []
    for take in (H2.take, H2.receive_data):
        ours, server = connected()
        ours.open_stream(REQUEST, end=False)
        encoder, events = server.encoder, []
        try:
            for headers, end in RESPONSES[what]:
                block = headers if isinstance(headers, bytes) else encoder.encode(headers)
                coded = CODED.get(tuple(headers), block) if isinstance(headers, list) else block
                events += take(ours, headers_head(len(coded), 1, end=end) + coded)
        except ProtocolError as exc:
            events.append(type(exc))
        heard.append((list(map(repr, events)), ours.data_to_send()))
    assert heard[0] == heard[1]
    assert len(heard[0][0]) >= 1


# Of a client's headers: which streams they come on, what the server does in between, and its limit.
REQUESTS: dict[str, list[tuple[int, Any] | str]] = {
    "some": [(1, REQUEST), (3, [*REQUEST, ("x-a", "1")]), (5, REQUEST)],
    "trailers": [(1, REQUEST), (1, [("x-a", "1")])],
    "an even number": [(1, REQUEST), (2, REQUEST)],
    "none": [(0, REQUEST)],
    "a lower number": [(5, REQUEST), (3, REQUEST)],
    "no block": [(1, b"\xff\xff\xff\xff\xff\xff")],
    "too many at once": [(1, REQUEST), (3, REQUEST), (5, REQUEST)],
    "behind a reset": [(1, REQUEST), "reset", (1, REQUEST), (3, REQUEST)],
    "behind a reset that is forgotten": [(1, REQUEST), "reset", "forget", (1, REQUEST), (3, REQUEST)],
    "behind the end": [(1, REQUEST), "close", (3, REQUEST)],
    "in the place of the preface": [(1, REQUEST)],
}


@pytest.mark.parametrize("what", REQUESTS)
def test_a_request_means_what_h2_takes_it_for(what: str) -> None:
    """Mutants seen: the streams are not counted; what is told on a stream that was reset ends the connection; an even
    number is a client's; the end is not heard of; no preface is missed.
    """
    heard = []
    for take in (H2.take, H2.receive_data):
        ours, client = H2(h2_configuration(client=False)), H2(h2_configuration(client=True))
        for one in (ours, client):
            one.initiate_connection()
        if what == "too many at once":
            ours.local_settings.update({SettingCodes.MAX_CONCURRENT_STREAMS: 2})
            ours.local_settings.acknowledge()
        if what != "in the place of the preface":
            ours.receive_data(client.data_to_send())
        events: list[Any] = []
        try:
            for step in REQUESTS[what]:
                if step == "reset":
                    ours.reset_stream(1)
                elif step == "forget":
                    ours.forget(1)
                elif step == "close":
                    ours.close_connection()
                else:
                    stream_id, headers = step
                    block = headers if isinstance(headers, bytes) else client.encoder.encode(headers)
                    events += take(ours, headers_head(len(block), int(stream_id), end=stream_id == 1) + block)
        except ProtocolError as exc:
            events.append(type(exc))
        heard.append((list(map(repr, events)), ours.data_to_send(), sorted(ours.streams)))
    assert heard[0] == heard[1]
    assert len(heard[0][0]) >= 1
