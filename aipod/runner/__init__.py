"""How an instance's methods are executed. Four verbs, the same for every kind: start, run, shutdown, wait.

This package is the only one that starts processes and model threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import trio

from aipod import worker
from aipod.errors import JobFailed, job_failed
from aipod.results import Result

# (progress 0..1 or None, its message or None, log text or None)
Report = Callable[[float | None, str | None, str | None], None]


async def model_failed(exc: BaseException) -> JobFailed:
    """What to say of whatever the model raised in this process, SystemExit, KeyboardInterrupt and groups included.

    This is a trio-flavored async function. Raises Cancelled where the run is cancelled: it does not matter how a
    method puts that, as Cancelled, alone or in groups, or as something else.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    return failed(worker.failure("MODEL_ERROR", exc))


async def load_failed(exc: BaseException) -> JobFailed:
    """As `model_failed`, of whatever was raised before there was an instance."""
    await trio.lowlevel.checkpoint_if_cancelled()
    return failed(worker.load_failure(exc))


def failed(event: Mapping[str, str]) -> JobFailed:
    """The exception that a worker's `error` event tells of."""
    return job_failed(
        event["reason"], event["message"], {name: event[name] for name in ("type", "trace") if event.get(name)}
    )


# What is told of a run that was cancelled, and is not over.
STOPPING = "cancelled; waiting for it to stop"
GOES_ON = "cancelled; it runs in a thread, which cannot be stopped"


class RunnerBroken(Exception):
    """This runner cannot run jobs any more and has not started this one: take another."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What the served class offers, as told by who imported it."""

    name: str
    methods: Mapping[str, Mapping[str, Any]]
    is_async: bool

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Description:
        """From what `methods.describe` returns."""
        return cls(raw["class"], raw["methods"], raw["async"])


@dataclasses.dataclass(frozen=True)
class Task:
    """One run of one method."""

    job_id: str
    method: str
    version: str
    kwargs: bytes  # JSON object
    metadata: Mapping[str, str]
    payload: Path
    # Of what most methods have no use for; as text, for to make a path object takes longer than to make a file.
    work_dir: str
    res: str
    new_version: str
    timeout: float | None  # seconds
    # Called in the trio thread with what the runner itself says of the run; it is told until the run is over.
    remark: Callable[[str], None] = lambda text: None


class Runner(Protocol):
    """One instance of a version. All four verbs are trio-flavored async functions."""

    shared: bool  # may run several jobs at once

    @property
    def lock_name(self) -> str:
        """Of the worker lock that is held until the next run is over, and no longer; empty where the server's own is.

        Once that run is over it is another one.
        """

    @property
    def broken(self) -> bool:
        """True once it cannot run jobs any more, however it came to that."""

    @property
    def stopped(self) -> bool:
        """True while its process exists and computes nothing, because somebody has stopped it. Does not block."""

    async def start(self) -> Description:
        """Load the instance. Raises `JobFailed` (LOAD_FAILED), `Refused` (OVERLOADED).

        Cancelled: nothing is left.
        """

    async def run(self, task: Task, report: Report) -> Result:
        """Run one method. Raises `JobFailed`, or `RunnerBroken` where nothing was started.

        Cancelled: the method is asked to stop, then made to, which `task.remark` tells; this returns when it has really
        ended. Cancelled before it is called: the method is not started.
        """

    async def shutdown(self) -> None:
        """Let the instance's `close` hook run, then end it, by force where it takes too long.

        Raises `JobFailed` for what the hook raises, where this process can see it.
        """

    async def wait(self) -> int | None:
        """Wait for the end; the exit status of a process, None for anything else.

        Somebody should, from the start on: so what is printed between the runs is heard.
        """
