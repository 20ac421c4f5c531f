"""A runner without an instance, a process or a thread: it calls the functions it was given, in the caller's task.

For tests of what uses runners, on trio's virtual clock too:

    async def slow(context, path):
        await trio.sleep(3600)

    runner = FakeRunner({"slow": slow})

It keeps what `Runner` promises, and says in `verbs` what was asked of it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from aipod.errors import job_failed
from aipod.methods import describe_method
from aipod.models import Context, Options
from aipod.results import BadResult, Result, settle
from aipod.runner import STOPPING, Description, Report, RunnerBroken, Task, load_failed, model_failed


async def _nothing() -> None: ...


class FakeRunner:
    """One instance of a class that does not exist.

    `methods` are called as a model's: plain functions, which must not block, and trio-flavored async ones. `load` and
    `close` are trio-flavored async functions; what `load` raises is what a model's `load` would raise.

    The mutable state is the crash, which ends all runs, and the record of verbs.
    """

    def __init__(
        self,
        methods: Mapping[str, Callable[..., Any]],
        *,
        load: Callable[[], Awaitable[object]] = _nothing,
        close: Callable[[], Awaitable[object]] = _nothing,
        shared: bool = False,
        lock_name: str = "",
    ) -> None:
        self.lock_name = lock_name
        self.shared = shared
        self.verbs: list[str] = []
        self.stopped = False  # for tests to set
        self._methods = methods
        self._load = load
        self._close = close
        self._runs: set[trio.CancelScope] = set()
        self._crashed = False
        self._ended = trio.Event()

    @property
    def broken(self) -> bool:
        return self._ended.is_set()

    def crash(self) -> None:
        """Do what a worker does that is killed: its runs end as WORKER_CRASHED, and it takes no more."""
        self._crashed = True
        self._ended.set()
        for run in self._runs:
            run.cancel()

    async def start(self) -> Description:
        self.verbs.append("start")
        try:
            await self._load()
        except BaseException as exc:
            raise await load_failed(exc) from exc
        await trio.lowlevel.checkpoint()
        options = dataclasses.asdict(Options())
        methods = {name: {**options, **describe_method(fn, own=2)} for name, fn in self._methods.items()}
        return Description("Fake", methods, self.shared)

    async def run(self, task: Task, report: Report) -> Result:
        if self.broken:
            raise RunnerBroken
        await trio.lowlevel.checkpoint()
        self.verbs.append(f"run {task.method}")
        context = Context(
            job_id=task.job_id,
            method=task.method,
            version=task.version,
            metadata=task.metadata,
            work_dir=task.work_dir,
            new_version=task.new_version,
            timeout=task.timeout,
            report=report,
        )
        with trio.CancelScope() as scope:
            self._runs.add(scope)
            try:
                value = self._methods[task.method](context, task.payload, **json.loads(task.kwargs))
                if inspect.isawaitable(value):
                    value = await value
                result = settle(value, payload=task.payload, work_dir=Path(task.work_dir), res=Path(task.res))
            except BadResult as exc:
                raise job_failed(exc.reason, str(exc)) from None
            except BaseException as exc:
                if isinstance(exc, trio.Cancelled) and not self._crashed:
                    task.remark(STOPPING)
                raise await model_failed(exc) from exc
            finally:
                self._runs.discard(scope)
                context.cancel()
        if self._crashed:
            raise job_failed("WORKER_CRASHED", "the worker process was killed by SIGKILL", {"signal": "SIGKILL"})
        return result

    async def shutdown(self) -> None:
        self.verbs.append("shutdown")
        try:
            if not self.broken:
                await self._close()
        finally:
            self._ended.set()

    async def wait(self) -> int | None:
        await self._ended.wait()
        return -9 if self._crashed else None
