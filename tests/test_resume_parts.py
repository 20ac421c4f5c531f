"""The client's parts without a server: the table of failures, patience, ticket file, sources, course, link."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import random
import re
import stat
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError

import aipod
from aipod.client.course import Course, Request
from aipod.client.failure import (
    OUT_OF_SIGHT,
    Action,
    BadAnswer,
    Known,
    Local,
    NoAnswer,
    decide,
    of_state,
)
from aipod.client.link import RELEASED_PER_CALL, Link
from aipod.client.patience import Patience
from aipod.client.reader import BATCH, Stream
from aipod.client.sink import Sink
from aipod.client.source import Source
from aipod.client.ticket import Saved, TicketFile, parse_ticket
from aipod.codec import Compressor, decode_chunk, digest
from aipod.config import CHUNK
from aipod.errors import TABLE, leaves
from aipod.transport.codec import BadMessage
from aipod.transport.stream import StreamRefused
from aipod.wire.ai import Error, Op, Open, Phase, Raw, State
from tests.conftest import run

SPOOL = "0123-boot1"
BEFORE = Known("t")  # nothing was answered, `last` was not sent
AFTER = Known("t", Op.RESUME, SPOOL, 5.0, Phase.RECEIVING)
WATCHED = Known("t", Op.ATTACH, None, 0.0, Phase.QUEUED)
STRANGE = Known("t", Op.ATTACH)


def refusal(reason: str, *, delay: float | None = None, **metadata: str) -> GRPCError:
    """What the server's table makes of `reason`."""
    row = TABLE[reason]
    details: list[Any] = [ErrorInfo(domain="aipod", reason=reason, metadata=metadata)]
    delay = row.retry_after if delay is None else delay
    if delay is not None:
        details.append(RetryInfo(retry_delay=Duration(seconds=int(delay), nanos=int(delay % 1 * 1e9))))
    return GRPCError(Status(int(row.code)), "text", details)


def outcome(exc: BaseException, known: Known) -> tuple[Action, str]:
    decision = decide(exc, known)
    assert decision is not None
    assert isinstance(decision.error, aipod.AipodError)
    return decision.action, decision.error.reason


# --- the table


