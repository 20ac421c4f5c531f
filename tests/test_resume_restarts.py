"""A call whose server is killed, drained or another one: the right answer from one run, or `Interrupted`."""

from __future__ import annotations

import asyncio
import functools
import random
import re
from pathlib import Path
from typing import Any

import pytest

import aipod
from aipod.client import Event
from aipod.config import CHUNK
from aipod.wire.ai import Op
from tests.conftest import Serve, free_port, run
from tests.gates import GATED, MODEL, SMALL, Feed, Gate, runs
from tests.phases import until
from tests.proxy import open_proxy
from tests.tap import Chunks


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
    """I2, I7. On the same port and spool. Only what ran is interrupted; whatever was lost, it is the same job.

    Mutants seen: an upload, or a run, that was lost is begun under a new ticket.
    """
    port = free_port()
    options = ("--tick", "0.1", "--instances", "1")
    first = serve(MODEL, *options, bind=f"127.0.0.1:{port}")
    gate, other = Gate(tmp_path), Gate(tmp_path, "other")
    other.gate.touch() if phase != "QUEUED" else None

    async def main() -> Any:
        killed, feed, jobs = asyncio.Event(), Feed(), set[str]()
        feed.go.set() if phase != "RECEIVING" else None

        def kill(event: Event) -> None:
            feed.note(event)
            jobs.add(event.job_id)
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
        assert len(jobs) == 1

    run(main)
    assert gate.runs == (0 if phase == "DONE" else 1)


def test_jobs_go_to_another_spool_only_before_they_are_complete(serve: Serve, tmp_path: Path) -> None:
    """I13. Two servers with separate spools behind one address. A small job names the wrong spool, and nothing is made
    there but what is asked for once more; complete ones are looked for until their server is back.

    Mutants seen: a call whose `last` was sent does not name the spool; it does not say that it must exist; who waits
    for a handle is not told in which spool a server looked, or does not know the right one, and gives up after 60 s.
    """
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (serve(MODEL, "--tick", "0.1", "--instances", "2", directory=tmp_path / name) for name in ("one", "two"))
    gate, awaited = Gate(tmp_path), Gate(tmp_path, "awaited")
    mark = tmp_path / "small"

    async def main() -> None:
        async with open_proxy(one.port) as proxy, aipod.Client(proxy.address) as client:
            job = await client.submit("gated", b"x", **gate.kwargs)
            looked: dict[str, list[str]] = {"handle": [], "late": [], "call": []}

            def note(who: str, event: Event) -> None:
                looked[who] += re.findall("is looked for .*", event.message)

            call = client.chaos(b"x", metadata=GATED, kwargs=awaited.kwargs, on_event=functools.partial(note, "call"))
            wait = job.wait(on_event=functools.partial(note, "handle"))
            waiting = [asyncio.create_task(wait), asyncio.create_task(call)]
            await until(lambda: gate.mark.exists() and awaited.mark.exists())
            before = proxy.connections
            proxy.switch(two.port)
            await until(lambda: proxy.connections > before)  # else `last` may go to the dead one
            waiting.append(asyncio.create_task(job.wait(on_event=functools.partial(note, "late"))))
            assert await client.chaos(b"x", mark=str(mark)) == SMALL
            assert runs(mark) == 1
            gate.gate.touch()
            awaited.gate.touch()
            attempts = proxy.connections
            await until(lambda: all(looked.values()))
            assert {text for texts in looked.values() for text in texts} == {
                "is looked for until its own server is back"
            }
            assert not any(one.done() for one in waiting)
            proxy.switch(one.port)
            assert await asyncio.gather(*waiting) == [SMALL] * 3
            assert proxy.connections > attempts

    run(main)
    assert (gate.runs, awaited.runs) == (1, 1)


def test_a_job_is_ended_though_another_spool_answers_while_its_own_server_is_away(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the handle that has submitted it, and by one that was attached and has had a word from its server.

    Mutants seen: who ends a job does not know its spool, or does not learn it, and gives it up after 60 s (here: 0 s).
    """
    monkeypatch.setattr("aipod.client.failure.OUT_OF_SIGHT", 0.0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    options = ("--tick", "0.1", "--cancel-grace", "0.1")
    one, two = (serve(MODEL, *options, directory=tmp_path / name) for name in ("one", "two"))
    gate = Gate(tmp_path)
    seen: list[Chunks] = []

    def tap() -> Chunks:
        seen.append(Chunks())
        return seen[-1]

    async def main() -> None:
        async with open_proxy(one.port) as proxy, aipod.Client(proxy.address) as client:
            proxy.tap = tap
            job = await client.submit("gated", b"x", **gate.kwargs)
            await until(gate.mark.exists)
            attached = client.attach(job.ticket)
            for op, end in ((Op.CANCEL, job.cancel), (Op.RELEASE, attached.release)):
                seen.clear()
                proxy.switch(two.port)
                ending = asyncio.create_task(end())
                await until(lambda op=op, ending=ending: ending.done() or asked(op) > 1)
                assert not ending.done()
                proxy.switch(one.port)
                await ending
                if op == Op.CANCEL:
                    await attached.cancel()
            with pytest.raises(aipod.JobFailed) as caught:
                await attached.wait()
            assert caught.value.reason == "RELEASED"

    def asked(op: Op) -> int:
        return sum(opening.op == op for chunks in seen for opening in chunks.openings)

    run(main)
    assert gate.runs == 1
