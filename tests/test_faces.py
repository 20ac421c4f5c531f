"""What is particular to the faces: threads and forks, Ctrl-C, the interpreter's end; trio's scopes and other loops."""

from __future__ import annotations

import asyncio
import gc
import inspect
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio

import aipod
from aipod.client import Event
from aipod.client.event import Rate, merged
from aipod.client.flow import Flow
from aipod.codec import frame
from aipod.faces.host import Host
from aipod.faces.trio import _run as run_in_trio
from aipod.wire.ai import Raw, State
from tests.conftest import ROOT, Serve, Served, first_only, left_in, run, wait_until
from tests.faces import said
from tests.proxy import open_proxy

MODEL = "tests.models_faces:Faces"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(MODEL, tmp_path_factory.mktemp("faces"), (), "127.0.0.1:0", forked=True)
    try:
        yield served
        assert served.stop() == 0, served.log_text()
        assert left_in(served.spool, uploads=False) == []
    finally:
        served.process.kill()
        served.process.communicate()


def python(code: str, *args: str, check: bool = True, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=check, cwd=ROOT)


def hosts() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "aipod-client"]


# Threads


def test_neither_face_loads_trio_asyncio_nor_the_sync_one_trio(served: Served) -> None:
    code = """
        import sys, asyncio, aipod
        kind, address = sys.argv[1:]
        if kind == "sync":
            with aipod.SyncClient(address) as client:
                client.predict(b"")
        elif kind == "trio":
            import trio
            async def main():
                async with aipod.TrioClient(address) as client:
                    await client.predict(b"")
            trio.run(main)
        else:
            async def main():
                async with aipod.Client(address) as client:
                    await client.predict(b"")
            asyncio.run(main())
        print(*sorted({"trio", "trio_asyncio"} & set(sys.modules)))
    """
    assert python(code, "sync", served.address).stdout == "\n"
    assert python(code, "asyncio", served.address).stdout == "\n"
    assert python(code, "trio", served.address).stdout == "trio\n"


def test_it_works_where_a_loop_runs_as_in_a_notebook(served: Served) -> None:
    async def cell() -> Any:
        with aipod.SyncClient(served.address) as client:
            return client.predict(b"x")

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        assert runner.run(cell())["size"] == 1
    assert hosts() == []


@pytest.mark.parametrize("how", ["idle", "under way", "in atexit"])
def test_the_interpreter_ends_where_nobody_has_closed_the_client(served: Served, tmp_path: Path, how: str) -> None:
    code = """
        import atexit, sys, threading, time, aipod
        address, mark, until, how = sys.argv[1:]
        client = aipod.SyncClient(address)
        print(client.predict(b"")["size"])
        if how == "in atexit":
            atexit.register(lambda: print(client.predict(b"x")["size"]))
        if how == "under way":
            def call():
                try:
                    client.chaos(b"", metadata=[("x-func-name", "forever")], mark=mark, until=until)
                except aipod.JobLost:
                    pass
            threading.Thread(target=call, daemon=True).start()
            while not __import__("os").path.exists(mark):
                time.sleep(0.02)
    """
    ended = python(code, served.address, str(tmp_path / "mark"), str(tmp_path / "go"), how)
    (tmp_path / "go").touch()
    assert ended.stdout == ("0\n1\n" if how == "in atexit" else "0\n")
    assert ended.stderr == ""


def test_a_client_that_nobody_has_any_more_ends_its_thread(served: Served) -> None:
    client = aipod.SyncClient(served.address)
    client.predict(b"")
    (thread,) = hosts()
    del client
    gc.collect()
    thread.join(20)
    assert hosts() == []


def test_after_a_fork_it_says_so(served: Served) -> None:
    """Mutant seen: no look at the process; the child waits for a thread that it has not."""
    code = """
        import os, sys, aipod
        unused = aipod.SyncClient(sys.argv[1])
        with aipod.SyncClient(sys.argv[1]) as client:
            client.predict(b"")
            if not os.fork():
                try:
                    client.predict(b"")
                except aipod.UsageError as exc:
                    print("child:", exc, flush=True)
                print(unused.predict(b"x")["size"], flush=True)
                unused.close()
                sys.exit()
            os.wait()
            print("parent:", client.predict(b"")["size"])
    """
    ended = python(code, served.address)
    said_by_child, size, parent = ended.stdout.splitlines()
    assert "was forked" in said_by_child
    assert (size, parent) == ("1", "parent: 0")
    assert "Error" not in ended.stderr


