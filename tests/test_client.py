"""The client when things go wrong: what is tried again, what is not, and that every job is cancelled or right."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import json
import os
import random
import socket
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from grpclib.metadata import encode_timeout

import aipod
from aipod.client import Event
from aipod.client.course import CallDeadline
from aipod.client.failure import BadAnswer
from aipod.client.link import THREADS, Link
from aipod.client.sink import Sink
from aipod.codec import Compressor, digest
from aipod.config import CHUNK
from aipod.packing import BATCH
from aipod.wire.ai import Raw, State
from tests.conftest import Serve, Served, free_port, left_in, run, wait_until
from tests.proxy import Fault, open_proxy

# Random bytes: what goes over the wire is as long as the payload. The server's window is 4 MiB, so that `last` cannot
# have been sent while a proxy has carried 6 MB at most.
PAYLOAD = os.urandom(13_000_000)
ANSWER = {"size": len(PAYLOAD), "sha256": hashlib.sha256(PAYLOAD).hexdigest()}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served("tests.models_faults:Counted", tmp_path_factory.mktemp("server"), (), "127.0.0.1:0")
    yield served
    assert served.stop() == 0, served.log_text()
    assert left_in(served.spool) == []


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    path = tmp_path / "payload"
    path.write_bytes(PAYLOAD)
    return path


def named(method: str) -> list[tuple[str, str]]:
    return [("x-func-name", method)]


def runs(mark: Path) -> int:
    return mark.read_text().count("run") if mark.exists() else 0


def entries(served: Served) -> list[str]:
    """What jobs have left in the spool; workers' files stay until the server ends."""
    try:
        return [name for name in left_in(served.spool) if not name.startswith("workers/")]
    except FileNotFoundError:  # it is being removed this moment
        return ["something"]


def nothing_is_left(served: Served) -> None:
    wait_until(lambda: not entries(served))


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


# --- what is tried again


def test_nothing_listening_is_unreachable_after_all_attempts() -> None:
    attempts: list[Event] = []

    async def main() -> None:
        async with aipod.Client(f"127.0.0.1:{free_port()}", config=aipod.Config(attempts=2)) as client:
            await client.predict(b"x", on_event=attempts.append)

    with pytest.raises(aipod.Unreachable, match=r"127\.0\.0\.1:\d+.*[Cc]onnect") as caught:
        run(main)
    assert caught.value.reason == "UNREACHABLE"
    assert [(event.phase, event.connection) for event in attempts] == [
        ("CONNECTING", 1),
        ("WAITING", 2),
        ("CONNECTING", 2),
    ]
    assert {event.connections for event in attempts} == {2}
    assert attempts[1].message == "Connection refused"
    assert str(caught.value).endswith(": Connection refused")


@pytest.mark.parametrize("cut", [0, 1, 24, 300, 100_000, 3_000_000, 6_000_000])
def test_cut_before_last_is_tried_again_and_the_method_runs_once(
    served: Served, payload: Path, tmp_path: Path, cut: int
) -> None:
    mark = tmp_path / "mark"

    async def main() -> tuple[Any, int]:
        async with open_proxy(served.port, Fault(cut_up=cut)) as proxy, aipod.Client(proxy.address) as client:
            return await client.chaos(payload, mark=str(mark)), proxy.connections

    assert run(main) == (ANSWER, 2)
    assert runs(mark) == 1
    nothing_is_left(served)


