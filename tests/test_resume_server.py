"""Jobs that outlive their connections, seen from the wire: two servers on one spool, and clients that come and go.

    I5   every cut is survived                     test_a_cut_after_any_message
    I6   the newest connection has the upload      test_take_over…, test_a_delayed…, and tests/test_spool.py
    I7   RUNNING and free means died               test_a_run_is_interrupted_when…, test_of_many_clients…
    I9   bad input changes nothing                 test_bad_input…
    I10  a full disk is a pause                    test_a_disk_that_fills_up…, and tests/test_spool.py
    I13  a commit goes to one spool only           test_another_spool…, test_resume_of_what_never_was…
    I14  outcomes stay                             test_cancel…, test_release…, tests/test_kill_points.py
    I16  abandoned jobs stop after the grace       test_a_job_that_nobody_watches…, and tests/test_job.py

I1, I3, I4 are tests/test_disk.py's; I2 and I4 tests/test_kill_points.py's; I8, I11, I12 tests/test_spool.py's; I15 is
tests/test_interop.py's, tests/test_cancel.py's and tests/test_strangers.py's. The mutants that were seen stand at each.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from aipod.codec import digest, job_id
from aipod.config import MIB
from aipod.spool import Journal
from aipod.wire.ai import Op, Phase, Raw
from tests import wire
from tests.conftest import Served, children, run
from tests.models_resume import LONG, answer_to
from tests.wire import Client, Lost, Outcome, Refusal, ask, attach, call

MODEL = "tests.models_resume:Jobs"
TICK, GRACE = 0.5, 2.0
OPTIONS = ("--tick", str(TICK), "--grace", str(GRACE), "--cancel-grace", "1", "--drain", "0", "--instances", "3")
PAYLOAD = os.urandom(3500)


class Pair:
    """Two servers on one spool."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.a, self.b = (Served(MODEL, directory, OPTIONS, "127.0.0.1:0") for _ in range(2))
        self.spool = self.a.spool

    def of(self, names: str) -> list[str]:
        return [getattr(self, name).address for name in names]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    for served in (pair.a, pair.b):
        below = children(served.process.pid)
        assert served.stop() == 0, served.log_text()
        assert not [pid for pid in below if pid in children(os.getpid())]
        assert "a bug of aipod" not in served.log_text()


class Work:
    """A client with files of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts, self.until = path / "starts", path / "until"

    def client(self, name: str = "count", payload: bytes = PAYLOAD, **kwargs: Any) -> Client:
        if name.startswith("wait"):
            kwargs["until"] = str(self.until)
        return Client(name, payload, {"starts": str(self.starts), **kwargs}, restartable=name == "wait_again")

    @property
    def lines(self) -> list[str]:
        return self.starts.read_text().splitlines() if self.starts.exists() else []

    async def started(self, count: int = 1) -> None:
        async with asyncio.timeout(20):
            while self.lines.count("start") < count:
                await asyncio.sleep(0.01)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


@contextlib.asynccontextmanager
async def opened(client: Client, address: str, op: Op = Op.RUN, **fields: Any) -> AsyncIterator[wire.Call]:
    """A connection of the client's, whose first state has come."""
    client.epoch += 1
    async with call(address, client.ticket, op, client.name, client.kwargs, **client.fields | fields) as one:
        one.on_state = client.check
        await one.state()
        yield one


async def begun(client: Client, address: str, end: int = 1000) -> None:
    """A connection that has brought the payload's beginning, durably, and was cut."""
    async with opened(client, address) as one:
        await one.chunk(client.payload[:end], 0, sync=True)
        await one.until(lambda state: state.offset == end)


