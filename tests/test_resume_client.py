"""A job survives anything: wire, server, caller. Each answer is right, and comes from one run of the method."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from grpclib.metadata import Deadline

import aipod
from aipod.client import Event
from aipod.client.course import Course, Request
from aipod.client.follow import Follower
from aipod.config import CHUNK, MIB
from aipod.wire.ai import Op
from tests.conftest import ROOT, Serve, Served, free_port, left_in, run
from tests.proxy import Fault, Proxy, open_proxy

MODEL = "tests.models_faults:Counted"
PAYLOAD = os.urandom(13_000_000)
ANSWER = {"size": len(PAYLOAD), "sha256": hashlib.sha256(PAYLOAD).hexdigest()}
SMALL = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(MODEL, tmp_path_factory.mktemp("server"), ("--tick", "0.1", "--instances", "4"), "127.0.0.1:0")
    yield served
    assert served.stop() == 0, served.log_text()
    assert left_in(served.spool) == []


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    path = tmp_path / "payload"
    path.write_bytes(PAYLOAD)
    return path


class Gate:
    """The two files of a gated run."""

    def __init__(self, directory: Path, name: str = "") -> None:
        self.mark, self.gate = directory / f"mark{name}", directory / f"gate{name}"

    @property
    def kwargs(self) -> dict[str, str]:
        return {"mark": str(self.mark), "gate": str(self.gate)}

    @property
    def runs(self) -> int:
        return self.mark.read_text().count("run") if self.mark.exists() else 0


class Feed:
    """A payload that goes on until a part of it is durable at the server, pauses until `go`, and ends."""

    def __init__(self) -> None:
        self.durable, self.go = asyncio.Event(), asyncio.Event()
        self._sent = bytearray()

    def note(self, event: Event) -> None:
        if event.offset:
            self.durable.set()

    async def pieces(self) -> AsyncIterator[bytes]:
        while not self.durable.is_set():
            self._sent += (piece := os.urandom(100_000))
            yield piece
            await asyncio.sleep(0.01)
        await self.go.wait()
        self._sent += (piece := os.urandom(5_000_000))
        yield piece

    @property
    def answer(self) -> dict[str, Any]:
        return {"size": len(self._sent), "sha256": hashlib.sha256(self._sent).hexdigest()}


GATED = [("x-func-name", "gated")]


async def until(condition: Callable[[], Any], *, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def runs(mark: Path) -> int:
    return mark.read_text().count("run") if mark.exists() else 0


# --- the wire


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_cut_behind_any_frame_is_not_noticed(served: Served, tmp_path: Path, direction: str) -> None:
    """I5. One call for each frame of a whole one, each cut behind another frame. Mutant: no retry after `last`."""
    data = random.Random(1).randbytes(1_500_000)
    expected = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (tmp_path / "payload").write_bytes(data)

    async def call(frame: int) -> bool:
        """Whether there was so many frames that one was cut."""
        mark = tmp_path / f"mark{direction}{frame}"
        fault = Fault(frames_up=frame) if direction == "up" else Fault(frames_down=frame)
        async with open_proxy(served.port, fault) as proxy, aipod.Client(proxy.address) as client:
            assert await client.chaos(tmp_path / "payload", mark=str(mark)) == expected, frame
            assert runs(mark) == 1, frame
            return proxy.cuts > 0

    async def main() -> int:
        frame = 1
        while True:
            async with asyncio.TaskGroup() as group:
                calls = [group.create_task(call(number)) for number in range(frame, frame + 6)]
            if not all(task.result() for task in calls):
                return frame
            frame += 6

    assert run(main) > 6


def kinds(path: Path) -> dict[str, Callable[[], Any]]:
    def pieces() -> Iterator[bytes]:
        for start in range(0, len(PAYLOAD), 100_000):
            yield PAYLOAD[start : start + 100_000]

    async def apieces() -> AsyncIterator[bytes]:
        for piece in pieces():
            yield piece

    class Once:
        def __init__(self) -> None:
            self._file = io.BytesIO(PAYLOAD)

        def read(self, size: int) -> bytes:
            return self._file.read(size)

    return {
        "path": lambda: path,
        "file": lambda: io.BytesIO(PAYLOAD),
        "iterator": pieces,
        "async iterator": apieces,
        "stream": Once,
    }


@pytest.mark.parametrize("kind", ["path", "file", "iterator", "async iterator", "stream"])
def test_an_upload_goes_on_where_it_is_durable(served: Served, payload: Path, tmp_path: Path, kind: str) -> None:
    """Cut twice: nothing that was told to be durable is sent again. Mutant: `start = 0` in every attempt."""
    mark = tmp_path / "mark"
    events: list[Event] = []

    async def main() -> int:
        faults = [Fault(stall_up=4_000_000), Fault(stall_up=4_000_000)]
        async with open_proxy(served.port, *faults) as proxy, aipod.Client(proxy.address) as client:

            def note(event: Event) -> None:
                if proxy.connections < 3 and events and event.offset > max(one.offset for one in events):
                    proxy.cut()
                events.append(event)

            answer = await client.chaos(kinds(payload)[kind](), mark=str(mark), on_event=note)
            assert answer == ANSWER
            assert proxy.connections == 3
            return proxy.total_up

    sent = run(main)
    assert runs(mark) == 1
    durable = [event.offset for event in events]
    assert durable == sorted(durable)
    resumed, connecting = [], False
    for event in events:
        if connecting and event.phase == "RECEIVING":
            resumed.append(event.offset)
        connecting = event.phase == "CONNECTING" if event.phase != "WAITING" else False
    assert len(resumed) == 3, "the first states of three connections"
    assert 0 == resumed[0] < resumed[1] < resumed[2]
    again = (4_000_000 - resumed[1]) + (resumed[1] + 4_000_000 - resumed[2])
    assert sent <= len(PAYLOAD) + again + 100_000


@pytest.mark.parametrize("cut", [700, 300_000, 1_500_000, 3_000_000])
@pytest.mark.parametrize("save", [False, True])
def test_a_download_goes_on_at_the_byte_that_is_here(served: Served, tmp_path: Path, cut: int, save: bool) -> None:
    """Mutant: `have = 0` in every attempt sends more than the answer and a window."""
    received: list[int] = []

    async def main() -> Any:
        async with open_proxy(served.port, Fault(cut_down=cut)) as proxy, aipod.Client(proxy.address) as client:
            answer = await client.chaos(
                metadata=[("x-func-name", "seeded")],
                length=4_000_000,
                save_to=tmp_path / "answer" if save else None,
                on_event=lambda event: received.append(event.received),
            )
            assert proxy.connections == 2
            return answer.read_bytes() if save else answer, proxy.down

    answer, down = run(main)
    assert answer == random.Random(0).randbytes(4_000_000)
    assert received == sorted(received)
    assert down <= 4_000_000 - cut // MIB * MIB + 100_000
    assert not list(tmp_path.glob(".*"))


def test_a_cut_while_the_method_runs_is_not_noticed_and_no_log_is_lost_or_doubled(
    served: Served, tmp_path: Path
) -> None:
    """Mutant: `log_have = 0` in every attempt doubles the log."""
    gate = Gate(tmp_path)
    log: list[str] = []
    phases: list[str] = []

    def note(event: Event) -> None:
        log.append(event.log)
        if phases[-1:] != [event.phase]:
            phases.append(event.phase)

    async def main() -> Any:
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address) as client:
            call = asyncio.create_task(client.chaos(b"x", metadata=GATED, lines=50, **gate.kwargs, on_event=note))
            await until(lambda: "line 49" in "".join(log))
            for _ in range(3):
                phases.clear()
                proxy.cut()
                await until(lambda: "CONNECTING" in phases and phases[-1] == "RUNNING")
            gate.gate.touch()
            return await call

    assert run(main) == SMALL
    assert gate.runs == 1
    lines = "".join(log).split()
    assert lines == " ".join([*(f"line {number} grüße" for number in range(50)), "the end"]).split()


@pytest.mark.parametrize("phase", ["RECEIVING", "RUNNING"])
def test_a_silent_connection_is_replaced(served: Served, tmp_path: Path, phase: str) -> None:
    """I6. The old one is open and says nothing. Mutant: without `retire` the next attempt takes it again."""
    gate = Gate(tmp_path)

    async def main() -> None:
        feed = Feed()
        feed.go.set() if phase == "RUNNING" else None
        async with open_proxy(served.port) as proxy:
            async with aipod.Client(proxy.address, config=aipod.Config(silence=0.5)) as client:

                def freeze(event: Event) -> None:
                    feed.note(event)
                    if event.phase == phase and not gate.gate.exists() and feed.durable.is_set():
                        proxy.freeze()
                        feed.go.set()
                        gate.gate.touch()

                answer = await client.chaos(feed.pieces(), metadata=GATED, **gate.kwargs, on_event=freeze)
                assert answer == feed.answer
                assert proxy.connections == 2

    run(main)
    assert gate.runs == 1


# --- small jobs


def test_a_small_job_waits_for_nothing_once_the_spool_is_known(served: Served, tmp_path: Path) -> None:
    """Nothing comes down, and the method runs. Mutant: `last` that waits for the first state never arrives."""
    mark = tmp_path / "mark"

    async def main() -> Any:
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address) as client:
            assert await client.chaos(b"x") == SMALL
            proxy.hold_down()
            for data in (b"", b"x"):
                mark.unlink(missing_ok=True)
                call = asyncio.create_task(client.chaos(data, mark=str(mark)))
                await until(mark.exists)
                proxy.let_down()
                answer = await call
                proxy.hold_down()
            proxy.let_down()
            return answer

    assert run(main) == SMALL


@pytest.mark.parametrize("payload", [b"x", PAYLOAD], ids=["small", "large"])
def test_an_idle_connection_that_died_is_not_noticed(served: Served, tmp_path: Path, payload: bytes) -> None:
    """`last` may have been sent: the server says that the job was not started, and it is run under a new ticket."""
    mark = tmp_path / "mark"
    phases: list[str] = []

    async def main() -> Any:
        async with open_proxy(served.port) as proxy:
            async with aipod.Client(proxy.address, config=aipod.Config(attempts=1)) as client:
                assert await client.chaos(b"x") == SMALL
                proxy.trap()
                path = tmp_path / "payload"
                path.write_bytes(payload)
                return await client.chaos(path, mark=str(mark), on_event=lambda event: phases.append(event.phase))

    assert run(main)["size"] == len(payload)
    assert runs(mark) == 1


def test_small_answers_are_released_with_the_next_call_and_large_ones_at_once(served: Served, tmp_path: Path) -> None:
    """`RELEASED` is what a second look at the ticket finds."""

    async def main() -> list[str]:
        reasons = []
        async with aipod.Client(served.address) as client:
            for length in (10, 200_000):
                job = await client.submit("seeded", length=length)
                same = client.attach(str(job))
                assert await same.wait() == random.Random(0).randbytes(length)
                assert await job.wait() == random.Random(0).randbytes(length), "a handle's answer stays"
                await job.release()
                with pytest.raises(aipod.JobFailed) as caught:
                    await job.wait()
                reasons.append(caught.value.reason)
            ticket = tmp_path / "ticket"
            small: list[str] = []

            def note(event: Event) -> None:
                if event.phase == "DONE" and not small:
                    small.append(json.loads(ticket.read_text())["ticket"])

            await client.chaos(b"x", ticket_file=ticket, on_event=note)
            assert not ticket.exists()
            async with aipod.Client(served.address) as other:  # the next call of `client` takes the word along
                assert await other.attach(small[0]).wait() == SMALL
            await client.chaos(b"x")

            async def released() -> str:
                while True:
                    try:
                        await client.attach(small[0]).wait()
                    except aipod.JobFailed as exc:
                        return exc.reason
                    await asyncio.sleep(0.02)

            async with asyncio.timeout(10):
                reasons.append(await released())
        return reasons

    assert run(main) == ["RELEASED"] * 3


# --- handles


def test_a_submitted_job_goes_on_and_is_found_by_its_ticket(served: Served, payload: Path, tmp_path: Path) -> None:
    """In this process, after its client was closed, and in another one."""
    gate = Gate(tmp_path)

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            job = await client.submit("gated", payload, **gate.kwargs)
            assert job.id == hashlib.sha256(job.ticket).hexdigest()[:32]
            with pytest.raises(TimeoutError):
                await job.wait(timeout=0.2)
            waiting = asyncio.create_task(job.wait())
            await asyncio.sleep(0.1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        code = (
            "import asyncio, sys, aipod\n"
            "async def main():\n"
            "    async with aipod.Client(sys.argv[1]) as client:\n"
            "        print(await client.attach(sys.argv[2]).wait())\n"
            "asyncio.run(main())\n"
        )
        command = [sys.executable, "-c", code, served.address, str(job)]
        other = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd=ROOT)
        async with aipod.Client(served.address) as client:
            same = client.attach(job.ticket)
            saving = asyncio.create_task(same.save(tmp_path / "answer"))
            gate.gate.touch()
            assert json.loads((await saving).read_text()) == ANSWER
            assert await same.wait() == ANSWER
        out, _ = await other.communicate()
        assert out.decode().strip() == str(ANSWER)

    run(main)
    assert gate.runs == 1


def test_events_of_a_job(served: Served, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def main() -> list[Event]:
        events = []
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address) as client:
            job = await client.submit("gated", b"x", lines=3, **gate.kwargs)
            async with contextlib.aclosing(job.events()) as stream:
                async for event in stream:
                    events.append(event)
                    if "line 2" in event.log:
                        proxy.cut()
                        gate.gate.touch()
            assert await job.wait() == SMALL
        return events

    events = run(main)
    assert "".join(event.log for event in events) == "line 0 grüße\nline 1 grüße\nline 2 grüße\nthe end\n"
    assert {"CONNECTING", "RUNNING"} <= {event.phase for event in events}
    assert (events[-1].phase, events[-1].runs) == ("DONE", 1)


def test_events_can_be_left_early(served: Served, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def main() -> Any:
        async with aipod.Client(served.address) as client:
            job = await client.submit("gated", b"x", **gate.kwargs)
            async with contextlib.aclosing(job.events()) as stream:
                async for event in stream:
                    if event.phase == "RUNNING":
                        break
            gate.gate.touch()
            return await job.wait()

    assert run(main) == SMALL


def test_cancel_and_what_is_said_afterwards(served: Served, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def main() -> list[str]:
        reasons = []
        async with aipod.Client(served.address) as client:
            job = await client.submit("gated", b"x", **gate.kwargs)
            await until(gate.mark.exists)
            await job.cancel()
            for _ in range(2):
                with pytest.raises(aipod.JobCancelled) as caught:
                    await job.wait()
                reasons.append(caught.value.reason)
            await job.cancel()
            for act in (client.attach(b"x" * 16).wait, client.attach(b"x" * 16).cancel):
                with pytest.raises(aipod.Refused) as refused:
                    await act()
                reasons.append(refused.value.reason)
        return reasons

    assert run(main) == ["CANCELLED", "CANCELLED", "NOT_FOUND", "NOT_FOUND"]


def test_leaving_an_awaited_call_cancels_its_job_at_once(served: Served, tmp_path: Path) -> None:
    """The caller does not wait for it: the word goes on behind its back, and leaving the client waits for that."""
    gate = Gate(tmp_path)

    async def main() -> float:
        async with aipod.Client(served.address) as client:
            call = asyncio.create_task(client.chaos(b"x", metadata=GATED, **gate.kwargs))
            await until(gate.mark.exists)
            began = time.monotonic()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            return time.monotonic() - began

    assert run(main) < 0.5
    run(lambda: until(lambda: all(name.startswith("workers/") for name in left_in(served.spool)), seconds=10))


# --- the server


def test_a_time_that_is_over_when_a_connection_begins_is_no_lost_connection(served: Served) -> None:
    """The call's own timer may be a moment later than the one that grpclib looks at."""

    async def main() -> None:
        async with aipod.Client(served.address, config=aipod.Config(attempts=1)) as client:
            request = Request("chaos", GATED, deadline=Deadline.from_timeout(0.0))
            await Follower(client._link, request, Course(op=Op.ATTACH, fresh=False)).run()

    with pytest.raises(aipod.JobCancelled) as caught:
        run(main)
    assert caught.value.reason == "DEADLINE_EXCEEDED"