def test_ctrl_c_comes_back_at_once_and_the_client_goes_on(served: Served, tmp_path: Path) -> None:
    """In a process of its own, by its own default handler. Mutant seen: the call is not cancelled."""
    code = """
        import os, signal, sys, threading, time, aipod
        address, mark = sys.argv[1:]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        def interrupt():
            while not os.path.exists(mark):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt).start()
        with aipod.SyncClient(address) as client:
            try:
                client.chaos(b"", metadata=[("x-func-name", "forever")], mark=mark)
            except KeyboardInterrupt:
                print("interrupted")
            print(client.predict(b"")["size"])
    """
    mark = tmp_path / "mark"
    assert python(code, served.address, str(mark)).stdout == "interrupted\n0\n"
    wait_until(lambda: said(mark) == "cancelled")


@first_only("Python 3.11's byte code")
def test_ctrl_c_at_any_place_of_a_call_neither_hangs_nor_costs_the_client(served: Served) -> None:
    """A trace function raises where Python looks for signals, behind calls and jumps: once at each such place.

    Mutants seen: a call that may have begun is waited for, and has not; Thread.is_alive says whether there is a thread;
    a thread whose start has failed is not told to leave.
    """
    code = """
        import dis, faulthandler, gc, itertools, sys, threading, time, aipod

        places, before = ("RESUME", "CALL", "JUMP_BACKWARD", "POP_JUMP_BACKWARD"), {}

        def stop(frame, event, arg):
            global left
            frame.f_trace_opcodes = True
            if event == "opcode":
                last, before[frame] = before.get(frame), frame.f_lasti
                if last is not None and dis.opname[frame.f_code.co_code[last]].startswith(places):
                    left -= 1
                    if not left:
                        sys.settrace(None)
                        raise KeyboardInterrupt
            return stop

        def held(client):
            return client.predict(b"12", on_event=lambda event: None)["size"]

        def of_its_own(_):
            with aipod.SyncClient(sys.argv[1]) as client:
                return held(client)

        faulthandler.dump_traceback_later(140, exit=True)
        client = aipod.SyncClient(sys.argv[1])
        def places_of(call):
            global left
            left = 10**9
            sys.settrace(stop)
            call(client)
            sys.settrace(None)
            return 10**9 - left

        # A call all over; of a client of its own, the end, where its thread is started and ended.
        for call, last, step in (held, 10**9, 1), (of_its_own, 240, 9):
            assert held(client) == 2
            stopped = 0
            for at in itertools.count(max(1, places_of(call) - last), step):
                left = at
                before.clear()
                sys.settrace(stop)
                try:
                    call(client)
                except KeyboardInterrupt:
                    stopped += 1
                except RuntimeError as exc:  # threading's own, of 3.11: a lock that it has lost
                    assert "lock" in str(exc), exc
                finally:
                    sys.settrace(None)
                assert held(client) == 2
                if left > 0:
                    break
            assert stopped > 20
        # Not active_count: a thread whose start was stopped is counted by threading for ever, whether it runs or not.
        while sum(thread.is_alive() for thread in threading.enumerate()) > 2:
            gc.collect()
            time.sleep(0.01)
    """
    ended = python(code, served.address, check=False, seconds=150)
    assert (ended.stdout, ended.returncode) == ("", 0), ended.stderr


def test_what_would_wait_for_itself_is_refused(served: Served) -> None:
    with aipod.SyncClient(served.address) as client:

        async def items() -> AsyncIterator[bytes]:
            client.predict(b"")
            yield b""

        def plain() -> Iterator[bytes]:
            yield bytes(client.predict(b"abc")["size"])

        with pytest.raises(aipod.UsageError, match="wait for itself"):
            client.predict(items())
        assert client.predict(plain())["size"] == 3  # in a thread of its own it may