async def refused(function: Any, *args: Any, **kwargs: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await function(*args, **kwargs)
    return caught.value


async def running(work: Work, client: Client, address: str) -> asyncio.Task[Outcome]:
    """A client's visit whose method runs."""
    before = work.lines.count("start")
    task = asyncio.create_task(client.visit(address))
    await work.started(before + 1)
    return task


async def left(task: asyncio.Task[Any]) -> None:
    """Cut a client's connection."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def entries(spool: Path) -> set[str]:
    return {path.name for path in spool.iterdir() if path.is_dir() and path.name != "workers"}


BOTH = pytest.mark.parametrize("way", ["aa", "ab"], ids=["same process", "other process"])

# Uploads


@BOTH
def test_an_upload_that_is_cut_is_resumed_at_the_durable_offset(pair: Pair, work: Work, way: str) -> None:
    """I1, I5. Mutant seen: `resume` begins at 0."""
    first, second = pair.of(way)

    async def main() -> None:
        client = work.client()
        await begun(client, first, 1000)
        outcome = await client.visit(second, chunk=500)
        assert client.sent == [1000, 1500, 2000, 2500, 3000]
        assert outcome.data == answer_to(PAYLOAD, LONG)
        assert work.lines == ["start"]

    run(main)


def test_what_was_written_and_not_told_is_durable_when_a_connection_is_left(pair: Pair, work: Work) -> None:
    async def main() -> None:
        client = work.client()
        async with opened(client, pair.a.address) as one:
            await one.chunk(PAYLOAD[:2000], 0)
            # The server has it when it has answered what comes behind.
            await one.chunk(PAYLOAD[2000:2001], 2000, sync=True)
            await one.until(lambda state: state.offset == 2001)
            await one.chunk(PAYLOAD[2001:3000], 2001)
            await asyncio.sleep(0.3)
        assert (await client.visit(pair.b.address)).phase == Phase.DONE
        assert client.sent == [3000]

    run(main)


@BOTH
def test_take_over_from_a_silent_connection_within_two_ticks(pair: Pair, work: Work, way: str) -> None:
    """I6. Mutants seen: the holder does not heed who asks; nobody asks (the newer one hears BUSY)."""
    first, second = pair.of(way)

    async def main() -> None:
        client = work.client()
        async with opened(client, first) as silent:
            await silent.chunk(PAYLOAD[:1000], 0, sync=True)
            await silent.until(lambda state: state.offset == 1000)
            began = time.monotonic()
            async with opened(client, second) as newer:
                assert time.monotonic() - began < 2 * TICK
                assert (newer.states[-1].phase, newer.states[-1].offset) == (Phase.RECEIVING, 1000)
                superseded = await refused(silent.outcome)
                assert (superseded.reason, superseded.metadata) == ("SUPERSEDED", {"epoch": str(client.epoch)})
                await newer.chunk(PAYLOAD[1000:], 1000)
                await newer.last(PAYLOAD)
                assert (await newer.outcome()).data == answer_to(PAYLOAD, LONG)
        assert work.lines == ["start"]

    run(main)


@BOTH
def test_a_delayed_older_connection_does_not_disturb_a_newer_one(pair: Pair, work: Work, way: str) -> None:
    """I6. Mutant seen: no comparison of epochs."""
    first, second = pair.of(way)

    async def main() -> None:
        client = work.client()
        client.epoch = 10
        async with opened(client, first) as newer:
            await newer.chunk(PAYLOAD[:1000], 0)
            client.epoch = 0
            late = await refused(client.visit, second)
            assert (late.reason, late.metadata) == ("SUPERSEDED", {"epoch": "11"})
            await newer.chunk(PAYLOAD[1000:], 1000)
            await newer.last(PAYLOAD)
            assert (await newer.outcome()).phase == Phase.DONE
        assert work.lines == ["start"]
        # Once there is nothing to be brought, who asks does not matter.
        client.epoch, client.committed, client.phase = 0, True, Phase.NONE
        assert (await client.visit(second)).phase == Phase.DONE

    run(main)


def test_a_newer_connection_takes_over_again_and_again(pair: Pair, work: Work) -> None:
    """Each sends a little; no byte that was told durable is asked for again."""

    async def main() -> None:
        client = work.client()
        for turn in range(6):
            async with opened(client, pair.of("ab")[turn % 2]) as one:
                have = one.states[-1].offset
                assert have == turn * 500
                await one.chunk(PAYLOAD[have : have + 500], have, sync=True)
                await one.until(lambda state, end=have + 500: state.offset == end)  # type: ignore[misc]
        assert (await client.visit(pair.a.address)).data == answer_to(PAYLOAD, LONG)
        assert work.lines == ["start"]

    run(main)


# Who watches


@BOTH
def test_attach_needs_a_ticket_and_nothing_else_and_disturbs_nobody(pair: Pair, work: Work, way: str) -> None:
    first, second = pair.of(way)

    async def main() -> None:
        client = work.client("wait", lines=50)
        async with opened(client, first) as uploader:
            async with call(second, client.ticket, Op.ATTACH) as watcher:
                assert (await watcher.phase(Phase.RECEIVING)).offset == 0
                await uploader.chunk(PAYLOAD, 0, sync=True)
                await uploader.until(lambda state: state.offset == len(PAYLOAD))
                await watcher.until(lambda state: state.offset == len(PAYLOAD))
                await uploader.last(PAYLOAD)
                state = await watcher.until(lambda state: state.message == "step 49" and len(watcher.log) > 300)
                assert state.progress == pytest.approx(0.98)
                log = "".join(f"line {n}\n" for n in range(50)).encode()
                assert watcher.log == log
                # Also from where a client has left off, and in the same words from anywhere.
                for address in (first, second):
                    async with call(address, client.ticket, Op.ATTACH, log_have=100) as again:
                        await again.until(lambda state: len(again.log) == len(log) - 100)
                        assert again.log == log[100:]
                work.until.touch()
                outcome = await watcher.outcome()
            assert await uploader.outcome() == outcome
        assert outcome.json == "done"
        assert work.lines == ["start"]
        for address in (first, second):
            async with call(address, client.ticket, Op.ATTACH, log_have=7) as late:
                assert await late.outcome() == outcome
                assert late.log == log[7:]

    run(main)


@pytest.mark.parametrize("size", [100, LONG, 3 * MIB + 5])
def test_the_answer_comes_from_where_the_client_has_it_as_often_as_asked(pair: Pair, work: Work, size: int) -> None:
    """I3, I4. Mutant seen: `have` is not looked at."""

    async def main() -> None:
        client = work.client(size=size)
        outcome = await client.visit(pair.a.address)
        answer = answer_to(PAYLOAD, size)
        assert outcome.data == answer
        for have in (0, 1, size // 2, size - 1, size):
            for address in pair.of("ab"):
                assert await attach(address, client.ticket, before=answer[:have]) == outcome
        assert work.lines == ["start"]

    run(main)


def test_a_watcher_of_a_job_that_is_not_there(pair: Pair) -> None:
    async def main() -> None:
        before = entries(pair.spool)
        for op in (Op.ATTACH, Op.CANCEL, Op.RELEASE):
            assert (await refused(ask, pair.a.address, os.urandom(16), op)).reason == "NOT_FOUND"
        assert entries(pair.spool) == before

    run(main)


# Cuts


def test_a_cut_after_any_message(pair: Pair, work: Work) -> None:
    """I5: the connection is cut after the k-th message that the client sends, or receives, for every k.

    Mutant seen: a lost connection cancels the job.
    """

    class Cut(wire.Call):
        """A connection that is cut once so many messages have gone one way."""

        sent = received = 0
        after_sent: int | None = None
        after_received: int | None = None

        async def send(self, message: Raw, *, end: bool = False) -> None:
            if self.sent == self.after_sent:
                raise Lost
            self.sent += 1
            await super().send(message, end=end)

        async def receive(self) -> Raw | None:
            if self.received == self.after_received:
                raise Lost
            self.received += 1
            return await super().receive()

    async def story(direction: str, k: int, addresses: list[str]) -> bool:
        """Whether there was a k-th message."""
        work.starts.unlink(missing_ok=True)
        client = work.client()
        cut = type("CutAt", (Cut,), {direction: k})
        whole = True
        try:
            outcome = await client.visit(addresses[0], kind=cut)
        except Lost:
            whole = False
            outcome = await client.until_known(addresses[::-1])
        assert outcome.data == answer_to(PAYLOAD, LONG)
        assert work.lines == ["start"]
        return not whole

    async def main() -> None:
        for direction in ("after_sent", "after_received"):
            k = 0
            while await story(direction, k, pair.of("ab")):
                k += 1
            assert k >= 5

    run(main, timeout=120)


def test_of_many_clients_with_one_ticket_one_starts_the_job_and_all_hear_the_answer(pair: Pair, work: Work) -> None:
    """I2, I6, I7. Mutant seen: the lock is let go between the upload and the run."""

    async def one_of(client: Client, address: str, epoch: int) -> Outcome:
        mine = work.client()
        mine.ticket, mine.epoch = client.ticket, epoch
        try:
            return await mine.visit(address, chunk=700)
        except Refusal as exc:
            assert exc.reason == "SUPERSEDED"  # noqa: PT017
            return await attach(address, mine.ticket)

    async def main() -> None:
        for turn in range(12):
            work.starts.unlink(missing_ok=True)
            client = work.client()
            addresses = (pair.of("ab") + pair.of("ba"))[: 2 + turn % 2]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one_of(client, a, n * 10)) for n, a in enumerate(addresses)]
            assert {task.result().data for task in tasks} == {answer_to(PAYLOAD, LONG)}
            assert work.lines == ["start"]

    run(main, timeout=120)


# Ends


@BOTH
@pytest.mark.parametrize("phase", ["RECEIVING", "abandoned", "RUNNING"])
def test_cancel_ends_a_job_in_any_phase_and_for_ever(pair: Pair, work: Work, phase: str, way: str) -> None:
    """I14. Mutants seen: the holder does not look for `cancel`; the end of a cancelled upload is not stored."""
    first, second = pair.of(way)

    async def main() -> None:
        client = work.client("wait")
        if phase == "RUNNING":
            task = await running(work, client, first)
            await ask(second, client.ticket, Op.CANCEL)
            outcome = await task
            assert work.lines == ["start", "cancelled"]
        else:
            async with opened(client, first) as one:
                await one.chunk(PAYLOAD[:100], 0, sync=True)
                await one.until(lambda state: state.offset == 100)
                if phase == "RECEIVING":
                    await ask(second, client.ticket, Op.CANCEL)
                    outcome = await one.outcome()
            if phase == "abandoned":
                async with asyncio.timeout(5):  # the server may not have seen yet that it was left
                    while (await ask(second, client.ticket, Op.CANCEL)).phase != Phase.CANCELLED:
                        await asyncio.sleep(0.05)
                outcome = await attach(second, client.ticket)
            assert work.lines == []
        assert (outcome.phase, outcome.reason) == (Phase.CANCELLED, "CANCELLED")
        for address in (first, second):
            async with asyncio.timeout(10):
                assert await attach(address, client.ticket) == outcome
            for committed in (False, True):
                client.committed = committed
                assert await client.visit(address) == outcome
            assert (await ask(address, client.ticket, Op.CANCEL)).phase == Phase.CANCELLED
        assert "cancelled" not in work.lines[2:]
        assert work.lines.count("start") == (phase == "RUNNING")

    run(main)


def test_a_job_in_line_is_cancelled_without_a_start(pair: Pair, work: Work) -> None:
    async def main() -> None:
        blockers = [await running(work, work.client("wait"), pair.a.address) for _ in range(3)]
        client = work.client("wait")
        async with opened(client, pair.a.address) as one:
            await one.chunk(PAYLOAD, 0)
            await one.last(PAYLOAD)
            assert (await one.phase(Phase.QUEUED)).offset == len(PAYLOAD)
            async with call(pair.b.address, client.ticket, Op.ATTACH) as other:
                assert (await other.phase(Phase.QUEUED)).offset == len(PAYLOAD)
            await ask(pair.b.address, client.ticket, Op.CANCEL)
            assert (await one.outcome()).phase == Phase.CANCELLED
        work.until.touch()
        assert {(await task).json for task in blockers} == {"done"}
        assert work.lines == ["start"] * 3

    run(main)


def test_cancel_of_what_has_ended_changes_nothing(pair: Pair, work: Work) -> None:
    async def main() -> None:
        client = work.client()
        outcome = await client.visit(pair.a.address)
        assert (await ask(pair.b.address, client.ticket, Op.CANCEL)).phase == Phase.DONE
        assert await attach(pair.a.address, client.ticket) == outcome

    run(main)


def test_release_forgets_an_answer_for_ever(pair: Pair, work: Work) -> None:
    """I14. Mutant seen: the tombstone is removed with the answer, and a delayed RUN starts the job again."""

    async def main() -> None:
        client = work.client()
        await client.visit(pair.a.address)
        assert (await ask(pair.b.address, client.ticket, Op.RELEASE)).phase == Phase.RELEASED
        assert not (pair.spool / job_id(client.ticket) / "res").exists()
        for address in pair.of("ab"):
            assert (await attach(address, client.ticket)).reason == "RELEASED"
            client.committed, client.phase = False, Phase.NONE
            assert (await client.visit(address)).phase == Phase.RELEASED
        assert work.lines == ["start"]

    run(main)


def test_a_failure_is_an_answer_that_stays(pair: Pair, work: Work) -> None:
    async def main() -> None:
        client = work.client("boom")
        outcome = await client.visit(pair.a.address)
        assert (outcome.phase, outcome.reason) == (Phase.FAILED, "MODEL_ERROR")
        for address in pair.of("abab"):
            assert await attach(address, client.ticket) == outcome
            client.committed, client.phase = False, Phase.NONE
            assert await client.visit(address) == outcome
        assert work.lines == ["start"]

    run(main)


def test_tickets_of_jobs_that_have_ended_are_released_along_with_another_call(pair: Pair, work: Work) -> None:
    async def main() -> None:
        client, running_one = work.client(), work.client("wait")
        await client.visit(pair.a.address)
        task = await running(work, running_one, pair.a.address)
        released = [client.ticket, running_one.ticket, os.urandom(16)]
        other = work.client(size=10)
        async with opened(other, pair.a.address, released=released):
            pass
        async with asyncio.timeout(5):
            while (await attach(pair.b.address, client.ticket)).phase != Phase.RELEASED:
                await asyncio.sleep(0.05)
        work.until.touch()
        assert (await task).json == "done"  # only what has ended is
        await ask(pair.a.address, other.ticket, Op.CANCEL)

    run(main)


# What never was, and what lives elsewhere


def test_resume_of_what_never_was_has_it_that_nothing_can_start(pair: Pair, work: Work) -> None:
    """I2, I13. Mutants seen: RESUME creates; RESUME leaves no tombstone."""

    async def main() -> None:
        client = work.client(size=10)
        client.committed = True
        for address in pair.of("abab"):
            refusal = await refused(client.visit, address)
            assert refusal.reason == "NOT_STARTED"
            assert refusal.metadata["spool"].partition("-")[0] == (pair.spool / "spool-id").read_text()
        client.committed = False
        for address in pair.of("ab"):
            assert (await client.visit(address)).phase == Phase.RELEASED
        assert work.lines == []

    run(main)


def test_another_spool_creates_nothing(pair: Pair, work: Work) -> None:
    """I13. Mutant seen: the spool is looked at only where the job exists."""

    async def main() -> None:
        before = entries(pair.spool)
        client = work.client()
        client.spool = "0123456789abcdef-" + "0" * 32
        for committed in (False, True):
            client.committed = committed
            refusal = await refused(client.visit, pair.a.address)
            assert refusal.reason == "WRONG_SPOOL"
            assert refusal.metadata["spool"].partition("-")[0] == (pair.spool / "spool-id").read_text()
        assert entries(pair.spool) == before
        # The name of this spool after another boot is still its own.
        client.committed, client.spool = False, (pair.spool / "spool-id").read_text() + "-" + "0" * 32
        assert (await client.visit(pair.a.address)).phase == Phase.DONE

    run(main)


OTHERS: list[tuple[str, Callable[[Client], None]]] = [
    ("kwargs", lambda client: client.kwargs.update(size=11)),
    ("method", lambda client: setattr(client, "name", "again")),
    ("size", lambda client: setattr(client, "payload", PAYLOAD[:-1])),
    ("version", lambda client: client.kwargs.update(version="7")),
]


@pytest.mark.parametrize("change", [change for _, change in OTHERS], ids=[name for name, _ in OTHERS])
def test_another_request_under_the_same_ticket(pair: Pair, work: Work, change: Callable[[Client], None]) -> None:
    """I9. Mutant seen: the fingerprint is compared while RECEIVING only."""

    async def main() -> None:
        client = work.client(size=10)
        await begun(client, pair.a.address)
        other = work.client(size=10)
        other.ticket, other.epoch = client.ticket, 5
        change(other)
        for committed in (False, True):
            other.committed = committed
            assert (await refused(other.visit, pair.b.address)).reason == "OTHER_REQUEST"
        outcome = await client.visit(pair.a.address)
        assert outcome.data == answer_to(PAYLOAD, 10)
        assert (await refused(other.visit, pair.b.address)).reason == "OTHER_REQUEST"
        assert await attach(pair.b.address, client.ticket) == outcome
        assert work.lines == ["start"]

    run(main)


def test_another_source_under_the_same_ticket(pair: Pair, work: Work) -> None:
    async def main() -> None:
        client = work.client()
        await begun(client, pair.a.address)
        async with call(
            pair.a.address,
            client.ticket,
            Op.RUN,
            client.name,
            client.kwargs,
            **client.fields | {"source": b"other", "epoch": 9},
        ) as one:
            assert (await refused(one.outcome)).reason == "OTHER_REQUEST"
        assert (await client.visit(pair.b.address)).phase == Phase.DONE

    run(main)


# Bad input

GOOD = zstandard.ZstdCompressor(write_checksum=True).compress(PAYLOAD[1000:2000])


def flipped(place: int) -> bytes:
    return GOOD[:place] + bytes([GOOD[place] ^ 16]) + GOOD[place + 1 :]


def bomb() -> bytes:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    return compressor.compress(bytes(64 * MIB))


BAD: list[tuple[str, list[Raw], str]] = [
    ("a gap", [Raw(data=GOOD, offset=1001)], "OFFSET_MISMATCH"),
    ("far away", [Raw(data=GOOD, offset=(1 << 64) - 1)], "OFFSET_MISMATCH"),
    ("truncated", [Raw(data=GOOD[:-3], offset=1000)], "BAD_CHUNK"),
    ("a flipped bit", [Raw(data=flipped(len(GOOD) // 2), offset=1000)], "BAD_CHUNK"),
    ("a flipped checksum", [Raw(data=flipped(len(GOOD) - 1), offset=1000)], "BAD_CHUNK"),
    ("two frames", [Raw(data=GOOD + GOOD, offset=1000)], "BAD_CHUNK"),
    ("no frame", [Raw(data=b"payload", offset=1000)], "BAD_CHUNK"),
    ("an empty frame", [Raw(data=zstandard.compress(b""), offset=1000)], "BAD_CHUNK"),
    ("a bomb", [Raw(data=bomb(), offset=1000)], "BAD_CHUNK"),
    ("too much", [Raw(data=zstandard.compress(bytes(5000)), offset=1000)], "SIZE_MISMATCH"),
    ("last too early", [Raw(offset=1000, last=True, digest=digest(PAYLOAD[:1000]))], "SIZE_MISMATCH"),
    ("last of more", [Raw(offset=len(PAYLOAD), last=True, digest=digest(PAYLOAD))], "SIZE_MISMATCH"),
    ("last behind a gap", [Raw(data=GOOD, offset=2500, last=True)], "OFFSET_MISMATCH"),
    ("a digest that is none", [Raw(digest=b"12345", offset=1000)], "BAD_MESSAGE"),
]


@pytest.mark.parametrize(("messages", "reason"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_changes_nothing(pair: Pair, work: Work, messages: list[Raw], reason: str) -> None:
    """I9: the honest client finishes the same job. Mutants seen: a gap is not looked for; `last` is believed."""

    async def main() -> None:
        client = work.client(size=10)
        await begun(client, pair.a.address)
        async with opened(client, pair.a.address) as bad:
            with contextlib.suppress(Lost):
                for message in messages:
                    await bad.send(message)
            assert (await refused(bad.outcome)).reason == reason
        outcome = await client.visit(pair.b.address)
        assert client.sent[0] == 1000
        assert outcome.data == answer_to(PAYLOAD, 10)
        assert work.lines == ["start"]

    run(main)


def test_an_overlap_is_skipped_and_a_second_last_is_not_read(pair: Pair, work: Work) -> None:
    async def main() -> None:
        client = work.client(size=10)
        await begun(client, pair.a.address)
        async with opened(client, pair.b.address) as one:
            for start, end in ((0, 700), (300, 1300), (0, 1300), (1300, 1400), (200, len(PAYLOAD))):
                await one.chunk(PAYLOAD[start:end], start)
            for _ in range(2):
                with contextlib.suppress(Lost):
                    await one.send(Raw(offset=len(PAYLOAD), last=True, digest=digest(PAYLOAD)))
            outcome = await one.outcome()
        assert outcome.data == answer_to(PAYLOAD, 10)
        assert work.lines == ["start"]

    run(main)


def test_a_digest_that_is_another_stops_the_job_before_it_starts(pair: Pair, work: Work) -> None:
    """Also after a resume, where the server must read what it has. Mutant seen: no digest of a resumed upload."""

    async def main() -> None:
        client = work.client()
        await begun(client, pair.a.address)
        for address in pair.of("ab"):
            async with opened(client, address) as one:
                have = one.states[-1].offset
                await one.chunk(PAYLOAD[have:], have)
                await one.send(Raw(offset=len(PAYLOAD), last=True, digest=digest(b"another")), end=True)
                assert (await refused(one.outcome)).reason == "DIGEST_MISMATCH"
            client.begins_anew()
        assert work.lines == []
        assert (await client.visit(pair.a.address)).phase == Phase.DONE

    run(main)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(bytes(len(PAYLOAD)), "DIGEST_MISMATCH"), (PAYLOAD + b"more", "SIZE_MISMATCH")],
    ids=["other bytes", "more bytes"],
)
def test_an_upload_of_other_bytes_can_be_begun_anew(pair: Pair, work: Work, wrong: bytes, reason: str) -> None:
    """They were durable, and told to be: the honest client is told that nothing is. Mutant seen: they are kept."""

    async def main() -> None:
        client = work.client()
        client.sized = False
        async with opened(client, pair.a.address) as one:
            await one.chunk(wrong, 0, sync=True)
            await one.until(lambda state: state.offset == len(wrong))
        async with opened(client, pair.b.address) as one:
            assert one.states[-1].offset == len(wrong)
            await one.last(PAYLOAD)
            assert (await refused(one.outcome)).reason == reason
        client.begins_anew()
        async with opened(client, pair.a.address) as one:
            assert one.states[-1].offset == 0
        assert work.lines == []
        assert (await client.visit(pair.b.address)).phase == Phase.DONE

    run(main)


TICKETS: list[tuple[str, dict[str, Any]]] = [
    ("another ticket under this id", {"ticket": b"another ticket!!"}),
    ("a short one", {"ticket": b"short"}),
    ("a long one", {"ticket": b"x" * 65}),
    ("none", {"ticket": b""}),
    ("an id that is a path", {"job": "../" * 8 + "etc/passwd"}),
    ("an id with more", {"job": "x" + "0" * 32}),
    ("no id", {"job": ""}),
]


@pytest.mark.parametrize("op", [Op.RUN, Op.RESUME, Op.ATTACH, Op.CANCEL, Op.RELEASE])
@pytest.mark.parametrize("wrong", [row[1] for row in TICKETS], ids=[row[0] for row in TICKETS])
def test_who_has_not_the_ticket_has_nothing(pair: Pair, work: Work, wrong: dict[str, Any], op: Op) -> None:
    """I9. Mutant seen: the id is taken from the header."""

    async def main() -> None:
        client = work.client(size=10)
        await begun(client, pair.a.address)
        before = entries(pair.spool)
        given = {"ticket": client.ticket, "job": job_id(client.ticket)} | wrong
        ticket = given.pop("ticket")
        async with call(pair.a.address, ticket, op, client.name, client.kwargs, epoch=99, **given) as one:
            assert (await refused(one.outcome)).reason == "BAD_TICKET"
        assert entries(pair.spool) == before
        assert (await client.visit(pair.a.address)).data == answer_to(PAYLOAD, 10)

    run(main)


# Nobody there


def test_a_job_that_nobody_watches_is_cancelled_after_the_grace_and_not_before(pair: Pair, work: Work) -> None:
    """I16. Mutants seen: a watcher in another process does not count; no grace."""

    async def main() -> None:
        client = work.client("wait")
        task = await running(work, client, pair.a.address)
        await left(task)
        # Watched from elsewhere, it goes on for longer than the grace.
        async with call(pair.b.address, client.ticket, Op.ATTACH) as watcher:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GRACE + 2 * TICK):
                    await watcher.outcome()
            assert watcher.states[-1].phase == Phase.RUNNING
        began = time.monotonic()
        async with asyncio.timeout(GRACE + 10):
            while "cancelled" not in work.lines:
                await asyncio.sleep(0.02)
        # The watcher's last word was up to a tick before it left.
        assert GRACE - 2 * TICK <= time.monotonic() - began <= GRACE + 4 * TICK
        outcome = await attach(pair.b.address, client.ticket)
        assert (outcome.phase, outcome.reason) == (Phase.CANCELLED, "CANCELLED")
        assert "nobody came back for it for 2 s" in outcome.message

    run(main)


def test_the_grace_of_a_job_in_its_own_process(pair: Pair, work: Work) -> None:
    async def main() -> None:
        client = work.client("wait")
        await left(await running(work, client, pair.a.address))
        began = time.monotonic()
        async with asyncio.timeout(GRACE + 10):
            while "cancelled" not in work.lines:
                await asyncio.sleep(0.02)
        assert GRACE <= time.monotonic() - began + 0.1 <= GRACE + 4 * TICK

    run(main)


# Servers that die


@pytest.fixture
def serve_one(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Servers of a spool of this test's own, one instance each."""
    started: list[Served] = []

    def start(*options: str) -> Served:
        fixed = ("--tick", "0.2", "--drain", "0", "--cancel-grace", "1")
        started.append(Served(MODEL, tmp_path, (*fixed, *options), "127.0.0.1:0"))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            assert served.stop() == 0, served.log_text()


def kill(served: Served) -> None:
    served.process.kill()
    served.process.communicate()


def test_a_run_is_interrupted_when_its_server_dies_and_what_waited_is_run(
    serve_one: Callable[..., Served], work: Work
) -> None:
    """I7. Mutants seen: RUNNING is adopted as QUEUED; a job whose lock is held counts as free; nobody adopts."""

    async def main() -> None:
        first, second = serve_one(), serve_one()
        client, waiting, boring = work.client("wait"), work.client(size=10), work.client(size=20)
        task = await running(work, client, first.address)
        queued = [asyncio.create_task(one.visit(first.address)) for one in (waiting, boring)]
        async with call(second.address, client.ticket, Op.ATTACH) as watcher:
            await watcher.phase(Phase.RUNNING)
            for one in (waiting, boring):
                async with asyncio.timeout(10):
                    while one.phase != Phase.QUEUED or not one.committed:
                        await asyncio.sleep(0.02)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):  # while its server lives nobody says otherwise
                    await watcher.outcome()
            assert {state.phase for state in watcher.states} == {Phase.RUNNING}
            kill(first)
            for lost in (task, *queued):
                with pytest.raises(Lost):
                    await lost
            outcome = await watcher.outcome()
        assert (outcome.phase, outcome.reason) == (Phase.FAILED, "INTERRUPTED")
        assert await client.visit(second.address) == outcome
        # Who has only the ticket has it run as well.
        assert (await attach(second.address, waiting.ticket)).data == answer_to(PAYLOAD, 10)
        assert (await boring.visit(second.address)).data == answer_to(PAYLOAD, 20)
        assert work.lines == ["start"] * 3

    run(main)