def test_a_server_that_is_drained_during_an_upload_is_not_sent_again_what_it_has(serve: Serve, tmp_path: Path) -> None:
    """Mutant seen: a refusal with RetryInfo makes the ticket a fresh one, and the next connection starts at 0."""
    port = free_port()
    first = serve(MODEL, "--tick", "0.1", "--drain", "0", bind=f"127.0.0.1:{port}")
    gate, feed = Gate(tmp_path), Feed()
    gate.gate.touch()
    events: list[Event] = []

    def note(event: Event) -> None:
        feed.note(event)
        events.append(event)

    async def main() -> None:
        async with aipod.Client(f"127.0.0.1:{port}") as client:
            job = asyncio.create_task(client.chaos(feed.pieces(), metadata=GATED, **gate.kwargs, on_event=note))
            await feed.durable.wait()
            assert await asyncio.to_thread(first.stop) == 0
            told = max(event.offset for event in events)
            events.clear()
            await asyncio.to_thread(serve, MODEL, bind=f"127.0.0.1:{port}")
            feed.go.set()
            assert await job == feed.answer
            # An event says what was sent before the chunk of its moment.
            assert min(event.sent for event in events if event.phase == "RECEIVING") >= told - CHUNK > 0

    run(main)
    assert gate.runs == 1


