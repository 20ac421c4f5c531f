"""The service `ai.AI`: each call is a viewer of one job."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import trio
from grpclib.const import Cardinality, Handler
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

from aipod.config import Config
from aipod.errors import AipodError, Refused, job_failed, leaves
from aipod.job.reply import own_messages, plain_messages, send_all
from aipod.job.request import Request, parse_request
from aipod.job.run import Job, run_job
from aipod.job.upload import check_limit, receive_payload
from aipod.pool import Lease, Pool, Waiter
from aipod.runner import Description
from aipod.service.status import Ending, ending_of, log
from aipod.service.viewer import Call, Viewer, Writer
from aipod.spool import Spool
from aipod.transport.server import PEER_GONE, TrioHandler
from aipod.versions import Versions
from aipod.wire.ai import Raw, StreamInput

RPCS = {"chaos": Raw, "train": StreamInput, "predict": StreamInput, "log": StreamInput}


class AI:
    """The service object that grpclib serves.

    The mutable state is the calls under way with their jobs (a drain waits for them) and whether a drain has begun.
    """

    def __init__(
        self, config: Config, description: Description, pool: Pool, spool: Spool, versions: Versions, jobs: trio.Nursery
    ) -> None:
        self._config = config
        self._description = description
        self._pool = pool
        self._spool = spool
        self._versions = versions
        # The server's: a job must be able to outlive the call that brought it.
        self._jobs = jobs
        self._active: dict[trio.CancelScope, Job | None] = {}
        self._idle = trio.Event()
        self.draining = False

    def __mapping__(self) -> dict[str, Handler]:
        return {
            f"/ai.AI/{rpc}": TrioHandler(functools.partial(self._serve, rpc), Cardinality.STREAM_STREAM, kind, Raw)
            for rpc, kind in RPCS.items()
        }

    async def drain(self, seconds: float) -> None:
        """Refuse new jobs and wait for those under way; cancel what is left after `seconds`.

        A job whose method was not started is refused, with the advice to try again; any other ends as cancelled, for
        the method must not run twice.
        This is a trio-flavored async function.
        """
        self.draining = True
        with trio.move_on_after(seconds):
            while self._active:
                await self._wait_idle()
        for scope, job in self._active.items():
            if job is not None:
                job.stop("the server is shutting down")
            if job is None or not job.started:
                scope.cancel()
        with trio.move_on_after(2 * self._config.cancel_grace + 5):  # the three steps, then trailers
            while self._active:
                await self._wait_idle()

    async def _wait_idle(self) -> None:
        self._idle = trio.Event()
        await self._idle.wait()

    async def _serve(self, rpc: str, stream: Stream[Any, Raw]) -> None:
        """One call, from the initial metadata to the trailers. This is a trio-flavored async function.

        Cancelled (the connection is gone): the job is cancelled; nothing is sent.
        """
        call = Call(stream)
        scope = trio.CancelScope()
        self._active[scope] = None
        try:
            await self._converse(rpc, call, scope)
        except (Exception, BaseExceptionGroup) as exc:
            rest = [leaf for leaf in leaves(exc) if not isinstance(leaf, trio.Cancelled)]
            if not all(isinstance(leaf, (*PEER_GONE, AipodError, GRPCError)) for leaf in rest):
                raise
            log.info("a call of %s was left by its peer: %s", rpc, rest or "cancelled")
            if isinstance(exc, BaseExceptionGroup) and (cancelled := exc.split(trio.Cancelled)[0]) is not None:
                raise cancelled from None
        finally:
            del self._active[scope]
            if not self._active:
                self._idle.set()

    async def _converse(self, rpc: str, call: Call, scope: trio.CancelScope) -> None:
        ending, trailers = Ending(), dict[str, str]()
        await call.start()
        async with trio.open_nursery() as nursery:
            writer = Writer(call)
            nursery.start_soon(writer.run)
            try:
                await self._view(rpc, call, writer, trailers, scope)
            except (Exception, BaseExceptionGroup) as exc:
                if any(isinstance(leaf, trio.Cancelled) for leaf in leaves(exc)):
                    raise
                ending = ending_of(exc)
            writer.close()
            await writer.done.wait()
        await call.finish(ending, trailers)

    async def _view(
        self, rpc: str, call: Call, writer: Writer, trailers: dict[str, str], scope: trio.CancelScope
    ) -> None:
        viewer = Viewer(writer, self._config.tick)
        timeout = call.timeout
        scope.deadline = trio.current_time() + timeout if timeout is not None else float("inf")
        with scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(viewer.beat)
                request = await self._open(rpc, call)
                async with self._job(request, call, viewer, scope.deadline) as job:
                    self._active[scope] = job
                    await job.ended.wait()
                    viewer.stop()
                    await self._answer(job, writer, viewer, trailers)
                nursery.cancel_scope.cancel()
        if scope.cancelled_caught:
            if trio.current_time() >= scope.deadline:
                raise job_failed("DEADLINE_EXCEEDED", f"not done within the call's timeout of {timeout:g} s")
            raise Refused("DRAINING", "the server is shutting down; try again")

    async def _open(self, rpc: str, call: Call) -> Request:
        """Read and check what is asked for; every refusal that needs no payload is made here."""
        if self.draining:
            raise Refused("DRAINING", "the server is shutting down; try again")
        with trio.move_on_after(self._config.upload_stall):
            first = await call.receive_first()
            if first is None:
                raise Refused("BAD_MESSAGE", "the request ended before its first message")
            # In a thread: 16 MiB of JSON take a while.
            request = await trio.to_thread.run_sync(
                parse_request,
                *(rpc, first, call.headers, self._description.methods, self._description.name),
                self._config.kwargs_limit,
            )
            if self.draining:  # it began while the caller hesitated
                raise Refused("DRAINING", "the server is shutting down; try again")
            if request.open is not None and request.open.spool not in ("", self._spool.id):
                raise Refused("WRONG_SPOOL", "that job lives in another spool", {"spool": self._spool.id})
            check_limit(request.size or 0, self._config.max_payload)
            return request
        raise Refused("UPLOAD_STALLED", f"no first message for {self._config.upload_stall:g} s (--upload-stall)")

    @contextlib.asynccontextmanager
    async def _job(self, request: Request, call: Call, viewer: Viewer, deadline: float) -> AsyncIterator[Job]:
        """Receive the payload and start the job. When the viewer leaves, the job is cancelled if it has not ended.

        That is the one place which decides what a viewer's end means to its job: its end, until jobs can be resumed.
        """
        fields = {"ticketed": not request.plain, "method": request.method, "version": request.version}
        entry = await trio.to_thread.run_sync(
            functools.partial(self._spool.claim, request.job_id, fields, request.kwargs, size=request.size)
        )
        job = Job(request, entry, self._spool.id)
        try:
            viewer.watch(job)
            await receive_payload(
                request,
                entry,
                call.receive,
                functools.partial(job.enter, job.phase),
                limit=self._config.max_payload,
                stall=self._config.upload_stall,
            )
            queue = Place(self._pool, request.version)
            limit = self._description.methods[request.method]["timeout"]
            self._jobs.start_soon(run_job, job, queue, self._versions, self._config.tick, limit, deadline)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(entry.destroy)
            raise
        try:
            yield job
        finally:
            job.cancel()

    async def _answer(self, job: Job, writer: Writer, viewer: Viewer, trailers: dict[str, str]) -> None:
        request, answer = job.request, job.answer
        level = self._config.level
        if request.plain:
            if answer is None:
                assert job.error is not None, "an ended job has an answer or an error"
                raise job.error
            if answer.kind == "file":
                trailers["x-content-type"] = "application/octet-stream"
            await send_all(plain_messages(job.entry, answer, level, self._config.message_limit), writer.send)
            return
        await viewer.say_outcome()
        if answer is not None:
            assert request.open is not None
            await send_all(own_messages(job.entry, answer, request.open.have, level), writer.send)


class Place:
    """A job's place in the pool's line."""

    def __init__(self, pool: Pool, version: str) -> None:
        self._pool = pool
        self._version = version
        self._waiter = Waiter(version)
        self._leased = False

    def place(self) -> int:
        return self._pool.place(self._waiter)

    def lease(self) -> AbstractAsyncContextManager[Lease]:
        if self._leased:
            self._waiter = Waiter(self._version, again=True)
        self._leased = True
        return self._pool.lease(self._version, self._waiter)

    def retire(self) -> None:
        self._pool.retire(self._version)