def test_a_restartable_method_is_run_once_more_and_no_more(serve_one: Callable[..., Served], work: Work) -> None:
    async def main() -> None:
        servers = [serve_one() for _ in range(2)]
        client = work.client("wait_again")
        task = await running(work, client, servers[0].address)
        for n in (0, 1):
            following = serve_one() if n else servers[1]
            kill(servers[n])
            with pytest.raises(Lost):
                await task
            task = asyncio.create_task(client.visit(following.address))
            if n == 0:
                await work.started(2)
        outcome = await task
        assert (outcome.phase, outcome.reason) == (Phase.FAILED, "INTERRUPTED")
        assert work.lines == ["start"] * 2
        assert await attach(following.address, client.ticket) == outcome

    run(main)


def test_a_server_that_drains_leaves_its_jobs_to_the_next_one(serve_one: Callable[..., Served], work: Work) -> None:
    async def main() -> None:
        first, second = serve_one(), serve_one()
        blocker, waiting, uploading = work.client("wait"), work.client(size=10), work.client(size=20)
        task = await running(work, blocker, first.address)
        queued = asyncio.create_task(waiting.visit(first.address))
        async with opened(uploading, first.address) as one:
            await one.chunk(PAYLOAD[:1000], 0)
            async with asyncio.timeout(10):
                while waiting.phase != Phase.QUEUED:
                    await asyncio.sleep(0.02)
            stopped = asyncio.create_task(asyncio.to_thread(first.stop))
            refusal = await refused(one.outcome)
            assert (refusal.reason, refusal.retry) == ("DRAINING", True)
        ended = await task
        assert (ended.phase, ended.reason) == (Phase.FAILED, "INTERRUPTED")
        with pytest.raises((Refusal, Lost)):  # it comes again
            await queued
        assert await stopped == 0
        assert await attach(second.address, blocker.ticket) == ended
        assert (await uploading.visit(second.address)).data == answer_to(PAYLOAD, 20)
        assert uploading.sent[0] == 1000
        assert (await waiting.visit(second.address)).data == answer_to(PAYLOAD, 10)
        assert work.lines.count("start") == 3

    run(main)