@pytest.mark.parametrize("phase", ["RECEIVING", "QUEUED", "RUNNING", "DONE"])
def test_the_server_is_killed_and_started_again(serve: Serve, tmp_path: Path, phase: str) -> None:
    """On the same port and spool. Only what ran is interrupted."""
    port = free_port()
    options = ("--tick", "0.1", "--instances", "1")
    first = serve(MODEL, *options, bind=f"127.0.0.1:{port}")
    gate, other = Gate(tmp_path), Gate(tmp_path, "other")
    other.gate.touch() if phase != "QUEUED" else None

    async def main() -> Any:
        killed, feed = asyncio.Event(), Feed()
        feed.go.set() if phase != "RECEIVING" else None

        def kill(event: Event) -> None:
            feed.note(event)
            due = {"DONE": True, "RUNNING": gate.mark.exists()}.get(phase, feed.durable.is_set())
            if not killed.is_set() and event.phase == phase and due:
                first.process.kill()
                killed.set()

        async with aipod.Client(f"127.0.0.1:{port}") as client:
            before = await client.submit("gated", b"", **other.kwargs) if phase == "QUEUED" else None
            if before is not None:
                await until(other.mark.exists)
            if phase == "DONE":
                call = client.chaos(metadata=[("x-func-name", "seeded")], length=60_000_000, on_event=kill)
            else:
                gate.gate.touch() if phase != "RUNNING" else None
                call = client.chaos(feed.pieces(), metadata=GATED, **gate.kwargs, on_event=kill)
            job = asyncio.create_task(call)
            await killed.wait()
            await asyncio.to_thread(first.process.communicate)
            await asyncio.to_thread(serve, MODEL, *options, bind=f"127.0.0.1:{port}")
            feed.go.set()
            if phase == "RUNNING":
                with pytest.raises(aipod.Interrupted):
                    await job
            else:
                answer = await job
                assert answer == (random.Random(0).randbytes(60_000_000) if phase == "DONE" else feed.answer)
            if before is not None:
                with pytest.raises(aipod.Interrupted):
                    await before.wait()

    run(main)
    assert gate.runs == (0 if phase == "DONE" else 1)


