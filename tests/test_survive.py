"""Jobs that lose connections and servers: several servers on one port and one spool, silent connections, many cuts."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import aipod
from aipod.client import Event
from aipod.codec import job_id
from aipod.config import GIB, MIB
from aipod.wire.ai import Op, Phase
from tests import wire
from tests.conftest import Serve, Served, free_port, left_in, run
from tests.models_survive import answer_to
from tests.phases import MODEL, Stand, Trial, connections, until
from tests.proxy import Fault, open_proxy
from tests.tap import Chunks

OPTIONS = ("--tick", "0.2", "--instances", "1", "--drain", "5", "--reuse-port")


class Port:
    """Two servers that listen on one port, with one spool and one data directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.address = f"127.0.0.1:{free_port()}"
        self._own: dict[object, str] = {}  # by process
        self.servers = [self._start() for _ in range(2)]

    def _start(self) -> Served:
        return Served(MODEL, self._directory, (*OPTIONS, "--bind", "127.0.0.1:0"), self.address, forked=True)

    def own_address(self, number: int) -> str:
        """Where only this one listens."""
        process = self.servers[number].process
        if process not in self._own:
            assert process.stdout is not None
            self._own[process] = process.stdout.readline().split()[-1]
        return self._own[process]

    def kill(self, number: int) -> None:
        self.servers[number].process.kill()
        self.servers[number].process.communicate()

    def start_again(self) -> None:
        self.servers = [self._start() if one.process.poll() is not None else one for one in self.servers]

    @contextlib.asynccontextmanager
    async def clients(self, config: aipod.Config | None = None) -> AsyncIterator[list[aipod.Client]]:
        """A client that is connected to the first server, and one that is to the second."""
        async with contextlib.AsyncExitStack() as stack:
            found: dict[int, aipod.Client] = {}
            for _ in range(100):  # the kernel chooses, by the client's port
                if len(found) == 2:
                    break
                before = [connections(one) for one in self.servers]
                client = await stack.enter_async_context(aipod.Client(self.address, config=config))
                await client.chaos(metadata=[("x-func-name", "aipod.jobs")])
                after = [connections(one) for one in self.servers]
                found.setdefault(before != [after[0] - 1, after[1]], client)
            yield [found[0], found[1]]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    port = Port(tmp_path_factory.mktemp("port"))
    yield port
    assert [served.stop() for served in port.servers] == [0, 0]
    assert left_in(port.servers[0].spool) == []


# ---- two servers on one port


def test_either_server_watches_cancels_and_answers_a_job_of_the_other(port: Port, tmp_path: Path) -> None:
    port.start_again()

    async def main() -> None:
        async with port.clients() as (one, two):
            trial = Trial(tmp_path, "running")
            job = await one.submit("work", b"x", kwargs={**trial.kwargs, "length": 1_000_000})
            same = two.attach(job.ticket)
            log = ""
            async with contextlib.aclosing(same.events()) as events:
                async for event in events:
                    log += event.log
                    if event.phase == "RUNNING" and log:
                        trial.gate.touch()
            assert log == "started\n"
            answers = [await same.wait(), await job.wait(), await same.wait()]
            assert len(answers[0]) == 1_000_000
            assert answers[0] == answers[1] == answers[2]
            assert trial.starts == 1

            trial = Trial(tmp_path, "running", method="cancel")
            job = await one.submit("work", b"x", kwargs=trial.kwargs)
            await until(lambda: trial.starts == 1)
            same = two.attach(str(job))
            await same.cancel()
            for handle in (same, job):
                with pytest.raises(aipod.JobCancelled):
                    await handle.wait()
            await same.release()
            with pytest.raises(aipod.JobFailed) as caught:
                await job.wait()
            assert caught.value.reason == "RELEASED"

    run(main)


def test_a_server_is_killed_with_jobs_in_every_phase(port: Port, tmp_path: Path) -> None:
    """The other one adopts them; what ran is interrupted, once and for all."""
    port.start_again()

    async def main() -> None:
        async with port.clients() as (one, _):
            stand = Stand(tmp_path, lambda: port.kill(0))
            await stand.take_place(one)
            await stand.lost()
            stand.go_on()
            await stand.check("upload", "queued", "download")
            with pytest.raises(aipod.Interrupted):
                await stand.calls["running"]
            assert stand.trials["running"].starts == 1

    run(main)


def test_a_restartable_job_is_run_once_more_by_the_other_server(port: Port, tmp_path: Path) -> None:
    port.start_again()

    async def main() -> None:
        async with port.clients() as (one, _):
            trial = Trial(tmp_path, "running", lambda: port.kill(0), method="again")
            call = trial.call(one)
            await trial.reached.wait()
            await until(lambda: trial.starts == 2)
            trial.go_on()
            trial.check(await call, starts=2)

    run(main)