@pytest.mark.parametrize(
    "exc",
    [
        OSError("x"),
        TimeoutError(),
        ConnectionResetError(),
        StreamTerminatedError("x"),
        NoAnswer("status OK without an outcome"),
        GRPCError(Status.INTERNAL, "a proxy's"),
        GRPCError(Status.UNAVAILABLE, "a proxy's"),
        GRPCError(Status.UNKNOWN, "a proxy's"),
        GRPCError(Status.CANCELLED),
        GRPCError(Status.DEADLINE_EXCEEDED),
        GRPCError(Status.INTERNAL, "a stranger's", [ErrorInfo(domain="other", reason="INTERNAL")]),
        BadMessage(Status.INTERNAL, "cannot be read"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_lost_connection_is_tried_again_and_typed(exc: Exception, wrapped: bool) -> None:
    whole = ExceptionGroup("", [ExceptionGroup("", [exc])]) if wrapped else exc
    assert outcome(whole, BEFORE) == (Action.RETRY, "UNREACHABLE")
    for known in (AFTER, WATCHED, STRANGE):
        assert outcome(whole, known) == (Action.RETRY, "JOB_LOST")
        decision = decide(whole, known)
        assert decision is not None
        assert (decision.cause, decision.retry_after, decision.within) == (next(leaves(whole)), 0.0, None)
        assert "may have run" in str(decision.error)


@pytest.mark.parametrize(
    ("exc", "why"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)"), "Connection refused"),
        (StreamTerminatedError("Connection lost"), "Connection lost"),
        (TimeoutError(), "no answer in time"),
        (GRPCError(Status.UNAVAILABLE, "a proxy's"), "UNAVAILABLE: a proxy's"),
        (GRPCError(Status.CANCELLED), "CANCELLED"),
        (refusal("DRAINING"), "DRAINING: text"),
        (BadAnswer("it goes on at byte 3, not at 2"), "the answer arrived damaged: .*"),
    ],
)
def test_who_watches_is_told_the_cause_in_short(exc: Exception, why: str) -> None:
    """Mutant: the error that is raised in the end says that the job may have run, while it is still being tried."""
    for known in (BEFORE, AFTER, WATCHED):
        decision = decide(exc, known)
        assert decision is not None
        assert decision.action is Action.RETRY
        assert re.fullmatch(why, decision.why)


def test_what_was_not_processed_leaves_the_request_incomplete() -> None:
    decision = decide(StreamRefused("refused"), AFTER)
    assert decision is not None
    assert (decision.action, decision.untouched) == (Action.RETRY, True)


STOPS = {
    "BAD_KWARGS", "BAD_TICKET", "BAD_VERSION", "BAD_MESSAGE", "UNKNOWN_METHOD", "OTHER_REQUEST", "DAMAGED",
    "SIZE_MISMATCH", "DIGEST_MISMATCH", "PAYLOAD_TOO_LARGE", "LOAD_FAILED", "MODEL_ERROR", "WORKER_CRASHED",
    "RESULT_NOT_JSON", "RESULT_NOT_TEXT", "RESULT_NO_FILE", "RESULT_NOT_STORED", "CANCELLED", "DEADLINE_EXCEEDED",
    "INTERRUPTED", "RELEASED", "INTERNAL", "SUPERSEDED",
}  # fmt: skip
COMES_AGAIN = {"BUSY", "DRAINING", "SPOOL_FULL", "OVERLOADED"}
TRANSIENT = {"OFFSET_MISMATCH", "UPLOAD_STALLED", "TRUNCATED"}
SPECIAL = {"NOT_FOUND", "NOT_STARTED", "WRONG_SPOOL", "BAD_CHUNK"}


def test_every_reason_is_decided_here() -> None:
    assert set(TABLE) == STOPS | COMES_AGAIN | TRANSIENT | SPECIAL


@pytest.mark.parametrize("reason", sorted(STOPS))
def test_reasons_that_stop(reason: str) -> None:
    for known in (BEFORE, AFTER, WATCHED):
        assert outcome(refusal(reason), known) == (Action.STOP, reason)


@pytest.mark.parametrize("reason", sorted(COMES_AGAIN))
def test_reasons_with_retry_info(reason: str) -> None:
    """Before `last` was sent the server's own reason is what a caller who gives up hears; after it, that it may run."""
    assert outcome(refusal(reason, delay=1.5), BEFORE) == (Action.RETRY, reason)
    assert outcome(refusal(reason, delay=1.5), AFTER) == (Action.RETRY, "JOB_LOST")
    decision = decide(refusal(reason, delay=1.5), AFTER)
    assert decision is not None
    assert decision.retry_after == 1.5


@pytest.mark.parametrize("reason", sorted(TRANSIENT))
def test_reasons_that_say_nothing_against_the_request(reason: str) -> None:
    assert outcome(refusal(reason), BEFORE) == (Action.RETRY, "UNREACHABLE")
    assert outcome(refusal(reason), AFTER) == (Action.RETRY, "JOB_LOST")


def test_a_status_without_our_details_is_retried_only_with_retry_info() -> None:
    full = GRPCError(Status.RESOURCE_EXHAUSTED, "full")
    later = GRPCError(Status.RESOURCE_EXHAUSTED, "full", [RetryInfo(retry_delay=Duration(seconds=3))])
    assert outcome(full, BEFORE) == (Action.STOP, "RESOURCE_EXHAUSTED")
    assert outcome(full, AFTER) == (Action.STOP, "JOB_LOST")
    assert outcome(later, BEFORE) == (Action.RETRY, "RESOURCE_EXHAUSTED")
    assert outcome(GRPCError(Status.UNIMPLEMENTED, "no such page"), BEFORE) == (Action.STOP, "UNIMPLEMENTED")
    assert outcome(GRPCError(Status.PERMISSION_DENIED, "no"), AFTER) == (Action.STOP, "JOB_LOST")


def test_a_damaged_chunk_is_sent_once_more() -> None:
    assert outcome(refusal("BAD_CHUNK"), BEFORE) == (Action.RETRY, "BAD_CHUNK")
    assert outcome(refusal("BAD_CHUNK"), Known("t", damaged=1)) == (Action.STOP, "BAD_CHUNK")
    assert outcome(BadAnswer("x"), AFTER) == (Action.RETRY, "BAD_ANSWER")
    assert outcome(BadAnswer("x"), Known("t", damaged=1)) == (Action.STOP, "BAD_ANSWER")


def test_the_wrong_spool() -> None:
    wrong = refusal("WRONG_SPOOL", spool="other-boot1")
    learnt = decide(wrong, BEFORE)
    assert learnt is not None
    assert (learnt.action, learnt.untouched, learnt.spool) == (Action.RELEARN, True, "other-boot1")
    for known in (AFTER, WATCHED):
        decision = decide(wrong, known)
        assert decision is not None
        assert (decision.action, decision.within) == (Action.RETRY, OUT_OF_SIGHT)
        assert isinstance(decision.error, aipod.JobLost)


def test_a_job_that_is_not_there() -> None:
    assert outcome(refusal("NOT_FOUND"), STRANGE) == (Action.STOP, "NOT_FOUND")
    decision = decide(refusal("NOT_FOUND"), WATCHED)
    assert decision is not None
    assert (decision.action, decision.within) == (Action.RETRY, OUT_OF_SIGHT)
    assert isinstance(decision.error, aipod.JobLost)


@pytest.mark.parametrize(
    ("known", "spool", "action"),
    [
        (AFTER, SPOOL, Action.ANEW),
        (Known("t", Op.RESUME, SPOOL, 5.0), SPOOL, Action.ANEW),
        (Known("t", Op.RESUME, SPOOL, 899.0), SPOOL, Action.ANEW),
        (Known("t", Op.RESUME, SPOOL, 900.0), SPOOL, Action.STOP),  # it may have run and been forgotten
        (Known("t", Op.RESUME, SPOOL, -1.0), SPOOL, Action.STOP),  # the clock was set
        (AFTER, "0123-boot2", Action.STOP),  # the machine was started again: the last second may be lost
        (AFTER, "", Action.STOP),
        (Known("t", Op.RESUME, "", 5.0), SPOOL, Action.STOP),
        (Known("t", Op.RESUME, SPOOL, 5.0, Phase.QUEUED), SPOOL, Action.STOP),  # it was complete: it may have run
        (Known("t", Op.RESUME, SPOOL, 5.0, Phase.RUNNING), SPOOL, Action.STOP),
        (Known("t", Op.RUN), SPOOL, Action.STOP),
        (WATCHED, SPOOL, Action.STOP),
    ],
)
def test_when_a_job_that_was_not_started_is_run_anew(known: Known, spool: str, action: Action) -> None:
    decision = decide(refusal("NOT_STARTED", spool=spool, ttl="900"), known)
    assert decision is not None
    assert decision.action is action
    if action is Action.ANEW:  # should there be no patience for another time: it has not run
        assert isinstance(decision.error, aipod.Unreachable)


def test_a_process_that_has_just_started_outbids_once() -> None:
    exc = refusal("SUPERSEDED", epoch="77")
    decision = decide(exc, Known("t", may_outbid=True))
    assert decision is not None
    assert (decision.action, decision.epoch) == (Action.OUTBID, 77)
    for known in (BEFORE, AFTER):
        assert outcome(exc, known) == (Action.STOP, "SUPERSEDED")
    assert outcome(refusal("SUPERSEDED", epoch="?"), Known("t", may_outbid=True)) == (Action.STOP, "SUPERSEDED")


def test_what_is_not_ours_is_left_alone() -> None:
    class Mine(OSError):
        pass

    assert decide(ValueError(), BEFORE) is None
    mine = Mine()
    decision = decide(ExceptionGroup("", [Local(mine)]), AFTER)
    assert decision is not None
    assert (decision.action, decision.error) == (Action.STOP, mine)


@pytest.mark.parametrize(
    ("state", "kind", "reason"),
    [
        (State(phase=Phase.FAILED, error=Error(reason="MODEL_ERROR", type="E")), aipod.ModelError, "MODEL_ERROR"),
        (State(phase=Phase.FAILED, error=Error(reason="INTERRUPTED")), aipod.Interrupted, "INTERRUPTED"),
        (State(phase=Phase.CANCELLED, error=Error(reason="CANCELLED")), aipod.JobCancelled, "CANCELLED"),
        (
            State(phase=Phase.CANCELLED, error=Error(reason="DEADLINE_EXCEEDED")),
            aipod.JobCancelled,
            "DEADLINE_EXCEEDED",
        ),
        (State(phase=Phase.CANCELLED), aipod.JobCancelled, "CANCELLED"),
        (State(phase=Phase.RELEASED), aipod.JobFailed, "RELEASED"),
        (State(phase=Phase.RELEASED, error=Error(reason="CANCELLED")), aipod.JobFailed, "RELEASED"),
        (State(phase=Phase.FAILED), aipod.JobFailed, "INTERNAL"),
    ],
)  # fmt: skip
def test_outcomes_that_are_no_answer(state: State, kind: type[aipod.JobFailed], reason: str) -> None:
    error = of_state(state)
    assert (type(error), error.reason) == (kind, reason)


# --- patience


class Half(random.Random):
    """Jitter in the middle."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def patience(clock: Clock | None = None, **settings: Any) -> Patience:
    return Patience(aipod.Config(**settings), clock=clock or Clock(), rng=Half())


def test_before_anything_is_known_attempts_are_counted() -> None:
    tries = patience(attempts=7)
    pauses = [tries.pause(known=False) for _ in range(7)]
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, None]
    assert patience(attempts=1).pause(known=False) is None


def test_afterwards_only_time_without_progress_counts() -> None:
    clock = Clock()
    tries = patience(clock, attempts=1, reconnect=100.0)
    assert [tries.pause(known=True) for _ in range(6)] == [0.25, 0.5, 1.0, 2.0, 2.5, 2.5]
    assert tries.attempt == 7
    clock.now = 99.0
    assert tries.pause(known=True) == 1.0, "one more try at the very end"
    clock.now = 100.0
    assert tries.pause(known=True) is None
    tries.progress()
    assert tries.attempt == 1
    assert tries.pause(known=True) == 0.25
    clock.now = 1e9
    for _ in range(2000):  # 2 ** 2000 is no float
        tries.progress() if tries.pause(known=True) is None else None


def test_no_time_at_all_is_no_try() -> None:
    assert patience(reconnect=0).pause(known=True) is None


def test_the_servers_own_pause_is_kept_unless_time_is_over() -> None:
    clock = Clock()
    tries = patience(clock, reconnect=10.0)
    assert tries.pause(known=True, at_least=5.0) == 5.0
    clock.now = 8.0
    assert tries.pause(known=True, at_least=5.0) == 2.0


def test_a_connection_that_was_idle_is_grudged_once() -> None:
    tries = patience(attempts=1)
    assert tries.pause(known=False, free=True) == 0.0
    assert tries.attempt == 1
    assert tries.pause(known=False, free=True) is None
    tries.seen()
    assert tries.pause(known=False, free=True) == 0.0


def test_a_job_out_of_sight_is_looked_for_so_long_and_no_longer() -> None:
    clock = Clock()
    tries = patience(clock, reconnect=1000.0)
    assert tries.pause(known=True, within=60.0) == 0.25
    clock.now = 59.5
    assert tries.pause(known=True, within=60.0) == 0.5
    clock.now = 60.0
    assert tries.pause(known=True, within=60.0) is None
    tries.seen()
    assert tries.pause(known=True, within=60.0) is not None


# --- the ticket file

SAVED = Saved(bytes(range(16)), 123, SPOOL, 5.5, "request")


def test_a_ticket_file_keeps_what_it_gets(tmp_path: Path) -> None:
    file = TicketFile(tmp_path / "ticket")
    assert file.load() is None
    file.remove()
    file.save(SAVED)
    assert file.load() == SAVED
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    later = Saved(SAVED.ticket, 124, "", None, "request")
    file.save(later)
    assert file.load() == later
    assert list(tmp_path.iterdir()) == [file.path]
    file.check(later, "request")
    with pytest.raises(aipod.UsageError, match="another request"):
        file.check(later, "other")
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_ticket_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    file = TicketFile(tmp_path / "ticket")
    file.save(SAVED)
    with pytest.raises(TypeError):
        file.save(Saved(SAVED.ticket, 1, SPOOL, 1.0, object()))  # type: ignore[arg-type]
    assert file.load() == SAVED
    assert list(tmp_path.iterdir()) == [file.path]


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", "{}", "\xff", '{"ticket": 5}']
    + [
        json.dumps({"ticket": "00" * 16, "epoch": 1, "spool": "s", "sent": None, "request": "r", **wrong})
        for wrong in ({"ticket": "0g"}, {"epoch": "1"}, {"spool": None}, {"sent": "1"}, {"request": 1})
    ],
)  # fmt: skip
def test_what_is_no_ticket_file_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ticket"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(aipod.UsageError):
        TicketFile(path).load()
    assert path.read_bytes() == text.encode("latin1")


def test_tickets_come_as_bytes_or_as_text() -> None:
    assert parse_ticket(SAVED.ticket) == parse_ticket(SAVED.ticket.hex()) == SAVED.ticket
    for wrong in (b"short", b"x" * 65, "xyz", "00", 5, None):
        with pytest.raises(aipod.UsageError):
            parse_ticket(wrong)  # type: ignore[arg-type]


def test_a_course_of_a_file_resumes_only_what_was_sent(tmp_path: Path) -> None:
    file = TicketFile(tmp_path / "ticket")
    sent = Course.of_file(file, SAVED)
    assert (sent.op, sent.sent_to, sent.fresh, sent.may_outbid) == (Op.RESUME, SPOOL, False, True)
    unsent = Course.of_file(file, Saved(SAVED.ticket, 123, "", None, "r"))
    assert (unsent.op, unsent.sent_to, unsent.fresh) == (Op.RUN, None, False)
    assert unsent.next_epoch() > 123
    unsent.epoch = 2**62
    assert unsent.next_epoch() == 2**62 + 1, "whatever the clock says"
    unsent.sent("s")
    unsent.save(Request("chaos", fingerprint="r"))
    saved = file.load()
    assert saved is not None
    assert (saved.spool, saved.epoch, saved.request) == ("s", 2**62 + 1, "r")
    assert saved.sent is not None
    assert abs(saved.sent - time.time()) < 60
    unsent.not_sent()
    unsent.save(Request("chaos", fingerprint="r"))
    assert file.load() == Saved(SAVED.ticket, 2**62 + 1, "", None, "r")


# --- sources

DATA = os.urandom(CHUNK * 6 + 12345)


class Once:
    """A file that can only be read."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int) -> bytes:
        return self._file.read(size)


def sources(tmp_path: Path, data: bytes) -> dict[str, Any]:
    (tmp_path / "file").write_bytes(data)

    async def asynchronous() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 300_000):
            yield data[start : start + 300_000]

    shifted = io.BytesIO(b"before" + data)
    shifted.seek(6)
    return {
        "bytes": data,
        "path": tmp_path / "file",
        "file": shifted,
        "stream": Once(data),
        "iterator": (data[start : start + 100_000] for start in range(0, len(data), 100_000)),
        "async iterator": asynchronous(),
    }


KINDS = ("bytes", "path", "file", "stream", "iterator", "async iterator")


async def collect(source: Source, start: int, *, most: int | None = None) -> tuple[bytes, list[Raw]]:
    """The payload from `start` on, or its first `most` batches."""
    chunks: list[Raw] = []
    batches = source.batches(start, 1)
    async for batch in batches:
        chunks += batch
        most = None if most is None else most - 1
        if most == 0:
            break
    await batches.aclose()
    data = b"".join(decode_chunk(chunk.data) for chunk in chunks if chunk.data)
    at = start
    for chunk in chunks:
        assert chunk.offset == at
        at += len(decode_chunk(chunk.data)) if chunk.data else 0
    return data, chunks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 1, CHUNK, CHUNK * 4, CHUNK * 4 + 5, len(DATA) - 1, len(DATA)])
