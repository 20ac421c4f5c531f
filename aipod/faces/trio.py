"""`TrioClient`: the client for trio."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import trio

from aipod.client import Call, Client, Job
from aipod.client.event import OnEvent
from aipod.config import Config
from aipod.faces.face import CallFace, Face, JobFace, like, spoken
from aipod.faces.ferry import Ferry
from aipod.faces.host import GOODBYE, Crossing, Host

P = ParamSpec("P")
T = TypeVar("T")

_WORDS = {"asyncio-flavored": "trio-flavored"}
_NOTHING = object()


class _Bell:
    """Rung in the client's thread, waited for by one task of trio's."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._rung = trio.Event()

    def ring(self) -> None:
        with contextlib.suppress(trio.RunFinishedError):  # nobody waits any more
            self._token.run_sync_soon(self._ring)

    def _ring(self) -> None:
        self._rung.set()

    async def wait(self) -> None:
        await self._rung.wait()
        self._rung = trio.Event()


async def _run(host: Host, make: Callable[..., Coroutine[Any, Any, T]], /, *args: Any, **kwargs: Any) -> T:
    """Wait for `make(*args, **kwargs)`. What is raised here meanwhile, cancellation for one, cancels it and waits.

    `on_event` is called here. What has ended all the same is returned, although the scope is cancelled.
    """
    bell = _Bell()
    crossing = Crossing(bell.ring)
    on_event: OnEvent | None = kwargs.get("on_event")
    if on_event is not None:
        kwargs["on_event"] = crossing
    coro = make(*args, **kwargs)
    try:
        host.start(crossing, coro)
        while not crossing.is_over:
            await bell.wait()
            while on_event is not None and (event := crossing.event()) is not None:
                on_event(event)
    except BaseException as exc:
        crossing.cancel()
        with trio.CancelScope(shield=True):
            while crossing.is_begun and not crossing.is_over:
                await bell.wait()
        if not isinstance(exc, trio.Cancelled) or not crossing.has_answer:
            raise
    result: T = crossing.result()
    return result


def _ferried(args: tuple[Any, ...]) -> tuple[list[Any], list[Ferry]]:
    """`args` as the client's loop can use them, and what is to be closed when it does no more."""
    ferries = {n: Ferry(arg) for n, arg in enumerate(args) if isinstance(arg, AsyncIterable)}
    return [ferries.get(n, arg) for n, arg in enumerate(args)], list(ferries.values())


async def _close(ferries: list[Ferry]) -> None:
    for ferry in ferries:
        await ferry.aclose()


