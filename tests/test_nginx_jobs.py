"""Jobs behind deploy/nginx.conf: nginx is reloaded and restarted, one of two servers with a spool each is killed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import aipod
from aipod.client import Event
from tests.conftest import FIRST, Served, free_port, left_in, require, run
from tests.phases import MODEL, PHASES, Stand, Trial, connected, holder, until
from tests.test_nginx import everywhere, nobody, of_nginx_alone, proxy, to

OPTIONS = ("--tick", "0.2", "--instances", "1", "--drain", "5")
REPORT = to("report")  # servers with a spool each, chosen by the job's id


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    require("nginx")
    served = Served(MODEL, tmp_path_factory.mktemp("one"), OPTIONS, "127.0.0.1:0")
    yield served
    assert served.stop() == 0
    assert left_in(served.spool) == []


def test_a_reload_is_not_noticed_in_any_phase(served: Served, tmp_path: Path) -> None:
    """The old workers carry the jobs to their ends; what begins then goes through the new ones."""

    async def main() -> None:
        stand = Stand(tmp_path, nginx.reload)
        async with aipod.Client(nginx.address) as client, aipod.Client(nginx.address) as newer:
            await stand.take_place(client)
            async with newer:
                with pytest.raises(aipod.Refused, match="no method"):
                    await newer.chaos(metadata=[("x-func-name", "none")])
            stand.go_on()
            await stand.check(*PHASES)
            assert {phase: trial.connections for phase, trial in stand.trials.items()} == dict.fromkeys(PHASES, 1)

    with proxy(tmp_path, everywhere(served.address)) as nginx:
        run(main)


def test_nginx_is_stopped_and_started_again_in_every_phase(served: Served, tmp_path: Path) -> None:
    async def main() -> None:
        stand = Stand(tmp_path, nginx.quit)
        async with aipod.Client(nginx.address) as client:
            await stand.take_place(client)
            await stand.lost()
            await asyncio.to_thread(nginx.start)
            stand.go_on()
            await stand.check(*PHASES)
            assert min(trial.connections for trial in stand.trials.values()) > 1

    with proxy(tmp_path, everywhere(served.address)) as nginx:
        run(main)


def test_an_idle_connection_does_not_notice_either(served: Served, tmp_path: Path) -> None:
    events: list[Event] = []

    async def main() -> None:
        async with aipod.Client(nginx.address, config=aipod.Config(attempts=1)) as client:
            for number, between in enumerate((nginx.reload, nginx.quit, nginx.start, None)):
                if between != nginx.start:
                    mark = tmp_path / f"mark{number}"
                    to_work = [("x-func-name", "work")]
                    await client.chaos(b"x", metadata=to_work, mark=str(mark), on_event=events.append)
                    assert mark.read_text().count("start") == 1
                if between is not None:
                    between()

    with proxy(tmp_path, everywhere(served.address)) as nginx:
        run(main)
    assert [event.message for event in events if event.phase == "WAITING"] == []


# ---- two servers with a spool each, chosen by the job's id


class Two:
    """Two servers with separate spools, on ports that they keep."""

    def __init__(self, directory: Path) -> None:
        self._homes = {f"127.0.0.1:{free_port()}": directory / name for name in ("one", "two")}
        for home in self._homes.values():
            home.mkdir()
        self.servers = [self._start(address) for address in self._homes]
        self.addresses = [nobody()] * 4 + list(self._homes)  # upstream "report"

    def _start(self, address: str) -> Served:
        return Served(MODEL, self._homes[address], OPTIONS, address, forked=True)

    def kill(self, served: Served) -> None:
        served.process.kill()
        served.process.communicate()

    def kill_the_one_of(self, trial: Trial) -> None:
        if trial.phase == "download":
            (one,) = connected(self.servers)
            self.kill(one)
        else:
            self.kill(holder(self.servers, trial.events[-1].job_id))

    def start_again(self) -> None:
        self.servers = [self._start(one.address) if one.process.poll() is not None else one for one in self.servers]


@contextlib.asynccontextmanager
async def direct(two: Two) -> AsyncIterator[list[aipod.Client]]:
    """Clients of both servers, past nginx."""
    one, other = (aipod.Client(served.address) for served in two.servers)
    async with one, other:
        yield [one, other]


def two_spools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """A module's fixture. Both servers end cleanly."""
    require("nginx")
    two = Two(tmp_path_factory.mktemp("two"))
    yield two
    two.start_again()
    assert [served.stop() for served in two.servers] == [0, 0]


