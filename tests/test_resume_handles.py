"""A job in the hands of its caller: handles, and ticket files, with which a caller that was killed continues."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import io
import json
import random
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import aipod
from aipod.client import Event
from aipod.client.ticket import next_ticket
from aipod.codec import job_id
from aipod.wire.ai import Op
from tests.conftest import FIRST, ROOT, Served, left_in, run
from tests.gates import ANSWER, GATED, PAYLOAD, SMALL, Gate, payload_file, runs, server
from tests.killed_client import ask
from tests.phases import until
from tests.proxy import Fault, Proxy, open_proxy
from tests.tap import Chunks

served = pytest.fixture(scope="module")(server)
payload = pytest.fixture(payload_file)

# Handles


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
    """The caller does not wait for it: the word goes on behind its back, and leaving the client waits for that.

    Nothing of the server's arrives meanwhile. Mutants seen: the caller waits for the server's answer; the client is
    left without it.
    """
    gate = Gate(tmp_path)

    async def some_turns() -> None:
        for _ in range(100):
            await asyncio.sleep(0)

    async def main() -> None:
        async with open_proxy(served.port) as proxy, contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(aipod.Client(proxy.address))
            call = asyncio.create_task(client.chaos(b"x", metadata=GATED, **gate.kwargs))
            await until(gate.mark.exists)
            proxy.hold_down()
            call.cancel()
            await some_turns()
            assert call.cancelled()
            leaving = asyncio.create_task(stack.aclose())
            await some_turns()
            assert not leaving.done()
            proxy.let_down()
            await leaving

    run(main)
    run(lambda: until(lambda: all(name.startswith("workers/") for name in left_in(served.spool)), seconds=10))


def test_many_calls_that_are_left_at_once_are_all_cancelled(served: Served, tmp_path: Path) -> None:
    """Mutant: errands above a number are dropped, as they once were: those jobs went on for their grace."""
    gate = Gate(tmp_path)

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            queued: set[str] = set()

            def note(event: Event) -> None:
                if event.phase in ("QUEUED", "RUNNING"):
                    queued.add(event.job_id)

            calls = [
                asyncio.create_task(client.chaos(b"x", metadata=GATED, on_event=note, **gate.kwargs))
                for _ in range(150)
            ]
            await until(lambda: len(queued) == 150)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        async with aipod.Client(served.address) as client:

            async def phases() -> list[str]:
                jobs = await client.chaos(metadata=[("x-func-name", "aipod.jobs")])
                return [job["phase"] for job in jobs if job["id"] in queued]

            while await phases() != ["CANCELLED"] * 150:  # the running ones end in their own time
                await asyncio.sleep(0.1)

    run(main)


def test_an_answer_whose_release_was_lost_is_released_with_the_next_call(served: Served) -> None:
    """Mutant: the errand's failure is nobody's."""

    async def main() -> None:
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address) as client:
            await client.chaos(metadata=[("x-func-name", "seeded")], length=200_000)
            proxy.trap()
            assert len(client._link.errands) == 1
            await until(lambda: not client._link.errands)
            (lost,) = client._link._released
            await client.chaos(b"x")
            assert lost not in client._link._released

            async def ask() -> None:
                while True:  # the server gathers some before it releases them
                    await client.attach(lost.ticket).wait()

            with pytest.raises(aipod.JobFailed) as caught:
                await asyncio.wait_for(ask(), 20)
            assert caught.value.reason == "RELEASED"

    run(main)


@pytest.mark.parametrize("at_once", [False, True], ids=["aclose", "close"])
def test_nothing_is_opened_after_a_client_was_closed(served: Served, tmp_path: Path, at_once: bool) -> None:
    """Mutants: an errand, or a call that was begun before, makes a new connection that nobody closes."""
    gate = Gate(tmp_path)

    async def main() -> None:
        async with open_proxy(served.port) as proxy:
            client = aipod.Client(proxy.address)
            left = asyncio.create_task(client.chaos(b"x", metadata=GATED, **gate.kwargs))
            await until(gate.mark.exists)
            left.cancel()  # not awaited: it learns of that only when the client is closed
            if at_once:
                begun = asyncio.create_task(client.chaos(tmp_path / "mark", metadata=GATED, **gate.kwargs))
                await asyncio.sleep(0)  # it is looking at its file
                client.close()
                with pytest.raises(aipod.Unreachable):
                    await begun
            else:
                await client.__aexit__(None, None, None)
            with pytest.raises(asyncio.CancelledError):
                await left
            await until(lambda: not client._link.errands)
            assert client._link._channel is None
            assert proxy.connections == 1
        if not at_once:  # it waited for the one that was cancelled, and for its word to the server
            await until(lambda: all(name.startswith("workers/") for name in left_in(served.spool)), seconds=10)

    run(main)
    gate.gate.touch()


def test_what_a_handle_has_released_says_so(served: Served) -> None:
    async def main() -> None:
        async with aipod.Client(served.address) as client:
            for length in (10, 200_000):
                job = await client.submit("seeded", length=length)
                same = client.attach(str(job))
                assert await same.wait() == random.Random(0).randbytes(length)
                assert await job.wait() == random.Random(0).randbytes(length), "a handle's answer stays"
                await job.release()
                with pytest.raises(aipod.JobFailed) as caught:
                    await job.wait()
                assert caught.value.reason == "RELEASED"

    run(main)


def test_an_answer_is_released_with_the_next_call_or_the_end_and_a_large_one_at_once(
    served: Served, tmp_path: Path
) -> None:
    """So is that of a ticket file: that job is known for its whole time, to whoever else has begun with the file.

    Mutants: at the end nothing is said; with a ticket file it waits for the next call.
    """
    tap = Chunks()

    async def main() -> None:
        async with open_proxy(served.port) as proxy:
            proxy.tap = lambda: tap
            async with aipod.Client(proxy.address) as client:
                for length in (1, 2, 200_000, 3):
                    await client.chaos(metadata=[("x-func-name", "seeded")], length=length)
                    await until(lambda: not client._link.errands)
                await client.chaos(b"x", ticket_file=tmp_path / "ticket")
                await until(lambda: not client._link.errands)
                with pytest.raises(aipod.JobFailed):
                    await client.chaos(metadata=[("x-func-name", "seeded")], length=-1)
        said = tap.openings
        calls = [opening.ticket for opening in said if opening.op == Op.RUN]
        first, second, large, third, kept, failed = calls
        assert [(opening.op, opening.ticket, opening.released) for opening in said] == [
            (Op.RUN, first, []),
            (Op.RUN, second, [first]),
            (Op.RUN, large, [second]),
            (Op.RELEASE, large, []),
            (Op.RUN, third, []),
            (Op.RUN, kept, [third]),
            (Op.RELEASE, kept, []),
            (Op.RUN, failed, []),
            (Op.RELEASE, failed, [failed]),
        ]

    run(main)


# Ticket files


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
    data = PAYLOAD
    if phase == "RECEIVING":
        data *= 4  # more than the sockets on the way hold
        payload.write_bytes(data)

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
                job = job_id(bytes.fromhex(json.loads(ticket.read_text())["ticket"]))
                await until(lambda: f"job {job} gated@default done" in served.log_text())
        finally:
            caller.kill()
            await asyncio.to_thread(caller.wait)

    async def main() -> int:
        fault = Fault(stall_up=7_000_000) if phase == "RECEIVING" else Fault()
        async with open_proxy(served.port, fault) as proxy:
            await kill(proxy)
        gate.gate.touch()
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address) as client:
            answer = await client.chaos(
                payload, metadata=GATED, ticket_file=ticket, kwargs=gate.kwargs, on_event=events.append
            )
            assert answer == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            return proxy.total_up

    sent = run(main)
    assert gate.runs == 1
    assert not ticket.exists()
    first = next(event for event in events if event.job_id and event.heartbeats and event.offset)
    assert first.offset > 0
    assert sent < (len(data) if phase == "RECEIVING" else 100_000)


def test_a_caller_killed_at_any_step_continues(served: Served, tmp_path: Path) -> None:
    """The same call, repeated, gives the right answer from one run, and leaves nothing but a part of a ticket file.

    The steps are the same on every Python: the first of those that are supported tries each one, the others every
    fifth. Mutants seen: a new ticket for a file that is there; the file stays when the answer is here; the server is
    not told what is here of the answer; a part may be read by others before it is the answer, and nobody takes it up.
    """
    data = random.Random(0).randbytes(1_500_000)
    steps = 0

    def killed(number: int, home: Path) -> bool:
        command = [sys.executable, "-m", "tests.killed_client", str(number), str(home), served.address]
        status = subprocess.run(command, cwd=ROOT, timeout=60).returncode
        assert status in (0, -signal.SIGKILL)
        return status != 0

    for steps in range(1, 100, 1 if FIRST else 5):
        home = tmp_path / str(steps)
        home.mkdir()
        (home / "payload").write_bytes(data)
        if not killed(steps, home):
            break
        assert run(functools.partial(ask, home, served.address)) == home / "answer"
        assert (home / "answer").read_bytes() == data, steps
        assert (home / "mark").read_text() == "run\n", steps
        left = {path.name for path in home.iterdir()} - {"payload", "answer", "mark"}
        assert all(re.fullmatch(r"(\.ticket)?\.[0-9a-f]{16}\.part", name) for name in left), (steps, left)
        assert len(left) <= 1
    assert steps > 10


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


@pytest.mark.parametrize("fails", [False, True], ids=["answer", "error"])
def test_a_ticket_file_is_for_one_payload_though_only_its_bytes_tell_it(
    served: Served, tmp_path: Path, fails: bool
) -> None:
    """Who comes with another one is refused, and leaves job and file to who has the right one.

    Mutants seen: the first one's answer is given to it (as it once was), or saved for it; its handle; the file goes, or
    the job is released, with an error that was not told; the right payload is refused.
    """
    gate, ticket, save_to = Gate(tmp_path), tmp_path / "ticket", tmp_path / "answer"
    save_to.write_bytes(b"before")

    async def main() -> None:
        async with aipod.Client(served.address) as client:

            async def ask(data: bytes, **more: Any) -> Any:
                fixed = {"metadata": GATED, "ticket_file": ticket, "kwargs": gate.kwargs}
                return await client.chaos(io.BytesIO(data), **fixed, **more)

            call = asyncio.create_task(ask(PAYLOAD))
            await until(gate.mark.exists)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            gate.gate.write_text("fail" if fails else "")
            for other in (PAYLOAD[:-1] + bytes([PAYLOAD[-1] ^ 1]), b""):
                with pytest.raises(aipod.UsageError, match="another request"):
                    await ask(other, save_to=save_to)
                with pytest.raises(aipod.UsageError, match="another request"):
                    await client.submit(
                        "gated", io.BytesIO(other), metadata=GATED, ticket_file=ticket, kwargs=gate.kwargs
                    )
            assert save_to.read_bytes() == b"before"
            if fails:
                with pytest.raises(aipod.ModelError):
                    await ask(PAYLOAD)
            else:
                assert await ask(PAYLOAD) == ANSWER
            assert sorted(path.name for path in tmp_path.iterdir()) == ["answer", "gate", "mark"]

    run(main)
    assert gate.runs == 1


@pytest.mark.parametrize("callers", [1, 3])
def test_a_job_that_never_came_is_run_anew_by_all_who_have_its_ticket_file(
    served: Served, tmp_path: Path, callers: int
) -> None:
    """Its request was complete on a connection that was lost: nothing can start under that ticket any more.

    Mutants seen: each draws a ticket of its own to run it anew; the file may not have that ticket.
    """
    gate, ticket = Gate(tmp_path), tmp_path / "ticket"

    async def ask(client: aipod.Client) -> Any:
        return await client.chaos(b"x", metadata=GATED, ticket_file=ticket, kwargs=gate.kwargs)

    async def lose(proxy: Proxy, client: aipod.Client) -> None:
        await client.chaos(b"")  # from now on it knows the spool
        proxy.hold()
        call = asyncio.create_task(ask(client))
        await until(ticket.exists)
        await until(lambda: json.loads(ticket.read_text())["sent"] is not None)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    async def main() -> None:
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address) as client:
            await lose(proxy, client)
            proxy.cut()
        lost = bytes.fromhex(json.loads(ticket.read_text())["ticket"])
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(aipod.Client(served.address)) for _ in range(callers)]
            calls = [asyncio.create_task(ask(one)) for one in clients]
            await until(lambda: json.loads(ticket.read_text())["ticket"] == next_ticket(lost).hex())
            await until(gate.mark.exists)
            gate.gate.touch()
            answers = await asyncio.gather(*calls, return_exceptions=True)
        # One may have taken the upload over from another, or have had the answer, and released it, before another did.
        told = [one if isinstance(one, dict) else getattr(one, "reason", repr(one)) for one in answers]
        assert SMALL in told
        assert all(one in (SMALL, "SUPERSEDED", "RELEASED") for one in told), told
        assert not ticket.exists()

    run(main)
    assert gate.runs == 1


@pytest.mark.parametrize("size", [1, 3_000_000])
def test_callers_who_begin_with_one_ticket_file_at_once_have_one_job(served: Served, tmp_path: Path, size: int) -> None:
    """Each has the answer, or is told that a newer one goes on. Mutant: each makes a ticket where there is no file."""
    gate = Gate(tmp_path)
    gate.gate.touch()
    data = random.Random(0).randbytes(size)

    async def call(ticket: Path) -> Any:
        async with aipod.Client(served.address) as client:
            with warnings.catch_warnings(action="ignore"):
                try:
                    return await client.chaos(data, metadata=GATED, ticket_file=ticket, kwargs=gate.kwargs)
                except (aipod.Refused, aipod.JobFailed) as exc:
                    return exc.reason

    async def main() -> None:
        for number in range(1, 9):
            answers = await asyncio.gather(*(call(tmp_path / f"ticket{number}") for _ in range(3)))
            assert {"size": size, "sha256": hashlib.sha256(data).hexdigest()} in answers
            assert gate.runs == number, answers

    run(main)


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
