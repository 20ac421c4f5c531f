"""A short payload that comes with its request, and what only looks like one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from aipod.codec import Compressor, digest, job_id
from aipod.job.request import Request
from aipod.job.whole import comes_whole, whole_payload
from aipod.results import INLINE
from aipod.spool import Journal, Spool, Sweeper
from aipod.wire.ai import Op, Open, Raw

FRAME = Compressor(3).frame
OPEN = Open(ticket=b"t" * 16, op=Op.RUN, epoch=1, spool="here")
REQUEST = Request(job_id(OPEN.ticket), "chaos", "v", b"{}", 3, OPEN, Raw(), {})
CHUNK = Raw(data=FRAME(b"abc"), last=True, digest=digest(b"abc"))


def payload(message: Raw, request: Request = REQUEST) -> bytes | None:
    return whole_payload(dataclasses.replace(request, first=message))


def test_what_is_whole_and_what_is_left_to_the_upload() -> None:
    """Mutants seen: each of the checks left out."""
    assert payload(CHUNK) == b"abc"
    assert payload(dataclasses.replace(CHUNK, digest=b"")) == b"abc"
    empty = dataclasses.replace(REQUEST, size=0)
    assert payload(Raw(last=True, digest=digest()), empty) == b""
    for wrong in (
        {"last": False}, {"offset": 1}, {"sync": True}, {"digest": digest(b"abd")}, {"digest": b"x"},
        {"data": FRAME(b"ab")}, {"data": b"abc"}, {"data": CHUNK.data + b"x"}, {"data": b""},
    ):  # fmt: skip
        assert payload(dataclasses.replace(CHUNK, **wrong)) is None, wrong
    longer = FRAME(bytes(INLINE + 1))
    assert payload(Raw(data=longer, last=True), dataclasses.replace(REQUEST, size=INLINE + 1)) is None


@pytest.mark.parametrize("wrong", [{"size": None}, {"size": INLINE + 1}, {"kwargs": None}, {"open": None}])
def test_whose_payload_is_waited_for(wrong: dict[str, object]) -> None:
    """Mutants seen: a RESUME creates; who waits to hear which spool it is is waited for."""
    assert comes_whole(REQUEST)
    assert not comes_whole(dataclasses.replace(REQUEST, **wrong))
    for other in ({"op": Op.RESUME}, {"spool": ""}):
        assert not comes_whole(dataclasses.replace(REQUEST, open=dataclasses.replace(OPEN, **other)))


def test_a_whole_job_is_in_line_with_the_first_line_of_its_journal(tmp_path: Path) -> None:
    """A kill between two steps leaves nothing or all of it. Mutants seen: the line comes first; without its phase."""
    spool = Spool.open(tmp_path / "spool", "app", reserve=0)
    entry = spool.claim(REQUEST.job_id, REQUEST.fields, b"{}", size=3, payload=b"abc")
    assert entry is not None
    (line,) = (entry.path / "state").read_bytes().splitlines()
    told = json.loads(line.partition(b" ")[2])
    assert (told["phase"], told["offset"], told["print"]) == ("QUEUED", 3, "")
    assert entry.payload.read_bytes() == b"abc"
    assert entry.payload.stat().st_mode & 0o777 == 0o400
    entry.let_go()
    again = spool.hold(REQUEST.job_id)
    assert again is not None
    assert again.written == 3
    assert not again.resume()
    again.destroy()


def test_what_a_short_release_leaves_is_told_to_nobody_and_forgotten_by_a_sweep(tmp_path: Path) -> None:
    """Where the process that would have removed the entry has died. Mutants seen: it is told; it stays."""
    spool = Spool.open(tmp_path / "spool", "app", reserve=0)
    entry = spool.claim(REQUEST.job_id, {**REQUEST.fields, "metadata": {"x": "secret"}}, b'{"a": "secret"}')
    assert entry is not None
    entry.append_log("secret")
    entry.store({"phase": "DONE", "kind": "json", "answer": 8, "digest": "0" * 32, "inline": "secret"})
    entry.release_short()
    entry.let_go()
    look = spool.look(REQUEST.job_id)
    assert "secret" not in str(look.read())
    assert look.read()["phase"] == "RELEASED"
    assert look.read_log(0, 100) == b""
    assert b"secret" in (look.path / "state").read_bytes()
    assert sum(Sweeper(spool, upload_ttl=3600, ttl=86400).sweep()) == 0
    assert b"secret" not in (look.path / "state").read_bytes()
    assert Journal(look.path / "state").read()["phase"] == "RELEASED"