two = pytest.fixture(two_spools, scope="module")


# On every Python one of each kind: what waits for its server, what goes to another one, and what is lost.
@pytest.mark.parametrize(
    ("phase", "again"),
    [
        ("running", True),
        ("upload", False),
        ("running", False),
        *([("queued", True), ("download", True), ("download", False)] if FIRST else []),
    ],
    ids=lambda value: {True: "started again", False: "gone"}.get(value, value),
)
def test_of_two_spools_one_loses_its_server(two: Two, tmp_path: Path, phase: str, again: bool) -> None:
    """I13. Before the commit the job goes to the other spool; afterwards it waits for its own, or says `JobLost`."""
    two.start_again()
    patience = aipod.Config(reconnect=60.0 if again or phase == "upload" else 2.0)

    async def main() -> None:
        trial = Trial(tmp_path, phase, lambda: two.kill_the_one_of(trial))
        async with aipod.Client(nginx.address, config=patience) as client, direct(two) as others:
            await trial.block(*others)
            call = trial.call(client, REPORT)
            await trial.reached.wait()
            await until(lambda: any(event.phase == "WAITING" for event in trial.events))
            if again:
                await asyncio.to_thread(two.start_again)
                trial.go_on()
            elif phase == "upload":
                trial.go_on()
            if phase == "upload" or (again and phase != "running"):
                trial.check(await call)
                return
            with pytest.raises(aipod.Interrupted if again else aipod.JobLost) as caught:
                await call
            trial.go_on()
            assert again or "may have run" in str(caught.value)
            assert trial.starts == 1

    with proxy(tmp_path, two.addresses) as nginx:
        run(main)


def test_a_small_job_goes_where_its_id_leads(two: Two, tmp_path: Path) -> None:
    """The client thinks of the spool that answered last; the other one creates nothing for it."""
    two.start_again()

    async def main() -> None:
        async with aipod.Client(nginx.address, config=aipod.Config(attempts=1)) as client:
            for number in range(10):
                mark = tmp_path / str(number)
                await client.chaos(b"x", metadata=[*REPORT, ("x-func-name", "work")], mark=str(mark))
                assert mark.read_text().count("start") == 1
        assert len({mark.read_text() for mark in tmp_path.glob("[0-9]")}) == 2, "one server had all of them"

    with proxy(tmp_path, two.addresses) as nginx:
        run(main)


@of_nginx_alone
def test_a_job_whose_server_is_gone_is_cancelled_when_it_is_back(two: Two, tmp_path: Path) -> None:
    """The other server knows no such job, which says nothing about it."""
    two.start_again()

    async def main() -> None:
        async with aipod.Client(nginx.address) as client, direct(two) as others:
            trial = Trial(tmp_path, "queued")
            await trial.block(*others)
            trial.gate.unlink()  # after the restart either of the two may be the first
            job = await client.submit("work", metadata=REPORT, kwargs=trial.kwargs)
            two.kill(holder(two.servers, job.id))
            cancelling = asyncio.create_task(job.cancel())
            await asyncio.wait([cancelling], timeout=0.5)
            assert not cancelling.done()
            await asyncio.to_thread(two.start_again)
            trial.before.touch()
            await cancelling
            with pytest.raises(aipod.JobCancelled):
                await job.wait()
            assert trial.starts <= 1

    with proxy(tmp_path, two.addresses) as nginx:
        run(main)


