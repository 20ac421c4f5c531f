"""The payload's way into an entry: what waits in memory, what is refused, what a caller that leaves stops."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import zstandard
from trio.testing import wait_all_tasks_blocked

from aipod.codec import digest, stored
from aipod.config import GIB, MIB
from aipod.errors import Refused, leaves
from aipod.job.request import Request
from aipod.job.upload import INBOX, Inbox, PlainSink, receive_payload
from aipod.spool import Entry, Spool
from aipod.wire.ai import Error, Open, Raw, State
from tests.conftest import left_in

HEAVY = [
    Raw(data=bytes(INBOX + 1)),
    Raw(digest=bytes(INBOX + 1)),
    Raw(open=Open(source=bytes(INBOX + 1))),
    Raw(open=Open(released=[bytes(INBOX // 4)] * 5)),
    Raw(state=State(log=bytes(INBOX + 1))),
    Raw(state=State(error=Error(trace="x" * (INBOX + 1)))),
    Raw.parse(b"\xa2\x06\x84\x80\x80\x02" + bytes(INBOX + 4)),  # a field that nobody knows
]


@pytest.mark.parametrize("message", HEAVY, ids=range(len(HEAVY)))
async def test_what_waits_is_bounded_wherever_a_message_has_its_weight(message: Raw) -> None:
    inbox = Inbox()
    await inbox.put(message)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inbox.put, message)
            await wait_all_tasks_blocked()
            assert nursery.child_tasks
            assert await inbox.wait()
            assert len(inbox.take()) == 1
            await wait_all_tasks_blocked()
            assert not nursery.child_tasks
            scope.cancel()


async def test_empty_messages_weigh_something_too() -> None:
    inbox = Inbox()
    with trio.move_on_after(10):
        for _ in range(INBOX // 64 + 1):
            await inbox.put(Raw())
        await wait_all_tasks_blocked()
        with trio.move_on_after(0) as scope:
            await inbox.put(Raw())
        assert scope.cancelled_caught


@pytest.fixture
def entry(tmp_path: Path) -> Iterator[Entry]:
    spool = Spool.open(tmp_path / "spool", "app", reserve=0)
    entry = spool.claim("0" * 32, {})
    assert entry is not None
    yield entry
    entry.destroy()
    assert left_in(spool.path) == []


async def receive(entry: Entry, *messages: Raw, open_: Open | None = None) -> Request:
    """Take a payload in whose first message is the first of `messages`."""
    request = Request(entry.id, "chaos", "v", b"{}", None, open_, messages[0], {})
    rest = iter(messages[1:])

    async def more() -> Raw | None:
        return next(rest, None)

    await receive_payload(request, entry, more, limit=0, synced=lambda: None, arrived=lambda data, wire: None)
    return request


@pytest.mark.parametrize("open_", [None, Open()], ids=["plain", "own"])
@pytest.mark.parametrize("length", [1, 15, 17, 60 * MIB])
async def test_a_digest_that_is_none(entry: Entry, open_: Open | None, length: int) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await receive(entry, Raw(), Raw(digest=bytes(length)), open_=open_)
    (refused,) = leaves(caught.value)
    assert isinstance(refused, Refused)
    assert refused.reason == "BAD_MESSAGE"


async def test_the_first_message_is_gone_when_the_payload_is_here(entry: Entry) -> None:
    data = zstandard.compress(b"payload")
    first = Raw(data=data, last=True, digest=digest(b"payload"))
    gone = weakref.ref(first)
    request = await receive(entry, first, open_=Open())
    del first
    gc.collect()
    assert gone() is None
    assert request.first == Raw()
    assert entry.payload.read_bytes() == b"payload"


async def test_what_comes_while_a_checkpoint_is_made_is_taken_though_another_was_asked_for(entry: Entry) -> None:
    """Mutant seen: the thread takes nothing until then, and is begun again and again, 13,000 times a second."""
    disk, stretches = threading.Event(), 0
    sync = entry.checkpoint

    def slow(*, now: bool = False) -> None:
        assert disk.wait(20)
        sync(now=now)

    entry.checkpoint = slow  # type: ignore[method-assign]

    def arrived(data: int, wire: int) -> None:
        nonlocal stretches
        stretches += wire == 0

    pieces = [b"first", b"second", b"third", b"fourth"]
    messages = [Raw(data=stored(piece), sync=True) for piece in pieces]
    for number, message in enumerate(messages):
        message.offset = sum(map(len, pieces[:number]))
    messages[-1].last, messages[-1].digest = True, digest(*pieces)
    rest = iter(messages[1:])

    async def more() -> Raw | None:
        await trio.sleep(0.05)
        return next(rest, None)

    request = Request(entry.id, "chaos", "v", b"{}", None, Open(), messages[0], {})
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:

            async def go_on() -> None:
                while entry.written < sum(map(len, pieces)):
                    await trio.sleep(0.01)
                disk.set()

            nursery.start_soon(go_on)
            await receive_payload(request, entry, more, limit=0, synced=lambda: None, arrived=arrived)
    assert stretches <= len(pieces)


def bomb(size: int) -> bytes:
    """Many zeros in little."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    zeros = bytes(MIB)
    return b"".join(compressor.compress(zeros) for _ in range(size // MIB)) + compressor.flush()


async def written(entry: Entry, nursery: trio.Nursery) -> int:
    """Cancel once something is written; how much it is then, when all has ended."""
    while not entry.written:
        await trio.sleep(0.001)
    nursery.cancel_scope.cancel()
    return entry.written


@pytest.mark.parametrize("kind", ["plain", "own"])
async def test_a_caller_that_leaves_stops_the_decompression_of_what_has_come(entry: Entry, kind: str) -> None:
    if kind == "plain":
        messages, open_ = [Raw(data=bomb(GIB))], None
    else:
        chunk = zstandard.compress(bytes(MIB))
        messages, open_ = [Raw(data=chunk, offset=n * MIB) for n in range(1024)], Open()
    async with trio.open_nursery() as nursery:

        async def take() -> None:
            await receive(entry, *messages, open_=open_)

        nursery.start_soon(take)
        await written(entry, nursery)
    assert 0 < entry.written < GIB // 2


async def test_a_caller_that_leaves_stops_the_walk_through_what_holds_nothing(entry: Entry) -> None:
    """Mutant seen: the decoder asks nobody before there is something to write."""
    sink = PlainSink(entry, None, 0)
    message = Raw(data=b"\x50\x2a\x4d\x18\0\0\0\0")  # an empty skippable frame
    ended: list[str] = []

    def feed(scope: trio.CancelScope) -> None:
        sink.feed([message])
        trio.from_thread.run_sync(scope.cancel)
        try:
            sink.feed([message])
        except trio.Cancelled:
            ended.append("stopped")
            raise

    with trio.CancelScope() as scope:
        await trio.to_thread.run_sync(feed, scope)
    assert ended == ["stopped"]
