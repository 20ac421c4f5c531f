"""`SyncClient`: the client for threads, a REPL, a notebook."""

from __future__ import annotations

import queue
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from aipod.client import Call, Client, Job
from aipod.client.event import OnEvent
from aipod.config import Config
from aipod.faces.face import CallFace, Face, JobFace, like, spoken
from aipod.faces.host import GOODBYE, Crossing, Host

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F")

_WORDS = {
    "async for ": "for ",
    "async with ": "with ",
    "await ": "",
    "contextlib.aclosing": "contextlib.closing",
    "AsyncGenerator[Event, None]": "Generator[Event, None, None]",
    "AsyncGenerator[bytes, None]": "Generator[bytes, None, None]",
    "asyncio-flavored.": "For threads.",
}
_NOTHING = object()


def _run(host: Host, make: Callable[..., Coroutine[Any, Any, T]], /, *args: Any, **kwargs: Any) -> T:
    """Wait for `make(*args, **kwargs)`. What is raised here meanwhile, Ctrl-C for one, cancels it and waits for that.

    `on_event` is called here.
    """
    rung: queue.SimpleQueue[None] = queue.SimpleQueue()
    crossing = Crossing(lambda: rung.put(None))
    on_event: OnEvent | None = kwargs.get("on_event")
    if on_event is not None:
        kwargs["on_event"] = crossing
    coro = make(*args, **kwargs)
    try:
        host.start(crossing, coro)
        while True:
            rung.get()
            while on_event is not None and (event := crossing.event()) is not None:
                on_event(event)
            if crossing.is_over:
                result: T = crossing.result()
                return result
    except BaseException:
        crossing.cancel()
        while crossing.is_begun and not crossing.is_over:
            rung.get()
        raise


def _waits(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Any, P], T]:
    """The method that waits for `method`."""

    def call(self: Face, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return _run(self._host, method, self._client, *args, **kwargs)

    like(call, method, "Sync", _WORDS)
    return call


def _iterates(
    method: Callable[Concatenate[Any, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Any, P], Generator[T, None, None]]:
    """The generator that gives what `method` gives."""

    async def next_of(items: AsyncGenerator[T, None]) -> Any:
        return await anext(items, _NOTHING)

    def call(self: Face, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        items = method(self._client, *args, **kwargs)
        try:
            while (item := _run(self._host, next_of, items)) is not _NOTHING:
                yield item
        finally:
            if not self._host.is_idle and not self._host.is_here:  # a collector of garbage may be anywhere
                _run(self._host, items.aclose)

    like(call, method, "Sync", _WORDS)
    return call


class SyncJob(JobFace):
    __doc__ = spoken(Job.__doc__ or "", "Sync", _WORDS)

    wait = _waits(Job.wait)
    save = _waits(Job.save)
    events = _iterates(Job.events)
    chunks = _iterates(Job.chunks)
    cancel = _waits(Job.cancel)
    release = _waits(Job.release)


class SyncCall(CallFace):
    __doc__ = spoken(Call.__doc__ or "", "Sync", _WORDS)

    def __enter__(self) -> Self:
        _run(self._host, self._client.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        _run(self._host, self._client.__aexit__, kind, exc, trace)

    events = _iterates(Call.events)
    wait = _waits(Call.wait)
    save = _waits(Call.save)
    chunks = _iterates(Call.chunks)


def _gives(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, Job]]) -> Callable[Concatenate[Any, P], SyncJob]:
    """The method that gives the handle of the job that `method` gives."""

    def call(self: Face, /, *args: P.args, **kwargs: P.kwargs) -> SyncJob:
        return SyncJob(self._host, _run(self._host, method, self._client, *args, **kwargs))

    like(call, method, "Sync", _WORDS)
    return call


def _makes(face: Callable[[Host, T], F], method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], F]:
    """The method that makes what `method` makes, which asks nobody yet."""

    def call(self: Face, /, *args: P.args, **kwargs: P.kwargs) -> F:
        return face(self._host, method(self._client, *args, **kwargs))

    like(call, method, "Sync", _WORDS)
    return call


class SyncClient(Face):
    """Calls the methods of a served model, from threads: any number at once, each of which waits for its answer.

        with aipod.SyncClient("127.0.0.1:50051") as client:
            answer = client.predict("scan.nii", version="3", top=5)

            job = client.submit("train", "set.csv", version="4")
            ...
            answer = job.wait()

    It has the methods, options and errors of `Client`, of which the arguments here are those. It works in a thread of
    its own, which is started by the first call: also where a loop runs, as in a notebook. It ends when the client is
    closed, or nobody has it any more, and keeps no interpreter from its end. After a fork each process makes its own.

    Ctrl-C, and what else is raised while a call waits, cancels the call's job, best effort, and is raised. `on_event`
    is called in the thread that waits, and may take its time. Iterables that are a payload are read in another thread,
    async iterators on the client's own loop.
    """

    _client: Client

    def __init__(self, target: str | Sequence[str] = "127.0.0.1:50051", *, config: Config | None = None) -> None:
        client = Client(target, config=config)
        super().__init__(Host(client.close), client)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way end as lost ones. The next call opens a new one.

        Before that it lets the server know of calls that were left and of answers that have arrived (for as long as it
        answers, 2 s at most where it does not). Leaving `with` does the same.
        """
        if self._host.is_idle:
            return
        try:
            _run(self._host, self._client.aclose)
        finally:
            if (thread := self._host.leave()) is not None:
                thread.join(GOODBYE)

    chaos = _waits(Client.chaos)
    train = _waits(Client.train)
    predict = _waits(Client.predict)
    log = _waits(Client.log)
    call = _waits(Client.call)
    stream = _makes(SyncCall, Client.stream)
    submit = _gives(Client.submit)
    attach = _makes(SyncJob, Client.attach)
