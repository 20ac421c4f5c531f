"""Tickets from new processes, behind deploy/nginx.conf and two servers with a spool each."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from pathlib import Path

import pytest

import aipod
from aipod.client.failure import ELSEWHERE
from aipod.codec import job_id
from tests.conftest import Serve, run
from tests.models_survive import answer_to
from tests.phases import MODEL, holder, until
from tests.test_cli import Done, start
from tests.test_nginx import Nginx, proxy
from tests.test_nginx_jobs import REPORT, Two, two_spools

# Of so many, as many as there are ways below are not at their own server, but once in 10,000 runs.
JOBS = 24
# sha256 of no payload at all, which is what `work` makes its answer of.
NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


two = pytest.fixture(two_spools, scope="module")


def asked(nginx: Nginx, job: str) -> list[str]:
    """The servers that were asked for the job, in turn."""
    return [line.partition(" at=")[2].split()[0] for line in nginx.calls() if f" job={job} " in line]


async def misplaced(two: Two, nginx: Nginx, mark: Path) -> list[aipod.Job]:
    """Jobs that the other server had to take, and has; their own knows nothing of them. The first one waits."""
    two.kill(two.servers[0])
    async with aipod.Client(nginx.address) as client:
        kwargs = {"mark": str(mark), "gate": str(mark.with_name("gate"))}
        jobs = [await client.submit("work", metadata=REPORT, kwargs=kwargs) for _ in range(JOBS)]
    await asyncio.to_thread(two.start_again)
    nginx.quit()
    await asyncio.to_thread(nginx.start)  # which does not know that one was down
    found = []
    for job in jobs:
        before = len(asked(nginx, job.id))
        while len(asked(nginx, job.id)) == before:  # the time may be over before the call has begun
            async with aipod.Client(nginx.address) as stranger:
                with pytest.raises(TimeoutError):
                    await stranger.attach(job.ticket, metadata=REPORT).wait(timeout=0.3)
            with contextlib.suppress(TimeoutError):  # nginx notes calls that ended
                await until(lambda job=job, before=before: len(asked(nginx, job.id)) > before, seconds=2)
        own = asked(nginx, job.id)[before]
        if own == two.servers[0].address:
            found.append(job)
    return found


def cli(nginx: Nginx, job: aipod.Job, *arguments: str) -> Done:
    words = [*arguments, "-", "--to", nginx.address, "--upstream", "report"]
    with start(*words, stdin=subprocess.PIPE) as process:
        out, err = process.communicate(str(job).encode(), timeout=60)
    return Done(process.returncode, out, err)


def test_a_ticket_finds_a_job_that_is_not_at_its_own_server(two: Two, tmp_path: Path) -> None:
    """Each way from a process, or a client, that knows nothing but the ticket.

    Mutants seen: NOT_FOUND ends the search at once, for who watches, and for who cancels or releases.
    """
    two.start_again()

    async def main() -> None:
        jobs = await misplaced(two, nginx, tmp_path / "mark")
        assert len(jobs) >= 6
        watched, saved, cancelled, released, shown, stopped = jobs[-6:]
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(aipod.Client(nginx.address)) for _ in range(4)]
            handles = [
                client.attach(job.ticket, metadata=REPORT)
                for client, job in zip(clients, (watched, saved, cancelled, released), strict=True)
            ]
            await handles[2].cancel()
            with pytest.raises(aipod.JobCancelled):
                await handles[2].wait()
            await handles[3].release()
            done = await asyncio.to_thread(cli, nginx, stopped, "cancel")
            assert (done.status, done.out) == (0, b"CANCELLED\n")
            (tmp_path / "gate").touch()
            async with contextlib.aclosing(handles[0].events()) as events:
                async for event in events:
                    last = event.phase
            assert last == "DONE"
            assert await handles[1].wait(save_to=tmp_path / "answer") == tmp_path / "answer"
            assert (tmp_path / "answer").read_bytes() == answer_to(NOTHING, 100)
            done = await asyncio.to_thread(cli, nginx, shown, "attach")
            assert (done.status, done.out) == (0, answer_to(NOTHING, 100))
            done = await asyncio.to_thread(cli, nginx, shown, "cancel", "--release")
            assert (done.status, done.out) == (0, b"RELEASED\n")
            for job in jobs:  # so that no server works on one when the test ends
                with contextlib.suppress(aipod.JobFailed):
                    await clients[0].attach(job.ticket, metadata=REPORT).wait()

    with proxy(tmp_path, two.addresses) as nginx:
        run(main, timeout=120)


def test_a_job_that_is_nowhere_is_looked_for_so_often_and_no_more(two: Two, tmp_path: Path) -> None:
    two.start_again()
    acts = {"wait": b"w" * 16, "cancel": b"c" * 16, "release": b"r" * 16}

    async def main() -> None:
        async with aipod.Client(nginx.address) as client:
            for act, ticket in acts.items():
                with pytest.raises(aipod.Refused) as caught:
                    await getattr(client.attach(ticket, metadata=REPORT), act)()
                assert caught.value.reason == "NOT_FOUND"

    with proxy(tmp_path, two.addresses) as nginx:
        run(main)
    for ticket in acts.values():  # now that nginx has noted them all
        servers = asked(nginx, job_id(ticket))
        assert len(servers) == 1 + ELSEWHERE
        assert set(servers) == {served.address for served in two.servers}


def test_one_server_is_asked_as_often_over_one_connection(serve: Serve) -> None:
    served = serve(MODEL)

    async def main() -> None:
        async with aipod.Client(served.address, config=aipod.Config(attempts=1)) as client:
            events: list[str] = []
            with pytest.raises(aipod.Refused) as caught:
                await client.attach(b"x" * 16).wait(on_event=lambda event: events.append(event.phase))
            assert caught.value.reason == "NOT_FOUND"
            assert events.count("WAITING") == 0, "each time at once"

    run(main)


def test_a_server_is_drained_before_it_is_taken_out_of_its_group(two: Two, tmp_path: Path) -> None:
    """As deploy/README.md says: after `down` nothing leads to what it has, while it drains everything does."""
    two.start_again()

    async def main() -> None:
        async with aipod.Client(nginx.address) as client:
            kwargs = {"mark": str(tmp_path / "mark"), "gate": str(tmp_path / "gate")}
            job = await client.submit("work", metadata=REPORT, kwargs=kwargs)
            await until((tmp_path / "mark").exists)
        one = holder(two.servers, job.id)
        conf = nginx.directory / "nginx.conf"
        text = conf.read_text()
        nginx.mark_down(one.address)
        async with aipod.Client(nginx.address) as client:
            with pytest.raises(aipod.Refused) as caught:
                await client.attach(job.ticket, metadata=REPORT).wait()
            assert caught.value.reason == "NOT_FOUND"
        conf.write_text(text)
        nginx.reload()
        one.process.terminate()
        async with aipod.Client(nginx.address) as client, asyncio.TaskGroup() as group:
            events: list[str] = []
            watching = client.attach(job.ticket, metadata=REPORT)
            waiting = group.create_task(watching.wait(on_event=lambda event: events.append(event.phase)))
            await until(lambda: "RUNNING" in events)
            (tmp_path / "gate").touch()
            assert await waiting == answer_to(NOTHING, 100)
        await asyncio.to_thread(one.process.communicate, timeout=30)
        assert one.process.returncode == 0
        assert (tmp_path / "mark").read_text().count("start") == 1

    with proxy(tmp_path, two.addresses) as nginx:
        run(main)
