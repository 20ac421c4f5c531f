"""`Client`: the four methods, retries, and the connection they share."""

from __future__ import annotations

import asyncio
import json
import os
import warnings
from collections.abc import Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from grpclib.metadata import Deadline, encode_metadata

from aipod.client.call import Attempt, Event, OnEvent, Request
from aipod.client.failure import NoAnswer, explain
from aipod.client.sink import check_target
from aipod.client.source import Payload, Source
from aipod.codec import Compressor
from aipod.config import KIB, Config
from aipod.errors import JobLost, Unreachable, UsageError, job_failed
from aipod.retry import delays
from aipod.transport.channel import Channel, split_target

# Above it bytes are better in a file, and kwargs better in the payload: both are held in memory whole.
WARN_ABOVE = 32 * KIB
T = TypeVar("T")


class Client:
    """Calls the methods of a served model. asyncio-flavored; many calls may be under way at once.

        async with aipod.Client("127.0.0.1:50051") as client:
            answer = await client.predict("scan.nii", version="3", top=5)

    `target` is HOST:PORT, [::1]:PORT or unix:PATH. The connection is made at the first call and again where it was
    lost. Raises `UsageError` for a target that is none.
    """

    def __init__(self, target: str = "127.0.0.1:50051", *, config: Config | None = None) -> None:
        try:
            split_target(target)
        except ValueError as exc:
            raise UsageError(str(exc)) from None
        self._target = target
        self._config = config or Config()
        self._channel: Channel | None = None
        self._closes = 0  # how often `close` was called: a call does not outlive it by trying again

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        channel = self._let_go()
        if channel is not None:
            await channel.aclose()

    def close(self) -> None:
        """Close the connection; calls under way end as lost ones. The next call opens a new one.

        Leaving `async with` also waits until the socket is closed, a second at most.
        """
        channel = self._let_go()
        if channel is not None:
            channel.close()

    def _let_go(self) -> Channel | None:
        self._closes += 1
        channel, self._channel = self._channel, None
        return channel

    async def chaos(
        self,
        payload: Payload = b"",
        /,
        *,
        version: str = "",
        metadata: Sequence[tuple[str, str]] = (),
        timeout: float | None = None,
        save_to: str | os.PathLike[str] | None = None,
        on_event: OnEvent | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        """Call the method that metadata `x-func-name` names ("chaos" without it); else as `predict`."""
        return await self._call(
            "chaos", payload, version, metadata, timeout, save_to, on_event, {**(kwargs or {}), **more}
        )

    async def train(
        self,
        payload: Payload = b"",
        /,
        *,
        version: str = "",
        metadata: Sequence[tuple[str, str]] = (),
        timeout: float | None = None,
        save_to: str | os.PathLike[str] | None = None,
        on_event: OnEvent | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        """Call the method `train`; else as `predict`."""
        return await self._call(
            "train", payload, version, metadata, timeout, save_to, on_event, {**(kwargs or {}), **more}
        )

    async def predict(
        self,
        payload: Payload = b"",
        /,
        *,
        version: str = "",
        metadata: Sequence[tuple[str, str]] = (),
        timeout: float | None = None,
        save_to: str | os.PathLike[str] | None = None,
        on_event: OnEvent | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        """Call the method `predict` and return its answer.

        `payload`: a path (str or PathLike) names a file to send; bytes, a binary file, or an iterable or async
        iterable of bytes are the payload itself. Keyword arguments that this signature does not name go to the
        method; those whose names it has go into `kwargs`. `timeout`: seconds for the whole call. `save_to`: write the
        answer to this file and return its path; without it bytes above 64 MiB raise. `on_event`: called on the loop
        with every `Event`; must not block.

        Returns what the method returned: JSON values, bytes (for a `Path`, the file's content), or `save_to`.
        Raises `UsageError`, `Refused`, `ModelError`, `JobCancelled`, `JobFailed`, `Unreachable` (the method did not
        run) and `JobLost` (it may have). What is lost before the request is complete is tried again.
        Cancelled: the job is cancelled, best effort.
        """
        return await self._call(
            "predict", payload, version, metadata, timeout, save_to, on_event, {**(kwargs or {}), **more}
        )

    async def log(
        self,
        payload: Payload = b"",
        /,
        *,
        version: str = "",
        metadata: Sequence[tuple[str, str]] = (),
        timeout: float | None = None,
        save_to: str | os.PathLike[str] | None = None,
        on_event: OnEvent | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        """Call the method `log`; else as `predict`."""
        return await self._call(
            "log", payload, version, metadata, timeout, save_to, on_event, {**(kwargs or {}), **more}
        )

    async def _call(
        self,
        rpc: str,
        payload: Payload,
        version: str,
        metadata: Sequence[tuple[str, str]],
        timeout: float | None,
        save_to: str | os.PathLike[str] | None,
        on_event: OnEvent | None,
        kwargs: dict[str, Any],
    ) -> Any:
        _check_arguments(version, timeout)
        if save_to is not None:
            await asyncio.to_thread(check_target, save_to)
        if rpc == "chaos" and version:
            kwargs = {**kwargs, "version": version}  # Raw has no field for it
        if isinstance(payload, bytes | bytearray | memoryview) and len(payload) > WARN_ABOVE:
            warnings.warn(f"{len(payload)} bytes of payload in memory; a path is sent without loading it", stacklevel=3)
        request = Request(
            rpc=rpc,
            kwargs=self._pack(kwargs),
            version=version,
            source=await asyncio.to_thread(Source, payload),
            metadata=_checked(metadata),
            deadline=None if timeout is None else Deadline.from_timeout(timeout),
            save_to=save_to,
            on_event=on_event,
        )
        return await self._try(request)

    def _pack(self, kwargs: dict[str, Any]) -> bytes:
        for name in kwargs:
            if name.startswith("_aipod"):
                raise UsageError(f"keyword argument {name!r}: names that begin with _aipod are aipod's own")
        try:
            text = json.dumps(kwargs, sort_keys=True, allow_nan=False).encode()
        except (TypeError, ValueError) as exc:
            raise UsageError(f"the keyword arguments are not JSON: {exc}; send other data as the payload") from None
        if len(text) > self._config.kwargs_limit:
            raise UsageError(f"{len(text)} bytes of keyword arguments; the limit is {self._config.kwargs_limit}")
        if len(text) > WARN_ABOVE:
            warnings.warn(f"{len(text)} bytes of keyword arguments; send large data as the payload", stacklevel=4)
        return Compressor(self._config.level).frame(text)

    async def _try(self, request: Request) -> Any:
        """Attempts, until one has an outcome or another cannot help."""
        pauses = delays(self._config.attempts)
        closes = self._closes
        number = 0
        while True:
            number += 1
            attempt = Attempt(self._connect(), self._config, request, number)
            try:
                return await _in_own_task(attempt.run())
            except (Exception, BaseExceptionGroup) as exc:
                failure = explain(exc, target=self._target, committed=attempt.committed)
                if failure is None:
                    raise
            left = None if request.deadline is None else request.deadline.time_remaining()
            if left == 0 and isinstance(failure.error, Unreachable | JobLost):
                raise job_failed("DEADLINE_EXCEEDED", "not done within the call's timeout") from failure.error
            pause = next(pauses, None)
            if failure.retry_after is None or pause is None or not request.source.check_replayable():
                raise failure.error from failure.cause
            pause = max(pause, failure.retry_after)
            why = str(failure.error)
            request.tell(Event("WAITING", message=why, attempt=number + 1, attempts=self._config.attempts))
            await asyncio.sleep(pause if left is None else min(pause, left))
            if self._closes != closes:
                raise failure.error from failure.cause

    def _connect(self) -> Channel:
        if self._channel is None:
            self._channel = Channel(self._target, self._config)
        return self._channel


def _check_arguments(version: object, timeout: object) -> None:
    """Raises `UsageError` for what would fail as something else later on."""
    if not isinstance(version, str):
        raise UsageError(f"version={version!r} is no text; write version={str(version)!r}")
    if timeout is not None and (not isinstance(timeout, int | float) or not timeout >= 0):
        raise UsageError(f"timeout={timeout!r} is not a number of seconds")


def _checked(metadata: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    try:
        headers = [(name.lower(), value) for name, value in metadata]
    except (AttributeError, TypeError, ValueError):
        raise UsageError(f"metadata={metadata!r} is not a list of pairs of text: [('x-upstream', 'a')]") from None
    try:
        encode_metadata(headers)
    except (TypeError, ValueError) as exc:
        raise UsageError(f"metadata cannot be sent: {exc}") from None
    return headers


async def _in_own_task(attempt: Coroutine[Any, Any, T]) -> T:
    """Await `attempt` in a task of its own. This is an asyncio-flavored function.

    grpclib ends a wait by cancelling the task that waits. The caller's must not be that one: asyncio.timeout and
    TaskGroup count cancellations, and a cancelled caller must not be taken for a lost connection.
    """
    caller = asyncio.current_task()
    assert caller is not None
    before = caller.cancelling()
    try:
        return await asyncio.create_task(attempt, name="aipod-call")
    except (Exception, asyncio.CancelledError) as exc:
        if caller.cancelling() > before:
            raise asyncio.CancelledError from exc
        if isinstance(exc, asyncio.CancelledError):
            raise NoAnswer("the connection was lost") from None
        raise
