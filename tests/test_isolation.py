"""What a job does to its worker is that job's own affair, and nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import aipod
from tests.calls import calls, marked, own
from tests.conftest import FIRST, Serve, alive, children, left_in, run, wait_until

MODEL = "tests.models_crash:Fragile"
JOBS, AT_ONCE, INSTANCES = 500 if FIRST else 160, 24, 4
CRASHES = {
    "null pointer": ("the worker process was killed by SIGSEGV", {"signal": "SIGSEGV"}),
    "kill": ("the worker process was killed by SIGKILL (out of memory?)", {"signal": "SIGKILL"}),
    "exit": ("the worker process exited with status 3", {"exit": "3"}),
    "abort": ("the worker process was killed by SIGABRT", {"signal": "SIGABRT"}),
}
ERRORS = {"raise": ("ValueError", "it said so"), "sys.exit": ("SystemExit", "4")}


def test_500_jobs_of_which_one_in_twenty_crashes_end_each_in_its_own_state(serve: Serve) -> None:
    served = serve(MODEL, "--instances", str(INSTANCES))
    pid, dice = served.process.pid, random.Random(5)
    hows = [how for how in CRASHES for _ in range(JOBS // 20 // len(CRASHES) + 1)]
    hows += [how for how in ERRORS for _ in range(10)]
    hows += ["well"] * (JOBS - len(hows))
    dice.shuffle(hows)

    async def job(client: aipod.Client, turns: asyncio.Semaphore, how: str) -> None:
        async with turns:
            payload = dice.randbytes(dice.randrange(30_000))
            call = client.predict(payload, how=how)
            if how in CRASHES:
                with pytest.raises(aipod.Interrupted) as crash:
                    await call
                error = crash.value
                assert (error.reason, error.message, error.metadata) == ("WORKER_CRASHED", *CRASHES[how])
            elif how in ERRORS:
                with pytest.raises(aipod.ModelError) as raised:
                    await call
                assert (raised.value.metadata["type"], raised.value.message) == ERRORS[how]
            else:
                assert await call == hashlib.sha256(payload).hexdigest()

    async def jobs(hows: list[str]) -> None:
        turns = asyncio.Semaphore(AT_ONCE)
        async with aipod.Client(served.address) as client, asyncio.TaskGroup() as group:
            for how in hows:
                group.create_task(job(client, turns, how))

    def left() -> tuple[int, int, int, list[str]]:
        """Processes, descriptors, locks of workers, and other files in the spool."""
        files = left_in(served.spool)
        locks = [name for name in files if name.startswith("workers/")]
        others = [name for name in files if name not in locks]
        return len(children(pid)), len(os.listdir(f"/proc/{pid}/fd")), len(locks), others

    run(lambda: jobs(["well"] * 40), timeout=60)
    before = left()
    run(lambda: jobs(hows), timeout=300)
    run(lambda: jobs(["well"] * 40), timeout=60)  # the last to crash have been replaced
    wait_until(lambda: left() == before)
    assert (before[0], before[2:]) == (INSTANCES, (INSTANCES, []))
    assert len(list(served.spool.glob("*/state"))) <= JOBS + 80
    assert served.stop() == 0
    assert list((served.spool / "workers").iterdir()) == []


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group whose processes may have 48 MiB."""
    for base, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        path = Path(base) / f"aipod-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            path.mkdir()
            try:
                (path / limit).write_text(str(48 << 20))
                (path / "cgroup.procs").touch()
                yield path
                return
            finally:
                path.rmdir()
    pytest.skip("control groups with a memory limit need a privileged user")


def test_a_worker_that_the_kernel_ends_for_its_memory(serve: Serve, group: Path) -> None:
    served = serve(MODEL)
    with pytest.raises(aipod.Interrupted, match=r"killed by SIGKILL \(out of memory\?\)"):
        own(served.address, "allocate", group=str(group))
    assert own(served.address, "predict", b"", how="well") == hashlib.sha256().hexdigest()


@pytest.mark.parametrize("end", ["cancel", "kill"])
def test_a_fork_bomb_is_gone_with_its_job_and_with_its_server(serve: Serve, tmp_path: Path, end: str) -> None:
    served = serve(MODEL, "--cancel-grace", "0.2")
    mark = tmp_path / "mark"
    with calls() as threads:
        job = threads.submit(own, served.address, "fork_bomb", mark=str(mark), timeout=60 if end == "kill" else 5)
        marked(mark)
        wait_until(lambda: len(children(served.process.pid)) > 30)  # not all are there when the first ones are
        below = children(served.process.pid)
        if end == "kill":
            served.process.kill()
            wait_until(lambda: not any(map(alive, below)), seconds=2)
            with pytest.raises((aipod.JobLost, aipod.Unreachable)):
                job.result()
            served.process.communicate(timeout=10)
        else:
            with pytest.raises(aipod.JobFailed, match="timeout"):
                job.result()
            wait_until(lambda: not any(map(alive, below)))
            assert own(served.address, "predict", b"", how="well") == hashlib.sha256().hexdigest()
