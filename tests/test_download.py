"""A download goes on where a killed caller was: the part file beside the answer, and what is not one."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aipod
from aipod.client import Event
from aipod.client.call import Attempt
from aipod.client.course import Course, Request, Until
from aipod.client.link import Link
from aipod.client.part import Part
from aipod.client.ticket import TicketFile
from aipod.codec import digest, job_id
from aipod.config import GIB, MIB
from tests.conftest import ROOT, Served, left_in, run
from tests.proxy import Fault, Proxy, open_proxy

MODEL = "tests.models_faults:Counted"
ANSWER = random.Random(0).randbytes(20_000_000)
SEEDED = [("x-func-name", "seeded")]
# Where the first three connections of a caller that is to be killed are cut: before the answer's end, all together.
CUT = 6_000_000
# Bytes that it has written then: what was on the way is lost with a connection.
WRITTEN = 4 * MIB
# Headers, heartbeats and frames of a whole download.
OVERHEAD = 100_000

CALLER = """
import asyncio, sys, aipod
address, ticket, out = sys.argv[1:]
async def main():
    async with aipod.Client(address) as client:
        await client.chaos(
            metadata=[("x-func-name", "seeded")], length=20_000_000, ticket_file=ticket, save_to=out
        )
asyncio.run(main())
"""

# Writes down what is synced, and whether there is a ticket file then.
NOTING = """
import os, sys
noted, ticket, *sys.argv[1:] = sys.argv[1:]
fsync = os.fsync
def noting(fd):
    fsync(fd)
    with open(noted, "a") as file:
        print(os.path.realpath(f"/proc/self/fd/{fd}"), os.path.exists(ticket), file=file)
os.fsync = noting
"""
COMMAND = """
import aipod.__main__
aipod.__main__.main()
"""
SAVER = """
import asyncio, sys, aipod
address, ticket, out = sys.argv[1:]
async def main():
    async with aipod.Client(address) as client:
        job = await client.submit("seeded", ticket_file=ticket, length=20_000_000)
        await job.save(out)
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(MODEL, tmp_path_factory.mktemp("server"), ("--tick", "0.1", "--instances", "2"), "127.0.0.1:0")
    yield served
    assert served.stop() == 0, served.log_text()
    assert left_in(served.spool) == []


class Download:
    """One job, its ticket file, and the directory that its answer goes to."""

    def __init__(self, directory: Path, way: str) -> None:
        self.way = way
        self.ticket, self.home = directory / "ticket", directory / "home"
        self.home.mkdir()
        self.out = self.home / "answer"

    @property
    def id(self) -> str:
        saved = TicketFile(self.ticket).load()
        assert saved is not None
        return job_id(saved.ticket)

    @property
    def part(self) -> Path:
        return self.home / f".answer.{self.id}.part"

    @property
    def written(self) -> bool:
        return any(path.stat().st_size >= WRITTEN for path in self.home.iterdir())

    def command(self, address: str) -> list[str]:
        if self.way == "predict":
            return [sys.executable, "-c", CALLER, address, str(self.ticket), str(self.out)]
        words = {
            "call": ["call", "seeded", "-k", "length=20000000", "--ticket", str(self.ticket)],
            "attach": ["attach", str(self.ticket)],
        }[self.way]
        return [sys.executable, "-m", "aipod", *words, "--to", address, "-o", str(self.out)]

    async def submit(self, served: Served) -> None:
        """For `attach`: a job of another process's."""
        async with aipod.Client(served.address) as client:
            job = await client.submit("seeded", ticket_file=self.ticket, length=len(ANSWER))
            await job.wait(save_to=os.devnull, keep=True)

    async def stop(self, served: Served, number: signal.Signals = signal.SIGKILL) -> int:
        """End a caller in the middle of the download; the bytes that it has left."""
        if self.way == "attach":
            await self.submit(served)
        async with open_proxy(served.port, *[Fault(cut_down=CUT)] * 3) as proxy:
            process = subprocess.Popen(self.command(proxy.address), cwd=ROOT, stderr=subprocess.DEVNULL)
            async with asyncio.timeout(30):
                while not self.written:
                    await asyncio.sleep(0.01)
            process.send_signal(number)
            await asyncio.to_thread(process.wait, 30)
        return self.part.stat().st_size

    async def again(self, served: Served, *faults: Fault) -> tuple[int, Proxy]:
        """The same command; bytes that came down in its last connection."""
        async with open_proxy(served.port, *faults) as proxy:
            process = subprocess.Popen(self.command(proxy.address), cwd=ROOT, stderr=subprocess.DEVNULL)
            assert await asyncio.to_thread(process.wait, 60) == 0
            return proxy.down, proxy

    def check(self) -> None:
        assert self.out.read_bytes() == ANSWER
        assert list(self.home.iterdir()) == [self.out]
        assert self.ticket.exists() is (self.way == "attach")