# A full disk


def limit(served: Served, size: int) -> None:
    """No file of the server's may be longer from now on, which is what a full disk looks like."""
    resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_disk_that_fills_up_is_a_pause(serve_one: Callable[..., Served], work: Work) -> None:
    """I10. Mutants seen: no checkpoint on leaving; SPOOL_FULL comes without RetryInfo."""
    payload = os.urandom(3 * MIB)

    async def main() -> None:
        served = serve_one()
        client = work.client(payload=payload, size=10)
        fields: dict[str, Any] = {"size": None}
        limit(served, 2 * MIB + 1000)
        async with opened(client, served.address, **fields) as one:
            await one.chunk(payload[:MIB], 0, sync=True)
            await one.until(lambda state: state.offset == MIB)
            with contextlib.suppress(Lost):
                for n in (1, 2):
                    await one.chunk(payload[n * MIB : (n + 1) * MIB], n * MIB)
            refusal = await refused(one.outcome)
            assert (refusal.reason, refusal.retry) == ("SPOOL_FULL", True)
        # Still full: what there is is told, and no more.
        async with opened(client, served.address, **fields) as one:
            assert one.states[-1].offset == 2 * MIB + 1000
        # A known size is refused before the first byte, and leaves nothing.
        other = work.client(payload=payload)
        before = entries(served.spool)
        refusal = await refused(other.visit, served.address)
        assert (refusal.reason, refusal.retry) == ("SPOOL_FULL", True)
        assert entries(served.spool) == before
        limit(served, resource.RLIM_INFINITY)
        async with opened(client, served.address, **fields) as one:
            have = one.states[-1].offset
            assert have == 2 * MIB + 1000
            await one.chunk(payload[have:], have)
            await one.last(payload)
            assert (await one.outcome()).data == answer_to(payload, 10)
        assert work.lines == ["start"]

    run(main)


