"""What a model does to its job, its process or its server costs that job only."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

import aipod
from aipod.config import Config
from aipod.errors import JobFailed, ModelError
from aipod.server import FILES_PER_CONNECTION, _with_room
from aipod.wire.ai import Op
from tests import stranger, wire
from tests.calls import calls, marked, own, plain
from tests.conftest import ROOT, Serve, Served, alive, children, left_in, run, wait_until
from tests.models_hostile import dig

MODELS = "tests.models_hostile"


def served_with(model: str, directory: Path) -> Iterator[Served]:
    served = Served(f"{MODELS}:{model}", directory, ("--cancel-grace", "1"), "127.0.0.1:0")
    try:
        yield served
        assert served.stop() == 0, served.log_text()
        assert left_in(served.spool) == []
        assert [path.name for path in served.data.glob(".*")] == []
        assert "a bug of aipod" not in served.log_text()
    finally:
        served.process.kill()
        served.process.communicate()


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served_with("InProcess", tmp_path_factory.mktemp("process"))


@pytest.fixture(scope="module")
def on_loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served_with("OnLoop", tmp_path_factory.mktemp("loop"))


def serves_on(served: Served) -> None:
    """It serves, and nothing is left of the jobs before."""
    assert own(served.address, "chaos", b"abc") == 3
    wait_until(lambda: all(name.startswith("workers") for name in left_in(served.spool)))
    assert [path.name for path in served.data.glob(".*")] == []


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("remove_entry", "RESULT_NOT_STORED"),
        ("remove_entry_and_raise", "MODEL_ERROR"),
        ("replace_journal", "RESULT_NOT_STORED"),
        ("replace_journal_and_raise", "MODEL_ERROR"),
        ("mute", "MODEL_ERROR"),
    ],
)
def test_what_a_model_does_to_its_job_is_that_job_s_failure(in_process: Served, method: str, reason: str) -> None:
    with pytest.raises(JobFailed) as caught:
        own(in_process.address, method)
    assert caught.value.reason == reason
    assert plain(in_process.address, method).info.reason == reason
    serves_on(in_process)


def test_what_is_left_of_the_payload_changes_no_outcome(serve: Serve) -> None:
    """DONE stays DONE, and the entry is let go of. Mutant seen: what cannot be removed is an error of the answer's."""
    served = serve(f"{MODELS}:InProcess")

    async def main() -> Any:  # not released, as the answer of a call is
        async with aipod.Client(served.address) as client:
            return await (await client.submit("replace_payload")).wait()

    assert run(main) == 1
    assert plain(served.address, "replace_payload").json() == 1
    wait_until(lambda: len(list(served.spool.glob("*/state"))) == 1)  # the plain client's goes after its answer
    (journal,) = served.spool.glob("*/state")
    assert b"DONE" in journal.read_bytes()
    assert b"FAILED" not in journal.read_bytes()
    serves_on(served)


@pytest.mark.parametrize(
    ("method", "reason"), [("block_journal", "RESULT_NOT_STORED"), ("block_journal_and_raise", "MODEL_ERROR")]
)
def test_a_journal_that_would_be_waited_for(serve: Serve, method: str, reason: str) -> None:
    """A FIFO. Mutant seen: it is opened as if it were a file; its callers, the sweep and SIGTERM wait for ever."""
    served = serve(f"{MODELS}:InProcess", "--tick", "0.1")
    with pytest.raises(JobFailed) as caught:
        own(served.address, method)
    assert caught.value.reason == reason
    assert plain(served.address, method).info.reason == reason
    assert own(served.address, "chaos", b"abc") == 3
    # It cannot be read.
    assert [job["phase"] for job in own(served.address, "aipod.jobs")] == ["RELEASED"]
    assert served.stop() == 0
    again = serve(f"{MODELS}:InProcess")  # which sweeps
    assert own(again.address, "chaos", b"abc") == 3
    assert again.stop() == 0
    damaged = [path.parent for path in served.spool.glob("*/state") if path.is_fifo()]
    assert len(damaged) == 1  # the plain one was removed when its call ended
    for entry in damaged:
        shutil.rmtree(entry)
        entry.with_suffix(".lock").unlink()


def test_a_result_that_has_a_directory_s_place(in_process: Served) -> None:
    with pytest.raises(JobFailed):
        own(in_process.address, "replace_result")
    serves_on(in_process)


def test_a_version_that_is_a_file_is_none(in_process: Served) -> None:
    assert own(in_process.address, "replace_version") is None
    serves_on(in_process)


