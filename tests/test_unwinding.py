"""Many calls that end at once do so some dozens in each turn of the loop, which does what else there is between."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from grpclib.client import Stream
from grpclib.const import Cardinality
from grpclib.exceptions import StreamTerminatedError
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import RequestReceived
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

from aipod.config import Config
from aipod.transport.channel import Channel, open_call, reset
from aipod.transport.stream import StreamRefused
from aipod.transport.wakes import IN_A_TURN, Wakes
from aipod.wire.ai import Raw
from tests.conftest import ROOT, run
from tests.unwinding import CALLS, CONNECTIONS, WAYS

# trio-asyncio may run a callback twice in a turn of trio's, and a call with tasks of its own takes one turn or two.
MOST = 4 * IN_A_TURN


@pytest.fixture(scope="module")
def unwound() -> dict[str, dict[str, Any]]:
    """What became of the calls of a server, in every way. In a process of its own: the server replaces asyncio's."""
    command = [sys.executable, "-m", "tests.unwinding"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["way"]: line for line in lines}


@pytest.mark.parametrize("way", [way.__name__ for way in WAYS])
def test_every_call_of_a_server_ends_once(unwound: dict[str, dict[str, Any]], way: str) -> None:
    """Mutants seen: what waits is forgotten at `hurry`; one turn is never followed by another."""
    assert unwound[way]["begun"] == unwound[way]["ended"] == CONNECTIONS * CALLS


@pytest.mark.parametrize("way", ["lose", "reset", "reset_and_lose", "lose_while_it_drains"])
def test_calls_of_a_server_end_some_dozens_in_a_turn(unwound: dict[str, dict[str, Any]], way: str) -> None:
    """Over all its connections. Mutants seen: each wakes at once; each connection has its own count."""
    assert unwound[way]["most in a turn"] <= MOST
    if way != "lose_while_it_drains":
        assert unwound[way]["PINGs answered meanwhile"] > 0


def test_a_server_that_aborts_waits_for_no_turn(unwound: dict[str, dict[str, Any]]) -> None:
    assert unwound["lose_before_its_end"]["most in a turn"] > MOST


# --- clients


def new_call(channel: Channel) -> Stream[Raw, Raw]:
    return channel.request("/ai.AI/chaos", Cardinality.STREAM_STREAM, Raw, Raw)


class Peer:
    """A server that answers nothing. `connections`: the h2 side and the writer of each."""

    def __init__(self) -> None:
        self.connections: list[tuple[H2Connection, asyncio.StreamWriter]] = []
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, places: int) -> None:
        h2 = H2Connection(H2Configuration(client_side=False))
        limits = {SettingCodes.MAX_CONCURRENT_STREAMS: places}
        h2.local_settings = Settings(client=False, initial_values=limits)
        h2.initiate_connection()
        self.connections.append((h2, writer))
        writer.write(h2.data_to_send())
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                self.requests += sum(isinstance(event, RequestReceived) for event in h2.receive_data(data))
                writer.write(h2.data_to_send())
        writer.close()


@contextlib.asynccontextmanager
async def silent(places: int) -> AsyncIterator[tuple[Peer, Channel]]:
    """A channel to a `Peer` with `places` streams on each connection."""
    peer = Peer()
    serving = set[asyncio.Task[None]]()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.create_task(peer.serve(reader, writer, places)))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        channel = Channel(f"{host}:{port}", Config())
        try:
            yield peer, channel
        finally:
            await channel.aclose()
            await asyncio.gather(*serving)


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