def test_payloads_may_wait_for_each_other_and_for_calls_of_their_client(served: Served) -> None:
    """However many there are: none holds a thread that another has need of.

    Mutant seen: they are read in the threads that asyncio has for everything, of which there are 32 at most.
    """
    callers = 40
    together = threading.Barrier(callers)
    with aipod.SyncClient(served.address) as client, ThreadPoolExecutor(callers) as threads:

        def pieces() -> Iterator[bytes]:
            together.wait(30)
            client.predict(iter([b"inner"]))
            yield b"outer"

        done = [threads.submit(client.predict, pieces()) for _ in range(callers)]
        assert [one.exception(60) for one in done] == [None] * callers
    wait_until(lambda: not [one for one in threading.enumerate() if one.name.startswith("aipod-payload")])


def test_calls_under_way_end_as_lost_ones_when_another_thread_closes(served: Served, tmp_path: Path) -> None:
    client = aipod.SyncClient(served.address)
    mark, raised = tmp_path / "mark", []

    def call() -> None:
        try:
            client.chaos(b"", metadata=[("x-func-name", "forever")], mark=str(mark), until=str(tmp_path / "go"))
        except aipod.AipodError as exc:
            raised.append(exc)

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: said(mark))
    client.close()
    thread.join(20)
    (tmp_path / "go").touch()
    assert isinstance(raised[0], aipod.JobLost)
    wait_until(lambda: not hosts())
    assert client.predict(b"")["size"] == 0
    client.close()


# trio


def test_trio_beside_a_server_and_an_outer_loop_in_one_process(tmp_path: Path) -> None:
    """Both import trio-asyncio, which replaces asyncio's functions; two clients, one of them of the outer loop."""
    code = """
        import sys, trio, aipod
        from pathlib import Path
        here = Path(sys.argv[1])
        async def main():
            config = aipod.Config(
                model="tests.models_faces:Faces", bind=("unix:" + str(here / "sock"),), spool=str(here / "spool"),
                data=str(here / "data"), reserve=0,
            )
            async with trio.open_nursery() as nursery:
                await nursery.start(aipod.serve, config)
                import trio_asyncio
                async with aipod.TrioClient(config.bind[0]) as one, trio_asyncio.open_loop():
                    async with aipod.TrioClient(config.bind[0]) as two:
                        print((await one.predict(b"1"))["size"], (await two.predict(b"22"))["size"])
                        async def plain():
                            async with aipod.Client(config.bind[0]) as three:
                                return await three.predict(b"333")
                        print((await trio_asyncio.aio_as_trio(plain)())["size"])
                nursery.cancel_scope.cancel()
        trio.run(main)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert (ended.stdout, ended.returncode) == ("1 2\n3\n", 0), ended.stderr


async def test_what_trio_raises_is_in_no_group(served: Served) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x"
        raise KeyError("mine")

    async with aipod.TrioClient(served.address) as client:
        with pytest.raises(KeyError):
            await client.predict(broken())
        with pytest.raises(KeyError):
            async with client.stream("predict", broken()) as call:
                await call.wait()
        with pytest.raises(LookupError, match="body"):
            async with client.stream("predict", forever()) as call:
                raise LookupError("body")


async def forever() -> AsyncIterator[bytes]:
    yield b"x"
    await trio.sleep_forever()


async def test_a_payload_that_does_not_end_is_let_go(served: Served) -> None:
    """Mutants seen: the task that iterates outlives the call; it is not waited for."""
    ended: list[str] = []

    async def items() -> AsyncIterator[bytes]:
        try:
            async for item in forever():
                yield item
        finally:
            ended.append("let go")

    async with aipod.TrioClient(served.address) as client:
        with trio.move_on_after(0.5) as scope:
            await client.predict(items())
        assert scope.cancelled_caught
        assert ended == ["let go"]


async def test_an_answer_that_comes_all_the_same_is_given_although_the_scope_is_cancelled() -> None:
    """Mutant seen: what is cancelled raises, whatever has come."""
    host = Host(lambda: None)
    begun = threading.Event()
    answers: list[str] = []

    async def too_late() -> str:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "answer"
        raise AssertionError

    async def call() -> None:
        answers.append(await run_in_trio(host, too_late))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            while not begun.is_set():
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert answers == ["answer"]
    thread = host.leave()
    assert thread is not None
    thread.join(20)


@pytest.mark.parametrize("face", ["sync", "trio"])
def test_what_is_left_after_its_client_begins_no_thread(served: Served, tmp_path: Path, face: str) -> None:
    """Mutant seen: an iterator that is closed last asks in a new one (as it did in trio)."""
    gate: Any = {"mark": str(tmp_path / "mark"), "until": str(tmp_path / "go")}

    async def in_trio() -> None:
        async with aipod.TrioClient(served.address) as client:
            events = (await client.submit("forever", **gate)).events()
            await anext(events)
        await events.aclose()
        assert hosts() == [], "while the client is there"

    if face == "trio":
        trio.run(in_trio)
    else:
        with aipod.SyncClient(served.address) as client:
            events = client.submit("forever", **gate).events()
            next(events)
        events.close()
        assert hosts() == [], "while the client is there"
    (tmp_path / "go").touch()


def test_clients_of_several_trio_runs_one_after_the_other(served: Served) -> None:
    client = aipod.TrioClient(served.address)

    async def main() -> int:
        size: int = (await client.predict(b"x"))["size"]
        return size

    assert [trio.run(main) for _ in range(2)] == [1, 1]

    async def close() -> None:
        client.close()

    trio.run(close)
    wait_until(lambda: not hosts())


# Several addresses


def test_a_job_is_asked_for_where_it_is_and_not_where_new_ones_go(serve: Serve, tmp_path: Path) -> None:
    """Mutant seen: it is found all the same, but by asking the others first."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = (serve(MODEL, directory=tmp_path / name) for name in ("one", "two"))

    async def main() -> None:
        async with open_proxy(one.port) as near, open_proxy(two.port) as far:
            async with aipod.Client([near.address, far.address]) as client:
                job = await client.submit("echo", b"here")
                near.cut()
                assert await client.predict(iter([b"x"])) == {"size": 1, "kwargs": {}}
                assert far.connections == 1  # new jobs go there now
                assert await job.wait() == b"here"
                assert job._misses == 0
                await job.release()

    run(main)


