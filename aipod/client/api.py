"""`Client`: calls, jobs that are submitted, and the connection that they share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from aipod.client.event import OnEvent
from aipod.client.follow import release_all
from aipod.client.job import Job
from aipod.client.link import Link
from aipod.client.prepare import check_timeout, checked, named, prepare
from aipod.client.reader import Payload
from aipod.client.sink import check_target
from aipod.client.stream import Call
from aipod.client.ticket import parse_ticket
from aipod.config import Config


class Client:
    """Calls the methods of a served model. asyncio-flavored; many calls may be under way at once.

        async with aipod.Client("127.0.0.1:50051") as client:
            answer = await client.predict("scan.nii", version="3", top=5)

            job = await client.submit("train", "set.csv", version="4")
            ...
            answer = await job.wait()

    `target` is HOST:PORT, [::1]:PORT or unix:PATH, several of them with commas, or a list. The connection is made at
    the first call and again where it was lost: of several addresses, a name's among them, to the first that answers, in
    their order, and when that is lost to the next one (gRPC's pick_first). What cannot be reached is passed over. A job
    stays where it is: it is asked for there, and at the others in turns where that is away. Raises `UsageError` for a
    target that is none.
    """

    def __init__(self, target: str | Sequence[str] = "127.0.0.1:50051", *, config: Config | None = None) -> None:
        self._config = config or Config()
        self._link = Link(target, self._config)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """As `close`, but what was left to do is done first. Leaving `async with` does the same.

        It lets the server know of calls that were left and of answers that have arrived (for as long as it answers, 2 s
        at most where it does not), and waits until the socket is closed (1 s at most).
        """
        await self._link.aclose(release_all)

    def close(self) -> None:
        """Close the connection at once; calls under way end as lost ones. The next call opens a new one."""
        self._link.close()

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
        ticket_file: str | os.PathLike[str] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        """Call the method that metadata `x-func-name` names ("chaos" without it); else as `predict`."""
        return await self._call(
            "chaos", payload, version, metadata, timeout, save_to, on_event, ticket_file, {**(kwargs or {}), **more}
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
        ticket_file: str | os.PathLike[str] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        """Call the method `train`; else as `predict`."""
        return await self._call(
            "train", payload, version, metadata, timeout, save_to, on_event, ticket_file, {**(kwargs or {}), **more}
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
        ticket_file: str | os.PathLike[str] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        """Call the method `predict` and return its answer, whatever happens to connections and servers meanwhile.

        `payload`: a path (str or PathLike) names a file to send; bytes, a binary file, or an iterable or async
        iterable of bytes are the payload itself. What can be read once only is kept in a temporary file meanwhile
        (`TMPDIR` says where). Keyword arguments that this signature does not name go to the method; those whose names
        it has go into `kwargs`. `timeout`: seconds for the whole call. `save_to`: write the answer to this file and
        return its path; without it bytes above 64 MiB raise. `on_event`: called with every `Event`, on the
        loop, which it must not block (`SyncClient` and `TrioClient` call it where the caller waits, and while it is
        busy the newest event of a phase takes the place of those before). What it raises ends the call.

        `ticket_file`: keep in this file what is needed to continue. When this process is killed, or the call is
        cancelled or out of time, the job goes on for the server's grace time; the same call with the same file, from
        any process, continues it: the upload, the wait, or the download, of which what has arrived waits beside
        `save_to` in `.NAME.ID.part`. Another payload is refused; a file object is read to its end for that, once the
        job has ended. Of what can be read once only nothing is read any more when all of it was sent: bring the same.
        The file is removed when the answer is here, or the error that the job has ended with. It is as secret as the
        job.

        What is lost on the way is sent again from where it was; nothing that the server has is sent twice. Tried again
        are `config.attempts` connections while nothing is known of the job, afterwards as many as there are in
        `config.reconnect` seconds without progress: as long a server may be away, also behind a proxy where others with
        spools of their own answer. A job that a server should have, and has not, is looked for a minute.

        Returns what the method returned: JSON values, bytes (for a `Path`, the file's content), or `save_to`.
        Raises `UsageError`, `Refused`, `ModelError`, `JobCancelled`, `Interrupted` (the server or the worker was killed
        while the method ran), `JobFailed`, `Unreachable` (the method did not run) and `JobLost` (it may have).
        Left (cancelled, Ctrl-C) without a ticket file: the job is cancelled, best effort.
        """
        return await self._call(
            "predict", payload, version, metadata, timeout, save_to, on_event, ticket_file, {**(kwargs or {}), **more}
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
        ticket_file: str | os.PathLike[str] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        """Call the method `log`; else as `predict`."""
        return await self._call(
            "log", payload, version, metadata, timeout, save_to, on_event, ticket_file, {**(kwargs or {}), **more}
        )

    async def call(
        self,
        method: str,
        payload: Payload = b"",
        /,
        *,
        version: str = "",
        metadata: Sequence[tuple[str, str]] = (),
        timeout: float | None = None,
        save_to: str | os.PathLike[str] | None = None,
        on_event: OnEvent | None = None,
        ticket_file: str | os.PathLike[str] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        """Call any exported method, by its name; else as `predict`."""
        rpc, headers = named(method, metadata, self._config)
        return await self._call(
            rpc, payload, version, headers, timeout, save_to, on_event, ticket_file, {**(kwargs or {}), **more}
        )

    def stream(
        self,
        method: str,
        payload: Payload = b"",
        /,
        *,
        version: str = "",
        metadata: Sequence[tuple[str, str]] = (),
        timeout: float | None = None,
        ticket_file: str | os.PathLike[str] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Call:
        """Call any exported method step by step: what it is doing by an iterator, its answer in chunks.

            async with client.stream("predict", "scan.nii", top=5) as call:
                async for event in call.events():
                    show(event.phase, event.progress, event.log)
                async for chunk in call.chunks():
                    ...

        The arguments are those of `predict`; what is not named here goes to the method. `timeout` counts from the
        beginning of the `with` block, which raises `UsageError` for what cannot be sent. Leaving the block before the
        answer was had is what cancelling `predict` is.
        """
        check_timeout(timeout)
        rpc, headers = named(method, metadata, self._config)
        kwargs = {**(kwargs or {}), **more}
        return Call(
            self._link,
            lambda: prepare(self._link, rpc, payload, version, headers, ticket_file, kwargs, stacklevel=3),
            timeout,
        )

    async def submit(
        self,
        method: str,
        payload: Payload = b"",
        /,
        *,
        version: str = "",
        metadata: Sequence[tuple[str, str]] = (),
        on_event: OnEvent | None = None,
        ticket_file: str | os.PathLike[str] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Job:
        """Hand a job over and return its handle, once the server has the whole payload.

        `method` is the name of any exported method. The arguments are those of `predict` but for `timeout` and
        `save_to`, which are `Job.wait`'s: here they would go to the method. `on_event` is called until this returns.
        With `ticket_file` the same call continues what another process has begun; the file is removed when `Job.wait`
        has given the answer.

        Raises as `predict`; what the job then ends with is told by `Job.wait`. Cancelled without a ticket file before
        it returns: the job is cancelled, best effort.
        """
        rpc, headers = named(method, metadata, self._config)
        kwargs = {**(kwargs or {}), **more}
        call = Call(
            self._link,
            lambda: prepare(self._link, rpc, payload, version, headers, ticket_file, kwargs, stacklevel=4),
            None,
        )
        async with call:
            request, course = await call.hand_over(on_event)
        job = Job(
            self._link,
            course.ticket,
            request.metadata,
            taken=True,
            file=course.file,
            misses=course.misses,
            spool=course.spool,
        )
        job._watch()
        return job

    def attach(self, ticket: bytes | str, *, metadata: Sequence[tuple[str, str]] = ()) -> Job:
        """The handle of a job that this or any other process has submitted; asks nobody yet.

        `ticket` is what `Job.ticket` or `str(job)` was; `metadata` is sent with every call, `x-upstream` for one.
        Raises `UsageError` for what is no ticket.
        """
        return Job(self._link, parse_ticket(ticket), checked(metadata, self._config), taken=False, file=None)

    async def _call(
        self,
        rpc: str,
        payload: Payload,
        version: str,
        metadata: Sequence[tuple[str, str]],
        timeout: float | None,
        save_to: str | os.PathLike[str] | None,
        on_event: OnEvent | None,
        ticket_file: str | os.PathLike[str] | None,
        kwargs: dict[str, Any],
    ) -> Any:
        check_timeout(timeout)
        call = Call(
            self._link,
            lambda: prepare(self._link, rpc, payload, version, metadata, ticket_file, kwargs, stacklevel=5),
            timeout,
        )
        if save_to is not None:
            await asyncio.to_thread(check_target, save_to)
        async with call:
            return await call.answer(save_to, on_event)
