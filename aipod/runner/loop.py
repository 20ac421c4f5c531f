"""Instances in the server's process: the loop runner and the thread runner.

The loop runner has one, whose async methods run concurrently and whose plain ones run in threads; the thread runner has
several of a class of plain methods, which run one job each.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import outcome
import trio

from aipod.errors import job_failed
from aipod.methods import describe
from aipod.models import Context, Options, load_class
from aipod.results import INLINE, BadResult, Result, encode, settle
from aipod.runner import GOES_ON, STOPPING, Description, Report, RunnerBroken, Task, load_failed, model_failed
from aipod.runner.capture import Capture
from aipod.runner.output import ServerLog
from aipod.transport import bridge

log = logging.getLogger("aipod.runner")
T = TypeVar("T")

# Plain methods that run at once; trio's own default for threads.
THREADS = 40


class LoopRunner:
    """One instance, shared by all jobs of its version."""

    lock_name = ""
    shared = True
    stopped = False  # who reads this is not

    def __init__(
        self,
        model: str,
        version: str,
        data_dir: Path,
        *,
        load_timeout: float,
        grace: float,
        cls: type | None = None,
    ) -> None:
        """`cls`: the class itself; without it `model` is imported."""
        self._model = model
        self._cls = cls
        self._version = version
        self._data_dir = data_dir
        self._load_timeout = load_timeout
        self._grace = grace
        self._instance: Any = None
        # Of their own: models' threads must not use up those that write payloads.
        self._threads = trio.CapacityLimiter(THREADS)
        self._ended = trio.Event()
        self._server_log = ServerLog(version)

    @property
    def broken(self) -> bool:
        return self._ended.is_set()

    async def start(self) -> Description:
        deadline = trio.current_time() + self._load_timeout
        try:
            with trio.CancelScope(deadline=deadline) as patience, Capture(self._server_log):
                cls = await self._load(deadline, self._find_class)
                self._instance = await self._load(deadline, cls)
                self._instance.version = self._version
                self._instance.data_dir = self._data_dir
                for hook in ("load", "warm_up"):
                    function = getattr(self._instance, hook, None)
                    if inspect.iscoroutinefunction(function):
                        await self._call(function)
                    elif function is not None:
                        await self._load(deadline, function)
        except BaseException as exc:
            raise await load_failed(exc) from exc
        if patience.cancelled_caught:
            self._instance = None
            raise job_failed("LOAD_FAILED", f"the model did not load within {self._load_timeout:g} s (--load-timeout)")
        return Description.of(describe(cls))

    def _find_class(self) -> type:
        return self._cls or load_class(self._model)

    async def _load(self, deadline: float, call: Callable[..., T], *args: Any) -> T:
        """A part of the load that is plain code: in a thread, which nobody can stop, up to `deadline`.

        Cancelled: it is waited for all the same. Callers that come and go would else start one load after the other.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True, deadline=deadline) as patience:
            result = await trio.to_thread.run_sync(call, *args, limiter=self._threads, abandon_on_cancel=True)
        if patience.cancelled_caught:
            log.error("%s still loads after %g s; its thread goes on", self._model, self._load_timeout)
            await trio.sleep_forever()  # until the caller's scope ends this: its deadline is the same
        return result

    async def run(self, task: Task, report: Report) -> Result:
        if self.broken:
            raise RunnerBroken
        # Else a method that is cancelled already would run until its first await.
        await trio.lowlevel.checkpoint_if_cancelled()
        capture = Capture(self._server_log, task.job_id, report)
        context = Context(
            job_id=task.job_id,
            method=task.method,
            version=task.version,
            metadata=task.metadata,
            work_dir=task.work_dir,
            new_version=task.new_version,
            timeout=task.timeout,
            report=capture.report,
        )
        kwargs = json.loads(task.kwargs)
        try:
            method = getattr(self._instance, task.method)
            with capture:
                value = await self._call_for(context, method, task, kwargs)
            if not isinstance(value, Path):
                # Not in a thread: making JSON holds the GIL there as well.
                kind, data = encode(value)
                if len(data) <= INLINE:
                    return Result(kind, data)
            keep = functools.partial(settle, payload=task.payload, work_dir=Path(task.work_dir), res=Path(task.res))
            return await trio.to_thread.run_sync(keep, value)
        except BadResult as exc:
            raise job_failed(exc.reason, str(exc)) from None
        except BaseException as exc:
            raise await model_failed(exc) from exc

    async def _call_for(self, context: Context, method: Callable[..., Any], task: Task, kwargs: dict[str, Any]) -> Any:
        """Run a method. Cancelled: `context.cancelled` is true before the method is, so that its cleanup sees it.

        A plain method's thread, or one that an async method waits for, cannot be stopped: this asks and waits, and says
        so where it takes long. What waits for nothing cannot be cancelled, and needs nobody who watches for that.
        """
        inner, patience = trio.CancelScope(shield=True), trio.CancelScope(shield=True)
        ended = False
        remark = STOPPING if inspect.iscoroutinefunction(method) else GOES_ON

        async def ask_when_cancelled() -> None:
            try:
                await trio.sleep_forever()
            finally:
                if not ended:
                    task.remark(remark)
                context.cancel()
                inner.cancel()
                with patience:
                    await trio.sleep(self._grace)
                    text = "job %s: %s was asked to stop %g s ago and goes on: nothing can end what runs in the server"
                    log.warning(text, context.job_id, context.method, self._grace, extra={"job": context.job_id})

        call = functools.partial(self._call, method, context, task.payload, **kwargs)
        async with trio.open_nursery() as nursery:
            with inner:
                result = await outcome.acapture(
                    _telling, call, functools.partial(nursery.start_soon, ask_when_cancelled)
                )
            ended = True
            if nursery.child_tasks:
                nursery.cancel_scope.cancel()
                patience.cancel()
        context.cancel()  # for threads that it has left behind
        return result.unwrap()

    # Else Ctrl-C in a program that serves and computes could be raised in the model's code, as if that had done it.
    @trio.lowlevel.enable_ki_protection
    async def _call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(function, *args, **kwargs)
        if not inspect.iscoroutinefunction(function):
            name = f"{getattr(function, '__name__', 'a call')} from {self._model}"  # not that of a partial
            return await trio.to_thread.run_sync(call, limiter=self._threads, thread_name=name)
        if getattr(function, "__aipod__", Options()).flavor == "asyncio":
            # As an outcome: a SystemExit that leaves an asyncio task would end the loop, and with it the server.
            result = await bridge.to_trio(functools.partial(outcome.acapture, call))()
            await trio.lowlevel.checkpoint_if_cancelled()  # not asyncio's CancelledError
            return result.unwrap()
        return await call()

    async def shutdown(self) -> None:
        try:
            with trio.move_on_after(self._grace) as patience, Capture(self._server_log):
                await self._close(getattr(self._instance, "close", None))
            if patience.cancelled_caught:
                log.error("%s.close() took longer than %g s; going on without it", self._model, self._grace)
        except BaseException as exc:
            raise await model_failed(exc) from exc
        finally:
            self._instance = None
            self._ended.set()

    async def _close(self, hook: Callable[..., Any] | None) -> None:
        if inspect.iscoroutinefunction(hook):
            await self._call(hook)
        elif hook is not None:
            # One that hangs must not keep the server from ending: its thread ends with the process.
            await trio.to_thread.run_sync(hook, limiter=self._threads, abandon_on_cancel=True)

    async def wait(self) -> int | None:
        await self._ended.wait()
        return None


async def _telling(call: Callable[[], Awaitable[T]], waits: Callable[[], object]) -> T:
    """Await trio-flavored `call()`; `waits` is called before it waits for the first time."""
    steps = call().__await__()
    try:
        first = next(steps)
    except StopIteration as done:
        return cast(T, done.value)
    waits()
    return cast(T, await bridge.go_on(steps, first))


class ThreadRunner(LoopRunner):
    """One of several instances of a class of plain methods, whose run is in a thread: one job at a time, as leased."""

    shared = False