def test_a_source_is_sent_from_any_offset_again_and_hashed_once(tmp_path: Path, kind: str, start: int) -> None:
    """First in part, then from `start` on, then whole. Mutant: hashing what is read again gives another digest."""

    async def main() -> None:
        async with Source(sources(tmp_path, DATA)[kind]) as source:
            assert source.size == (len(DATA) if kind in ("bytes", "path") else None)
            first, _ = await collect(source, 0, most=1)
            assert DATA.startswith(first)
            rest, chunks = await collect(source, start)
            assert rest == DATA[start:]
            assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
            assert chunks[-1].digest == digest(DATA)
            assert (await collect(source, 0))[1][-1].digest == digest(DATA)
            assert source.read == len(DATA)

    run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_in_a_new_process_reads_its_beginning_for_the_digest_only(tmp_path: Path, kind: str) -> None:
    async def main() -> None:
        async with Source(sources(tmp_path, DATA)[kind]) as source:
            rest, chunks = await collect(source, CHUNK * 5 + 7)
            assert rest == DATA[CHUNK * 5 + 7 :]
            assert chunks[-1].digest == digest(DATA)

    run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_is_shorter_than_what_was_sent_is_refused(tmp_path: Path, kind: str) -> None:
    async def main() -> None:
        async with Source(sources(tmp_path, b"short")[kind]) as source:
            await collect(source, 6)

    with pytest.raises(aipod.UsageError, match="5 bytes now, but 6"):
        run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_source_is_one_last_message(tmp_path: Path, kind: str) -> None:
    async def main() -> list[Raw]:
        async with Source(sources(tmp_path, b"")[kind]) as source:
            return (await collect(source, 0))[1]

    assert run(main) == [Raw(last=True, digest=digest(b""))]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_read_while_an_attempt_is_given_up_is_not_lost(asynchronous: bool) -> None:
    """The iterator has been asked for a piece when the connection is lost: the next attempt gets that piece."""
    asked, go = threading.Event(), threading.Event()

    def pieces() -> Iterator[bytes]:
        yield DATA[: BATCH * CHUNK]
        asked.set()
        go.wait(10)
        yield DATA[BATCH * CHUNK :]

    async def apieces() -> AsyncIterator[bytes]:
        yield DATA[: BATCH * CHUNK]
        asked.set()
        await asyncio.to_thread(go.wait, 10)
        yield DATA[BATCH * CHUNK :]

    async def main() -> None:
        async with Source(apieces() if asynchronous else pieces()) as source:
            lost = asyncio.create_task(collect(source, 0))
            await asyncio.to_thread(asked.wait, 10)
            lost.cancel()
            with pytest.raises(asyncio.CancelledError):
                await lost
            go.set()
            data, chunks = await collect(source, 100)
            assert data == DATA[100:]
            assert chunks[-1].digest == digest(DATA)

    run(main)


