"""The service `ai.AI`: each call is a viewer of one job."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import AsyncIterator
from typing import Any

import trio
from grpclib.const import Cardinality, Handler
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

from aipod import codec
from aipod.codec import PONG
from aipod.config import Config
from aipod.errors import AipodError, Refused, job_failed, leaves
from aipod.identity import Caller, Identities
from aipod.job.job import Job
from aipod.job.reply import own_messages, plain_messages, send_all, send_short
from aipod.job.request import Request, has_large_kwargs, is_plain, parse_attach, parse_request
from aipod.job.times import Download
from aipod.job.upload import check_limit, receive_payload
from aipod.job.watched import Told
from aipod.job.whole import MOMENT, comes_whole, has_nothing
from aipod.metrics import Metrics
from aipod.packing import Packer
from aipod.pool import Pool
from aipod.runner import Description
from aipod.service.builtin import Builtins, is_builtin
from aipod.service.drain import Drain, Ongoing
from aipod.service.forget import Forgetter
from aipod.service.jobs import Jobs
from aipod.service.large import LargeKwargs
from aipod.service.place import Place
from aipod.service.refusals import Refusals
from aipod.service.shortage import Shortage
from aipod.service.status import Ending, ending_of, failure_of, log
from aipod.service.viewer import Call, Viewer, Writer
from aipod.spool import Entry, Spool
from aipod.tracing import Trace
from aipod.transport.requests import PEER_GONE, TrioHandler
from aipod.versions import Versions
from aipod.wire.ai import Op, Open, Phase, Raw, StreamInput

RPCS = {"chaos": Raw, "train": StreamInput, "predict": StreamInput, "log": StreamInput}

# As `open.have`: the caller wants to hear how the job is, but not its answer.
_NO_ANSWER = 1 << 63

# Calls at once, over all connections, that have not brought their first message: 30 KB each, so 60 MB, for 50 bytes of
# headers. Clients send it right behind them. One more ends the one that has waited longest: were it refused itself,
# those that send nothing would keep everybody out.
SILENT = 2000


class AI:
    """The service object that grpclib serves.

    The mutable state is which calls have not brought their first message, and in what it is made of.
    """

    def __init__(
        self,
        config: Config,
        identities: Identities,
        description: Description,
        pool: Pool,
        spool: Spool,
        versions: Versions,
        jobs: trio.Nursery,
        metrics: Metrics,
    ) -> None:
        self._metrics = metrics
        self._config = config
        self._identities = identities
        self._description = description
        self._pool = pool
        self._spool = spool
        self._versions = versions
        self._nursery = jobs
        self._jobs = Jobs(config, description.methods, spool, versions, functools.partial(Place, pool), jobs, metrics)
        self._forgetter = Forgetter(spool)
        self._shortage = Shortage(spool)
        self._builtins = Builtins(config, spool, description, lambda: self.drain.begun)
        self._large_kwargs = LargeKwargs(config.upload_stall)
        self._silent: dict[trio.CancelScope, None] = {}  # the waits for a first message, the longest first
        self.now = self._jobs.room.now
        self.drain = Drain(self._jobs, config.cancel_grace)

    async def run(self) -> None:
        """What goes on beside the calls. This is a trio-flavored async function; it never returns."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._jobs.heed)
            nursery.start_soon(self._forgetter.run)
            nursery.start_soon(self._shortage.run)
            nursery.start_soon(self._identities.watch)

    async def adopt(self, job_ids: list[str]) -> None:
        """Go on with jobs whose process has died, as many as there is room for.

        This is a trio-flavored async function.
        """
        for job_id in job_ids:
            if self.drain.begun or not self._jobs.room.left:
                return
            try:
                if job_id not in self._jobs.held:
                    await self._jobs.adopt(job_id, asked=False)
            except Exception as exc:  # one that is damaged, say: the others go on
                log.warning("job %s: it cannot go on now", job_id, exc_info=exc, extra={"job": job_id})

    def __mapping__(self) -> dict[str, Handler]:
        return {
            f"/ai.AI/{rpc}": TrioHandler(functools.partial(self._serve, rpc), Cardinality.STREAM_STREAM, kind, Raw)
            for rpc, kind in RPCS.items()
        }

    async def _serve(self, rpc: str, stream: Stream[Any, Raw]) -> None:
        """One call, from the initial metadata to the trailers. This is a trio-flavored async function.

        Cancelled (the connection is gone): a plain client's job is cancelled; nothing is sent.
        """
        call = Call(stream)
        try:
            with self.drain.call(was_on_its_way=call.was_on_its_way) as ongoing:
                await self._converse(rpc, call, ongoing)
        except (Exception, BaseExceptionGroup) as exc:
            rest = [leaf for leaf in leaves(exc) if not isinstance(leaf, trio.Cancelled)]
            if not all(isinstance(leaf, (*PEER_GONE, AipodError, GRPCError)) for leaf in rest):
                raise
            # Also what every client does that has handed a job over, or has heard enough of it.
            level = logging.INFO if rest else logging.DEBUG
            log.log(level, "a call of %s was left by its peer: %s", rpc, rest or "reset")
            if isinstance(exc, BaseExceptionGroup) and (cancelled := exc.split(trio.Cancelled)[0]) is not None:
                raise cancelled from None
        finally:
            call.log_end(rpc)

    async def _converse(self, rpc: str, call: Call, ongoing: Ongoing) -> None:
        ending, trailers = Ending(), dict[str, str]()
        first = None
        if ongoing.refused:
            # Before the initial metadata, with which a stock client commits itself: its retry policy may yet find
            # another server (gRFC A6).
            try:
                self._identities.identify(call.authorization, call.certificate)
                first = await self._first(call, ongoing)
                if is_plain(first) and not is_builtin(rpc, call.headers.get("x-func-name", "")):
                    raise Refusals.draining()
            except (AipodError, GRPCError) as exc:
                await call.finish(ending_of(exc), trailers)
                return
        refused, caller = None, None
        try:
            caller = self._identities.identify(call.authorization, call.certificate)
        except AipodError as exc:
            refused = exc
        async with trio.open_nursery() as nursery:
            writer = Writer(call, nursery)
            viewer = Viewer(writer, nursery, self._config.tick, self._metrics.late)
            with call.joined():
                await call.start()
                if caller is not None:
                    viewer.begin()
            try:
                if refused is not None:
                    raise refused
                assert caller is not None, "who is not refused is somebody"
                await self._view(rpc, first, caller, call, viewer, writer, trailers, ongoing)
            except (Exception, BaseExceptionGroup) as exc:
                if any(isinstance(leaf, trio.Cancelled) for leaf in leaves(exc)):
                    raise
                self._shortage.note(exc)
                ending = ending_of(exc)
                self._metrics.fail(ending.reason)
            await writer.finish(ending, trailers)

    async def _view(
        self,
        rpc: str,
        first: Raw | StreamInput | None,
        caller: Caller,
        call: Call,
        viewer: Viewer,
        writer: Writer,
        trailers: dict[str, str],
        ongoing: Ongoing,
    ) -> None:
        call.caller = caller.name
        timeout, scope = call.timeout, ongoing.scope
        scope.deadline = trio.current_time() + timeout if timeout is not None else float("inf")
        with scope:
            try:
                if first is None:
                    first = await self._first(call, ongoing)
                ongoing.asks = not is_plain(first)
                if is_builtin(rpc, call.headers.get("x-func-name", "")):
                    await self._builtins.run(first, caller, call, viewer, writer)
                elif (attach := parse_attach(first, call.headers)) is not None:
                    await self._own(None, None, *attach, caller, call, viewer, writer, ongoing)
                else:
                    large = has_large_kwargs(first, self._config.kwargs_limit)
                    async with self._large_kwargs.room(large) as give_back:
                        request = await self._open(rpc, first, caller, call, large=large)
                        del first  # what came of the kwargs

                        def stored() -> None:
                            request.drop_kwargs()
                            give_back()

                        if request.open is not None:
                            if comes_whole(request) and has_nothing(request.first):
                                second = await call.receive_soon(MOMENT)
                                request.first = request.first if second is None else second
                            found = await self._jobs.find(request, stored, scope.deadline)
                        else:
                            entry = await self._jobs.claim_plain(request)
                        stored()
                    if request.open is not None:
                        who = request.job_id, request.open
                        await self._own(request, found, *who, caller, call, viewer, writer, ongoing)
                    else:
                        await self._plain(request, entry, call, viewer, writer, trailers, ongoing)
            finally:
                viewer.end()
        if scope.cancelled_caught:
            if trio.current_time() >= scope.deadline:
                raise job_failed("DEADLINE_EXCEEDED", f"not done within the call's timeout of {timeout:g} s")
            raise self.drain.why(ongoing)

    async def _first(self, call: Call, ongoing: Ongoing) -> Raw | StreamInput:
        """Wait for the first message; a later call may end that wait (`SILENT`).

        This is a trio-flavored async function. Raises `Refused` (BAD_MESSAGE, OVERLOADED, UPLOAD_STALLED).
        """
        if call.has_message:  # most bring it with their headers
            return _present(await call.receive_first())
        if len(self._silent) >= SILENT:
            oldest = next(iter(self._silent))
            del self._silent[oldest]
            oldest.cancel()
        with trio.CancelScope() as patience, self.drain.idling(ongoing):
            self._silent[patience] = None
            try:
                came = await call.arrival(self._config.upload_stall)
            finally:
                self._silent.pop(patience, None)
            if came:
                return _present(await call.receive_first())
        if patience.cancelled_caught:
            raise Refused("OVERLOADED", "the server has many calls without a first message at once; try again later")
        raise Refused("UPLOAD_STALLED", f"no first message for {self._config.upload_stall:g} s (--upload-stall)")

    async def _open(self, rpc: str, first: Raw | StreamInput, caller: Caller, call: Call, *, large: bool) -> Request:
        """Check what is asked for; every refusal that needs no payload is made here. `large`: its kwargs."""
        parse = functools.partial(
            parse_request,
            *(rpc, first, call.headers, self._description.methods, self._description.name),
            *(self._config.kwargs_limit, caller),
        )
        # Small ones here: a way into a thread takes ten times what they do.
        request = await self._large_kwargs.parse(parse) if large else parse()
        check_limit(request.size or 0, self._config.max_payload)
        return request

    # Own clients: the job goes on without the call that brought it

    async def _own(
        self,
        request: Request | None,
        found: Job | Told | None,
        job_id: str,
        open_: Open,
        caller: Caller,
        call: Call,
        viewer: Viewer,
        writer: Writer,
        ongoing: Ongoing,
    ) -> None:
        """Watch the job, `found` or looked for; bring its payload where it is this call's to bring; send its answer."""
        call.job_id = job_id
        if open_.released:
            released = [codec.job_id(ticket) for ticket in open_.released]
            if open_.op == Op.RELEASE:  # its own may be among them: it is not kept for longer than the others then
                await self._forgetter.release(released, caller)
            else:
                self._forgetter.release_soon(released, caller)
        if request is None:
            await self._jobs.check_owner(job_id, caller)
        if open_.op in (Op.CANCEL, Op.RELEASE):
            told = await self._jobs.end(job_id, release=open_.op == Op.RELEASE)
            await writer.send_last(Raw(data=PONG, state=told.state()))
            return
        while True:
            if found is None:
                found = await (
                    self._jobs.attach(job_id)
                    if request is None
                    else self._jobs.find(request, request.drop_kwargs, ongoing.scope.deadline)
                )
            job, found = found, None
            if request is not None and not (isinstance(job, Job) and job.request is request):
                request.take_first()  # who only watches must not hold a message's worth of memory
            # Who wants something else than the answer says that it has more of it than there is.
            viewer.watch(job, open_.log_have, patient=open_.have < _NO_ANSWER)
            if not isinstance(job, Job):
                with self.drain.idling(ongoing):
                    await self._jobs.follow(job)
            else:
                job.viewers += 1
                try:
                    if job.request is request and job.phase == Phase.RECEIVING:
                        await self._upload(job, call, ongoing.scope.deadline)
                    await job.over.wait()
                finally:
                    job.leave()
            if job.ended:
                break
        viewer.stop()
        end = Raw(data=PONG, state=await viewer.outcome())
        if job.answer is None:
            await writer.send_last(end)
        else:
            try:
                download = Download(self._metrics, job.method, job.answer.size, open_.have)
                is_short = job.answer.inline is not None
                packer = Packer(self._config.small_level if is_short else self._config.level, open_.have, call.held)
                messages = own_messages(job.look, job.answer, packer, download)
                with Trace("download", call.headers, job_id=job_id):
                    if is_short:
                        await send_short([end], messages, writer.send_last, download)
                    else:
                        await writer.send(end)
                        await send_all(messages, writer.send, download, packer)
            except* FileNotFoundError:
                raise Refused("NOT_FOUND", "the answer was released while it was sent") from None
        self._forgetter.told(job, open_)

    async def _upload(self, job: Job, call: Call, deadline: float) -> None:
        """Receive the payload and start the job; whatever comes between leaves it to who comes next."""
        try:
            with job.upload:
                await self._receive(job, call)
                self._jobs.start(job, deadline)
                return
        except BaseException:
            await self._jobs.leave_upload(job)
            raise
        await self._jobs.leave_upload(job)
        if job.superseded_by:
            won = {"epoch": str(job.superseded_by)}
            raise Refused("SUPERSEDED", "a newer call with the same ticket goes on with this upload", won)
        if job.handed_over:
            raise Refusals.draining()

    async def _receive(self, job: Job, call: Call) -> None:
        call.expect((job.request.size or 0) - job.entry.written)
        await receive_payload(
            job.request,
            job.entry,
            functools.partial(call.receive_within, self._config.upload_stall),
            limit=self._config.max_payload,
            synced=job.notify,
            arrived=job.times.arrived,
        )

    # Plain clients: the call is the job

    async def _plain(
        self,
        request: Request,
        entry: Entry,
        call: Call,
        viewer: Viewer,
        writer: Writer,
        trailers: dict[str, str],
        ongoing: Ongoing,
    ) -> None:
        call.job_id = request.job_id
        async with self._job(request, entry, call, viewer, ongoing.scope.deadline) as job:
            ongoing.job = job
            await job.over.wait()
            viewer.stop()
            if job.answer is None:
                assert job.error is not None, "an ended job has an answer or an error"
                raise job.error
            if job.answer.kind == "file":
                trailers["x-content-type"] = "application/octet-stream"
            download = Download(self._metrics, job.method, job.answer.size)
            limits = self._config.small_level, self._config.message_limit
            messages = plain_messages(job.look, job.answer, *limits, download)
            with Trace("download", call.headers, job_id=request.job_id):
                if job.answer.inline is not None:
                    await send_short([], messages, writer.send_last, download)
                else:
                    await send_all(messages, writer.send, download)

    @contextlib.asynccontextmanager
    async def _job(
        self, request: Request, entry: Entry, call: Call, viewer: Viewer, deadline: float
    ) -> AsyncIterator[Job]:
        """Receive the payload and start the job. When the viewer leaves, the job is cancelled if it has not ended."""
        job = Job(request, entry, self._spool.id, metrics=self._metrics)
        try:
            viewer.watch(job)
            with self._jobs.room.coming(request.job_id, request.version):
                await self._receive(job, call)
                self._jobs.start(job, deadline)
        except BaseException as exc:
            job.end(failure_of(exc))
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(entry.destroy)
            job.close()
            raise
        try:
            yield job
        finally:
            job.cancel()


def _present(first: Raw | StreamInput | None) -> Raw | StreamInput:
    if first is None:
        raise Refused("BAD_MESSAGE", "the request ended before its first message")
    return first