def test_directories_deeper_than_python_recurses(serve: Serve) -> None:
    served = serve(f"{MODELS}:InProcess")
    with pytest.raises(ModelError):
        own(served.address, "dig", depth=3000)
    serves_on(served)
    assert served.stop() == 0
    # What a server that was killed has left there.
    (served.spool / ".trash-1").mkdir()
    dig(served.spool / ".trash-1", 3000)
    (served.data / f".new-{(served.spool / 'spool-id').read_text().strip()}.{'0' * 32}").write_text("no directory")
    serves_on(serve(f"{MODELS}:InProcess"))


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "GeneratorExit", "BaseException", "SystemExit", "Mute"])
@pytest.mark.parametrize("method", ["with_trio", "with_asyncio", "in_thread"])
def test_whatever_a_method_on_the_loop_raises(on_loop: Served, method: str, kind: str) -> None:
    with pytest.raises(ModelError) as caught:
        own(on_loop.address, method, kind=kind)
    assert caught.value.metadata["type"] == kind
    serves_on(on_loop)


@pytest.mark.parametrize(
    ("model", "kind"),
    [("LoadInterrupted", "KeyboardInterrupt"), ("WarmUpInterrupted", "GeneratorExit"), ("LoadMute", "Mute")],
)
def test_whatever_a_load_raises(serve: Serve, model: str, kind: str) -> None:
    served = serve(f"{MODELS}:{model}")
    for _ in range(2):
        with pytest.raises(JobFailed) as caught:
            own(served.address, "chaos")
        assert (caught.value.reason, caught.value.metadata["type"]) == ("LOAD_FAILED", kind)


@pytest.mark.parametrize(("model", "kind"), [("OnLoop", "KeyboardInterrupt"), ("ThreadCloses", "SystemExit")])
def test_whatever_a_close_raises(serve: Serve, model: str, kind: str) -> None:
    served = serve(f"{MODELS}:{model}")
    own(served.address, "chaos")
    assert served.stop() == 0
    assert f"{kind}\n" in served.log_text()
    assert left_in(served.spool) == []


def test_a_plain_load_on_the_loop_has_its_time_limit(serve: Serve) -> None:
    served = serve(f"{MODELS}:LoadHangs", "--load-timeout", "1")
    with pytest.raises(JobFailed, match="did not load within 1 s") as caught:
        own(served.address, "chaos")
    assert caught.value.reason == "LOAD_FAILED"
    assert "its thread goes on" in served.log_text()
    assert own(served.address, "chaos") == "loaded"
    assert served.stop() == 0


def test_relative_directories_and_a_model_that_changes_the_current_one(serve: Serve, tmp_path: Path) -> None:
    spool, data = (os.path.relpath(tmp_path / name, ROOT) for name in ("spool", "data"))
    served = serve(f"{MODELS}:OnLoop", "--spool", spool, "--data", data)
    own(served.address, "chdir")
    serves_on(served)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="this system cannot limit another process")
def test_no_descriptor_left(serve: Serve, tmp_path: Path) -> None:
    served = serve(f"{MODELS}:InProcess")
    until = tmp_path / "until"
    with calls() as threads, stranger.open_channel(served.address, ("grpc.enable_retries", 0)) as channel:
        running = threads.submit(own, served.address, "wait", mark=str(tmp_path / "mark"), until=str(until))
        marked(tmp_path / "mark")
        assert stranger.reply_of(stranger.start(channel, "chaos", iter([]))).info.reason == "BAD_MESSAGE"
        before = resource.prlimit(
            served.process.pid, resource.RLIMIT_NOFILE, (4, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
        call = stranger.start(channel, "chaos", iter([stranger.first_message("chaos", {})]))
        refused = stranger.reply_of(call)
        assert (refused.code, refused.info.reason) == (StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        details = Status.FromString(refused.trailers["grpc-status-details-bin"]).details
        assert any(detail.Is(RetryInfo.DESCRIPTOR) for detail in details)
        until.touch()
        assert running.result(30) is None  # its journal was open: the outcome needs no descriptor
        assert "could not be stored" not in served.log_text()
        resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, before)
        assert own(served.address, "chaos", b"abc") == 3
    assert "a bug of aipod" not in served.log_text()
    assert served.stop() == 0
    serves_on(serve(f"{MODELS}:InProcess"))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="this system cannot limit another process")
def test_connections_that_cannot_be_accepted_are_one_line_and_come_in_later(serve: Serve) -> None:
    """Mutants seen: asyncio's own loop around accept(), which logs a thousand errors a second; each try is logged.

    Then the first refusal of the server's life, made with no descriptor left. Mutant seen: what it needs is imported
    only then.
    """
    served = serve(f"{MODELS}:InProcess")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with calls() as threads, stranger.open_channel(served.address, ("grpc.enable_retries", 0)) as channel:
        grpc.channel_ready_future(channel).result(timeout=30)
        before = resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (4, hard))
        waiting = [threads.submit(own, served.address, "chaos", b"abc") for _ in range(3)]
        wait_until(lambda: "no connection can be accepted" in served.log_text())
        time.sleep(2.5)  # of tries, one a second
        reply = stranger.reply_of(stranger.start(channel, "chaos", iter([stranger.first_message("chaos", {})])))
        assert (reply.code, reply.info.reason) == (StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert served.log_text().count("no connection can be accepted") == 1
        resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, before)
        assert [future.result() for future in waiting] == [3, 3, 3]
    assert "Traceback" not in served.log_text()