def test_a_disk_that_is_full_ends_neither_the_server_nor_what_it_knows(
    serve_one: Callable[..., Served], work: Work
) -> None:
    """Mutant seen: what `open.released` raises reaches the server's nursery (as it once did)."""

    async def main() -> None:
        served = serve_one()
        client = work.client(size=10)
        outcome = await client.visit(served.address)
        limit(served, 100)  # no journal takes another line
        async with call(served.address, os.urandom(16), Op.ATTACH, released=[client.ticket]) as one:
            assert (await refused(one.outcome)).reason == "NOT_FOUND"
        assert (await refused(ask, served.address, client.ticket, Op.RELEASE)).reason == "SPOOL_FULL"
        assert (await refused(work.client().visit, served.address)).reason == "SPOOL_FULL"
        assert await attach(served.address, client.ticket) == outcome
        limit(served, resource.RLIM_INFINITY)
        assert (await ask(served.address, client.ticket, Op.RELEASE)).phase == Phase.RELEASED
        assert served.process.poll() is None

    run(main)


def test_a_long_answer_that_came_at_once_is_on_disk_soon(serve_one: Callable[..., Served], work: Work) -> None:
    """Mutant seen: nobody settles it once it was told."""

    async def main() -> None:
        served = serve_one("--tick", "2")  # the job has ended long before
        client = work.client(size=LONG)
        assert (await client.visit(served.address)).data == answer_to(PAYLOAD, LONG)
        journal = Journal(served.spool / job_id(client.ticket) / "state")
        async with asyncio.timeout(10):
            while "settled" not in journal.read():
                await asyncio.sleep(0.01)

    run(main)