def test_jobs_go_to_another_spool_only_before_they_are_complete(serve: Serve, tmp_path: Path) -> None:
    """I13. Two servers with separate spools behind one address. A small job names the wrong spool, and nothing is made
    there but what is asked for once more; a complete one is looked for until its server is back."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (serve(MODEL, "--tick", "0.1", directory=tmp_path / name) for name in ("one", "two"))
    gate = Gate(tmp_path)
    mark = tmp_path / "small"

    async def main() -> None:
        async with open_proxy(one.port) as proxy, aipod.Client(proxy.address) as client:
            job = await client.submit("gated", b"x", **gate.kwargs)
            await until(gate.mark.exists)
            waiting = asyncio.create_task(job.wait())
            before = proxy.connections
            proxy.switch(two.port)
            await until(lambda: proxy.connections > before)  # else `last` may go to the dead one
            assert await client.chaos(b"x", mark=str(mark)) == SMALL
            assert runs(mark) == 1
            gate.gate.touch()
            attempts = proxy.connections
            await asyncio.sleep(0.3)
            assert not waiting.done()
            proxy.switch(one.port)
            assert await waiting == SMALL
            assert proxy.connections > attempts

    run(main)
    assert gate.runs == 1


# --- the caller

CALLER = """
import asyncio, json, sys, aipod
address, payload, ticket, kwargs = sys.argv[1:]
async def main():
    async with aipod.Client(address) as client:
        await client.chaos(payload, metadata=[("x-func-name", "gated")], ticket_file=ticket, kwargs=json.loads(kwargs))
