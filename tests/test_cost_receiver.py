"""What receiving costs, counted: hops into threads, syncs, copies, bytes that are held. No times."""

from __future__ import annotations

import asyncio
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from aipod.client.failure import BadAnswer
from aipod.client.sink import AHEAD, Filling, Sink
from aipod.codec import Compressor, digest, new_hasher
from aipod.config import KIB, MIB, Config
from aipod.job import upload
from aipod.job.request import Request
from aipod.job.upload import INBOX, receive_payload
from aipod.spool import SYNC_BYTES, Entry, Spool
from aipod.transport.codec import Codec
from aipod.transport.inbox import Inbox, recycle
from aipod.transport.window import Budget, ReceiveWindow
from aipod.wire.ai import Open, Raw, State
from tests.conftest import left_in, run, wait_until

PIECE = random.Random(0).randbytes(MIB)
FRAME = Compressor(1).frame(PIECE)


def chunks(count: int) -> Iterator[Raw]:
    hasher = new_hasher()
    for n in range(count):
        hasher.update(PIECE)
        last = n == count - 1
        yield Raw(data=bytes(bytearray(FRAME)), offset=n * MIB, last=last, digest=hasher.digest() if last else b"")


@pytest.fixture
def entry(tmp_path: Path) -> Iterator[Entry]:
    spool = Spool.open(tmp_path / "spool", "app", reserve=0)
    entry = spool.claim("0" * 32, {})
    assert entry is not None
    yield entry
    entry.destroy()
    assert left_in(spool.path) == []


async def receive(entry: Entry, count: int) -> list[int]:
    """Take `count` chunks in; how many bytes each hop into a thread has written."""
    hops: list[int] = []
    rest = chunks(count)

    def arrived(data: int, wire: int) -> None:
        if not wire:
            hops.append(data)

    async def more() -> Raw | None:
        return next(rest, None)

    request = Request(entry.id, "chaos", "v", b"{}", None, Open(), Raw(), {})
    await receive_payload(request, entry, more, limit=0, synced=lambda: None, arrived=arrived)
    return hops


async def test_a_hop_writes_many_chunks_and_little_waits(entry: Entry) -> None:
    """Mutants seen: a hop for each message; one that takes what there is and returns; an inbox without a bound."""
    count = 128
    tracemalloc.start()
    try:
        hops = await receive(entry, count)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(hops) == entry.written == count * MIB
    assert len(hops) <= 2 * count * MIB // upload.STRETCH, hops
    assert max(hops) <= upload.STRETCH + INBOX + 2 * MIB
    # What waits and what the thread has taken, a chunk over the bound in each; one that waits to be put, one in the
    # making, twice there; one decoded, and the one before.
    assert peak < 2 * INBOX + 8 * MIB, peak


async def receive_one_by_one(entry: Entry, count: int) -> list[int]:
    """As `receive`; each chunk comes when the one before was written."""
    rest, hops = chunks(count), []

    def arrived(data: int, wire: int) -> None:
        if not wire:
            hops.append(data)

    sent = 0

    async def more() -> Raw | None:
        nonlocal sent
        while entry.written < sent * MIB:
            await trio.sleep(0)
        sent += 1
        return next(rest, None)

    request = Request(entry.id, "chaos", "v", b"{}", None, Open(), Raw(), {})
    await receive_payload(request, entry, more, limit=0, synced=lambda: None, arrived=arrived)
    assert sum(hops) == entry.written == count * MIB
    return hops


async def test_a_thread_that_has_written_all_waits_for_more(entry: Entry) -> None:
    """Mutant seen: it comes back for each chunk."""
    assert len(await receive_one_by_one(entry, 64)) <= 32