# No descriptor left


def leave_descriptors(served: Served, free: int) -> None:
    """The server can open `free` more files and connections, and no more."""
    used = {int(name) for name in os.listdir(f"/proc/{served.process.pid}/fd")}
    lowest = next(n for n in range(1 << 20) if n - len([fd for fd in used if fd < n]) == free)
    _, hard = resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (lowest, hard))


def test_who_finds_no_descriptor_comes_again_and_what_runs_goes_on(
    serve_one: Callable[..., Served], work: Work
) -> None:
    """Mutants seen: `claim` raises what the system does, INTERNAL to a client; what a job's tick raises ends it."""

    async def main() -> None:
        served = serve_one()
        before = resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)
        ended, client = work.client(size=10), work.client("wait")
        await ended.visit(served.address)
        task = await running(work, client, served.address)
        for free in (1, 2, 3):
            leave_descriptors(served, free)
            with contextlib.suppress(Lost):  # it cannot even be heard
                refusal = await refused(work.client().visit, served.address)
                assert (refusal.reason, refusal.retry) == ("OVERLOADED", True)
            with contextlib.suppress(Lost, Refusal):
                async with call(served.address, client.ticket, Op.ATTACH, released=[ended.ticket]) as watcher:
                    await watcher.phase(Phase.RUNNING)
            await asyncio.sleep(2 * TICK)
            resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, before)
        assert served.process.poll() is None
        assert (await attach(served.address, ended.ticket)).phase in (Phase.DONE, Phase.RELEASED)
        work.until.touch()
        assert (await task).phase == Phase.DONE
        assert (await work.client(size=20).visit(served.address)).data == answer_to(PAYLOAD, 20)
        assert "would not survive a power cut" in served.log_text()  # the first tick came when there was none
        assert "a bug of aipod" not in served.log_text()

    run(main)