def test_a_source_that_never_gives_anything_can_be_left() -> None:
    released = threading.Event()

    def pieces() -> Iterator[bytes]:
        released.wait(30)
        yield b""

    async def main() -> None:
        async with Source(pieces()) as source:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await collect(source, 0)
        released.set()

    run(main)


def test_a_file_that_changes_between_attempts_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)

    async def main() -> None:
        async with Source(path) as source:
            await collect(source, 0)
            with path.open("r+b") as file:
                file.write(b"changed")
            os.utime(path, ns=(0, 0))
            await collect(source, 0)

    with pytest.raises(aipod.UsageError, match="changed while it was sent"):
        run(main)


def test_a_stream_leaves_no_file_and_closes_what_it_has(tmp_path: Path) -> None:
    async def main() -> Stream:
        async with Source(iter([DATA])) as source:
            await collect(source, 0)
            reader = source._reader
            assert isinstance(reader, Stream)
            assert reader._kept is not None
            assert os.fstat(reader._kept.fileno()).st_nlink == 0
            return reader

    reader = run(main)
    assert reader._kept is not None
    assert reader._kept.closed


def test_tags_tell_sources_apart(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"x")
    other.write_bytes(b"y")
    assert Source(one).tag == Source(str(one)).tag != Source(other).tag
    assert Source(one).content_tag() != Source(other).content_tag()
    assert Source(b"x").tag == b""
    assert Source(b"x").content_tag() == Source(bytearray(b"x")).content_tag() != Source(b"y").content_tag()
    before = Source(one).tag
    os.utime(one, ns=(0, 0))
    assert Source(one).tag != before


