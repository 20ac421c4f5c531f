"""A job as its caller sees it: one attempt after the other, until there is what was asked for or no sense in more."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from grpclib.exceptions import GRPCError

from aipod.client.ask import ask
from aipod.client.call import Attempt
from aipod.client.course import Course, Request, elsewhere
from aipod.client.failure import ELSEWHERE, Action, Decision, Known, Local, NoAnswer, decide, gone
from aipod.client.link import Had, Link
from aipod.client.patience import Patience
from aipod.client.ticket import next_ticket
from aipod.errors import job_failed
from aipod.wire.ai import Op, Phase, State

# Seconds after which a job that was left is ended again where it is still being received.
ASK_AGAIN = (0.05, 0.2, 0.5)
CLOSED = "the client was closed"


class Follower:
    """Follows one job. `course` is what is known of it; a job that is run anew gets a new one."""

    def __init__(self, link: Link, request: Request, course: Course, closes: int) -> None:
        self._link = link
        self._request = request
        self._patience = Patience(link.config)
        self._closes = closes  # of `link`, when the caller called
        self._anew = 0
        self.course = course

    async def run(self) -> Any:
        """The answer, or what the request wants instead. This is an asyncio-flavored function.

        Raises what `aipod.Client.predict` says. Cancelled, it leaves the job alone.
        """
        source = self._request.source
        size = None if source is None else source.size
        while True:
            course, before = self.course, self.course.step
            if self._link.closes != self._closes:
                raise gone(course.known(self._link.target, course.op, receiving=False), CLOSED)
            attempt = Attempt(self._link, self._request, course)
            try:
                course.tell(
                    self._request,
                    phase="CONNECTING",
                    payload_size=size,
                    message="",
                    job_id=course.id,
                    **self._number(),
                )
                return await attempt.run()
            except (Exception, BaseExceptionGroup) as exc:
                decision = decide(exc, course.known(self._link.target, attempt.op, receiving=attempt.receiving))
                if decision is None:
                    raise
                deadline = self._request.deadline
                if decision.action is Action.RETRY and deadline is not None and deadline.time_remaining() <= 0:
                    raise job_failed("DEADLINE_EXCEEDED", "not done within the call's timeout") from exc
            if course.step != before or attempt.ran:
                self._patience.progress()
            elif attempt.answered:
                self._patience.seen()
            pause = self._prepare(decision, attempt)
            if pause:
                self._tell_waiting(decision.why)
            await asyncio.sleep(pause)
            if self._link.closes != self._closes:
                raise decision.error from decision.cause

    def _number(self) -> dict[str, int]:
        number = self._patience.attempt
        return {"connection": number, "connections": max(number, self._link.config.attempts)}

    def _tell_waiting(self, why: str) -> None:
        try:
            self.course.tell(self._request, phase="WAITING", message=why, **self._number())
        except Local as exc:
            raise exc.error from exc.error.__cause__

    def _prepare(self, decision: Decision, attempt: Attempt) -> float:
        """Make ready for another attempt; seconds to wait before it. Raises the error where there must be none."""
        course = self.course
        course.damaged += decision.damaged
        if decision.untouched and not attempt.answered:
            course.fresh = attempt.was_fresh
            if attempt.committed:
                course.not_sent()
        if decision.action is Action.STOP or self._link.closes != self._closes:
            raise decision.error from decision.cause
        if decision.action is Action.RELEARN and not course.relearn:
            course.relearn = True
            self._link.learn(self._request.upstream, decision.spool)
            return 0.0
        if decision.action is Action.OUTBID:
            course.epoch, course.may_outbid = decision.epoch, False
            return 0.0
        if decision.action is Action.ELSEWHERE:
            course.misses, course.searched = elsewhere(course.misses), course.searched + 1
            return 0.0
        # Of several addresses the one that cannot be reached is asked in turns with the others, as one that has it not.
        missed = decision.missed or (attempt.unreached and self._link.is_several)
        course.misses += missed
        if decision.draining:
            course.misses = elsewhere(course.misses)
        known = course.answered or course.sent_to is not None
        if decision.action is Action.ANEW:
            self._anew += 1
            if self._anew > self._link.config.attempts:
                raise decision.error from decision.cause
            self.course = Course(next_ticket(course.ticket), file=course.file, told=course.told)
            return 0.0  # the attempts that were lost have waited
        free = attempt.idle and not attempt.heard and decision.action is Action.RETRY
        pause = self._patience.pause(
            known=known, draining=decision.draining, at_least=decision.retry_after, free=free, within=decision.within
        )
        if pause is None:
            raise decision.error from decision.cause
        return 0.0 if missed and course.misses % 2 else pause  # elsewhere it is asked for at once


async def ask_surely(
    link: Link,
    metadata: Sequence[tuple[str, str]],
    ticket: bytes,
    op: Op,
    misses: int = 0,
    *,
    taken: bool = False,
    spool: str = "",
) -> tuple[State, int]:
    """`ask`, as often as it makes sense; what it gave, and after how many misses. `taken`: the job is known to be at a
    server, perhaps at none that answers now. `spool`: the one that it is in, where that is known.

    Raises `JobLost` where no connection lasts or that job is not found again, and `Refused` where there is none.
    This is an asyncio-flavored function.
    """
    patience, closes = Patience(link.config), link.closes
    phase = Phase.QUEUED if taken else Phase.NONE
    known = Known(link.target, Op.ATTACH, phase=phase, elsewhere=ELSEWHERE, spool=spool)
    while True:
        idle = link.is_connected(spool)
        unreached = False
        try:
            async with asyncio.timeout(link.config.silence):
                return await ask(link, metadata, ticket, op, misses, spool), misses
        except (Exception, BaseExceptionGroup) as exc:
            unreached = link.is_several and isinstance(exc, OSError)
            decision = decide(exc, known)
            if decision is None:
                raise
        if decision.action is Action.ELSEWHERE:
            misses = elsewhere(misses)
            known = dataclasses.replace(known, elsewhere=known.elsewhere - 1)
            continue
        missed = decision.missed or unreached
        misses += missed
        pause = patience.pause(known=decision.missed, at_least=decision.retry_after, free=idle, within=decision.within)
        if decision.action is not Action.RETRY or pause is None:
            raise decision.error from decision.cause
        await asyncio.sleep(0.0 if missed and misses % 2 else pause)
        if link.closes != closes:
            raise decision.error from decision.cause


async def release(link: Link, had: Had) -> None:
    """Release a job whose answer is here, best effort: where that fails, a later call takes the word along.

    This is an asyncio-flavored function.
    """
    try:
        await ask(link, had.metadata, had.ticket, Op.RELEASE, had.misses, had.spool)
    except BaseException:
        link.release(had)
        raise


async def release_all(link: Link, had: list[Had]) -> None:
    """Release jobs of one spool as a later call would have done. As `release`."""
    first = had[0]
    try:
        tickets = [one.ticket for one in had]
        await ask(link, first.metadata, first.ticket, Op.RELEASE, first.misses, first.spool, tickets)
    except BaseException:
        link.put_back(had)
        raise


async def end_left(
    link: Link, metadata: Sequence[tuple[str, str]], ticket: bytes, op: Op, misses: int, spool: str
) -> None:
    """End a job that its caller has left, best effort: the errand of one who has gone.

    The call that brought the job may still be about to create it, or to let go of it, when this one arrives: then it is
    asked again. This is an asyncio-flavored function.
    """
    for pause in ASK_AGAIN:
        with contextlib.suppress(GRPCError, NoAnswer):
            state = await ask(link, metadata, ticket, op, misses, spool)
            if state.phase > Phase.RECEIVING:
                return
        await asyncio.sleep(pause)