def test_versions_that_two_servers_write_are_left_alone_by_each_other(port: Port, tmp_path: Path) -> None:
    """One server is killed and started again, which sweeps, while the other one writes."""
    port.start_again()

    async def main() -> None:
        async with port.clients() as (one, two):
            trials = {name: Trial(tmp_path, "running", method=name) for name in ("old", "killed", "kept")}
            for version in ("killed", "kept"):
                mark = str(trials["old"].mark)
                await one.train(b"old", version=version, kwargs={"mark": mark})
            calls = {}
            for name, client in (("killed", one), ("kept", two)):
                kwargs = {"mark": str(trials[name].mark), "gate": str(trials[name].gate)}
                calls[name] = asyncio.create_task(client.train(name.encode(), version=name, kwargs=kwargs))
                await until(lambda name=name: trials[name].starts == 1)
            port.kill(0)
            await asyncio.to_thread(port.start_again)
            with pytest.raises(aipod.Interrupted):
                await calls["killed"]
            trials["kept"].gate.touch()
            await calls["kept"]
            assert trials["kept"].starts == 1
        async with port.clients() as clients:
            for client in clients:
                for version, written in (("killed", "old"), ("kept", "kept")):
                    read = client.chaos(version=version, metadata=[("x-func-name", "read")])
                    assert await read == [written, written]
        left = [path.name for path in port.servers[0].data.iterdir() if path.name.startswith(".")]
        assert left == []

    run(main)


def test_what_one_server_has_trained_the_other_one_answers_with(port: Port, tmp_path: Path) -> None:
    """Also an instance that was loaded before. Mutant: without `Present.replaced` the second read is old."""
    port.start_again()

    async def main() -> None:
        read = {"version": "shared", "metadata": [("x-func-name", "read")]}
        async with port.clients() as clients:
            for text in ("one", "two"):
                for trainer in clients:
                    await trainer.train(text.encode(), version="shared", kwargs={"mark": str(tmp_path / "mark")})
                    assert [await client.chaos(**read) for client in clients] == [[text, text]] * 2
                    text += "!"

    run(main)


def test_two_servers_that_write_one_version_leave_one_of_the_two_whole(port: Port, tmp_path: Path) -> None:
    port.start_again()

    async def main() -> None:
        async with port.clients() as clients:
            for turn in range(3):
                trials = [Trial(tmp_path, "running", method=f"{turn}-{number}") for number in range(2)]
                calls = [
                    asyncio.create_task(
                        client.train(
                            f"{turn}{number}".encode(),
                            version="both",
                            kwargs={"mark": str(trial.mark), "gate": str(tmp_path / str(turn))},
                        )
                    )
                    for number, (client, trial) in enumerate(zip(clients, trials, strict=True))
                ]
                await until(lambda trials=trials: [trial.starts for trial in trials] == [1, 1])
                (tmp_path / str(turn)).touch()
                await asyncio.gather(*calls)
                for client in clients:
                    read = await client.chaos(version="both", metadata=[("x-func-name", "read")])
                    assert read in ([f"{turn}{number}"] * 2 for number in range(2))

    run(main)


# ---- the wire


WINDOW = aipod.Config().max_window
BIG = int(os.environ.get("AIPOD_TEST_LONG", "1")) > 1
CUTS = 20