@of_nginx_alone
def test_a_job_that_another_server_had_to_take_is_found_there_when_its_own_is_back(two: Two, tmp_path: Path) -> None:
    """Mutant: without x-job-missed its own server says WRONG_SPOOL for as long as it is asked."""
    two.start_again()

    async def main() -> None:
        async with aipod.Client(nginx.address) as client:
            trial = Trial(tmp_path, "upload", lambda: two.kill_the_one_of(trial))
            trial.gate.unlink()
            call = trial.call(client, REPORT)
            await trial.reached.wait()
            trial._go.set()
            await until(lambda: trial.starts == 1)
            await asyncio.to_thread(two.start_again)
            nginx.quit()
            await until(lambda: trial.events[-1].phase == "WAITING")
            await asyncio.to_thread(nginx.start)
            trial.go_on()
            trial.check(await call)

    with proxy(tmp_path, two.addresses) as nginx:
        run(main)


@of_nginx_alone
def test_jobs_that_another_server_had_to_take_are_cancelled_there(two: Two, tmp_path: Path) -> None:
    two.start_again()
    two.kill(two.servers[0])

    async def main() -> None:
        async with aipod.Client(nginx.address) as client:
            trials = [Trial(tmp_path, "running", method=str(number)) for number in range(6)]
            jobs = [await client.submit("work", metadata=REPORT, kwargs=trial.kwargs) for trial in trials]
            await asyncio.to_thread(two.start_again)
            nginx.quit()
            await asyncio.to_thread(nginx.start)  # which does not know that one was down
            await asyncio.gather(*(job.cancel() for job in jobs))
            for job in jobs:
                with pytest.raises(aipod.JobCancelled):
                    await job.wait()
            assert max(trial.starts for trial in trials) <= 1

    with proxy(tmp_path, two.addresses) as nginx:
        run(main)


@of_nginx_alone
def test_a_new_job_goes_to_the_other_server_while_its_own_drains(tmp_path: Path) -> None:
    """For as long as that takes. Mutant seen: it is refused after five tries at its own."""
    require("nginx")
    drains, stays = (
        Served(MODEL, directory, ("--tick", "0.2", "--drain", "60"), "127.0.0.1:0", forked=True)
        for directory in (made(tmp_path / "drains"), made(tmp_path / "stays"))
    )
    gate, waits = tmp_path / "gate", tmp_path / "waits"
    to_work = [*REPORT, ("x-func-name", "work")]

    async def main() -> None:
        config = aipod.Config(attempts=2)
        async with aipod.Client(nginx.address, config=config) as client, aipod.Client(drains.address) as direct:
            kept = await direct.submit("work", mark=str(waits), gate=str(gate))
            await until(waits.exists)
            drains.process.terminate()
            await until(lambda: "draining" in drains.log_text())
            marks = [tmp_path / f"mark{number}" for number in range(12)]
            calls = [client.chaos(b"x", metadata=to_work, mark=str(mark)) for mark in marks]
            answers = await asyncio.gather(*calls)
            assert len({bytes(answer) for answer in answers}) == 1
            parents = {mark.read_text() for mark in marks}
            assert parents == {f"start {stays.process.pid}\n"}
            # It ends as soon as its last job has ended and nobody waits for that.
            heard: list[Event] = []
            waiting = asyncio.create_task(kept.wait(on_event=heard.append))
            await until(lambda: any(event.phase == "RUNNING" for event in heard))
            gate.touch()
            await waiting

    with proxy(tmp_path, [nobody()] * 4 + [drains.address, stays.address]) as nginx:
        run(main)
        asked = sum(f"at={drains.address}" in line for line in nginx.calls())
        assert asked > 0, "no job's id has led to the server that drains"
    drains.process.communicate(timeout=30)
    assert (drains.process.returncode, stays.stop()) == (0, 0)


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory
