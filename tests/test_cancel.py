"""A caller that leaves cancels its job, and the method really ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import aipod
from tests import stranger
from tests.calls import marked, own
from tests.conftest import Served, alive, children, left_in, run, wait_until

GRACE = 0.5


def served_with(model: str, directory: Path) -> Iterator[Served]:
    served = Served(f"tests.models_lifecycle:{model}", directory, ("--cancel-grace", str(GRACE)), "127.0.0.1:0")
    try:
        yield served
        below = children(served.process.pid)
        assert served.stop() == 0, served.log_text()
        assert left_in(served.spool) == []
        assert not any(map(alive, below))
        assert "Traceback" not in served.log_text()
    finally:
        served.process.kill()
        served.process.communicate()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served_with("Work", tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served_with("Together", tmp_path_factory.mktemp("together"))


def leave_plain(served: Served, method: str, mark: Path, **kwargs: str) -> None:
    """A stock client starts a call, and closes its connection while the method runs."""
    rpc = method if method in stranger.RPCS else "chaos"
    with stranger.open_channel(served.address) as channel:
        first = stranger.first_message(rpc, {"mark": str(mark), **kwargs})
        call = stranger.start(channel, rpc, iter([first]), metadata=[("x-func-name", method)])
        marked(mark)
        call.cancel()


def leave_own(served: Served, method: str, mark: Path, **kwargs: str) -> None:
    """aipod's own client is cancelled while the method runs."""

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            kwargs["mark"] = str(mark)
            metadata = [("x-func-name", method)]
            call = (
                client.predict(kwargs=kwargs) if method == "predict" else client.chaos(kwargs=kwargs, metadata=metadata)
            )
            task = asyncio.create_task(call)
            while not mark.exists():
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main)


Leave = Callable[..., None]
both = pytest.mark.parametrize("leave", [leave_plain, leave_own], ids=["plain", "own"])


def cancelled(mark: Path) -> bool:
    """Wait until the method says that it was cancelled: well within the two seconds."""
    return bool(wait_until(lambda: mark.read_text() == "cancelled", seconds=2))


@both
def test_a_method_in_a_worker_sees_it_and_the_worker_goes_on(work: Served, tmp_path: Path, leave: Leave) -> None:
    worker = own(work.address, "chaos")
    leave(work, "predict", tmp_path / "mark", until=str(tmp_path / "never"))
    assert cancelled(tmp_path / "mark")
    assert own(work.address, "chaos") == worker


@both
@pytest.mark.parametrize("method", ["stubborn", "hold"])
def test_a_worker_that_does_not_obey_is_ended_and_replaced(
    work: Served, tmp_path: Path, leave: Leave, method: str
) -> None:
    """It says before that where it is, also while it holds the GIL."""
    leave(work, method, tmp_path / "mark", **({"seconds": 60} if method == "hold" else {}))
    worker = int((tmp_path / "mark").read_text())
    wait_until(lambda: not alive(worker), seconds=2 * GRACE + 2)
    assert own(work.address, "chaos") != worker
    assert f"in {method}\n" in work.log_text()


def test_a_worker_that_ignores_sigterm_is_killed(work: Served, tmp_path: Path) -> None:
    leave_plain(work, "deaf", tmp_path / "mark")
    worker = int((tmp_path / "mark").read_text())
    wait_until(lambda: not alive(worker), seconds=2 * GRACE + 2)
    assert own(work.address, "chaos") != worker


@both
@pytest.mark.parametrize("method", ["with_trio", "with_asyncio", "in_thread"])
def test_a_method_in_the_server_is_cancelled(together: Served, tmp_path: Path, leave: Leave, method: str) -> None:
    leave(together, method, tmp_path / "mark")
    assert cancelled(tmp_path / "mark")
    assert own(together.address, "chaos") == together.process.pid


@both
def test_nothing_of_a_cancelled_job_is_left(work: Served, tmp_path: Path, leave: Leave) -> None:
    leave(work, "predict", tmp_path / "mark", until=str(tmp_path / "never"))
    wait_until(lambda: all(name.startswith("workers") for name in left_in(work.spool)), seconds=5)


def test_a_call_whose_deadline_passes(work: Served, tmp_path: Path) -> None:
    kwargs = {"mark": str(tmp_path / "mark"), "until": str(tmp_path / "never")}
    with pytest.raises(aipod.JobCancelled) as caught:
        own(work.address, "predict", timeout=0.5, kwargs=kwargs)
    assert caught.value.reason == "DEADLINE_EXCEEDED"
    assert cancelled(tmp_path / "mark")
