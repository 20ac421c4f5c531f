"""Power cuts: whatever they leave of the disk, what was acknowledged is there, and nothing untrue is believed.

Every file operation of a job's story is recorded (`tests.disk`), every image that a power cut may leave after each of
them is made, and the real spool recovers on it as the next server would.

I1: an offset that was told never decreases, and the bytes below it are the client's. I3: DONE that was told stays, with
the same bytes. I4: an answer is whole and right, or absent. I2: a method that was started is not started again.

Mutants seen: no fdatasync of the payload at a checkpoint; no sync of the journal; settle without the entry's directory,
without the spool's; no sync of a result, of a long result's name; resume at the file's size instead of the offset; a
job that had not settled is believed after a reboot; a line that a killed process had not synced is told; no sync of the
spool's name; no sync of a journal that replaces another, of its name.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from aipod.codec import digest
from aipod.config import Config
from aipod.errors import Refused
from aipod.job.request import Request
from aipod.job.watched import stored_answer
from aipod.results import INLINE, settle
from aipod.service.jobs import Jobs
from aipod.service.recover import Ended, recover
from aipod.spool import Entry, Journal, Look, Spool
from aipod.versions import Versions
from tests import disk
from tests.test_request import told as request_of

PAYLOAD = os.urandom(300)
LONG = os.urandom(INLINE + 1)
KWARGS = b'{"a": 1}'
LONG_KWARGS = b'{"a": "' + b"x" * INLINE + b'"}'
REQUEST = request_of(size=len(PAYLOAD))
ID = REQUEST.job_id


@dataclasses.dataclass
class Told:
    """What the client has heard after `done` operations. `durable`: from an entry that has settled."""

    done: int
    what: str
    value: Any = None
    durable: bool = True


class Story:
    """One job on a disk that is watched, with the words of `job.run` and `job.upload`."""

    def __init__(self, path: Path) -> None:
        self.disk = disk.Disk(path)
        self.told: list[Told] = []
        self.kwargs = KWARGS
        self.spool: Spool

    def open(self) -> None:
        self.spool = Spool.open(self.disk.path, "app", reserve=0, boot="first")

    def tell(self, what: str, value: Any = None, *, durable: bool = True) -> None:
        self.disk.look()
        self.told.append(Told(len(self.disk.ops), what, value, durable))

    def begin(self, kwargs: bytes = KWARGS) -> Entry:
        self.open()
        self.kwargs = kwargs
        entry = self.spool.claim(ID, REQUEST.fields, kwargs, size=len(PAYLOAD))
        assert entry is not None
        return entry

    def write(self, entry: Entry, end: int, *, sync: bool = True) -> None:
        entry.write(PAYLOAD[entry.written : end])
        if sync:
            entry.checkpoint(now=True)
            self.tell("offset", entry.durable)

    def queue(self, entry: Entry) -> None:
        entry.seal()
        entry.record({"phase": "QUEUED", "offset": entry.written})

    def start(self, entry: Entry) -> None:
        entry.record({"phase": "RUNNING", "worker": "", "attempt": 1})
        self.tell("started")

    def store(self, entry: Entry, value: bytes, *, durable: bool = True) -> None:
        result = settle(value, payload=entry.payload, work_dir=entry.work, res=entry.result)
        fields: dict[str, Any] = {"phase": "DONE", "kind": "bytes", "answer": len(value), "digest": digest(value).hex()}
        if result.inline is not None:
            fields["inline"] = result.inline.decode("latin-1")
        entry.store(fields)
        self.tell("done", value, durable=durable)


def upload_and_run(story: Story) -> None:
    entry = story.begin()
    for end in (100, 200, 300):
        story.write(entry, end)
    story.queue(entry)
    story.start(entry)
    story.store(entry, LONG)
    entry.let_go()


def short_answer(story: Story) -> None:
    entry = story.begin(LONG_KWARGS)
    story.write(entry, 300)
    story.queue(entry)
    story.start(entry)
    story.store(entry, b"answer")
    entry.let_go()


def small_job(story: Story) -> None:
    """Nothing is synced: a power cut may take it, but must not make it another."""
    entry = story.begin()
    story.write(entry, 300, sync=False)
    story.queue(entry)
    story.start(entry)
    story.store(entry, b"answer", durable=False)
    entry.let_go()


def fast_job_with_a_long_answer(story: Story) -> None:
    entry = story.begin(LONG_KWARGS)
    story.write(entry, 300, sync=False)
    story.queue(entry)
    story.start(entry)
    story.store(entry, LONG, durable=False)
    entry.let_go()


def long_answer_that_is_settled_afterwards(story: Story) -> None:
    """It was told before; at the next tick it is safe."""
    entry = story.begin()
    story.write(entry, 300, sync=False)
    story.queue(entry)
    story.start(entry)
    story.store(entry, LONG, durable=False)
    entry.let_go()
    assert entry.settle_answer()
    story.tell("done", LONG)


def settled_at_the_first_tick_of_the_run(story: Story) -> None:
    entry = story.begin(LONG_KWARGS)
    story.write(entry, 300, sync=False)
    story.queue(entry)
    story.start(entry)
    entry.settle()
    story.store(entry, LONG)
    entry.let_go()


def settled_in_line(story: Story) -> None:
    entry = story.begin()
    story.write(entry, 300, sync=False)
    story.queue(entry)
    entry.settle()
    story.tell("queued")
    story.start(entry)
    story.store(entry, b"answer")
    entry.let_go()


def upload_of_many_connections(story: Story) -> None:
    entry = story.begin()
    story.write(entry, 100)
    story.write(entry, 150, sync=False)
    for epoch, end in ((8, 200), (9, 300)):
        entry.let_go()
        again = story.spool.take_over(ID, epoch)
        assert again is not None
        again.resume()
        story.tell("offset", again.durable)
        story.write(again, end)
        entry = again
    story.queue(entry)
    entry.let_go()


def upload_of_killed_servers(story: Story) -> None:
    """The first is killed when it has written the offset and not yet synced it."""
    entry = story.begin()
    story.write(entry, 100)
    entry.write(PAYLOAD[100:200])
    os.fdatasync(entry._fd or 0)
    Journal(entry.path / "state").append({"offset": 200})
    entry._close()
    entry._lock.release()
    again = story.spool.hold(ID)
    assert again is not None
    again.resume()
    story.tell("offset", again.durable)
    story.write(again, 300)
    again.let_go()


def answer_of_a_killed_server(story: Story) -> None:
    """It is killed when it has written DONE and not yet synced it; another one tells it."""
    entry = story.begin()
    story.write(entry, 300)
    story.queue(entry)
    story.start(entry)
    fields = {"phase": "DONE", "kind": "bytes", "answer": 6, "digest": digest(b"answer").hex(), "inline": "answer"}
    Journal(entry.path / "state").append(fields)
    entry._close()
    entry._lock.release()
    fields, _, _ = jobs(story.spool)._read(story.spool.look(ID))
    assert fields["phase"] == "DONE"
    story.tell("done", b"answer")


def run_by_the_next_server(story: Story) -> None:
    entry = story.begin()
    story.write(entry, 300)
    story.queue(entry)
    entry.let_go()
    again = story.spool.hold(ID)
    assert again is not None
    assert isinstance(recover(again, options(), True), Request)
    story.start(again)
    story.store(again, LONG)
    again.let_go()


def released(story: Story) -> None:
    upload_and_run(story)
    entry = story.spool.hold(ID)
    assert entry is not None
    story.tell("gone")
    entry.release()
    entry.destroy()


def released_and_kept(story: Story) -> None:
    """What was told to be released stays so."""
    upload_and_run(story)
    entry = story.spool.hold(ID)
    assert entry is not None
    story.tell("going")
    entry.release()
    story.tell("released")
    entry.let_go()


STORIES: list[Callable[[Story], None]] = [
    upload_and_run,
    short_answer,
    small_job,
    fast_job_with_a_long_answer,
    long_answer_that_is_settled_afterwards,
    settled_at_the_first_tick_of_the_run,
    settled_in_line,
    upload_of_many_connections,
    upload_of_killed_servers,
    answer_of_a_killed_server,
    run_by_the_next_server,
    released,
    released_and_kept,
]


@functools.cache
def options() -> dict[str, Any]:
    return {"hello": {"restartable": False, "timeout": None}}


def jobs(spool: Spool) -> Jobs:
    """What a server makes of its spool; no call is served here."""
    return Jobs(Config(), options(), spool, Versions(spool.path), None, cast(trio.Nursery, None))


class Recovery:
    """What the next server finds, and what the client hears of it."""

    def __init__(self, path: Path, story: Story, done: int) -> None:
        told = [one for one in story.told if one.done <= done]
        self.spool = Spool.open(path, "app", reserve=0, boot="second")
        self.kwargs = story.kwargs
        self.name = story.spool.id.partition("-")[0]
        self.gone = any(one.what == "gone" for one in told)
        self.going = any(one.what in ("gone", "going") for one in told)
        self.released = any(one.what == "released" for one in told)
        self.started = any(one.what == "started" for one in told)
        self.offset = max((one.value for one in told if one.what == "offset"), default=0)
        self.acknowledged = any(one.durable and one.what in ("offset", "queued", "done") for one in told)
        self.answer = next((one.value for one in told if one.what == "done" and one.durable), None)
        self.answers = [one.value for one in story.told if one.what == "done"]

    def check(self) -> None:
        if self.acknowledged:
            assert self.spool.is_named(self.name)
        look = self.spool.look(ID)
        fields, _, _ = jobs(self.spool)._read(look)
        phase = fields.get("phase", "RECEIVING") if fields else "absent"
        getattr(self, f"check_{phase.lower()}")(look, fields)

    def check_absent(self, look: Look, fields: dict[str, Any]) -> None:
        assert self.gone or not self.acknowledged
        # Whatever is there is no hindrance to who begins anew.
        entry = self.spool.claim(ID, REQUEST.fields)
        assert entry is not None
        assert entry.durable == 0
        entry.destroy()

    def check_receiving(self, look: Look, fields: dict[str, Any]) -> None:
        assert not self.started
        assert fields["print"] == REQUEST.fingerprint
        entry = self.spool.take_over(ID, 100)
        assert entry is not None
        entry.resume()
        assert self.offset <= entry.durable <= len(PAYLOAD)
        assert entry.payload.read_bytes()[: entry.durable] == PAYLOAD[: entry.durable]
        assert entry.kwargs() == self.kwargs
        # And it goes on as if nothing had been.
        entry.write(PAYLOAD[entry.durable :])
        entry.checkpoint(now=True)
        entry.seal()
        assert entry.payload.read_bytes() == PAYLOAD
        assert Journal(entry.path / "state").read()["offset"] == len(PAYLOAD)
        entry.let_go()

    def check_queued(self, look: Look, fields: dict[str, Any]) -> None:
        assert not self.started
        entry = self.spool.hold(ID)
        assert entry is not None
        request = recover(entry, options(), True)
        assert isinstance(request, Request)
        assert (request.method, entry.kwargs()) == ("hello", self.kwargs)
        assert request.kwargs == (self.kwargs if len(self.kwargs) <= INLINE else None)  # the run reads long ones
        assert entry.payload.read_bytes() == PAYLOAD
        entry.let_go()

    def check_running(self, look: Look, fields: dict[str, Any]) -> None:
        assert self.answer is None
        entry = self.spool.hold(ID)
        assert entry is not None
        assert isinstance(recover(entry, options(), True), Ended)
        entry.let_go()
        assert self.spool.look(ID).read()["reason"] == "INTERRUPTED"

    def check_done(self, look: Look, fields: dict[str, Any]) -> None:
        assert not self.released
        answer = stored_answer(fields)
        data = answer.inline if answer.inline is not None else b"".join(look.read_result(0))
        assert data in self.answers
        assert (len(data), digest(data)) == (answer.size, answer.digest)
        assert self.answer in (None, data)

    def check_released(self, look: Look, fields: dict[str, Any]) -> None:
        assert self.going
        assert fields["print"] == REQUEST.fingerprint


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is one: thousands of syncs of a real disk take minutes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as path:
        yield Path(path)


@pytest.mark.parametrize("tell", STORIES, ids=lambda story: story.__name__)
def test_whatever_a_power_cut_leaves_what_was_told_is_true(memory: Path, tell: Callable[[Story], None]) -> None:
    (memory / "spool").mkdir()
    story = Story(memory / "spool")
    with story.disk.recorded():
        tell(story)
    seen = set()
    for done in range(len(story.disk.ops) + 1):
        known = tuple(one.what for one in story.told if one.done <= done)
        for image in story.disk.images(done):
            # Lock files are empty, and who made which temporary file does not matter.
            key = hash((known, tuple(sorted(image.items()))))
            if key in seen:
                continue
            seen.add(key)
            path = memory / "image"
            path.mkdir()
            disk.make(image, path)
            try:
                Recovery(path, story, done).check()
            except (AssertionError, Refused) as exc:
                listing = {name: (len(data), data[-150:]) for name, data in image.items()}
                raise AssertionError(f"after {done} operations, {known}: {listing}") from exc
            shutil.rmtree(path)
    assert len(seen) > 50