def _waits(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """The method that waits for `method`."""

    async def call(self: Face, /, *args: P.args, **kwargs: P.kwargs) -> T:
        ferried, ferries = _ferried(args)
        try:
            return await _run(self._host, method, self._client, *ferried, **kwargs)
        finally:
            await _close(ferries)

    like(call, method, "Trio", _WORDS)
    return call


def _iterates(
    method: Callable[Concatenate[Any, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Any, P], AsyncGenerator[T, None]]:
    """The generator that gives what `method` gives."""

    async def next_of(items: AsyncGenerator[T, None]) -> Any:
        return await anext(items, _NOTHING)

    async def call(self: Face, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[T, None]:
        items = method(self._client, *args, **kwargs)
        try:
            while (item := await _run(self._host, next_of, items)) is not _NOTHING:
                yield item
        finally:
            if not self._host.is_idle:  # else the client was closed, and the iterator with it
                with trio.CancelScope(shield=True):
                    await _run(self._host, items.aclose)

    like(call, method, "Trio", _WORDS)
    return call


class TrioJob(JobFace):
    __doc__ = spoken(Job.__doc__ or "", "Trio", _WORDS)

    wait = _waits(Job.wait)
    save = _waits(Job.save)
    events = _iterates(Job.events)
    chunks = _iterates(Job.chunks)
    cancel = _waits(Job.cancel)
    release = _waits(Job.release)


class TrioCall(CallFace):
    __doc__ = spoken(Call.__doc__ or "", "Trio", _WORDS)

    def __init__(self, host: Host, client: Call, ferries: list[Ferry]) -> None:
        super().__init__(host, client)
        self._ferries = ferries

    async def __aenter__(self) -> Self:
        try:
            await _run(self._host, self._client.__aenter__)
        except BaseException:
            await _close(self._ferries)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with trio.CancelScope(shield=True):  # it waits for no server
                await _run(self._host, self._client.__aexit__, kind, exc, trace)
        finally:
            await _close(self._ferries)

    events = _iterates(Call.events)
    wait = _waits(Call.wait)
    save = _waits(Call.save)
    chunks = _iterates(Call.chunks)


def _gives(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, Job]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, TrioJob]]:
    """The method that gives the handle of the job that `method` gives."""

    async def call(self: Face, /, *args: P.args, **kwargs: P.kwargs) -> TrioJob:
        ferried, ferries = _ferried(args)
        try:
            return TrioJob(self._host, await _run(self._host, method, self._client, *ferried, **kwargs))
        finally:
            await _close(ferries)

    like(call, method, "Trio", _WORDS)
    return call


def _streams(method: Callable[Concatenate[Any, P], Call]) -> Callable[Concatenate[Any, P], TrioCall]:
    """The method that makes the call that `method` makes."""

    def call(self: Face, /, *args: P.args, **kwargs: P.kwargs) -> TrioCall:
        ferried, ferries = _ferried(args)
        return TrioCall(self._host, method(self._client, *ferried, **kwargs), ferries)

    like(call, method, "Trio", _WORDS)
    return call


def _attaches(method: Callable[Concatenate[Any, P], Job]) -> Callable[Concatenate[Any, P], TrioJob]:
    """The method that makes the handle that `method` makes."""

    def call(self: Face, /, *args: P.args, **kwargs: P.kwargs) -> TrioJob:
        return TrioJob(self._host, method(self._client, *args, **kwargs))

    like(call, method, "Trio", _WORDS)
    return call


class TrioClient(Face):
    """Calls the methods of a served model. trio-flavored; many calls may be under way at once, from any task.

        async with aipod.TrioClient("127.0.0.1:50051") as client:
            answer = await client.predict("scan.nii", version="3", top=5)

            job = await client.submit("train", "set.csv", version="4")
            ...
            answer = await job.wait()

    It has the methods, options and errors of `Client`, of which the arguments here are those. It works on a loop of
    asyncio's in a thread of its own, which is started by the first call and ends when the client is closed, or nobody
    has it any more. Leaving a cancelled scope cancels the job of the call in it, best effort; a call that has its
    answer by then returns it. `on_event` is called in the task that waits; an async iterator that is a payload is
    iterated in trio, in one task of its own. After a fork each process makes its own.
    """

    _client: Client

    def __init__(self, target: str | Sequence[str] = "127.0.0.1:50051", *, config: Config | None = None) -> None:
        client = Client(target, config=config)
        super().__init__(Host(client.close), client)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """As `close`, but what was left to do is done first. Leaving `async with` does the same.

        It lets the server know of calls that were left and of answers that have arrived (for as long as it answers, 2 s
        at most where it does not), and waits until the socket is closed (1 s at most); also where it is cancelled.
        """
        if self._host.is_idle:
            await trio.lowlevel.checkpoint()
            return
        with trio.CancelScope(shield=True):
            try:
                await _run(self._host, self._client.aclose)
            finally:
                if (thread := self._host.leave()) is not None:
                    await trio.to_thread.run_sync(thread.join, GOODBYE)

    def close(self) -> None:
        """Close the connection at once; calls under way end as lost ones. The next call opens a new one."""
        self._host.leave(self._client.close)

    chaos = _waits(Client.chaos)
    train = _waits(Client.train)
    predict = _waits(Client.predict)
    log = _waits(Client.log)
    call = _waits(Client.call)
    stream = _streams(Client.stream)
    submit = _gives(Client.submit)
    attach = _attaches(Client.attach)