class Turns:
    """Counts turns of the loop."""

    now = 0

    async def count(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.now += 1


Ends = list[tuple[int, BaseException]]


async def end_all(how: str, calls: int, waiting: int) -> tuple[Ends, int]:
    """The turn and the error with which each of `calls` ends, and of `waiting` more that wait for a place.

    And how many requests the server has seen.
    """
    ends: Ends = []
    turns = Turns()

    async def one(channel: Channel) -> None:
        try:
            async with new_call(channel) as stream:
                await open_call(stream)
                await stream.recv_message()
        except StreamTerminatedError as exc:
            ends.append((turns.now, exc))

    async with silent(calls) as (peer, channel):
        await channel.__connect__()
        await until(lambda: peer.connections)
        tasks = [asyncio.create_task(one(channel)) for _ in range(calls + waiting)]
        await until(lambda: peer.requests == calls)
        counting = asyncio.create_task(turns.count())
        h2, writer = peer.connections[0]
        match how:
            case "closed":
                channel.close()
            case "lost":
                writer.transport.abort()
            case "reset":
                for number in range(calls):
                    h2.reset_stream(2 * number + 1, ErrorCodes.CANCEL)
                writer.write(h2.data_to_send())
            case _:
                frame = GoAwayFrame(0)
                frame.last_stream_id = 1
                writer.write(frame.serialize())
        await until(lambda: len(ends) >= calls - (how == "told to go"))
        if how == "closed":
            await asyncio.gather(*tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        counting.cancel()
        return ends, peer.requests


@pytest.mark.parametrize("how", ["closed", "lost", "reset", "told to go"])
def test_calls_of_a_client_end_some_dozens_in_a_turn(how: str) -> None:
    """Mutants seen: all at once, in each of these ways."""
    ends, _ = run(lambda: end_all(how, 300, 0))
    assert len(ends) == 300 - (how == "told to go")  # which says that it has seen the first one
    assert max(collections.Counter(turn for turn, _ in ends).values()) <= IN_A_TURN
    assert {isinstance(error, StreamRefused) for _, error in ends} == {how == "told to go"}


def test_calls_that_wait_for_a_place_end_some_dozens_in_a_turn_too() -> None:
    """The client is closed. As they were they waited for ever. Mutant seen: they are woken at once."""
    ends, requests = run(lambda: end_all("closed", 50, 600))
    assert len(ends) == 650
    assert requests == 50
    assert max(collections.Counter(turn for turn, _ in ends).values()) <= IN_A_TURN


def test_a_call_that_waits_for_a_place_goes_elsewhere_when_its_connection_is_lost() -> None:
    """As it was it waited for ever: for h2 the streams of a lost connection are still open."""

    async def main() -> None:
        async with silent(1) as (peer, channel), new_call(channel) as first, new_call(channel) as second:
            await open_call(first)
            await until(lambda: peer.requests == 1)
            waiting = asyncio.create_task(open_call(second))
            await until(lambda: first._stream.connection.places.awaited)
            peer.connections[0][1].transport.abort()
            async with asyncio.timeout(20):
                await waiting
            assert second._stream.connection is not first._stream.connection
            await until(lambda: peer.requests == 2)
            reset(second)

    run(main)


def test_a_place_is_given_to_one_call_after_the_other_in_their_order() -> None:
    """Also past one that has gone, and one that was called and goes before it has run.

    Mutants seen: the one that was called keeps the place; the last one that came is called first.
    """

    async def main() -> None:
        order: list[int] = []
        may_end = asyncio.Semaphore(0)

        async def one(number: int, channel: Channel) -> None:
            async with new_call(channel) as stream:
                await open_call(stream)
                order.append(number)
                await may_end.acquire()
                reset(stream)
            if number == 0:
                tasks[1].cancel()  # called, and has not run since

        async with silent(1) as (_, channel):
            await channel.__connect__()
            connection = channel._latest.connection
            await until(lambda: connection._connection.remote_settings.max_concurrent_streams == 1)
            tasks = [asyncio.create_task(one(number, channel)) for number in range(7)]
            await until(lambda: connection.places.awaited == 6)
            tasks[2].cancel()
            await until(tasks[2].done)
            may_end.release()
            for count in range(2, 6):
                await until(lambda count=count: len(order) == count)
                assert connection.places.awaited == 5 - count
                may_end.release()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert order == [0, 3, 4, 5, 6]

    run(main)


def test_what_is_added_wakes_in_order_and_at_once_where_there_is_room() -> None:
    async def main() -> None:
        wakes, woken = Wakes(), list[int]()
        for number in range(3 * IN_A_TURN):
            wakes.add(lambda number=number: woken.append(number))
        assert len(woken) == IN_A_TURN
        for turn in (2, 3):
            await asyncio.sleep(0)
            assert len(woken) == turn * IN_A_TURN
        assert woken == list(range(3 * IN_A_TURN))
        await until(lambda: wakes._refill is None)
        wakes.add(lambda: woken.append(-1))
        assert woken[-1] == -1

    run(main)
