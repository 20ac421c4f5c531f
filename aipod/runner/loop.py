"""The loop runner: one instance in the server's process. Async methods run concurrently, plain ones in threads."""

from __future__ import annotations

import functools
import inspect
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import outcome
import trio

from aipod import worker
from aipod.errors import JobFailed
from aipod.errors import outcome as failure
from aipod.models import Context, LoadError, exported, load_class
from aipod.results import BadResult, Result, settle
from aipod.runner import Description, Report, Task
from aipod.transport import bridge

# Plain methods that run at once; trio's own default for threads.
THREADS = 40


class LoopRunner:
    """One instance, shared by all jobs of its version."""

    lock_name = ""
    shared = True

    def __init__(self, model: str, version: str, data_dir: Path) -> None:
        self._model = model
        self._version = version
        self._data_dir = data_dir
        self._instance: Any = None
        self._flavors: dict[str, str] = {}
        # Of their own: models' threads must not use up those that write payloads.
        self._threads = trio.CapacityLimiter(THREADS)
        self._ended = trio.Event()

    async def start(self) -> Description:
        try:
            cls = await trio.to_thread.run_sync(load_class, self._model)
            self._instance = await trio.to_thread.run_sync(cls)
            self._instance.version = self._version
            self._instance.data_dir = self._data_dir
            self._flavors = {name: options.flavor for name, options in exported(cls).items()}
            for hook in ("load", "warm_up"):
                await self._call(hook)
        except LoadError as exc:
            raise failure("LOAD_FAILED", str(exc)) from exc
        except Exception as exc:
            raise _failed(exc) from exc
        return Description.of(worker.describe(cls))

    async def run(self, task: Task, report: Report) -> Result:
        token = trio.lowlevel.current_trio_token()

        def tell(*args: Any) -> None:
            # A method may report from its own thread; the job's state belongs to the trio thread.
            if trio.lowlevel.in_trio_task():
                report(*args)
            else:
                token.run_sync_soon(report, *args)

        context = Context(
            job_id=task.job_id,
            method=task.method,
            version=task.version,
            metadata=task.metadata,
            work_dir=task.work_dir,
            new_version=task.new_version,
            timeout=task.timeout,
            report=tell,
        )
        kwargs = json.loads(task.kwargs)
        try:
            value = await self._call(task.method, context, task.payload, **kwargs)
            keep = functools.partial(settle, payload=task.payload, work_dir=task.work_dir, res=task.res)
            return await trio.to_thread.run_sync(keep, value)
        except trio.Cancelled:
            context.cancel()
            raise
        except BadResult as exc:
            raise failure(exc.reason, str(exc)) from None
        except Exception as exc:
            raise _failed(exc) from exc

    async def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        function: Callable[..., Any] | None = getattr(self._instance, name, None)
        if function is None:
            return None
        call = functools.partial(function, *args, **kwargs)
        if not inspect.iscoroutinefunction(function):
            return await self._in_thread(call, args[0] if args else None)
        if self._flavors.get(name) == "asyncio":
            return await bridge.to_trio(call)()
        return await call()

    async def _in_thread(self, call: Callable[[], Any], context: Context | None = None) -> Any:
        """Run a plain method in a thread. A thread cannot be stopped: cancelled, this asks and waits for its end."""

        async def ask_when_cancelled() -> None:
            try:
                await trio.sleep_forever()
            finally:
                if context is not None:
                    context.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_when_cancelled)
            result = await outcome.acapture(functools.partial(trio.to_thread.run_sync, call, limiter=self._threads))
            nursery.cancel_scope.cancel()
        return result.unwrap()

    async def shutdown(self) -> None:
        try:
            await self._call("close")
        finally:
            self._instance = None
            self._ended.set()

    async def wait(self) -> int | None:
        await self._ended.wait()
        return None


def _failed(exc: BaseException) -> JobFailed:
    trace = "".join(traceback.format_exception(exc))[-16384:]
    return failure("MODEL_ERROR", str(exc)[:4096], {"type": type(exc).__name__, "trace": trace})
