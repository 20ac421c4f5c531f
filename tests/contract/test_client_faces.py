"""What every face of the client promises: asyncio's, that for threads, and trio's."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aipod
from aipod.client import Call, Client, Event, Job
from aipod.faces.sync import SyncCall, SyncClient, SyncJob
from aipod.faces.trio import TrioCall, TrioClient, TrioJob
from tests.conftest import Serve, Served, left_in
from tests.faces import FLAVORS, NAMES, Flavor, proxied, said
from tests.proxy import Fault

MODEL = "tests.models_faces:Faces"
MIB = 1 << 20


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(MODEL, tmp_path_factory.mktemp("faces"), (), "127.0.0.1:0", forked=True)
    try:
        yield served
        assert served.stop() == 0, served.log_text()
        assert left_in(served.spool, uploads=False) == []
        assert "a bug of aipod" not in served.log_text()
    finally:
        served.process.kill()
        served.process.communicate()


@pytest.fixture(params=NAMES)
def its(request: pytest.FixtureRequest) -> Flavor:
    return FLAVORS[request.param]()


def payload_of(size: int) -> bytes:
    """What cannot be compressed."""
    return os.urandom(size)


# Values, bytes, files


def test_what_comes_back(its: Flavor, served: Served, tmp_path: Path) -> None:
    data = payload_of(20_000)
    (tmp_path / "in").write_bytes(data)

    async def scenario(its: Flavor) -> None:
        async with its.client(served.address) as client:
            assert await client.predict(data, top=5) == {"size": 20_000, "kwargs": {"top": 5}}
            echo: dict[str, Any] = {"metadata": [("x-func-name", "echo")]}
            assert await client.chaos(str(tmp_path / "in"), **echo) == data
            assert await client.chaos(its.items([data[:7], data[7:]]), **echo) == data
            with (tmp_path / "in").open("rb") as file:
                assert await client.chaos(file, **echo, save_to=tmp_path / "out") == tmp_path / "out"
            assert (tmp_path / "out").read_bytes() == data
            # Names that the functions in between could have themselves go to the method.
            names = {"host": 1, "make": 2, "method": 3, "client": 4, "args": 5, "coro": 6}
            assert (await client.predict(b"", **names))["kwargs"] == names
            assert (await client.predict(b"", kwargs={"timeout": 1}))["kwargs"] == {"timeout": 1}

    its.run(scenario)


def test_any_method_is_called_by_its_name(its: Flavor, served: Served, tmp_path: Path) -> None:
    async def scenario(its: Flavor) -> None:
        async with its.client(served.address) as client:
            other = {"metadata": [("x-func-name", "boom")]}
            assert await client.call("echo", b"abc", **other) == b"abc"
            assert await client.call("echo", b"abc", save_to=tmp_path / "out") == tmp_path / "out"
            assert (tmp_path / "out").read_bytes() == b"abc"
            answer = await client.call("predict", b"abc", top=5, kwargs={"method": 1})
            assert answer == {"size": 3, "kwargs": {"top": 5, "method": 1}}
            with pytest.raises(aipod.Refused, match="no_such"):
                await client.call("no_such", b"")
            with pytest.raises(TypeError):
                await client.call()

    its.run(scenario)


def test_errors(its: Flavor, served: Served, tmp_path: Path) -> None:
    async def scenario(its: Flavor) -> None:
        wrong: list[Any] = ["nowhere", "http://127.0.0.1:1", None, 50051, [None]]
        for target in wrong:
            with pytest.raises(aipod.UsageError, match="HOST:PORT"):
                its.client(target)
        async with its.client(served.address) as client:
            with pytest.raises(aipod.ModelError, match=r"^ValueError: the secret is 42$"):
                await client.chaos(b"", metadata=[("x-func-name", "boom")])
            with pytest.raises(aipod.Refused, match="no_such"):
                await client.chaos(b"", metadata=[("x-func-name", "no_such")])
            with pytest.raises(aipod.UsageError, match="not JSON"):
                await client.predict(b"", what=object())
            with pytest.raises(aipod.UsageError, match="does not exist"):
                await client.predict(tmp_path / "none")
            with pytest.raises(aipod.UsageError, match="ticket file was to go there"):
                await client.predict(b"", ticket_file=tmp_path / "none" / "ticket")
            with pytest.raises(aipod.UsageError, match="not a number of seconds"):
                await client.predict(b"", timeout="soon")
            with pytest.raises(aipod.UsageError, match="hexadecimal"):
                client.attach("xyz")
            with pytest.raises(aipod.Refused) as refused:
                await client.attach(bytes(16)).wait()
            assert refused.value.reason == "NOT_FOUND"
            forever: Any = {"metadata": [("x-func-name", "forever")], "mark": str(tmp_path / "mark")}
            with pytest.raises(aipod.JobFailed) as late:
                await client.chaos(b"", **forever, timeout=0.5)
            assert late.value.reason == "DEADLINE_EXCEEDED"
            with pytest.raises(TypeError):
                await client.submit()
            with pytest.raises(ZeroDivisionError):
                await client.predict(broken())
        with proxied(1) as nobody, pytest.raises(aipod.Unreachable):
            async with its.client(nobody.address, attempts=1) as client:
                await client.predict(b"")

    def broken() -> Iterator[bytes]:
        yield b"x"
        raise ZeroDivisionError

    its.run(scenario)


def test_a_warning_names_the_line_that_calls(its: Flavor, served: Served) -> None:
    """Mutant seen: the line of asyncio that runs the call, in the thread of a face."""
    data = bytes(40_000)

    async def scenario(its: Flavor) -> None:
        async with its.client(served.address) as client:
            await client.predict(data)
            await client.predict(text="x" * 40_000)
            job = await client.submit("predict", data)
            async with client.stream("predict", data) as call:
                await call.wait()
            await job.release()

    with pytest.warns(UserWarning, match="in memory|keyword arguments") as caught:
        its.run(scenario)
    lines, first = inspect.getsourcelines(scenario)
    wanted = [first + n for n, line in enumerate(lines) if "data" in line or "text=" in line]
    if its.name == "sync":  # by way of what puts `await` in front of it
        assert {Path(one.filename).name for one in caught} == {"faces.py"}
    else:
        assert [(one.filename, one.lineno) for one in caught] == [(__file__, line) for line in wanted]


def test_what_a_payload_raises_and_that_it_is_let_go(its: Flavor, served: Served) -> None:
    """An async iterator of this flavor: for threads an ordinary one."""
    ended: list[str] = []

    async def scenario(its: Flavor) -> None:
        async def items() -> Any:
            try:
                async for item in its.items([b"x", b"y"]):
                    yield item
                raise KeyError("mine")
            finally:
                ended.append("let go")

        def plain() -> Iterator[bytes]:
            yield b"x"
            raise KeyError("mine")

        async with its.client(served.address) as client:
            with pytest.raises(KeyError, match="mine"):
                await client.predict(plain() if its.name == "sync" else items())
        assert ended == ([] if its.name == "sync" else ["let go"])

    its.run(scenario)


# Events


def test_events_come_to_the_caller_and_what_it_raises_ends_the_call(
    its: Flavor, served: Served, tmp_path: Path
) -> None:
    async def scenario(its: Flavor) -> None:
        seen: list[Event] = []
        places: set[object] = set()

        def note(event: Event) -> None:
            places.add(its.here())
            seen.append(event)

        def burst(event: Event) -> None:
            if event.phase == "RUNNING":
                raise ZeroDivisionError

        async with its.client(served.address) as client:
            steps: Any = {"metadata": [("x-func-name", "steps")], "count": 3}
            assert await client.chaos(b"x" * 100, **steps, on_event=note) == "walked"
            if its.name != "asyncio":  # there by tasks of the client's own, on the caller's loop
                assert places == {its.here()}
            phases = list(dict.fromkeys(event.phase for event in seen))
            assert phases[0] == "CONNECTING"
            assert phases[-2:] == ["RUNNING", "DONE"]
            assert "".join(event.log for event in seen) == "line 0\nline 1\nline 2\n"
            assert seen[-1].progress == 1.0
            mark = tmp_path / "mark"
            forever: Any = {"metadata": [("x-func-name", "forever")], "mark": str(mark)}
            with pytest.raises(ZeroDivisionError):
                await client.chaos(b"", **forever, on_event=burst)
        await its.until(lambda: said(mark) == "cancelled")

    its.run(scenario)


def test_a_busy_listener_misses_no_line_of_the_log(its: Flavor, served: Served) -> None:
    """What it has no time for waits at the server, where it can be had again: here each heartbeat is one event.

    Mutants seen: nobody waits for who iterates; for whose `on_event` is called somewhere else.
    """
    wanted = "".join(f"line {n}\n" for n in range(20))

    def check(seen: list[Event]) -> None:
        assert "".join(event.log for event in seen) == wanted
        assert seen[-1].phase == "DONE"
        beats = [event.heartbeats for event in seen]
        assert all(after - before <= 1 for before, after in itertools.pairwise(beats)), beats

    def note(event: Event) -> None:
        seen.append(event)
        time.sleep(0.2)

    async def scenario(its: Flavor) -> None:
        async with its.client(served.address) as client:
            job = await client.submit("steps", count=20)
            iterated: list[Event] = []
            async for event in job.events():
                iterated.append(event)
                await its.sleep(0.2)
            check(iterated)
            await job.release()
            job = await client.submit("steps", count=20)
            assert await job.wait(on_event=note) == "walked"
            check(seen)
            await job.release()

    seen: list[Event] = []
    its.run(scenario)


def test_an_upload_has_a_rate(its: Flavor, served: Served) -> None:
    async def scenario(its: Flavor) -> None:
        async with its.client(served.address) as client, client.stream("predict", pieces()) as call:
            seen = [event async for event in call.events()]
            assert (await call.wait())["size"] == 12 * MIB
        assert {"CONNECTING", "RECEIVING", "DONE"} <= {event.phase for event in seen}
        assert seen[-1].phase == "DONE"
        uploads = [event for event in seen if event.phase == "RECEIVING"]
        assert any(event.rate > 0 for event in uploads)
        assert not any(event.rate for event in seen if event.phase not in ("RECEIVING", "DONE"))

    def pieces() -> Iterator[bytes]:
        for _ in range(12):
            time.sleep(0.05)
            yield payload_of(MIB)

    its.run(scenario)


# Jobs that go on


def test_a_job_is_handed_over_watched_and_found_again(its: Flavor, served: Served, tmp_path: Path) -> None:
    """Mutant seen: it is released, as one whose answer was had."""
    data = payload_of(3 * MIB)

    async def scenario(its: Flavor) -> None:
        async with its.client(served.address) as client:
            job = await client.submit("echo", its.items([data]), metadata=[("x-custom", "1")])
            assert len(job.ticket) == 16
            assert str(job) == job.ticket.hex()
            assert len(job.id) == 32
            assert [event.phase async for event in job.events()][-1] == "DONE"
            assert (await client.predict(b""))["size"] == 0  # with which goes what is to be released
            assert await job.wait() == data
            assert await job.save(tmp_path / "out") == tmp_path / "out"
            assert (tmp_path / "out").read_bytes() == data
        async with its.client(served.address) as client:
            again = client.attach(str(job))
            assert b"".join([chunk async for chunk in again.chunks()]) == data
            assert b"".join([chunk async for chunk in again.chunks()]) == data
            await again.release()
            with pytest.raises(aipod.AipodError, match="released"):
                await again.wait()
            mark = tmp_path / "mark"
            job = await client.submit("forever", mark=str(mark))
            await its.until(lambda: said(mark))
            with pytest.raises(TimeoutError):
                await job.wait(timeout=0.1)
            assert said(mark) == "running"
            await job.cancel()
            with pytest.raises(aipod.JobCancelled):
                await job.wait()
            assert said(mark) == "cancelled"

    its.run(scenario)


# Step by step


def test_a_call_step_by_step(its: Flavor, served: Served) -> None:
    """Mutants seen: chunks that are asked for again go on where they were left; a call that was left runs it."""
    data = payload_of(5 * MIB)

    async def scenario(its: Flavor) -> None:
        async with its.client(served.address) as client:
            async with client.stream("echo", its.items([data])) as call:
                seen = [event async for event in call.events()]
                assert seen[-1].phase == "DONE"
                assert seen[-1].job_id == call.id
                async with contextlib.aclosing(call.chunks()) as early:
                    assert data.startswith(await anext(early))
                chunks = [chunk async for chunk in call.chunks()]  # from the first byte, all the same
                assert max(map(len, chunks)) <= MIB
                assert b"".join(chunks) == data
                with pytest.raises(aipod.UsageError, match="its answer was had"):
                    await call.wait()
            # In one go, without events: small answers and large ones, JSON as it is.
            async with client.stream("echo", b"small") as call:
                assert [chunk async for chunk in call.chunks()] == [b"small"]
            async with client.stream("echo") as call:
                assert [chunk async for chunk in call.chunks()] == []
            async with client.stream("predict", a=1) as call:
                assert [chunk async for chunk in call.chunks()] == [b'{"size": 0, "kwargs": {"a": 1}}']
            async with client.stream("boom") as call:
                assert [event.phase async for event in call.events()][-1] == "FAILED"
                with pytest.raises(aipod.ModelError):
                    [chunk async for chunk in call.chunks()]
            with pytest.raises(aipod.UsageError, match="not JSON"):
                async with client.stream("predict", a=object()):
                    raise AssertionError
            call = client.stream("predict", b"x")
            with pytest.raises(aipod.UsageError, match="within its block"):
                await call.wait()
            async with call:
                pass
            with pytest.raises(aipod.UsageError, match="within its block"):
                [event async for event in call.events()]

    its.run(scenario)


def test_chunks_that_are_left_early_can_be_had_again(its: Flavor, served: Served, tmp_path: Path) -> None:
    """Although the last one has come. Mutants seen: the call's answer was had; the ticket file goes."""
    data, ticket = payload_of(MIB + 1), tmp_path / "ticket"

    async def scenario(its: Flavor) -> None:
        async def leave(chunks: Any) -> None:
            async with contextlib.aclosing(chunks) as early:
                assert await anext(early) == data[:MIB]
                await its.sleep(0.5)  # more than the last one needs

        async with its.client(served.address) as client:
            async with client.stream("echo", its.items([data])) as call:
                await leave(call.chunks())
                assert b"".join([chunk async for chunk in call.chunks()]) == data
            job = await client.submit("echo", its.items([data]), ticket_file=ticket)
            await leave(job.chunks())
            assert ticket.exists()
            assert b"".join([chunk async for chunk in job.chunks()]) == data
            assert not ticket.exists()
            await job.release()

    its.run(scenario)


