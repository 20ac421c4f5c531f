"""The three faces of the client, so that one test can be written for all of them.

A scenario is an async function that is given a `Flavor`, and does what it does by that: under asyncio and trio it is
run by them, and for threads step by step, with nobody to wait for: what it awaits has blocked.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import trio

import aipod
from aipod.faces.sync import _run
from tests.conftest import run as run_asyncio
from tests.conftest import wait_until
from tests.proxy import Fault, Proxy, open_proxy

Scenario = Callable[["Flavor"], Awaitable[Any]]
Thunk = Callable[[], Awaitable[Any]]
NAMES = ("asyncio", "sync", "trio")


class Flavor:
    """What a scenario needs of its flavor."""

    name = ""

    def client(self, target: str | Sequence[str], **settings: Any) -> Any:
        raise NotImplementedError

    def run(self, scenario: Scenario) -> Any:
        raise NotImplementedError

    async def sleep(self, seconds: float) -> None:
        raise NotImplementedError

    async def until(self, condition: Callable[[], Any]) -> None:
        for _ in range(1000):
            if condition():
                return
            await self.sleep(0.02)
        raise AssertionError("not within 20 s")

    async def together(self, thunks: Sequence[Thunk]) -> list[Any]:
        """What all of them give, at once."""
        raise NotImplementedError

    async def left(self, thunk: Thunk, when: Callable[[], Any]) -> None:
        """Run it, and leave it as its caller does, once `when()` is true. Fails where it ends before."""
        raise NotImplementedError

    def here(self) -> object:
        """The task or thread that asks."""
        raise NotImplementedError

    async def items(self, pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
        """A payload of this flavor that can be read once."""
        for piece in pieces:
            await self.sleep(0)
            yield piece


class Asyncio(Flavor):
    name = "asyncio"

    def client(self, target: str | Sequence[str], **settings: Any) -> Any:
        return aipod.Client(target, config=aipod.Config(**settings))

    def run(self, scenario: Scenario) -> Any:
        return run_asyncio(lambda: scenario(self))

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def together(self, thunks: Sequence[Thunk]) -> list[Any]:
        async def one(thunk: Thunk) -> Any:
            return await thunk()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(thunk)) for thunk in thunks]
        return [task.result() for task in tasks]

    async def left(self, thunk: Thunk, when: Callable[[], Any]) -> None:
        async def one() -> Any:
            return await thunk()

        task = asyncio.create_task(one())
        while not when():
            assert not task.done(), task.result()
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    def here(self) -> object:
        return asyncio.current_task()


class Trio(Flavor):
    name = "trio"

    def client(self, target: str | Sequence[str], **settings: Any) -> Any:
        return aipod.TrioClient(target, config=aipod.Config(**settings))

    def run(self, scenario: Scenario) -> Any:
        async def bounded() -> Any:
            with trio.fail_after(60):
                return await scenario(self)

        return trio.run(bounded)

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

    async def together(self, thunks: Sequence[Thunk]) -> list[Any]:
        results: dict[int, Any] = {}

        async def one(n: int, thunk: Thunk) -> None:
            results[n] = await thunk()

        async with trio.open_nursery() as nursery:
            for n, thunk in enumerate(thunks):
                nursery.start_soon(one, n, thunk)
        return [results[n] for n in range(len(thunks))]

    async def left(self, thunk: Thunk, when: Callable[[], Any]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(thunk)
            while not when():
                assert nursery.child_tasks
                await trio.sleep(0.01)
            assert nursery.child_tasks
            nursery.cancel_scope.cancel()

    def here(self) -> object:
        return trio.lowlevel.current_task()


class Sync(Flavor):
    name = "sync"

    def client(self, target: str | Sequence[str], **settings: Any) -> Any:
        return _Awaited(aipod.SyncClient(target, config=aipod.Config(**settings)))

    def run(self, scenario: Scenario) -> Any:
        steps: Any = scenario(self)
        try:
            steps.send(None)
        except StopIteration as done:
            return done.value
        raise AssertionError("something was waited for that does not block")

    async def sleep(self, seconds: float) -> None:
        threading.Event().wait(seconds)

    async def together(self, thunks: Sequence[Thunk]) -> list[Any]:
        with ThreadPoolExecutor(len(thunks)) as pool:
            return list(pool.map(lambda thunk: self.run(lambda _: thunk()), thunks))

    async def left(self, thunk: Thunk, when: Callable[[], Any]) -> None:
        """By Ctrl-C."""

        def interrupt() -> None:
            wait_until(when)
            # Not before it waits: what is interrupted is the call.
            wait_until(lambda: sys._current_frames()[main.ident].f_code is _run.__code__)
            signal.pthread_kill(main.ident, signal.SIGINT)

        main = threading.main_thread()
        assert threading.current_thread() is main
        assert main.ident is not None
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            answer = await thunk()
        except KeyboardInterrupt:
            return
        finally:
            thread.join()
        raise AssertionError(answer)

    def here(self) -> object:
        return threading.current_thread()

    def items(self, pieces: Sequence[bytes]) -> Any:
        return iter(pieces)


class _Awaited:
    """An object of the sync face's, with `await` in front of what blocks."""

    WAITS = ("chaos", "train", "predict", "log", "call", "submit", "wait", "save", "cancel", "release", "aclose")

    def __init__(self, face: Any) -> None:
        self.face = face

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.face, "close" if name == "aclose" else name)
        if name in ("events", "chunks"):
            return lambda *args, **kwargs: _iterated(value(*args, **kwargs))
        if name in ("attach", "stream"):
            return lambda *args, **kwargs: _Awaited(value(*args, **kwargs))
        if name not in self.WAITS:
            return value

        async def call(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return _Awaited(result) if name == "submit" else result

        return call

    def __str__(self) -> str:
        return str(self.face)

    async def __aenter__(self) -> _Awaited:
        self.face.__enter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self.face.__exit__(*exc)


async def _iterated(items: Any) -> AsyncIterator[Any]:
    with contextlib.closing(items):
        for item in items:
            yield item


FLAVORS: dict[str, Callable[[], Flavor]] = {"asyncio": Asyncio, "sync": Sync, "trio": Trio}


@contextlib.contextmanager
def proxied(port: int, *faults: Fault) -> Iterator[Proxy]:
    """`open_proxy` for who has no loop of asyncio's: it has one in a thread of its own."""
    found: queue.SimpleQueue[Proxy] = queue.SimpleQueue()
    loop = asyncio.SelectorEventLoop()
    over = asyncio.Event()

    async def serve() -> None:
        async with open_proxy(port, *faults) as proxy:
            found.put(proxy)
            await over.wait()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run, name="tests-proxy")
    thread.start()
    try:
        yield _Elsewhere(found.get(timeout=20), loop)  # type: ignore[misc]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


class _Elsewhere:
    """A proxy whose methods are called in its own thread, one after the other."""

    def __init__(self, proxy: Proxy, loop: asyncio.AbstractEventLoop) -> None:
        self._proxy = proxy
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._proxy, name)
        if not callable(value):
            return value

        def call(*args: Any) -> None:
            done = threading.Event()
            self._loop.call_soon_threadsafe(lambda: (value(*args), done.set()))
            assert done.wait(20)

        return call


def said(mark: Path) -> str:
    """What a method has said there; empty where nothing yet."""
    return mark.read_text() if mark.exists() else ""
