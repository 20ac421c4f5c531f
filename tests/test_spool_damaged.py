"""Something else than a file where one of an entry's was: a model can do that. Nothing waits for it, and it is told."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from aipod.errors import Refused
from aipod.spool import Entry, Spool
from tests.spools import TICKETED, TTL, UPLOAD_TTL, A, B, Broom, claimed, killed, left_empty, refusal, sweep

spool = pytest.fixture(left_empty)


def _listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)  # a path in an address has 108 bytes
        sock.bind(path.name)
        os.fchdir(here)
        os.close(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "link": lambda path: path.symlink_to("nowhere"),
    "socket": _listen,
}


@pytest.fixture(params=KINDS)
def put(request: pytest.FixtureRequest) -> Callable[[Entry, str], None]:
    """Puts something in the place of one of an entry's files."""

    def put(entry: Entry, name: str) -> None:
        (entry.path / name).unlink(missing_ok=True)
        KINDS[request.param](entry.path / name)

    return put


def test_a_journal_that_is_no_file_is_damaged_and_its_job_can_never_start_again(
    spool: Spool, put: Callable[[Entry, str], None]
) -> None:
    """Mutants seen: no look at what was opened; opened as if it were a file."""
    broom = Broom(spool)
    with killed(spool, A, TICKETED) as entry:
        put(entry, "state")
        assert refusal(entry.record, {"phase": "DONE"}) == "DAMAGED"
        assert refusal(entry.store, {"phase": "FAILED"}) == "DAMAGED"
        assert broom.sweep() == 0  # held
    for ask in (spool.look(A).read, lambda: spool.hold(A), lambda: spool.claim(A, TICKETED), lambda: spool.fence(A)):
        assert refusal(ask) == "DAMAGED"
        assert not spool.is_held(A)
    assert refusal(spool.take_over, A, 7) == "DAMAGED"
    assert broom.sweep() == 0
    broom.clock.now += UPLOAD_TTL - 1
    assert broom.sweep() == 0
    broom.clock.now += 1
    assert broom.sweep() == 1


def test_who_holds_a_job_without_a_journal_lets_go_of_it(spool: Spool, put: Callable[[Entry, str], None]) -> None:
    entry = claimed(spool, A, TICKETED)
    put(entry, "state")
    entry.let_go()
    assert not spool.is_held(A)
    entry = spool.hold_damaged(A) or entry
    entry.destroy()


@pytest.mark.parametrize("name", ["in", "kw", "res"])
def test_what_must_be_read_or_written_and_is_no_file_is_damaged(
    spool: Spool, put: Callable[[Entry, str], None], name: str
) -> None:
    entry = claimed(spool, A, TICKETED, b"x" * 100_000)
    entry.result.touch()
    entry.let_go()
    put(entry, name)
    look = spool.look(A)
    read = {"in": lambda: next(look.read_payload()), "kw": look.kwargs, "res": lambda: next(look.read_result(0))}[name]
    assert refusal(read) == "DAMAGED"
    again = spool.hold(A)
    assert again is not None
    if name == "in":
        assert refusal(again.resume) == "DAMAGED"
    again.destroy()


def test_what_a_job_can_do_without_is_as_if_it_were_not_there(
    spool: Spool, put: Callable[[Entry, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    entry = claimed(spool, A, TICKETED)
    for name in ("log", "live", "live.tmp", "seen", "cancel", "want-7"):
        put(entry, name)
    entry.append_log("a line")
    assert "could not be written" in caplog.text
    entry.report.note(0.5, "half")
    entry.watch()
    entry.ask(8)
    assert (entry.read_log(0, 99), entry.live(), entry.words().wanted) == (b"", {}, 8)
    entry.destroy()


def test_a_payload_or_a_journal_that_is_no_file_is_not_synced(spool: Spool) -> None:
    for job_id, name in ((A, "in"), (B, "state")):
        entry = claimed(spool, job_id, TICKETED)
        (entry.path / name).unlink()
        os.mkfifo(entry.path / name)
        with pytest.raises((OSError, Refused)):
            entry.settle()
        assert not entry.settled
        entry.destroy()


def test_a_report_that_is_no_object_is_none(spool: Spool) -> None:
    entry = claimed(spool, A)
    for text in ("5", "[1]", "null", "[" * 100_000):
        (entry.path / "live").write_text(text)
        assert entry.live() == {}
    entry.destroy()


def test_a_release_does_not_wait(spool: Spool, put: Callable[[Entry, str], None]) -> None:
    entry = claimed(spool, A, TICKETED)
    entry.store({"phase": "FAILED"})
    put(entry, "state.tmp")
    assert refusal(entry.release) == "DAMAGED"
    entry.let_go()
    assert sweep(spool) == 0
    broom = Broom(spool)
    broom.sweep()
    broom.clock.now += TTL
    assert broom.sweep() == 1