def test_a_connection_that_is_cut_every_time_before_an_answer_is_unreachable(
    served: Served, payload: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"

    async def main() -> int:
        async with open_proxy(served.port, *[Fault(cut_down=60)] * 9) as proxy:
            async with aipod.Client(proxy.address, config=aipod.Config(attempts=3)) as client:
                with pytest.raises(aipod.Unreachable, match="no lasting connection"):
                    await client.chaos(payload, mark=str(mark))
                return proxy.connections

    assert run(main) == 3
    assert runs(mark) == 0


def test_the_answer_to_the_first_headers_is_cut_before_last(served: Served, payload: Path, tmp_path: Path) -> None:
    """The server's own words do not arrive either: still only the incomplete request counts."""
    mark = tmp_path / "mark"

    async def main() -> Any:
        async with open_proxy(served.port, Fault(cut_down=60)) as proxy, aipod.Client(proxy.address) as client:
            return await client.chaos(payload, mark=str(mark))

    assert run(main) == ANSWER
    assert runs(mark) == 1


def test_a_server_that_starts_late_is_found_and_an_untouched_iterator_is_sent(serve: Serve) -> None:
    port = free_port()

    async def main() -> Any:
        refused = asyncio.Event()
        async with aipod.Client(f"127.0.0.1:{port}", config=aipod.Config(attempts=20)) as client:
            call = asyncio.create_task(client.chaos(iter([PAYLOAD]), on_event=lambda event: refused.set()))
            await refused.wait()
            await asyncio.to_thread(serve, "tests.models_faults:Counted", bind=f"127.0.0.1:{port}")
            return await call

    assert run(main) == ANSWER


async def never() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


# --- the caller's own mistakes and exceptions


@pytest.mark.parametrize("after", [0, 1, BATCH * 3])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_a_source_raises_reaches_the_caller(served: Served, after: int, asynchronous: bool) -> None:
    class Mine(OSError):  # an OSError: it must not be taken for the network's
        pass

    def pieces() -> Iterator[bytes]:
        for _ in range(after):
            yield PAYLOAD[:CHUNK]
        raise Mine("mine")

    async def apieces() -> AsyncIterator[bytes]:
        for piece in pieces():
            yield piece

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            with pytest.raises(Mine, match="mine"):
                await client.chaos(apieces() if asynchronous else pieces())
            assert (await client.chaos(b"x"))["size"] == 1

    run(main)
    nothing_is_left(served)


@pytest.mark.parametrize("source", [["text"], [b"bytes", 5], "file"])
def test_a_source_of_something_else_than_bytes_is_refused(served: Served, tmp_path: Path, source: Any) -> None:
    async def main() -> None:
        (tmp_path / "text").write_text("text")
        with (tmp_path / "text").open() as file:
            async with aipod.Client(served.address) as client:
                await client.chaos(file if source == "file" else iter(source))

    with pytest.raises(aipod.AipodError, match="not bytes") as caught:
        run(main)
    assert caught.value.reason == "USAGE"
    nothing_is_left(served)


@pytest.mark.parametrize("when", ["CONNECTING", "RECEIVING"])
@pytest.mark.parametrize("change", ["grows", "shrinks", "is written to", "is replaced"])
def test_a_file_that_changes_while_it_is_read_is_noticed(
    served: Served, payload: Path, tmp_path: Path, change: str, when: str
) -> None:
    mark = tmp_path / "mark"

    def alter(event: Event) -> None:
        if event.phase != when:
            return
        if change == "is replaced":
            (tmp_path / "other").write_bytes(PAYLOAD[::-1])
            os.replace(tmp_path / "other", payload)
            return
        with payload.open("r+b") as file:
            if change == "shrinks":
                file.truncate(1_000_000)
                return
            file.seek(0, os.SEEK_END if change == "grows" else os.SEEK_SET)
            file.write(b"more")

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            await client.chaos(payload, mark=str(mark), on_event=alter)

    if (change, when) == ("is replaced", "RECEIVING"):
        run(main)  # the file that was opened is still whole
        return
    with pytest.raises(aipod.UsageError, match=r"changed while it was sent \(it had 13000000 bytes"):
        run(main)
    assert runs(mark) == 0
    nothing_is_left(served)


def test_a_file_of_size_0_is_read_all_the_same(served: Served, tmp_path: Path) -> None:
    content = Path("/proc/filesystems")
    assert content.stat().st_size == 0
    (tmp_path / "empty").touch()

    async def main() -> tuple[Any, Any]:
        async with aipod.Client(served.address) as client:
            return (await client.chaos(content))["sha256"], (await client.chaos(tmp_path / "empty"))["size"]

    assert run(main) == (hashlib.sha256(content.read_bytes()).hexdigest(), 0)


def test_a_non_blocking_file_is_refused(served: Served, tmp_path: Path) -> None:
    """Its read() says None where there is nothing yet: that is not the end."""
    mark = tmp_path / "mark"
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.write(writer, b"a" * 1000)

    async def main() -> None:
        with open(reader, "rb", buffering=0) as file:
            async with aipod.Client(served.address) as client:
                await client.chaos(file, mark=str(mark))

    with pytest.raises(aipod.UsageError, match="non-blocking"):
        run(main)
    os.close(writer)
    assert runs(mark) == 0
    nothing_is_left(served)


@pytest.mark.parametrize("payload", ["/no/such/file", "/", Path("/no/such/file"), 5, None])
def test_no_payload_at_all(served: Served, payload: Any) -> None:
    async def main() -> None:
        async with aipod.Client(served.address) as client:
            await client.chaos(payload)

    with pytest.raises(aipod.AipodError) as caught:
        run(main)
    assert caught.value.reason == "USAGE"


def test_a_file_that_may_not_be_read_is_no_network_failure(served: Served, payload: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    payload.chmod(0)

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            await client.chaos(payload)

    with pytest.raises(PermissionError):
        run(main)


@pytest.mark.parametrize("phase", ["CONNECTING", "RECEIVING", "RUNNING", "DONE"])
def test_what_on_event_raises_reaches_the_caller(served: Served, payload: Path, phase: str) -> None:
    class Mine(OSError):
        pass

    def show(event: Event) -> None:
        if event.phase == phase:
            raise Mine(phase)

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            await client.chaos(payload, on_event=show, metadata=named("slow_echo"), seconds=0.05)

    with pytest.raises(Mine, match=phase):
        run(main)
    nothing_is_left(served)


@pytest.mark.parametrize("target", ["", "localhost", "localhost:", ":50051", "host:port", "host:70000", "unix:"])
def test_wrong_targets(target: str) -> None:
    with pytest.raises(aipod.AipodError) as caught:
        aipod.Client(target)
    assert caught.value.reason == "USAGE"


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kwargs": {"_aipod_bin_size": 5}},
        {"_aipod": 1},
        {"a": object()},
        {"a": float("nan")},
        {"metadata": [("bad name", "x")]},
        {"metadata": [("x-text", "grüße\n")]},
        {"metadata": [("grpc-timeout", "1S")]},
        {"metadata": [("x-text", 5)]},
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(kwargs: dict[str, Any]) -> None:
    async def main() -> None:
        async with aipod.Client(f"127.0.0.1:{free_port()}") as client:
            await client.chaos(b"", **kwargs)

    with pytest.raises(aipod.AipodError) as caught:
        run(main)
    assert caught.value.reason == "USAGE"


def test_kwargs_with_reserved_names_reach_the_method(served: Served) -> None:
    names = {"payload": 1, "metadata": 2, "timeout": 3, "save_to": 4, "on_event": 5, "kwargs": 6}

    async def main() -> Any:
        async with aipod.Client(served.address) as client:
            return await client.chaos(metadata=named("kwargs"), kwargs={**names, "version": "7"}, payload=1)

    assert run(main) == {"kwargs": names, "version": "7"}


def test_where_the_answer_cannot_be_saved_nothing_is_sent(served: Served, payload: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    async def main(save_to: Path) -> None:
        async with aipod.Client(served.address) as client:
            await client.chaos(payload, save_to=save_to, mark=str(mark))

    for save_to in (tmp_path / "missing" / "answer", tmp_path, payload / "answer"):
        with pytest.raises(aipod.AipodError) as caught:
            run(lambda save_to=save_to: main(save_to))
        assert caught.value.reason == "USAGE"
        assert str(save_to.parent if save_to != tmp_path else tmp_path) in str(caught.value)
    assert runs(mark) == 0


def test_a_directory_that_goes_away_meanwhile_is_no_network_failure(served: Served, tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()

    def show(event: Event) -> None:
        if event.phase == "RUNNING" and directory.exists():
            directory.rmdir()

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            await client.chaos(
                b"x", metadata=named("slow_echo"), seconds=0.05, save_to=directory / "answer", on_event=show
            )

    with pytest.raises(FileNotFoundError):
        run(main)
    nothing_is_left(served)


# --- what the answer is saved to


def save(
    served: Served, target: Path, *, length: int = 1_000_000, config: aipod.Config | None = None, **more: Any
) -> Any:
    async def main() -> Any:
        async with aipod.Client(served.address, config=config) as client:
            return await client.chaos(metadata=named("random"), length=length, save_to=target, **more)

    return run(main)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_what_it_points_to_is_replaced(served: Served, tmp_path: Path, there: bool) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    if there:
        target.write_text("old")
    link.symlink_to("target")
    assert save(served, link) == link
    assert link.is_symlink()
    assert target.stat().st_size == 1_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_a_device_is_written_to(served: Served, tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        device.open("wb").close()
    except PermissionError:
        pytest.skip("needs root, and a file system with devices")
    save(served, device)
    assert device.is_char_device()
    full = tmp_path / "full"
    os.mknod(full, 0o600 | stat.S_IFCHR, os.makedev(1, 7))
    with pytest.raises(OSError, match="No space left"):
        save(served, full)
    assert full.is_char_device()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "null"]


def test_a_fifo_is_written_to_whenever_its_reader_comes(served: Served, tmp_path: Path) -> None:
    """Later than the silence that the server is allowed, here: it is not the server that is waited for."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def read() -> bytes:
        time.sleep(1)
        return fifo.read_bytes()

    with concurrent.futures.ThreadPoolExecutor() as threads:
        reader: list[concurrent.futures.Future[bytes]] = []

        def show(event: Event) -> None:
            if event.received == 1_000_000:
                reader.append(threads.submit(read))

        save(served, fifo, on_event=show, config=aipod.Config(silence=0.5))
        assert len(reader[0].result(30)) == 1_000_000
    assert fifo.is_fifo()
    assert list(tmp_path.iterdir()) == [fifo]


@pytest.mark.parametrize("end", ["timeout", "cancelled"])
@pytest.mark.parametrize("reads", [True, False])
def test_a_fifo_that_nobody_empties_does_not_hold_the_caller(
    served: Served, tmp_path: Path, end: str, reads: bool
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK) if reads else None

    async def main() -> None:
        arrived = asyncio.Event()
        async with aipod.Client(served.address) as client:
            call = asyncio.create_task(
                client.chaos(
                    metadata=named("random"),
                    length=1_000_000,
                    save_to=fifo,
                    timeout=2 if end == "timeout" else None,
                    on_event=lambda event: arrived.set() if event.received == 1_000_000 else None,
                )
            )
            await arrived.wait()
            if end == "timeout":
                with pytest.raises(aipod.JobCancelled):
                    await call
            else:
                await asyncio.sleep(0.2)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call

    run(main, timeout=20)
    if reader is not None:
        os.close(reader)


def test_a_reader_that_goes_away_is_told(served: Served, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with concurrent.futures.ThreadPoolExecutor() as threads:

        def read() -> None:
            with fifo.open("rb", buffering=0) as file:
                file.read(10)

        reading = threads.submit(read)
        with pytest.raises(aipod.AipodError, match="went away") as caught:
            save(served, fifo)
        reading.result(30)
    assert caught.value.reason == "NOT_SAVED"


def test_a_socket_is_no_place_for_an_answer(served: Served, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        with pytest.raises(aipod.UsageError, match="is a socket"):
            save(served, tmp_path / "socket")


def test_receiving_makes_no_task_per_message(served: Served, tmp_path: Path) -> None:
    """The cost of a chunk is in reading it, not in watching for it."""

    async def count(length: int) -> int:
        names: list[str] = []

        def make(loop: asyncio.AbstractEventLoop, coro: Any, **more: Any) -> asyncio.Task[Any]:
            names.append(coro.__qualname__)
            return asyncio.Task(coro, loop=loop, **more)

        async with aipod.Client(served.address) as client:
            await client.chaos(b"x")  # connected
            asyncio.get_running_loop().set_task_factory(make)
            await client.chaos(metadata=named("random"), length=length, save_to=tmp_path / "answer")
            asyncio.get_running_loop().set_task_factory(None)
        return len(names)

    assert run(lambda: count(2 * CHUNK)) == run(lambda: count(30 * CHUNK))


# --- the end that the caller sets


def test_a_timeout_cancels_the_job(served: Served, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            await client.chaos(b"x", metadata=named("patient"), mark=str(mark), timeout=1.0)

    began = time.monotonic()
    with pytest.raises(aipod.JobCancelled) as caught:
        run(main)
    assert caught.value.reason == "DEADLINE_EXCEEDED"
    assert 1 <= time.monotonic() - began < 20
    wait_until(lambda: mark.read_text() == "cancelled")
    nothing_is_left(served)


def test_a_server_is_given_the_whole_timeout() -> None:
    """Mutant seen: grpclib's own deadline, of which the fraction of a second is cut off."""
    told = [encode_timeout(CallDeadline.from_timeout(seconds).time_remaining()) for seconds in (14, 13.2, 10.5)]
    assert told == ["14S", "14S", "11S"]
    assert encode_timeout(CallDeadline.from_timeout(5).time_remaining())[-1] == "m"


@pytest.mark.parametrize("where", ["nobody listens", "no answer", "zero"])
def test_a_timeout_covers_everything_else_too(where: str) -> None:
    """The pauses between attempts, and a server that accepts but never says anything."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = free_port() if where == "nobody listens" else silent.getsockname()[1]
            async with aipod.Client(f"127.0.0.1:{port}", config=aipod.Config(attempts=100)) as client:
                await client.predict(b"", timeout=0 if where == "zero" else 0.3)

    began = time.monotonic()
    with pytest.raises(aipod.JobCancelled) as caught:
        run(main)
    assert caught.value.reason == "DEADLINE_EXCEEDED"
    assert time.monotonic() - began < 20


def test_the_callers_own_timeout_and_groups_work_around_a_failed_call() -> None:
    """grpclib ends waits by cancelling the task; asyncio counts cancellations."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            async with aipod.Client(address, config=aipod.Config(attempts=1)) as client:
                async with asyncio.timeout(0.5):
                    with pytest.raises(aipod.JobCancelled):
                        await client.predict(b"", timeout=0.1)
                    task = asyncio.current_task()
                    assert task is not None
                    assert task.cancelling() == 0
                    await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        run(main)


def test_cancelling_the_task_cancels_the_job(served: Served, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            call = asyncio.create_task(client.chaos(b"x", metadata=named("patient"), mark=str(mark)))
            await until(mark.exists)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await until(lambda: mark.read_text() == "cancelled")
            assert (await client.chaos(b"x"))["size"] == 1  # the same connection goes on

    run(main)
    nothing_is_left(served)


def test_cancelling_during_the_upload_leaves_nothing(served: Served) -> None:
    async def main() -> None:
        async with aipod.Client(served.address) as client:
            started = asyncio.Event()

            async def pieces() -> AsyncIterator[bytes]:
                yield PAYLOAD
                yield PAYLOAD
                started.set()
                await asyncio.Event().wait()

            call = asyncio.create_task(client.chaos(pieces()))
            await started.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    run(main)
    nothing_is_left(served)


# --- one client, many calls, several connections


def test_many_calls_at_once_over_one_connection(served: Served) -> None:
    async def main() -> int:
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address) as client:
            sizes = range(50)
            async with asyncio.TaskGroup() as group:
                calls = [group.create_task(client.chaos(PAYLOAD[:size])) for size in sizes]
            assert [call.result()["size"] for call in calls] == list(sizes)
            return proxy.connections

    assert run(main) == 1


def test_a_client_finds_a_server_that_was_started_again(serve: Serve) -> None:
    port = free_port()

    async def main() -> None:
        first = await asyncio.to_thread(serve, "tests.models_faults:Counted", bind=f"127.0.0.1:{port}")
        async with aipod.Client(first.address) as client:
            assert (await client.chaos(b"x"))["size"] == 1
            assert await asyncio.to_thread(first.stop) == 0
            await asyncio.to_thread(serve, "tests.models_faults:Counted", bind=f"127.0.0.1:{port}")
            assert (await client.chaos(b"xy"))["size"] == 2

    run(main)


def test_a_draining_server_finishes_what_it_has(serve: Serve, tmp_path: Path) -> None:
    """Its GOAWAY comes at the end of the drain; the job under way gets its answer, later ones are refused."""
    first = serve("tests.models_faults:Counted")

    async def main() -> None:
        async with aipod.Client(first.address, config=aipod.Config(attempts=1)) as client:
            running = asyncio.Event()
            call = asyncio.create_task(
                client.chaos(
                    b"x",
                    metadata=named("slow_echo"),
                    seconds=1,
                    on_event=lambda event: running.set() if event.phase == "RUNNING" else None,
                )
            )
            await running.wait()
            first.process.terminate()
            await until(lambda: "draining" in first.log_text())
            async with aipod.Client(first.address, config=aipod.Config(attempts=1)) as other:
                with pytest.raises(aipod.Refused) as caught:
                    await other.chaos(b"x")
            assert caught.value.reason == "DRAINING"
            assert await call == b"x"

    run(main)
    first.process.communicate(timeout=30)
    assert first.process.returncode == 0


def test_metadata_that_no_server_takes_is_not_sent(served: Served) -> None:
    """It would end the connection, with the other calls on it."""

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            most = [("x-long", "x" * (14 * 1024 - 38))]
            assert (await client.chaos(b"xy", metadata=most))["size"] == 2
            more = [("x-long", most[0][1] + "x")]
            with pytest.raises(aipod.UsageError, match="14337 bytes of metadata; at most 14336"):
                await client.chaos(b"xy", metadata=more)
            with pytest.raises(aipod.UsageError, match="metadata"):
                await client.submit("chaos", metadata=more)

    run(main)


def test_close_ends_calls_and_the_next_call_connects_again(served: Served, tmp_path: Path) -> None:
    """The jobs go on for their grace time: whoever has the ticket finds them."""
    mark, ticket, other = tmp_path / "mark", tmp_path / "ticket", tmp_path / "other"

    async def main() -> int:
        async with open_proxy(served.port) as proxy, aipod.Client(proxy.address) as client:
            committed = asyncio.create_task(
                client.chaos(b"x", metadata=named("patient"), ticket_file=ticket, mark=str(mark))
            )
            await until(mark.exists)
            heard = asyncio.Event()
            uploading = asyncio.create_task(
                client.chaos(
                    never(), ticket_file=other, on_event=lambda event: event.phase == "RECEIVING" and heard.set()
                )
            )
            await heard.wait()
            client.close()
            with pytest.raises(aipod.JobLost):
                await committed
            with pytest.raises(aipod.Unreachable):
                await uploading
            for file in (ticket, other):
                await client.attach(json.loads(file.read_text())["ticket"]).cancel()
            await until(lambda: mark.read_text() == "cancelled")
            assert (await client.chaos(b"x"))["size"] == 1
            return proxy.connections

    assert run(main) == 2


def test_a_call_does_not_outlive_its_client() -> None:
    """Between two attempts there is no connection to close: the pause must end the call."""

    async def main() -> None:
        tried = asyncio.Event()
        client = aipod.Client(f"127.0.0.1:{free_port()}", config=aipod.Config(attempts=100))
        async with client:
            call = asyncio.create_task(client.predict(b"x", on_event=lambda event: tried.set()))
            await tried.wait()
        with pytest.raises(aipod.Unreachable):
            await call
        assert client._link._channel is None

    run(main)


# --- a wrong answer is never returned


@pytest.mark.parametrize("flip", [1_000, 100_000, 700_000, 1_048_700, 2_000_000])
def test_a_corrupt_answer_is_never_returned(served: Served, tmp_path: Path, flip: int) -> None:
    """It is fetched again, over another connection where this one was of no use any more."""
    config = aipod.Config(silence=2)

    async def main() -> Any:
        async with open_proxy(served.port, Fault(flip_down=flip)) as proxy:
            async with aipod.Client(proxy.address, config=config) as client:
                metadata = named("seeded")
                return await client.chaos(metadata=metadata, length=4_000_000, save_to=tmp_path / "answer")

    saved = run(main)
    assert saved.read_bytes() == random.Random(0).randbytes(4_000_000)
    assert list(tmp_path.iterdir()) == [saved]
    nothing_is_left(served)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("wrong", ["digest", "size", "offset", "chunk", "nothing"])
def test_an_answer_is_checked_against_what_was_stored(tmp_path: Path, save: bool, wrong: str) -> None:
    """I4. Mutant seen: the digest is not compared."""
    frame = Compressor(1).frame(b"answer")
    state = State(size=6, digest=digest(b"answer"), content_type="application/octet-stream")
    message = Raw(data=frame, offset=0, last=True)
    if wrong == "digest":
        state.digest = digest(b"Answer")
    elif wrong == "size":
        state.size = 7
    elif wrong == "offset":
        message.offset = 3
    elif wrong == "chunk":
        message.data = frame[:-1]
    sink = Sink(state, tmp_path / "answer" if save else None)

    def take() -> Any:
        sink.add(message)
        return sink.finish()

    if wrong == "nothing":
        assert take() == (tmp_path / "answer" if save else b"answer")
    else:
        with pytest.raises(BadAnswer):
            take()
        sink.discard()
        assert list(tmp_path.iterdir()) == []


def test_a_client_has_few_threads_and_they_end_with_it() -> None:
    """Each has a heap that stays. Mutant seen: asyncio's threads, which are many."""
    together = threading.Barrier(THREADS)

    def work() -> threading.Thread:
        together.wait(10)
        return threading.current_thread()

    async def main() -> None:
        link = Link("127.0.0.1:1", aipod.Config())
        for _ in range(2):  # who has closed it may use it again
            threads = set(await asyncio.gather(*(link.in_thread(work) for _ in range(4 * THREADS))))
            assert len(threads) == THREADS
            link.close()
            await asyncio.to_thread(lambda threads=threads: [thread.join(10) for thread in threads])
            assert not any(thread.is_alive() for thread in threads)

    run(main)


def test_payloads_that_wait_for_another_call_do_not_keep_its_file_from_being_sent(
    served: Served, payload: Path
) -> None:
    """Mutant seen: whatever is read is read in the client's own threads, of which there are few."""
    others, go = threading.Semaphore(0), threading.Event()

    def waiting() -> Iterator[bytes]:
        others.release()
        assert go.wait(30)
        yield b"x"

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            calls = [asyncio.create_task(client.chaos(waiting())) for _ in range(THREADS + 1)]
            for _ in calls:
                await asyncio.to_thread(others.acquire, timeout=30)
            try:
                async with asyncio.timeout(20):
                    assert await client.chaos(payload) == ANSWER
            finally:
                go.set()
            assert [answer["size"] for answer in await asyncio.gather(*calls)] == [1] * len(calls)

    run(main)
    nothing_is_left(served)