def test_leaving_cancels_the_job(its: Flavor, served: Served, tmp_path: Path) -> None:
    """Mutants seen: no word for a call that was left in its block; a job that was handed over is cancelled."""

    async def scenario(its: Flavor) -> None:
        async with its.client(served.address) as client:
            mark, other, third = tmp_path / "mark", tmp_path / "other", tmp_path / "third"
            call: Any = {"metadata": [("x-func-name", "forever")], "mark": str(mark)}
            await its.left(lambda: client.chaos(b"", **call), lambda: said(mark))
            await its.until(lambda: said(mark) == "cancelled")
            async with client.stream("forever", mark=str(other)) as step:
                async with contextlib.aclosing(step.events()) as events:
                    async for event in events:
                        if event.phase == "RUNNING" and said(other):
                            break
            await its.until(lambda: said(other) == "cancelled")

            async def blocked() -> None:
                async with client.stream("forever", mark=str(third)) as call:
                    await call.wait()

            await its.left(blocked, lambda: said(third))
            await its.until(lambda: said(third) == "cancelled")
            job = await client.submit("forever", mark=str(tmp_path / "job"), until=str(tmp_path / "go"))
            await its.left(lambda: job.wait(), lambda: said(tmp_path / "job"))
            assert said(tmp_path / "job") == "running"  # it goes on
            (tmp_path / "go").touch()
            assert await job.wait() == "ended"
            assert await client.predict(b"") == {"size": 0, "kwargs": {}}

    its.run(scenario)