@pytest.mark.parametrize("way", ["reset", *(["silence"] if BIG else [])])
@pytest.mark.parametrize("size", [160 * MIB, *([2 * GIB] if BIG else [])], ids=lambda size: f"{size // MIB} MiB")
def test_an_upload_that_is_cut_20_times(port: Port, tmp_path: Path, size: int, way: str) -> None:
    """Nothing is sent again that was told to be durable, and never more than a window and 8 MiB.

    Mutant: `start = 0` in every attempt.
    """
    port.start_again()
    payload, mark = tmp_path / "payload", tmp_path / "mark"
    sha256 = hashlib.sha256()
    with payload.open("wb") as file:
        for _ in range(size // MIB):
            sha256.update(piece := os.urandom(MIB))
            file.write(piece)
    told = [0]  # to be durable, before each connection
    offset = 0
    sent: list[Chunks] = []

    def note(event: Event) -> None:
        nonlocal offset
        if event.phase == "WAITING":
            told.append(event.offset)
        assert event.offset >= offset
        offset = event.offset

    def tap() -> Chunks:
        sent.append(Chunks())
        return sent[-1]

    async def main() -> None:
        each = size // (CUTS + 1)
        fault = Fault(cut_up=each) if way == "reset" else Fault(swallow_up=each)
        config = aipod.Config() if way == "reset" else aipod.Config(silence=0.5)
        async with open_proxy(port.servers[0].port, *[fault] * CUTS) as proxy:
            proxy.tap = tap
            async with aipod.Client(proxy.address, config=config) as client:
                to = [("x-func-name", "work")]
                answer = await client.chaos(payload, metadata=to, mark=str(mark), on_event=note)
            assert answer == answer_to(sha256.hexdigest(), 100)
            assert (proxy.connections, proxy.cuts) == (CUTS + 1, CUTS)

    run(main, timeout=400)
    assert mark.read_text().count("start") == 1
    assert len(told) == len(sent) == CUTS + 1
    for before, chunks in zip(told, sent, strict=True):
        assert chunks.spans[0][0] >= before
        assert all(one[1] == other[0] for one, other in itertools.pairwise(chunks.spans))
    again = sum(chunks.sent for chunks in sent) - size
    ends = [(before.spans[-1][1] - after.spans[0][0]) // MIB for before, after in itertools.pairwise(sent)]
    print(f"sent again: {again / MIB:.1f} MiB in all; whole chunks, in MiB: {ends}")
    assert again <= CUTS * (WINDOW + 8 * MIB)


@pytest.mark.parametrize("number", [0, 1], ids=["same process", "other process"])
def test_take_over_from_a_silent_connection_within_two_ticks(port: Port, tmp_path: Path, number: int) -> None:
    """I6. The old one is open and in the middle of a chunk; nothing that it sends arrives. Time is the server's: the
    heartbeats that the newer one hears before the upload is its own.

    Mutants: `heed` gives nothing up (the other process hears BUSY), nor does `find` (the same one does too).
    """
    port.start_again()
    mark = tmp_path / "mark"
    payload = os.urandom(8 * MIB)

    async def main() -> None:
        client = wire.Client("work", payload, {"mark": str(mark)})

        def opened(address: str) -> contextlib.AbstractAsyncContextManager[wire.Call]:
            return wire.call(address, client.ticket, Op.RUN, "work", client.kwargs, **client.fields)

        async def send(call: wire.Call, offset: int) -> None:
            for start in range(offset, len(payload), MIB):
                await call.chunk(payload[start : start + MIB], start)

        own = int(port.own_address(0).rpartition(":")[2])
        async with open_proxy(own, Fault(swallow_up=5 * MIB + 1000)) as proxy:
            client.epoch = 1
            async with opened(proxy.address) as silent:
                sending = asyncio.create_task(send(silent, 0))
                await until(lambda: proxy.cuts == 1)
                arrived = port.servers[0].spool / job_id(client.ticket) / "in"
                await until(
                    lambda: arrived.read_bytes()[: 5 * MIB] == payload[: 5 * MIB]
                )  # it has its full size at once
                client.epoch = 2
                async with opened(port.own_address(number)) as one:
                    beats = 0
                    while (message := await one.receive()) is not None and message.state is None:
                        beats += 1
                    assert (one.states[0].phase, one.states[0].offset) == (Phase.RECEIVING, 5 * MIB)
                    assert beats <= 1 + 2, "one at once, and one for each tick"
                    await send(one, 5 * MIB)
                    await one.last(payload)
                    assert (await one.outcome()).data == answer_to(hashlib.sha256(payload).hexdigest(), 100)
                # It may have learned that its connection was taken over; else it still waits for room.
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    run(main)
    assert mark.read_text().count("start") == 1


# ---- a connection that was idle


@pytest.mark.parametrize("how", ["server killed", "server drained", "reset", "reset when used", "silence"])
def test_a_request_that_died_on_an_idle_connection_is_run_once(serve: Serve, tmp_path: Path, how: str) -> None:
    """The caller does not notice: with one attempt only, and no word of waiting."""
    address = f"127.0.0.1:{free_port()}"
    served = serve(MODEL, "--tick", "0.2", bind=address)
    events: list[Event] = []
    payloads = [b"x", b"", tmp_path / "large"]
    if how.startswith("server"):
        payloads.pop()  # a start takes seconds

    async def main() -> None:
        config = aipod.Config(attempts=1, silence=1.0)
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address, config=config) as client:
            for turn, payload in enumerate(payloads):
                mark = tmp_path / f"mark{turn}"
                call = client.chaos(payload, metadata=[("x-func-name", "work")], mark=str(mark), on_event=events.append)
                sha256 = hashlib.sha256(payload.read_bytes() if isinstance(payload, Path) else payload).hexdigest()
                assert await call == answer_to(sha256, 100)
                assert mark.read_text().count("start") == 1
                if turn == len(payloads) - 1:
                    break
                if how.startswith("server"):
                    number = signal.SIGKILL if how == "server killed" else signal.SIGTERM
                    await asyncio.to_thread(served.stop, number=number)
                    await asyncio.to_thread(restart)
                elif how == "reset":
                    proxy.cut()
                elif how == "reset when used":
                    proxy.trap()
                else:
                    proxy.freeze()

    def restart() -> None:
        nonlocal served
        served = serve(MODEL, "--tick", "0.2", bind=address)

    (tmp_path / "large").write_bytes(os.urandom(20 * MIB))
    run(main)
    assert [event.message for event in events if event.phase == "WAITING"] == []