async def test_a_thread_that_others_may_want_waits_for_nothing(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant seen: a thousand slow uploads have each of the few threads wait."""
    monkeypatch.setattr(upload, "LINGER", 30.0)
    others = [object() for _ in range(int(upload.BULK.available_tokens) - 1)]
    for other in others:
        upload.BULK.acquire_on_behalf_of_nowait(other)
    try:
        with trio.fail_after(20):
            await receive_one_by_one(entry, 4)
    finally:
        for other in others:
            upload.BULK.release_on_behalf_of(other)


async def test_who_waits_for_more_is_woken_for_several_for_much_and_at_the_end() -> None:
    """Mutants seen: it sleeps on, in each of the three; it is woken for each message."""
    for put, end in (([Raw(data=b"1"), Raw(data=b"2")], False), ([Raw(data=bytes(INBOX))], False), ([], True)):
        inbox, taken = upload.Inbox(), []
        thread = threading.Thread(target=lambda inbox=inbox, taken=taken: taken.append(inbox.take(1000)))
        thread.start()
        while not inbox._lingers:
            await trio.sleep(0.001)
        for number, message in enumerate(put):
            await inbox.put(message)
            assert inbox._news._waiters or number == len(put) - 1  # type: ignore[attr-defined]
        if end:
            inbox.end()
        await trio.to_thread.run_sync(thread.join, 20)
        assert taken == [put]


async def test_what_was_written_is_synced_beside_the_writing_which_waits_where_too_much_is_at_stake(
    entry: Entry,
) -> None:
    """Mutants seen: the sync holds the writing up from its begin; and nothing does."""
    at_stake: list[int] = []
    sync = entry.checkpoint

    def slow(*, now: bool = False) -> None:
        if not at_stake:
            wait_until(lambda: entry.written - entry.durable > SYNC_BYTES - upload.STRETCH, seconds=20)
            threading.Event().wait(0.3)  # nothing more may come now
            at_stake.append(entry.written - entry.durable)
        sync(now=now)

    entry.checkpoint = slow  # type: ignore[method-assign]
    await receive(entry, 192)
    assert len(at_stake) == 1
    assert at_stake[0] <= SYNC_BYTES + INBOX + 2 * MIB  # what one take of the inbox brings goes behind the stretch


def test_an_answer_is_written_by_few_hops_and_all_of_it_is_told(tmp_path: Path) -> None:
    """Mutants seen: a hop for each chunk; no bound on what waits; the last ones are not told."""
    count = 64
    whole = PIECE * count
    told: list[int] = []

    async def main() -> int:
        hops = 0

        async def in_thread(fn: Callable[[], None]) -> None:
            nonlocal hops
            hops += 1
            await asyncio.to_thread(fn)

        sink = Sink(State(size=len(whole), digest=digest(whole)), tmp_path / "answer")
        filling = Filling(sink, in_thread, lambda: told.append(sink.received))
        for chunk in chunks(count):
            heavy = Raw(data=FRAME, offset=chunk.offset, last=chunk.last)
            await filling.add(heavy, inline=False)
            assert filling._put - filling.wire <= AHEAD + len(FRAME)
        await filling.settle()
        assert sink.finish() == tmp_path / "answer"
        return hops

    # As many as stretches, and more where the thread is quicker than what comes.
    assert run(main) <= count // 2
    assert told == sorted(told)
    assert told[-1] == len(whole)
    assert (tmp_path / "answer").read_bytes() == whole


def test_what_goes_wrong_in_the_thread_is_heard_of(tmp_path: Path) -> None:
    async def main() -> None:
        sink = Sink(State(size=4 * MIB), tmp_path / "answer")
        filling = Filling(sink, asyncio.to_thread, lambda: None)
        await filling.add(Raw(data=FRAME, offset=MIB), inline=False)  # not the first
        with pytest.raises(BadAnswer, match="not at 0"):
            await filling.settle()
        sink.discard()

    run(main)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settling", [False, True])
def test_what_is_dropped_is_not_added(tmp_path: Path, settling: bool) -> None:
    """Mutants seen: what waits is added though its caller has gone; who goes while it settles leaves a task."""

    begun, go_on, over = threading.Event(), threading.Event(), threading.Event()

    def work(fn: Callable[[], None]) -> None:
        begun.set()
        go_on.wait(20)
        fn()
        over.set()

    async def main() -> None:
        sink = Sink(State(size=4 * MIB), tmp_path / "answer")
        filling = Filling(sink, lambda fn: asyncio.to_thread(work, fn), lambda: None)
        await filling.add(Raw(data=FRAME, offset=0), inline=False)
        await asyncio.to_thread(begun.wait, 20)
        if settling:
            settle = asyncio.create_task(filling.settle())
            await asyncio.sleep(0)
            settle.cancel()
            await asyncio.wait([settle])
            assert settle.cancelled()
        else:
            await filling.drop()  # does not wait for the thread
        assert asyncio.all_tasks() == {asyncio.current_task()}
        go_on.set()
        assert await asyncio.to_thread(over.wait, 20)
        assert sink.received == 0
        sink.discard()

    run(main)


def received(message: bytes) -> memoryview:
    """A message as it comes out of an inbox."""

    async def main() -> memoryview | None:
        window = ReceiveWindow(4 * MIB, 4 * MIB, Budget(0), Budget(0), lambda size: None)
        inbox = Inbox(4 * MIB, window, Budget(1))
        inbox.arrived(len(message) + 5, len(message) + 5)
        inbox.feed(memoryview(b"\0" + len(message).to_bytes(4, "big") + message))
        return await inbox.read()

    out = run(main)
    assert out is not None
    return out


def test_a_chunk_is_copied_once_on_its_way_and_its_buffer_is_used_again() -> None:
    """Mutants seen: it is copied when it is parsed; its buffer is given away while it is read."""
    codec = Codec(Config())
    message = received(bytes(Raw(data=PIECE, offset=7)))
    whole = message.obj
    raw = codec.decode(message, Raw)  # type: ignore[arg-type]
    assert isinstance(raw.data, memoryview)
    assert raw.data.obj is whole
    assert raw.data == PIECE
    other = received(bytes(Raw(data=PIECE[::-1])))
    assert raw.data == PIECE
    assert other.obj is not whole
    recycle(raw.data)
    with pytest.raises(ValueError, match="released"):
        len(raw.data)
    assert received(bytes(Raw(data=PIECE))).obj is whole


def test_little_of_a_message_does_not_keep_all_of_it() -> None:
    """What waits is weighed by what it has. Mutant seen: any field is a view."""
    message = received(bytes(Raw(data=PIECE)) + bytes(Raw(data=PIECE[: 300 * KIB])))
    raw = Codec(Config()).decode(message, Raw)  # type: ignore[arg-type]
    assert type(raw.data) is bytes
    assert raw.data == PIECE[: 300 * KIB]


def test_a_window_that_is_widened_leaves_some_to_others_and_gives_it_back() -> None:
    """Mutants seen: it takes all there is; it has more than the most; it keeps it."""
    growth, credit = Budget(16 * MIB), list[int]()
    windows: list[Any] = [ReceiveWindow(256 * KIB, 3 * MIB, growth, Budget(MIB), credit.append) for _ in range(10)]
    for window in windows:
        window.widen(1 << 50)
    assert windows[0].size == 3 * MIB
    assert 256 * KIB < windows[-1].size < MIB
    assert credit[0] == 3 * MIB - 256 * KIB
    for window in windows:
        window.close()
    assert growth.take(16 * MIB)
    small = ReceiveWindow(256 * KIB, 3 * MIB, Budget(16 * MIB), Budget(MIB), credit.append)
    small.widen(1000)
    assert small.size == 256 * KIB