# Connections


def test_a_connection_is_used_again_and_a_closed_client_opens_another(its: Flavor, served: Served) -> None:
    async def scenario(its: Flavor) -> None:
        with proxied(served.port) as proxy:
            client = its.client(proxy.address)
            for _ in range(3):
                assert (await client.predict(b""))["size"] == 0
            await its.together([lambda: client.predict(b"") for _ in range(5)])
            assert proxy.connections == 1
            await client.aclose()
            await client.aclose()
            assert (await client.predict(b""))["size"] == 0
            assert proxy.connections == 2
            await client.aclose()

    its.run(scenario)


def test_fifty_jobs_at_once_and_connections_that_are_cut(its: Flavor, served: Served) -> None:
    async def scenario(its: Flavor) -> None:
        with proxied(served.port, Fault(cut_up=100_000), Fault(cut_up=100_000), Fault(cut_down=100_000)) as proxy:
            async with its.client(proxy.address) as client:
                data = [payload_of(640 * n) for n in range(50)]
                echo: Any = {"metadata": [("x-func-name", "echo")]}
                answers = await its.together([lambda one=one: client.chaos(one, **echo) for one in data])  # type: ignore[misc]
            assert answers == data
            assert proxy.cuts == 3

    its.run(scenario)


def test_chunks_go_on_at_the_byte_where_they_were(its: Flavor, served: Served) -> None:
    """Mutants seen: a chunk that does not count as received; a new connection begins at the first byte."""
    data = payload_of(8 * MIB)

    async def scenario(its: Flavor) -> None:
        with proxied(served.port, Fault(), Fault(cut_down=3 * MIB), Fault(flip_down=MIB)) as proxy:
            async with its.client(proxy.address) as client:
                job = await client.submit("echo", data)
                proxy.cut()
                assert b"".join([chunk async for chunk in job.chunks()]) == data
                assert proxy.connections == 3
                await job.release()

    with pytest.warns(UserWarning, match="in memory"):
        its.run(scenario)