# --- the answer


@pytest.mark.parametrize("save", [False, True])
def test_an_answer_goes_on_where_it_was(tmp_path: Path, save: bool) -> None:
    parts = [b"first", b"second", b"third"]
    whole = b"".join(parts)
    state = State(size=len(whole), digest=digest(whole), content_type="application/octet-stream")
    sink = Sink(state, tmp_path / "answer" if save else None)
    pack = Compressor(1).frame
    sink.add(Raw(data=pack(parts[0]), offset=0))
    sink.add(Raw(data=pack(parts[1]), offset=5))
    for wrong in (Raw(data=pack(parts[2]), offset=5), Raw(data=b"damaged", offset=11), Raw(data=pack(b""), offset=11)):
        with pytest.raises(BadAnswer):
            sink.add(wrong)
    assert sink.received == 11
    assert sink.matches(State(size=len(whole), digest=digest(whole)))
    assert not sink.matches(State(size=len(whole), digest=digest(b"")))
    sink.add(Raw(data=pack(parts[2]), offset=11))
    sink.add(Raw(offset=16, last=True))
    answer = sink.finish()
    assert (answer.read_bytes() if save else answer) == whole
    sink.discard()


# --- the log


def test_log_bytes_are_neither_lost_nor_doubled() -> None:
    course = Course()
    text = "grüße\n".encode()

    def told(at: int, end: int) -> str:
        return course.new_log(State(log=text[at:end], log_offset=at))

    assert told(0, 3) == "gr", "half of a letter waits for the rest"
    assert told(0, 3) == ""
    assert course.log_have == 3
    assert told(2, 6) == "üß"[0:2]
    assert told(6, 6) == ""
    assert told(4, len(text)) == "e\n"
    assert course.log_have == len(text)


