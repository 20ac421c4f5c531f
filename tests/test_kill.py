"""kill -9 of the server or of a worker: no process is left, nothing is locked, and the next one starts clean."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from aipod.errors import JobFailed, JobLost
from aipod.spool import Journal
from tests import stranger
from tests.calls import calls, marked, own, plain, plain_version
from tests.conftest import Serve, Served, alive, children, left_in, wait_until

WORK = "tests.models_lifecycle:Work"


def kill(served: Served) -> None:
    """kill -9; the kernel ends the workers, and what they have started."""
    below = children(served.process.pid)
    served.process.kill()
    served.process.communicate()
    wait_until(lambda: not any(map(alive, below)), seconds=2)


def is_held(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def running_job(served: Served) -> dict[str, str]:
    """The journal of the only entry."""
    (state,) = served.spool.glob("*/state")
    return Journal(state).read()


@pytest.mark.parametrize("method", ["hold", "burn", "forks"])
def test_a_killed_server_leaves_no_process_and_the_next_one_starts_clean(
    serve: Serve, tmp_path: Path, method: str
) -> None:
    served = serve(WORK)
    mark = tmp_path / "mark"
    with calls() as threads:
        kwargs = {"mark": str(mark)} if method == "forks" else {"mark": str(mark), "seconds": 60}
        future = threads.submit(plain, served.address, method, **kwargs)
        pids = [int(pid) for pid in marked(mark).split()]
        assert set(pids) <= set(children(served.process.pid))
        state = running_job(served)
        assert state["phase"] == "RUNNING"
        lock = served.spool / "workers" / f"{state['worker']}.lock"
        assert is_held(lock)
        kill(served)
        assert future.result().code is grpc.StatusCode.UNAVAILABLE
    # Its main thread may be gone a moment before the others, which hold it too.
    wait_until(lambda: not is_held(lock), seconds=2)
    after = serve(WORK)
    wait_until(lambda: left_in(after.spool) == [])
    assert plain(after.address, "turn").json() == 0
    assert [path.name for path in (after.spool / "workers").iterdir()] != [lock.name]


def test_a_server_killed_during_an_own_clients_job(serve: Serve, tmp_path: Path) -> None:
    served = serve(WORK)
    with calls() as threads:
        future = threads.submit(own, served.address, "hold", mark=str(tmp_path / "mark"), seconds=60)
        marked(tmp_path / "mark")
        kill(served)
        with pytest.raises(JobLost):
            future.result()
    after = serve(WORK)
    assert own(after.address, "turn") == 0
    # A ticketed entry waits for its client until its time is over; here nobody will come.
    kill(after)


def test_a_server_killed_while_a_payload_arrives(serve: Serve) -> None:
    served = serve(WORK)
    with socket.socket() as idle, stranger.open_channel(served.address) as channel, calls() as threads:
        idle.connect(("127.0.0.1", served.port))

        def pieces() -> Iterator[Any]:
            yield stranger.first_message("chaos", {})
            yield from stranger.more_messages("chaos", stranger.shaped(os.urandom(3_000_000), "frames"))
            served.process.wait()

        future = threads.submit(stranger.reply_of, stranger.start(channel, "chaos", pieces(), timeout=60))
        wait_until(lambda: any(path.stat().st_size >= 3_000_000 for path in served.spool.glob("*/in")))
        kill(served)
        assert future.result().code is grpc.StatusCode.UNAVAILABLE
    assert left_in(served.spool) != []
    after = serve(WORK)
    wait_until(lambda: left_in(after.spool) == [])
    assert plain(after.address, "turn").json() == 0


def test_a_server_killed_during_a_train_leaves_the_old_version(serve: Serve, tmp_path: Path) -> None:
    served = serve(WORK)
    assert plain_version(served.address, "train", "v", b"old").json() == "trained"
    with calls() as threads:
        mark = tmp_path / "mark"
        threads.submit(plain_version, served.address, "train", "v", b"new", mark=str(mark))
        marked(mark)
        assert len(list(served.data.glob(".new-*"))) == 1
        kill(served)
    after = serve(WORK)
    assert plain_version(after.address, "log", "v").json() == "old"
    assert [path.name for path in after.data.iterdir() if not path.name.startswith("closed-")] == ["v"]


def test_a_killed_worker_costs_its_own_job_only(serve: Serve, tmp_path: Path) -> None:
    served = serve(WORK, "--instances", "2")
    with calls() as threads:
        marks = {name: tmp_path / name for name in ("own", "plain", "other")}
        until = str(tmp_path / "until")
        other = threads.submit(own, served.address, "predict", mark=str(marks["other"]), until=until)
        marked(marks["other"])
        for name, call in (("own", own), ("plain", plain)):
            future = threads.submit(call, served.address, "hold", mark=str(marks[name]), seconds=60)
            pid = int(marked(marks[name]))
            waiting = threads.submit(own, served.address, "chaos")
            os.kill(pid, signal.SIGKILL)
            if name == "own":
                with pytest.raises(JobFailed, match="SIGKILL") as caught:
                    future.result()
                assert (caught.value.reason, caught.value.metadata) == ("WORKER_CRASHED", {"signal": "SIGKILL"})
            else:
                reply = future.result()
                assert reply.code is grpc.StatusCode.INTERNAL
                assert (reply.info.reason, dict(reply.info.metadata)) == ("WORKER_CRASHED", {"signal": "SIGKILL"})
            # The next one in line gets a worker of its own.
            assert alive(waiting.result())
        Path(until).touch()
        assert other.result() == "done"


def test_a_worker_that_dies_while_it_is_idle_is_noticed_by_nobody(serve: Serve) -> None:
    served = serve(WORK)
    pid = own(served.address, "chaos")
    os.kill(pid, signal.SIGKILL)
    assert own(served.address, "chaos") != pid
