"""`Client`: the four methods, jobs that are submitted, and the connection that they share."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from grpclib.metadata import encode_metadata

from aipod.client.ask import ask
from aipod.client.course import CallDeadline, Course, Request, Until
from aipod.client.event import OnEvent
from aipod.client.follow import Follower, end_left, release, release_all
from aipod.client.job import Job
from aipod.client.link import Had, Link
from aipod.client.reader import Payload
from aipod.client.sink import check_target
from aipod.client.source import Source
from aipod.client.ticket import TicketFile, parse_ticket
from aipod.client.traced import traced
from aipod.codec import Compressor, frame
from aipod.config import KIB, Config
from aipod.errors import JobLost, Refused, Unreachable, UsageError, job_failed
from aipod.results import INLINE
from aipod.transport.channel import split_target
from aipod.wire.ai import Op, Phase

# Above it bytes are better in a file, and kwargs better in the payload: both are held in memory whole.
WARN_ABOVE = 32 * KIB
RPCS = ("chaos", "train", "predict", "log")
# Bytes of `max_headers` for what every call brings besides metadata: path, authority, job, token, trace.
OWN_HEADERS = 2 * KIB


class Client:
    """Calls the methods of a served model. asyncio-flavored; many calls may be under way at once.

        async with aipod.Client("127.0.0.1:50051") as client:
            answer = await client.predict("scan.nii", version="3", top=5)

            job = await client.submit("train", "set.csv", version="4")
            ...
            answer = await job.wait()

    `target` is HOST:PORT, [::1]:PORT or unix:PATH. The connection is made at the first call and again where it was
    lost. Raises `UsageError` for a target that is none.
    """

    def __init__(self, target: str = "127.0.0.1:50051", *, config: Config | None = None) -> None:
        try:
            split_target(target)
        except ValueError as exc:
            raise UsageError(str(exc)) from None
        self._config = config or Config()
        self._link = Link(target, self._config)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._link.aclose(release_all)

    def close(self) -> None:
        """Close the connection; calls under way end as lost ones. The next call opens a new one.

        Leaving `async with` also lets the server know of calls that were left and of answers that have arrived (for as
        long as it answers, 2 s at most where it does not), and waits until the socket is closed (1 s at most).
        """
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
        return its path; without it bytes above 64 MiB raise. `on_event`: called on the loop with every `Event`; must
        not block.

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
        Cancelled without a ticket file: the job is cancelled, best effort.
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
        closes = self._link.closes
        metadata = _checked(metadata, self._config)
        if method not in RPCS:
            metadata = [*(pair for pair in metadata if pair[0] != "x-func-name"), ("x-func-name", method)]
            metadata = _checked(metadata, self._config)
        rpc = method if method in RPCS else "chaos"
        request, course = await self._prepare(
            rpc, payload, version, metadata, ticket_file, {**(kwargs or {}), **more}, stacklevel=3
        )
        request.until, request.on_event = Until.TAKEN, on_event
        _, course = await self._run(request, course, None, closes)
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
        return Job(self._link, parse_ticket(ticket), _checked(metadata, self._config), taken=False, file=None)

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
        closes = self._link.closes
        _check_timeout(timeout)
        if save_to is not None:
            await asyncio.to_thread(check_target, save_to)
        request, course = await self._prepare(
            rpc, payload, version, _checked(metadata, self._config), ticket_file, kwargs, stacklevel=4
        )
        request.save_to, request.on_event = save_to, on_event
        request.goes_on = request.durable = ticket_file is not None
        if timeout is not None and ticket_file is None:
            request.deadline = CallDeadline.from_timeout(timeout)
        answer, course = await self._run(request, course, timeout, closes)
        self._delivered(request, course, closes)
        return answer

    async def _prepare(
        self,
        rpc: str,
        payload: Payload,
        version: str,
        metadata: Sequence[tuple[str, str]],
        ticket_file: str | os.PathLike[str] | None,
        kwargs: dict[str, Any],
        *,
        stacklevel: int,
    ) -> tuple[Request, Course]:
        if not isinstance(version, str):
            raise UsageError(f"version={version!r} is no text; write version={str(version)!r}")
        if rpc == "chaos" and version:
            kwargs = {**kwargs, "version": version}  # Raw has no field for it
        in_memory = isinstance(payload, bytes | bytearray | memoryview)
        if isinstance(payload, bytes | bytearray | memoryview) and len(payload) > WARN_ABOVE:
            warnings.warn(
                f"{len(payload)} bytes of payload in memory; a path is sent without loading it", stacklevel=stacklevel
            )
        text = self._text(kwargs, stacklevel + 1)
        level = self._config.small_level
        # What is large would have the loop's own one keep as much memory.
        packed = frame(text, level) if len(text) <= WARN_ABOVE else Compressor(level).frame(text)
        in_thread = self._link.in_thread
        source = Source(payload, in_thread) if in_memory else await asyncio.to_thread(Source, payload, in_thread)
        request = Request(rpc, metadata, packed, version, source)
        if ticket_file is None:
            return request, Course()
        request.fingerprint = await asyncio.to_thread(_fingerprint, request, text, source)
        file = ticket_file if isinstance(ticket_file, TicketFile) else TicketFile(ticket_file)
        course = Course(file=file)
        saved = await asyncio.to_thread(file.create, course.saved(request))
        if saved.ticket == course.ticket:
            return request, course
        file.check(saved, request.fingerprint)
        return request, Course.of_file(file, saved)

    def _text(self, kwargs: dict[str, Any], stacklevel: int) -> bytes:
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
            warnings.warn(
                f"{len(text)} bytes of keyword arguments; send large data as the payload", stacklevel=stacklevel
            )
        return text

    async def _run(self, request: Request, course: Course, timeout: float | None, closes: int) -> tuple[Any, Course]:
        """Follow the job as far as `request` wants; what that gave, and what is known of the job then.

        `closes`: of the link, when the caller called; one that was closed since is not opened again for that.
        """
        assert request.source is not None
        follower = Follower(self._link, request, course, closes)
        scope = asyncio.timeout(timeout)
        continued = False
        what = f"submit {_method(request)}" if request.until is Until.TAKEN else _method(request)
        try:
            with self._link.call(), traced(follower, request, what):
                try:
                    async with request.source, scope:
                        return await follower.run(), follower.course
                except BaseException as exc:
                    self._leave(request, follower.course, exc, closes)
                    raise
        except BaseException as exc:
            continued = _is_continued(follower.course, exc)
            if isinstance(exc, TimeoutError) and scope.expired():
                raise job_failed("DEADLINE_EXCEEDED", "not done within the call's timeout") from exc.__cause__
            raise
        finally:
            if request.save_to is not None:
                course = follower.course
                await asyncio.to_thread(course.leave if continued else course.discard)

    def _leave(self, request: Request, course: Course, error: BaseException, closes: int) -> None:
        """The caller goes without an answer: nobody can ask for the job again, unless there is a file."""
        if course.unchecked:
            return  # it may be another caller's
        if course.phase > Phase.DONE:
            self._release(request, course, closes)
            return
        absent = course.fresh or isinstance(error, Unreachable | JobLost)  # or out of reach
        absent = absent or (isinstance(error, Refused) and not course.answered)
        if course.file is None and not absent and self._link.closes == closes:
            op = Op.RELEASE if course.phase == Phase.DONE else Op.CANCEL
            self._link.errand(end_left, self._link, request.metadata, course.ticket, op, course.misses)

    def _delivered(self, request: Request, course: Course, closes: int) -> None:
        """The caller has the answer: nobody will ask for it again."""
        course.forget_file()
        self._release(request, course, closes)

    def _release(self, request: Request, course: Course, closes: int) -> None:
        """Let the server forget what became of the job: at once where that is large, else with a later call."""
        is_open = self._link.closes == closes
        had = Had(course.spool, course.ticket, request.metadata, course.misses)
        if course.file is not None:
            # Another process may have begun with the same file, and ask when it is in reach again. A job that is
            # released by a word of its own is known for its whole time, so the method is not run for that one.
            if is_open:
                self._link.errand(ask, self._link, had.metadata, had.ticket, Op.RELEASE, had.misses)
        elif not (
            is_open and course.told.get("answer_size", 0) > INLINE and self._link.errand(release, self._link, had)
        ):
            self._link.release(had)


def _is_continued(course: Course, error: BaseException) -> bool:
    """Whether the same call can go on with the job. Its ticket file goes where not.

    A job that has ended without an answer, or never began, is not continued: another try takes a new ticket.
    """
    if course.file is None:
        return False
    if course.unchecked:
        return True  # by whoever has the payload that was sent; this caller was told nothing of what became of it
    new = not (course.found or course.answered) and course.sent_to is None
    # SUPERSEDED: another caller goes on with the job, and with the file.
    refused = isinstance(error, Refused) and error.reason != "SUPERSEDED"
    if course.phase > Phase.DONE or (new and refused):
        course.forget_file()
        return False
    return True


def _method(request: Request) -> str:
    """What the request names, on whatever call."""
    return next((value for name, value in request.metadata if name == "x-func-name"), request.rpc)


def _fingerprint(request: Request, kwargs: bytes, source: Source) -> str:
    """What a ticket file knows its request by. Blocks: bytes in memory are hashed."""
    method = next((value for name, value in request.metadata if name == "x-func-name"), "")
    fields = [request.rpc, method, request.version, kwargs.decode(), source.size, source.content_tag()]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def _check_timeout(timeout: object) -> None:
    """Raises `UsageError` for what would fail as something else later on."""
    if timeout is not None and (not isinstance(timeout, int | float) or not timeout >= 0):
        raise UsageError(f"timeout={timeout!r} is not a number of seconds")


def _checked(metadata: Sequence[tuple[str, str]], config: Config) -> list[tuple[str, str]]:
    """Raises `UsageError` for what cannot be sent, or is more than a server takes: it would end the connection."""
    try:
        headers = [(name.lower(), value) for name, value in metadata]
    except (AttributeError, TypeError, ValueError):
        raise UsageError(f"metadata={metadata!r} is not a list of pairs of text: [('x-upstream', 'a')]") from None
    try:
        encode_metadata(headers)
    except (TypeError, ValueError) as exc:
        raise UsageError(f"metadata cannot be sent: {exc}") from None
    # As HTTP/2 counts them (RFC 9113 section 6.5.2).
    size = sum(len(name) + len(value) + 32 for name, value in headers)
    if size > config.max_headers - OWN_HEADERS:
        most = config.max_headers - OWN_HEADERS
        raise UsageError(f"{size} bytes of metadata; at most {most} (Config.max_headers); send more as the payload")
    return headers
