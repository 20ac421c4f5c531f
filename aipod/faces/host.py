"""An asyncio loop in a thread of its own: where the client works for those who are somewhere else."""

from __future__ import annotations

import asyncio
import atexit
import collections
import contextlib
import contextvars
import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aipod.client.event import Event, Listener, merged
from aipod.client.prepare import CALLED_AT
from aipod.errors import UsageError

# Seconds that whoever closes a client waits for its thread: a call that pauses between two connections holds it.
GOODBYE = 1.0

_threads: weakref.WeakSet[_Thread] = weakref.WeakSet()


class Host:
    """The thread of one client. It is started when it is first needed, also after `leave`.

    It ends with `leave`, when nobody has the host any more, and with the interpreter: whatever is under way then.
    `at_end` is called on the loop before it ends. Any thread may use it.
    """

    def __init__(self, at_end: Callable[[], None]) -> None:
        self._at_end = at_end
        # A collector of garbage may end an iterator, which calls, in the thread that has it.
        self._lock = threading.RLock()
        self._pid: int | None = None
        self._thread: _Thread | None = None

    @property
    def is_idle(self) -> bool:
        """There is no thread, or it has ended with the interpreter, or is another process's."""
        thread = self._thread
        # Not Thread.is_alive: Ctrl-C within it lets Python 3.11 and 3.12 take a living thread for a dead one.
        return thread is None or self._pid != os.getpid() or thread.loop.is_closed()

    @property
    def is_here(self) -> bool:
        """Whether the caller is in the thread itself, where nothing may wait for it."""
        return self._thread is not None and self._thread.ident == threading.get_ident()

    def start(self, crossing: Crossing, coro: Coroutine[Any, Any, Any]) -> None:
        """Run `coro` on the loop, for the one who waits at `crossing`.

        Raises `UsageError` in a forked child of the process that has used this client, and in the thread itself.
        """
        try:
            # Before the lock, which somebody may have held when the process was forked.
            if self._pid is None:
                self._pid = os.getpid()
            elif self._pid != os.getpid():
                raise UsageError(
                    "this client was used before the process was forked, and its connection is the parent's; make a "
                    "client in each process"
                )
            if self.is_here:
                raise UsageError(
                    "the client's own thread would wait for itself; in an async iterator that is its payload use "
                    "another client"
                )
            with self._lock:
                if self._thread is None or self.is_idle:
                    # In this order: Ctrl-C may come anywhere.
                    thread = _Thread(self._at_end)
                    self._forgotten = weakref.finalize(self, thread.leave, at_once=True)
                    self._forgotten.atexit = False
                    try:
                        thread.start()
                    except BaseException:  # no more threads, or Ctrl-C: whether this one runs nobody knows
                        thread.leave(at_once=True)
                        self._forgotten.detach()  # or it would keep the loop
                        raise
                    self._thread = thread
                self._thread.begin(crossing, coro)
        except BaseException:
            if not crossing.is_begun:
                coro.close()
            raise

    def leave(self, close: Callable[[], None] | None = None) -> threading.Thread | None:
        """Let the thread end when no call is under way any more, `close` being called there before.

        The thread, for who wants to wait for its end. Nothing where there is none, or another process's.
        """
        if self.is_idle:
            return None
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is None:
            return None
        if close is not None:
            thread.loop.call_soon_threadsafe(close)
        thread.leave()
        self._forgotten.detach()  # the last: Ctrl-C may come anywhere
        return thread.thread


