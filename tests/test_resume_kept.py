"""What a client keeps from one connection to the next: patience, ticket, answer, log, spools. No server is needed."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import json
import os
import random
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import aipod
from aipod.client.course import Course, Request
from aipod.client.failure import (
    BadAnswer,
)
from aipod.client.follow import release_all
from aipod.client.link import RELEASED_PER_CALL, Had, Link
from aipod.client.patience import Patience
from aipod.client.sink import Sink
from aipod.client.ticket import Saved, TicketFile, next_ticket, parse_ticket
from aipod.codec import Compressor, digest
from aipod.wire.ai import Op, Open, Raw, State
from tests.conftest import run

# Patience


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


def test_a_server_may_ask_for_a_pause_but_not_for_years() -> None:
    tries = patience(attempts=3)
    assert [tries.pause(known=False, at_least=seconds) for seconds in (9.0, 1e11, 1.0)] == [9.0, 600.0, None]


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


# The ticket file


SPOOL = "0123-boot1"
SAVED = Saved(bytes(range(16)), 123, SPOOL, 5.5, "request")


def test_a_ticket_file_keeps_what_it_gets(tmp_path: Path) -> None:
    file = TicketFile(tmp_path / "ticket")
    assert file.load() is None
    file.remove(SAVED.ticket)
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
    file.remove(SAVED.ticket)
    assert list(tmp_path.iterdir()) == []


def test_of_many_who_create_a_ticket_file_at_once_all_get_the_same_ticket(tmp_path: Path) -> None:
    """Mutant: the file is looked for and then replaced, as it once was: each caller has a job of its own."""
    tickets = [bytes([n]) * 16 for n in range(8)]
    for number in range(20):
        path, start = tmp_path / str(number), threading.Barrier(len(tickets))

        def create(ticket: bytes, path: Path = path, start: threading.Barrier = start) -> bytes:
            start.wait()
            return TicketFile(path).create(Saved(ticket, 0, "", None, "request")).ticket

        with concurrent.futures.ThreadPoolExecutor(len(tickets)) as pool:
            found = set(pool.map(create, tickets))
        saved = TicketFile(path).load()
        assert saved is not None
        assert found == {saved.ticket}
    assert len(list(tmp_path.iterdir())) == 20, "nothing else is left"


def test_a_ticket_file_of_another_job_is_left_alone(tmp_path: Path) -> None:
    file = TicketFile(tmp_path / "ticket")
    other = Saved(b"x" * 16, 1, "", None, "request")
    file.save(SAVED)
    assert file.create(other) == SAVED
    with pytest.raises(aipod.UsageError, match="belongs to another job now"):
        file.save(other)
    file.remove(other.ticket)
    assert file.load() == SAVED
    # The same job, run anew.
    anew = dataclasses.replace(other, ticket=next_ticket(SAVED.ticket))
    file.save(anew)
    assert file.load() == anew
    file.path.write_text("no ticket file")
    file.remove(anew.ticket)
    assert file.path.read_text() == "no ticket file"


def test_a_ticket_file_that_is_a_broken_link_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ticket"
    path.symlink_to("nowhere")
    with pytest.raises(aipod.UsageError, match="broken link"):
        TicketFile(path).save(SAVED)
    assert list(tmp_path.iterdir()) == [path]


def test_a_ticket_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    file = TicketFile(tmp_path / "ticket")
    file.save(SAVED)
    with pytest.raises(TypeError):
        file.save(Saved(SAVED.ticket, 1, SPOOL, 1.0, object()))  # type: ignore[arg-type]
    assert file.load() == SAVED
    assert list(tmp_path.iterdir()) == [file.path]


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", "{}", "\xff", '{"ticket": 5}', "[" * 10_000, " " * 2**20]
    + [
        json.dumps({"ticket": "00" * 16, "epoch": 1, "spool": "s", "sent": None, "request": "r", **wrong})
        for wrong in (
            {"ticket": "0g"}, {"epoch": "1"}, {"epoch": 10**30}, {"epoch": -1}, {"epoch": True}, {"spool": None},
            {"spool": "\ud800"}, {"sent": "1"}, {"sent": 10**400}, {"sent": -1}, {"sent": float("nan")},
            {"sent": float("inf")}, {"request": 1},
        )
    ],
)  # fmt: skip
def test_what_is_no_ticket_file_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ticket"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(aipod.UsageError):
        TicketFile(path).load()
    assert path.read_bytes() == text.encode("latin1")


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_a_ticket_file_is_a_regular_file(tmp_path: Path, kind: str) -> None:
    """Mutant: a FIFO is waited for."""
    path = tmp_path / "ticket"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    for use in (TicketFile(path).load, lambda: TicketFile(path).save(SAVED)):
        with pytest.raises(aipod.UsageError, match="is no regular file, as a ticket file is; name another one"):
            use()
    TicketFile(path).remove(SAVED.ticket)
    assert list(tmp_path.iterdir()) == [path]


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


# The answer and the log


@pytest.mark.parametrize("save", [False, True])
def test_an_answer_goes_on_where_it_was(tmp_path: Path, save: bool) -> None:
    """I4. Mutants seen: a chunk of any offset is taken; an answer with another digest counts as the same."""
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


def test_log_bytes_are_neither_lost_nor_doubled() -> None:
    """Mutant seen: all that comes is taken for new."""
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


# What a client remembers


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
        link.release(Had("one", bytes([n])))
    link.release(Had("two", b"z"))
    link.release(Had("", b"nobody has said where it is"))
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
        link.release(Had("three", b"%d" % n))
    assert len(link._released) == 256
    for n in range(10):
        link.release(Had(str(n), b"last"))
    groups = list(link._take_groups())
    assert [(group[0].spool, len(group)) for group in groups] == [("three", RELEASED_PER_CALL)] * 3 + [
        ("three", 256 - 10 - 3 * RELEASED_PER_CALL), *((str(n), 1) for n in range(10)),
    ]  # fmt: skip
    assert not link._released


def test_errands_wait_for_their_turn_and_end_with_the_client() -> None:
    """Mutants: what is above so many at once is dropped, as it once was; all run at once."""

    async def main() -> tuple[int, int, int]:
        link = Link("127.0.0.1:1", aipod.Config())
        running = most = done = 0

        async def errand() -> None:
            nonlocal running, most, done
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            done += 1
            raise OSError("nobody is told")

        taken = sum(link.errand(errand) for _ in range(5000))
        await link.aclose(release_all)
        assert not link.errands
        return taken, done, most

    assert run(main) == (16 + 4096, 16 + 4096, 16)


@pytest.mark.parametrize("at_once", [False, True], ids=["aclose", "close"])
def test_errands_that_nobody_answers_do_not_hold_the_client(at_once: bool) -> None:
    """Those that wait are given up with the first ones. Mutant: each has its two seconds."""

    async def main() -> int:
        link, began = Link("127.0.0.1:1", aipod.Config()), 0

        async def errand() -> None:
            nonlocal began
            began += 1
            await asyncio.Event().wait()

        for _ in range(1000):
            link.errand(errand)
        await asyncio.sleep(0)
        if at_once:
            link.close()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        else:
            await link.aclose(release_all)
        assert not link.errands
        return began

    assert run(main) == 16