WAYS = ("predict", "call", "attach")


@pytest.fixture(params=WAYS)
def download(request: pytest.FixtureRequest, tmp_path: Path) -> Download:
    return Download(tmp_path, request.param)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_the_same_call_goes_on_with_what_was_written(
    served: Served, download: Download, number: signal.Signals
) -> None:
    """Mutants seen: a part without the job's name; `have = 0` in the first attempt; a part that goes with its caller;
    an answer that stays 0600."""

    async def main() -> None:
        size = await download.stop(served, number)
        assert size >= WRITTEN
        assert [path.name for path in download.home.iterdir()] == [f".answer.{download.id}.part"]
        assert stat.S_IMODE(download.part.stat().st_mode) == 0o600
        down, proxy = await download.again(served)
        assert proxy.connections == 1
        assert len(ANSWER) - size <= down <= len(ANSWER) - size + OVERHEAD

    run(main)
    download.check()
    (download.home / "other").touch()
    assert download.out.stat().st_mode == (download.home / "other").stat().st_mode, "not 0600"


@pytest.mark.parametrize("wrong", ["damaged", "longer", "whole", "longer than whole"])
def test_what_was_written_is_checked_as_the_rest(served: Served, tmp_path: Path, wrong: str) -> None:
    """What is not of this answer comes again from byte 0, once. Mutant seen: a part whose bytes are not hashed."""
    download = Download(tmp_path, "predict")

    async def main() -> None:
        await download.stop(served)
        data = bytearray(download.part.read_bytes())
        if wrong == "damaged":
            data[1_000_000] ^= 1
        elif wrong == "longer":  # not with the answer's bytes: of a write that a power cut has torn, say
            data += bytes(100_000)
        else:
            data = bytearray(ANSWER + b"x" * (wrong != "whole"))
        download.part.write_bytes(data)
        down, proxy = await download.again(served)
        assert proxy.connections == 1
        comes = len(ANSWER) - len(data) if wrong != "longer than whole" else 0
        comes += 0 if wrong == "whole" else len(ANSWER)
        assert comes <= down <= comes + 2 * OVERHEAD

    run(main)
    download.check()


def test_an_answer_that_is_damaged_each_time_is_given_up(served: Served, tmp_path: Path) -> None:
    """And nothing is left of it, though the job can be asked for again."""
    download = Download(tmp_path, "attach")

    async def main() -> None:
        await download.submit(served)
        ticket = json.loads(download.ticket.read_text())["ticket"]
        download.part.write_bytes(bytes(100))
        download.part.chmod(0o600)
        async with open_proxy(served.port, Fault(flip_down=12_000_000), Fault(flip_down=12_000_000)) as proxy:
            async with aipod.Client(proxy.address) as client:
                job = client.attach(ticket)
                with pytest.raises(aipod.AipodError) as caught:
                    await job.wait(save_to=download.out)
                assert caught.value.reason == "BAD_ANSWER"
                assert list(download.home.iterdir()) == []
                assert await job.wait(save_to=download.out) == download.out

    run(main)
    download.check()


@pytest.mark.parametrize("by", ["submit", "call"])
def test_without_a_ticket_file_nothing_is_left(served: Served, tmp_path: Path, by: str) -> None:
    async def main() -> None:
        async with open_proxy(served.port, Fault(cut_down=CUT)) as proxy, aipod.Client(proxy.address) as client:
            here = asyncio.Event()

            def note(event: Event) -> None:
                if event.received >= 5 * MIB:
                    proxy.hold()
                    here.set()

            options: dict[str, Any] = {"save_to": tmp_path / "answer", "on_event": note}
            if by == "submit":
                call = (await client.submit("seeded", length=len(ANSWER))).wait(**options)
            else:
                call = client.chaos(metadata=SEEDED, length=len(ANSWER), **options)
            task = asyncio.create_task(call)
            await here.wait()
            (part,) = tmp_path.iterdir()
            assert part.stat().st_size >= 4 * MIB
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert list(tmp_path.iterdir()) == []

    run(main)


def test_an_answer_that_was_released_meanwhile_leaves_no_part(served: Served, download: Download) -> None:
    async def main() -> None:
        await download.stop(served)
        async with aipod.Client(served.address) as client:
            await client.attach(json.loads(download.ticket.read_text())["ticket"]).release()
        process = subprocess.Popen(download.command(served.address), cwd=ROOT, stderr=subprocess.DEVNULL)
        assert await asyncio.to_thread(process.wait, 60) == 1

    run(main)
    assert list(download.home.iterdir()) == []


def test_two_at_once_do_not_write_one_part(served: Served, tmp_path: Path) -> None:
    """The second has one of its own, from byte 0. Mutant seen: without the lock both write the same file."""
    download = Download(tmp_path, "attach")

    async def main() -> None:
        await download.stop(served)
        size = download.part.stat().st_size
        async with open_proxy(served.port) as slow, open_proxy(served.port) as fast:
            async with aipod.Client(slow.address) as one, aipod.Client(fast.address) as other:
                ticket = json.loads(download.ticket.read_text())["ticket"]
                slow.hold_down()
                first = asyncio.create_task(one.attach(ticket).wait(save_to=download.out))
                async with asyncio.timeout(10):
                    while not slow.up:  # it has the lock, and has told what it has
                        await asyncio.sleep(0.01)
                assert await other.attach(ticket).wait(save_to=download.out) == download.out
                assert download.out.read_bytes() == ANSWER
                download.out.unlink()
                slow.let_down()
                assert await first == download.out
                assert fast.down >= len(ANSWER)
                assert slow.down <= len(ANSWER) - size + OVERHEAD

    run(main)
    download.check()


@pytest.mark.parametrize("until", Until)
def test_a_call_that_only_watches_asks_for_nothing_of_the_answer(until: Until) -> None:
    """Else as much of it as a window holds comes beside the download. Mutant seen: `have = 0`."""

    async def main() -> int:
        link = Link("127.0.0.1:1", aipod.Config())
        return Attempt(link, Request("chaos", until=until), Course())._make_opening().have

    assert run(main) == (0 if until is Until.ANSWER else 2**64 - 1)


# --- the file itself

ID = "0123456789abcdef" * 2


def left(directory: Path, data: bytes, *, target: str = "answer") -> Path:
    """The part that a killed process has left."""
    part = Part(directory / target, ID)
    part.find()
    part.write(data)
    part.leave()
    return directory / f".{target}.{ID}.part"


def test_a_part_is_found_again_and_becomes_the_answer(tmp_path: Path) -> None:
    path = left(tmp_path, b"first ")
    part = Part(tmp_path / "answer", ID)
    part.find()
    assert (part.size, part.hasher.digest()) == (6, digest(b"first "))
    part.write(b"second")
    assert path.read_bytes() == b"first second"
    assert part.deliver()
    part.leave()
    part.remove()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("answer", b"first second")]


@pytest.mark.parametrize("what", ["link", "dangling link", "hard link", "fifo", "directory", "readable", "locked"])
def test_what_is_not_ours_alone_is_not_touched(tmp_path: Path, what: str) -> None:
    """Mutants seen: without O_NOFOLLOW, the count of links, the mode, the kind, the lock."""
    path = tmp_path / f".answer.{ID}.part"
    other = tmp_path / "other"
    other.write_bytes(b"other")
    other.chmod(0o644 if what == "readable" else 0o600)
    holder = None
    if what == "link":
        path.symlink_to(other)
    elif what == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif what == "hard link":
        path.hardlink_to(other)
    elif what == "fifo":
        os.mkfifo(path, 0o600)
    elif what == "directory":
        path.mkdir()
    else:
        other.rename(path)
        holder = path.open()
        if what == "locked":
            fcntl.flock(holder, fcntl.LOCK_EX)
    before = path.lstat()
    part = Part(tmp_path / "answer", ID)
    part.find()
    assert part.size == 0
    part.write(b"answer")
    assert part.deliver()
    assert (tmp_path / "answer").read_bytes() == b"answer"
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)
    assert what in ("fifo", "directory", "dangling link") or path.read_bytes() == b"other"
    assert len(list(tmp_path.iterdir())) == 2 + other.exists(), "nothing else was made, not by way of a link either"
    if holder is not None:
        holder.close()


def test_a_part_that_its_writer_delivers_meanwhile_is_not_taken_for_one(tmp_path: Path) -> None:
    """Who has opened it before and locks it afterwards has the answer in hand. Mutant seen: without the second look."""
    left(tmp_path, b"answer")
    first, second = Part(tmp_path / "answer", ID), Part(tmp_path / "answer", ID)
    first.find()
    todo = [first.deliver]

    def between(event: str, _: tuple[object, ...]) -> None:
        if event == "fcntl.flock" and todo:
            todo.pop()()

    sys.addaudithook(between)  # which is called before the lock is asked for; for good, but it has one thing to do
    umask = os.umask(0o077)  # else the answer's permissions would tell
    try:
        second.find()
    finally:
        os.umask(umask)
    assert not todo
    assert (second.size, (tmp_path / "answer").read_bytes()) == (0, b"answer")
    second.write(b"x")
    assert (tmp_path / "answer").read_bytes() == b"answer"
    second.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["answer"]


def test_a_part_that_nobody_looks_for_goes_with_its_process(tmp_path: Path) -> None:
    """Mutant seen: one beside the part of another process stays."""
    first, second, nameless = Part(tmp_path / "answer", ID), Part(tmp_path / "answer", ID), Part(tmp_path / "answer")
    for part in (first, second, nameless):
        part.write(b"answer")
    assert len(list(tmp_path.iterdir())) == 3
    for part in (second, nameless, first):
        part.leave()
    assert [path.name for path in tmp_path.iterdir()] == [f".answer.{ID}.part"]


def test_who_reads_what_was_left_stops_when_its_caller_goes(tmp_path: Path) -> None:
    """Else Ctrl-C waits for all of it. Mutant seen: a `find` that looks at nothing but the file."""
    path = left(tmp_path, b"answer")
    os.truncate(path, 64 * GIB)  # it has holes
    part = Part(tmp_path / "answer", ID)
    reading = threading.Thread(target=part.find)
    reading.start()
    while not part.size:
        reading.join(0.001)
    part.leave()
    reading.join()
    assert 0 < part.size < 64 * GIB
    assert path.stat().st_size == 64 * GIB


def test_a_long_name_has_a_part_too(tmp_path: Path) -> None:
    name = "ü" * 127
    assert left(tmp_path, b"answer", target=name[:50]).exists()
    part = Part(tmp_path / name, ID)
    part.find()
    assert part.size == 6
    assert part.deliver()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_part_beside_a_file_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    """A later call may name another file, or this one when the directory is gone."""
    part = Part(tmp_path / "answer", ID)
    part.write(b"answer")
    (tmp_path / "answer").mkdir()
    (tmp_path / "answer" / "in the way").touch()
    with pytest.raises(OSError, match="answer"):
        part.deliver()
    part.leave()
    path = tmp_path / f".answer.{ID}.part"
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"answer", 0o600)


@pytest.mark.parametrize("way", ["predict", "call", "save", "pipe"])
def test_a_saved_answer_is_on_the_disk_before_the_ticket_file_goes(served: Served, tmp_path: Path, way: str) -> None:
    """A power cut would else take both. Mutants seen, of each way: no sync; the ticket file goes first.

    What goes to a pipe is no file's.
    """
    job, noted = Download(tmp_path, way), tmp_path / "noted"
    words = [served.address, str(job.ticket), str(job.out)]
    script = {"predict": CALLER, "save": SAVER}.get(way, COMMAND)
    if script is COMMAND:
        words = ["call", "seeded", "-k", "length=20000000", "--ticket", str(job.ticket), "--to", served.address]
        words += ["-o", str(job.out)] if way == "call" else []
    command = [sys.executable, "-c", NOTING + script, str(noted), str(job.ticket), *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=60, check=True)
    assert not job.ticket.exists()
    lines = [line.split() for line in noted.read_text().splitlines()]
    of_answer = [line for line in lines if line[0] in (str(job.out), str(job.home))]
    if way == "pipe":
        assert (done.stdout == ANSWER, of_answer) == (True, [])
        assert all("aipod-" not in name for name, _ in lines)
    else:
        job.check()
        assert of_answer == [[str(job.out), "True"], [str(job.home), "True"]]