class _Thread:
    """One thread with its loop."""

    def __init__(self, at_end: Callable[[], None]) -> None:
        # Not asyncio.new_event_loop: trio-asyncio, wherever it is imported, replaces it.
        self.loop = asyncio.SelectorEventLoop()
        self._at_end = at_end
        self._pid = os.getpid()
        self._calls = 0
        self._is_leaving = False
        # A daemon: the interpreter ends also where nobody has closed the client.
        self.thread = threading.Thread(target=_run, args=(self.loop,), name="aipod-client", daemon=True)
        self.ident: int | None = None

    def start(self) -> None:
        self.thread.start()
        self.ident = self.thread.ident
        _threads.add(self)

    def begin(self, crossing: Crossing, coro: Coroutine[Any, Any, Any]) -> None:
        """Before `leave`: then it is run to its end."""
        try:
            crossing.is_begun = True
            self.loop.call_soon_threadsafe(self._begin, crossing, coro)
        except RuntimeError:  # the interpreter is about to end, and the loop has
            crossing.is_begun = False
            raise
        except BaseException:  # Ctrl-C: whether the loop has it nobody knows; what it has twice it begins once
            crossing.is_begun = True
            self.loop.call_soon_threadsafe(self._begin, crossing, coro)
            raise

    def leave(self, *, at_once: bool = False) -> None:
        """End the loop: when no call is under way any more, or at once. From any thread, and any process."""
        if self._pid == os.getpid():  # a forked child would wake its parent's
            with contextlib.suppress(RuntimeError):  # it has ended
                self.loop.call_soon_threadsafe(self._leave, at_once)

    def _begin(self, crossing: Crossing, coro: Coroutine[Any, Any, Any]) -> None:
        if crossing.has_task:
            return
        self._calls += 1
        crossing.begin(self.loop, coro, self._end)

    def _end(self) -> None:
        self._calls -= 1
        if self._is_leaving and not self._calls:
            self.loop.stop()

    def _leave(self, at_once: bool) -> None:
        self._is_leaving = True
        if at_once:
            self._at_end()
        if at_once or not self._calls:
            self.loop.stop()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    executor = ThreadPoolExecutor(thread_name_prefix="aipod-client")
    loop.set_default_executor(executor)
    try:
        loop.run_forever()
        loop.run_until_complete(_cancel_all())
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        executor.shutdown(wait=False)  # a thread that waits for input is left to itself: nothing can end it
        loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@atexit.register
def _end_all() -> None:
    """A thread that computes while the interpreter is taken down can take it down in its own way."""
    for thread in list(_threads):
        thread.leave(at_once=True)
        if thread._pid == os.getpid():
            thread.thread.join(GOODBYE)


class Crossing(Listener):
    """One call into the thread, and what comes back: events, then the end. `ring` tells the caller, from the thread.

    As `on_event` of the call it takes its events to the caller, in whose thread they are told.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._context = contextvars.copy_context()  # the caller's: of its trace, say
        # Who makes this is called by a method of a face's, and that by the caller's code, or a collector of garbage.
        if (code := sys._getframe(2).f_back) is not None:
            known = code.f_globals.setdefault("__warningregistry__", {})
            place = code.f_code.co_filename, code.f_lineno, code.f_globals.get("__name__"), known
            self._context.run(CALLED_AT.set, place)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._is_cancelled = False
        self._events: collections.deque[Event] = collections.deque()
        self._lock = threading.Lock()
        self._room = asyncio.Event()
        self.is_begun = False
        self.is_over = False

    # The thread's side

    def begin(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], on_end: Callable[[], None]
    ) -> None:
        def end(task: asyncio.Task[Any]) -> None:
            on_end()
            self.is_over = True
            self._ring()

        with self._lock:
            self._loop = loop
            self._task = loop.create_task(coro, name="aipod-crossing", context=self._context)
            if self._is_cancelled:
                self._task.cancel()
        self._task.add_done_callback(end)

    def __call__(self, event: Event) -> None:
        with self._lock:
            both = merged(self._events[-1], event) if self._events else None
            if both is not None:
                self._events[-1] = both
            else:
                self._events.append(event)
        self._ring()

    async def taken(self) -> None:
        """Until the caller has taken all events. This is an asyncio-flavored function."""
        while self._events:
            self._room.clear()
            await self._room.wait()

    # The caller's side

    def cancel(self) -> None:
        """Cancel the call as asyncio does; `is_over` says when it has ended."""
        with self._lock:
            self._is_cancelled = True
            loop, task = self._loop, self._task
        if loop is not None and task is not None:
            with contextlib.suppress(RuntimeError):  # it has ended, and the loop too
                loop.call_soon_threadsafe(task.cancel)

    def event(self) -> Event | None:
        """The next event; None where there is none for now."""
        with self._lock:
            if not self._events:
                return None
            event, is_last = self._events.popleft(), not self._events
        # Not under the lock, which the loop wants: a collector of garbage may run here, and wait for the loop.
        if is_last and self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._room.set)
        return event

    @property
    def has_task(self) -> bool:
        """Whether the loop has begun it."""
        return self._task is not None

    @property
    def has_answer(self) -> bool:
        """Whether it has ended with something else than an exception."""
        task = self._task
        return self.is_over and task is not None and not task.cancelled() and task.exception() is None

    def result(self) -> Any:
        """What the call returned. Raises what it raised."""
        assert self._task is not None
        return self._task.result()