def test_chunks_wait_at_the_server(its: Flavor, served: Served) -> None:
    """Who takes none has but a window of them and 8 MiB (`transport.window`), and what was cut is had all the same.

    Mutant seen: a chunk that is handed on does not wait for the one before it to be taken.
    """
    data = payload_of(40 * MIB)
    window = MIB

    async def scenario(its: Flavor) -> None:
        with proxied(served.port) as proxy:
            async with its.client(proxy.address, max_window=window) as client:
                job = await client.submit("echo", its.items([data]))
                before = proxy.down
                got: list[bytes] = []
                async for chunk in job.chunks():
                    got.append(chunk)
                    if len(got) == 1:
                        # A queue that is full, and with it the windows, before anything is asserted of them.
                        await its.sleep(0.5)
                        assert proxy.down - before < 20 * MIB
                        proxy.cut()
                assert b"".join(got) == data
                await job.release()

    its.run(scenario)


def test_a_lost_connection_is_followed_by_one_to_the_next_address(its: Flavor, served: Served) -> None:
    """Mutant seen: the first address is tried first again."""

    async def scenario(its: Flavor) -> None:
        with proxied(served.port) as one, proxied(served.port) as two:
            async with its.client(f"{one.address},{two.address}") as client:
                for proxy, wanted in ((one, (1, 0)), (two, (1, 1)), (one, (2, 1))):
                    # See below for why this is a payload of unknown size.
                    assert (await client.predict(its.items([b"x"])))["size"] == 1
                    assert (one.connections, two.connections) == wanted
                    proxy.cut()

    its.run(scenario)