asyncio.run(main())
"""


def start_caller(address: str, payload: Path, ticket: Path, gate: Gate) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CALLER, address, str(payload), str(ticket), json.dumps(gate.kwargs)]
    return subprocess.Popen(command, cwd=ROOT)


@pytest.mark.parametrize("phase", ["RECEIVING", "RUNNING", "DONE"])
def test_a_killed_caller_continues_with_its_ticket_file(
    served: Served, payload: Path, tmp_path: Path, phase: str
) -> None:
    """Mutants: `last` before its note in the file; a new ticket in spite of the file."""
    gate, ticket = Gate(tmp_path), tmp_path / "ticket"
    events: list[Event] = []

    async def kill(proxy: Proxy) -> None:
        caller = start_caller(proxy.address, payload, ticket, gate)
        try:
            if phase == "RECEIVING":
                await until(lambda: proxy.up > 6_000_000)
                assert json.loads(ticket.read_text())["sent"] is None
            else:
                await until(gate.mark.exists)
                assert json.loads(ticket.read_text())["sent"] is not None
            if phase == "DONE":
                proxy.hold()
                gate.gate.touch()
                await until(lambda: "gated@default done" in served.log_text())
        finally:
            caller.kill()
            await asyncio.to_thread(caller.wait)

    async def main() -> int:
        fault = Fault(cut_up=7_000_000) if phase == "RECEIVING" else Fault()
        async with open_proxy(served.port, *[fault] * 3) as proxy:
            await kill(proxy)
        gate.gate.touch()
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address) as client:
            answer = await client.chaos(
                payload, metadata=GATED, ticket_file=ticket, kwargs=gate.kwargs, on_event=events.append
            )
            assert answer == ANSWER
            return proxy.total_up

    sent = run(main)
    assert gate.runs == 1
    assert not ticket.exists()
    first = next(event for event in events if event.job_id and event.heartbeats and event.offset)
    assert first.offset > 0
    assert sent < (len(PAYLOAD) if phase == "RECEIVING" else 100_000)


@pytest.mark.parametrize("submitted", [False, True])
def test_who_is_cancelled_as_the_ticket_file_goes_has_the_answer(
    served: Served, tmp_path: Path, submitted: bool
) -> None:
    """Mutant: the file is removed in a thread; the caller is cancelled meanwhile, and its next try runs once more."""
    gate, ticket = Gate(tmp_path), tmp_path / "ticket"
    gate.gate.touch()

    async def ask(client: aipod.Client) -> Any:
        if submitted:
            job = await client.submit("gated", b"x", ticket_file=ticket, kwargs=gate.kwargs)
            return await job.wait()
        return await client.chaos(b"x", metadata=GATED, ticket_file=ticket, kwargs=gate.kwargs)

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            call = asyncio.create_task(ask(client))
            for state in (True, False):
                while ticket.exists() is not state:
                    await asyncio.sleep(0)
            call.cancel()
            assert await call == SMALL

    run(main)
    assert gate.mark.read_text() == "run\n"


def test_a_ticket_file_is_for_one_request(served: Served, payload: Path, tmp_path: Path) -> None:
    gate, ticket = Gate(tmp_path), tmp_path / "ticket"

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            call = asyncio.create_task(client.chaos(payload, metadata=GATED, ticket_file=ticket, kwargs=gate.kwargs))
            await until(gate.mark.exists)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert ticket.stat().st_mode & 0o777 == 0o600
            for other, kwargs in ((b"x", gate.kwargs), (payload, {**gate.kwargs, "lines": 1})):
                with pytest.raises(aipod.UsageError, match="another request"):
                    await client.chaos(other, metadata=GATED, ticket_file=ticket, kwargs=kwargs)
            job = await client.submit("gated", payload, metadata=GATED, ticket_file=ticket, kwargs=gate.kwargs)
            gate.gate.touch()
            assert await job.wait() == ANSWER
            assert not ticket.exists()

    run(main)
    assert gate.runs == 1


def test_a_newer_caller_takes_the_upload_over(served: Served, payload: Path, tmp_path: Path) -> None:
    """I6. Two processes with one ticket file: the older one is told, the newer one gets the answer."""
    ticket, mark = tmp_path / "ticket", tmp_path / "mark"

    async def main() -> Any:
        began, end = asyncio.Event(), asyncio.Event()

        async def pieces(whole: bool) -> AsyncIterator[bytes]:
            yield PAYLOAD[:9_000_000]
            if not whole:
                began.set()
                await end.wait()
            yield PAYLOAD[9_000_000:]

        async with aipod.Client(served.address) as old, aipod.Client(served.address) as new:
            older = asyncio.create_task(old.chaos(pieces(False), ticket_file=ticket, mark=str(mark)))
            await began.wait()
            saved = json.loads(ticket.read_text())
            ticket.write_text(json.dumps({**saved, "epoch": saved["epoch"] - 10**9}))
            newer = asyncio.create_task(new.chaos(pieces(True), ticket_file=ticket, mark=str(mark)))
            with pytest.raises(aipod.Refused) as caught:
                await older
            assert caught.value.reason == "SUPERSEDED"
            return await newer

    assert run(main) == ANSWER
    assert runs(mark) == 1


# --- no way out


@pytest.mark.parametrize("complete", [False, True])
def test_a_job_is_given_up_in_the_end(served: Served, tmp_path: Path, complete: bool) -> None:
    """A server that is never found again: the error says whether the method may have run."""
    gate = Gate(tmp_path)
    nowhere = free_port()

    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def main() -> aipod.AipodError:
        config = aipod.Config(reconnect=0.3, connect_timeout=0.5)
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address, config=config) as client:
            heard = asyncio.Event()
            call = asyncio.create_task(
                client.chaos(
                    b"" if complete else never(),
                    metadata=GATED,
                    **gate.kwargs,
                    ticket_file=tmp_path / "ticket",
                    on_event=lambda event: heard.set() if event.phase in ("RECEIVING", "RUNNING") else None,
                )
            )
            await (until(gate.mark.exists) if complete else heard.wait())
            proxy.switch(nowhere)
            with pytest.raises(aipod.JobLost if complete else aipod.Unreachable) as caught:
                await call
            proxy.switch(served.port)
            await client.attach(json.loads((tmp_path / "ticket").read_text())["ticket"]).cancel()
            return caught.value

    error = run(main)
    assert error.reason == ("JOB_LOST" if complete else "UNREACHABLE")
    assert ("may have run" in str(error)) is complete