# One definition


def test_help_shows_real_signatures() -> None:
    assert "version: 'str' = ''" in str(inspect.signature(aipod.SyncClient.predict))
    assert inspect.signature(aipod.SyncClient.submit).return_annotation == "SyncJob"
    assert inspect.signature(aipod.TrioClient.stream).return_annotation == "TrioCall"
    assert "for event in job.events():" in (aipod.SyncClient.attach(aipod.SyncClient(), bytes(16)).events.__doc__ or "")


# Parts


def test_the_rate_of_a_transfer_is_smoothed_and_begins_with_its_phase() -> None:
    """Mutants seen: no smoothing; a new connection's lower place counted as progress; the last phase's rate."""
    rate = Rate()
    assert rate.note("RECEIVING", 0, 0.0) == 0.0
    assert rate.note("RECEIVING", 50, 0.05) == 0.0  # too soon
    assert rate.note("RECEIVING", 1000, 1.0) == 1000.0
    assert 1000 < rate.note("RECEIVING", 3000, 2.0) < 1500
    before = rate.note("RECEIVING", 4000, 3.0)
    assert rate.note("RECEIVING", 2000, 4.0) == before  # connected again
    assert rate.note("RECEIVING", 2000, 10.0) < before / 2
    assert rate.note("DONE", 10**9, 11.0) == 0.0


def test_of_two_events_of_a_phase_the_newer_one_is_told_with_the_log_of_both() -> None:
    """Mutant seen: the log of the newer one alone."""
    first, second = Event("RUNNING", progress=0.1, log="a\n"), Event("RUNNING", progress=0.2, log="b\n")
    assert merged(first, second) == Event("RUNNING", progress=0.2, log="a\nb\n")
    assert merged(Event("QUEUED"), first) is None


async def test_a_flow_that_is_not_what_was_stored_says_so_at_its_end() -> None:
    """Mutants seen: the digest is not compared; nor is what a later connection tells of."""
    taken: list[bytes] = []

    async def pour(data: bytes) -> None:
        taken.append(data)

    async def nothing(*_: Any) -> None:
        return None

    def tell(**_: Any) -> None: ...

    state = State(size=3, digest=bytes(16))
    flow = Flow(state, pour)
    with pytest.raises(aipod.AipodError, match="not the one that was stored") as torn:
        await flow.carry(state, Raw(data=frame(b"abc", 1), last=True), nothing, nothing, tell)
    assert torn.value.reason == "BAD_ANSWER"
    with pytest.raises(aipod.AipodError, match="another one than before"):
        await flow.carry(State(size=4, digest=bytes(16)), None, nothing, nothing, tell)
    assert taken == [b"abc"]