# --- what a client remembers


def test_a_link_remembers_spools_by_upstream() -> None:
    link = Link("127.0.0.1:1", aipod.Config())
    assert link.spool("a") == ""
    link.learn("a", "one")
    link.learn("b", "two")
    link.learn("a", "")
    assert (link.spool("a"), link.spool("b"), link.spool("")) == ("one", "two", "")
    for n in range(100):
        link.learn(f"u{n}", "x")
    assert link.spool("a") == ""
    assert link.spool("u99") == "x"


def test_released_tickets_go_to_the_spool_they_are_of() -> None:
    link = Link("127.0.0.1:1", aipod.Config())
    for n in range(70):
        link.release("one", bytes([n]))
    link.release("two", b"z")
    opening = Open()
    assert link.take_released(opening, "") == []
    taken = link.take_released(opening, "one")
    assert opening.released == [bytes([n]) for n in range(RELEASED_PER_CALL)]
    link.put_back(taken)
    assert len(link.take_released(Open(), "one")) == RELEASED_PER_CALL
    assert link.take_released(Open(ticket=b"z"), "two") == [], "a call does not release what it asks for"
    again = Open()
    link.take_released(again, "two")
    assert again.released == [b"z"]
    for n in range(1000):
        link.release("three", b"%d" % n)
    assert len(link._released) == 256


def test_errands_are_bounded_and_end_with_the_client() -> None:
    async def main() -> tuple[int, int]:
        link = Link("127.0.0.1:1", aipod.Config())
        began = done = 0

        async def errand() -> None:
            nonlocal began, done
            began += 1
            await asyncio.sleep(0.01)
            done += 1
            raise OSError("nobody is told")

        for _ in range(100):
            link.errand(errand)
        await link.aclose()
        return began, done

    assert run(main) == (64, 64)