@pytest.mark.parametrize(
    ("files", "wanted", "connections", "jobs"),
    [
        (65536, 1000, 1000, 10_000),
        (1024, 1000, 198, 198),
        (64, 1000, 6, 6),
        (64, 5, 5, 6),
        (8, 1000, 1, 1),
        (1024, 0, 198, 198),
    ],
)
def test_there_are_no_more_connections_and_jobs_than_descriptors_for_them(
    files: int, wanted: int, connections: int, jobs: int
) -> None:
    config = _with_room(Config(max_connections=wanted), files)
    assert (config.max_connections, config.max_jobs) == (connections, jobs)
    assert _with_room(Config(max_connections=wanted), resource.RLIM_INFINITY).max_connections == wanted
    assert _with_room(Config(max_jobs=3), files).max_jobs == min(jobs, 3)


def test_an_upload_takes_no_more_descriptors_than_there_are_for_it(serve: Serve) -> None:
    """Where it does, a server that has as many jobs as it may refuses them. Mutant seen: the bound of before, 4."""
    served = serve("tests.models_resume:Jobs")
    files, uploads = Path(f"/proc/{served.process.pid}/fd"), 20

    async def main() -> None:
        before = len(list(files.iterdir()))
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(uploads):
                call = wire.call(
                    served.address, os.urandom(16), Op.RUN, "count", {"starts": "/dev/null"}, size=2000, epoch=1
                )
                one = await stack.enter_async_context(call)
                await one.chunk(b"x" * 1000, 0, sync=True)
                await one.until(lambda state: state.offset == 1000)
            for_a_moment = uploads
            took = len(list(files.iterdir())) - before + for_a_moment
            assert took <= uploads * FILES_PER_CONNECTION

    run(main)


@pytest.mark.parametrize(
    ("settings", "files", "level"),
    [
        ({}, 20_000, logging.INFO),
        ({"max_connections": 500}, 20_000, logging.INFO),
        ({"max_connections": 5000}, 20_000, logging.WARNING),
        ({"max_connections": 0}, 20_000, logging.WARNING),
        ({"max_jobs": 20_000}, 65_536, logging.WARNING),
        ({}, 65_536, None),
    ],
)
def test_who_has_asked_for_nothing_is_not_warned_of_what_there_is_not(
    caplog: pytest.LogCaptureFixture, settings: dict[str, int], files: int, level: int | None
) -> None:
    """Mutant seen: the first server of a user, with defaults alone, begins with a warning."""
    with caplog.at_level(logging.INFO):
        _with_room(Config(**settings), files)  # type: ignore[arg-type]
    assert [record.levelno for record in caplog.records] == ([] if level is None else [level])


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="this system cannot look at another process's limits")
def test_the_server_raises_its_limit_of_open_files_and_its_workers_do_not(serve: Serve) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
    try:
        served = serve(f"{MODELS}:InProcess")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    assert resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE) == (wanted, hard)
    assert own(served.address, "files") == 600


def test_a_worker_that_has_closed_its_descriptors_does_not_outlive_its_server(serve: Serve, tmp_path: Path) -> None:
    served = serve(f"{MODELS}:InProcess")
    with calls() as threads:
        threads.submit(plain, served.address, "close_descriptors", mark=str(tmp_path / "mark"))
        worker = int(marked(tmp_path / "mark"))
        assert worker in children(served.process.pid)
        served.process.kill()
        served.process.communicate()
        wait_until(lambda: not alive(worker), seconds=10)


def test_a_drain_does_not_wait_until_a_huge_result_is_measured(serve: Serve) -> None:
    served = serve(f"{MODELS}:InProcess", "--drain", "0.1")
    with calls() as threads:
        future = threads.submit(plain, served.address, "sparse")
        wait_until(lambda: list(served.spool.glob("*/res")))
        began = time.monotonic()
        assert served.stop() == 0
        assert time.monotonic() - began < 10
        assert future.result().info.reason == "CANCELLED"
    assert left_in(served.spool) == []