def test_who_is_silent_or_not_there_is_passed_over(its: Flavor, served: Served) -> None:
    """Mutant seen: who is silent is waited for."""

    async def scenario(its: Flavor) -> None:
        with proxied(served.port) as mute:
            mute.hold()
            targets = ["127.0.0.1:1", mute.address, served.address]
            async with its.client(targets, connect_timeout=600, handshake_timeout=600) as client:
                assert (await client.predict(b""))["size"] == 0

    its.run(scenario)


def test_a_job_stays_where_it_is(its: Flavor, serve: Serve, tmp_path: Path) -> None:
    """Two servers with a spool each. Mutant seen: a job is asked for where new ones go."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = (serve(MODEL, directory=tmp_path / name) for name in ("one", "two"))

    async def scenario(its: Flavor) -> None:
        with proxied(one.port) as near, proxied(two.port) as far:
            async with its.client([near.address, far.address]) as client:
                assert (await client.predict(b""))["size"] == 0
                assert (near.connections, far.connections) == (1, 0)
                job = await client.submit("forever", mark=str(tmp_path / "mark"), until=str(tmp_path / "go"))
                near.switch(1)  # nobody is there now: new jobs go to the next one
                # Of a size that is not known beforehand: it is not sent whole before the server has spoken, over a
                # connection that may have ended; the job could have run then, and would be looked for where it is not.
                assert (await client.predict(its.items([b"x"])))["size"] == 1
                assert far.connections == 1

                async def come_back() -> None:
                    await its.until(lambda: near.connections > 1)
                    near.switch(one.port)
                    (tmp_path / "go").touch()

                _, answer = await its.together([come_back, job.wait])
                assert answer == "ended"
                assert (await client.predict(b""))["size"] == 0
                assert far.connections == 1
        for served in (one, two):
            assert " done in " in served.log_text()

    its.run(scenario)


def test_a_job_of_another_process_is_found_at_one_of_several_addresses(
    its: Flavor, serve: Serve, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = (serve(MODEL, directory=tmp_path / name) for name in ("one", "two"))

    async def scenario(its: Flavor) -> None:
        async with its.client(f"{two.address}") as client:
            ticket = (await client.submit("echo", b"here")).ticket
        async with its.client(f"{one.address},{two.address}") as client:
            assert await client.attach(ticket).wait() == b"here"
            await client.attach(ticket).release()
            with pytest.raises(aipod.Refused):
                await client.attach(bytes(16)).cancel()

    its.run(scenario)


# One definition

FACES = {
    SyncClient: Client,
    SyncJob: Job,
    SyncCall: Call,
    TrioClient: Client,
    TrioJob: Job,
    TrioCall: Call,
}
# What faces do with what is inside themselves; asyncio's `close` is the sync one's too, which waits as `aclose` does.
OWN = {"answer", "hand_over"}


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_a_face_has_what_the_client_has(face: type) -> None:
    """Mutants seen: a method that is missing; an option that is not the client's; docs in another flavor's words."""
    original = FACES[face]
    wanted = {name for name in dir(original) if not name.startswith("_")} - OWN
    if face is SyncClient:
        wanted.remove("aclose")
    if original is Job:
        wanted.add("ticket")
    assert {name for name in dir(face) if not name.startswith("_")} == wanted
    prefix = face.__name__.removesuffix(original.__name__)
    for name in wanted - {"id", "ticket"}:
        mine, its = getattr(face, name), getattr(original, name)
        assert inspect.signature(mine).parameters == inspect.signature(its).parameters, name
        assert mine.__qualname__ == f"{face.__name__}.{name}"
        assert mine.__doc__
        assert "asyncio" not in mine.__doc__
        for line in mine.__doc__.splitlines():
            if prefix == "Sync":
                assert not re.search(r"\b(await|async) (?!iterable)", line), line
    returned = inspect.signature(face.__dict__["events"]).return_annotation if "events" in face.__dict__ else ""
    assert returned in ("", "AsyncGenerator[Event, None]", "Generator[Event, None, None]")
    assert inspect.signature(face.__init__).parameters.keys() >= {"self"}
    assert face.__doc__
    assert "For threads." in face.__doc__ or "trio-flavored" in face.__doc__ or face is SyncClient
