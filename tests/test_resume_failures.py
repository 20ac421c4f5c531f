"""The client's table of failures: what is tried again, what stops, and what its caller is told."""

from __future__ import annotations

import dataclasses
import errno
import re
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError

import aipod
from aipod.client.failure import (
    OUT_OF_SIGHT,
    Action,
    BadAnswer,
    Known,
    Local,
    NoAnswer,
    decide,
    of_state,
)
from aipod.client.patience import Patience
from aipod.config import Config
from aipod.errors import TABLE, leaves
from aipod.transport.codec import BadMessage
from aipod.transport.stream import StreamRefused
from aipod.transport.tls import Disagreement
from aipod.wire.ai import Error, Op, Phase, State

SPOOL = "0123-boot1"
BEFORE = Known("t")  # nothing was answered, `last` was not sent
AFTER = Known("t", Op.RESUME, SPOOL, 5.0, Phase.RECEIVING)
WATCHED = Known("t", Op.ATTACH, None, 0.0, Phase.QUEUED)
STRANGE = Known("t", Op.ATTACH)


def refusal(reason: str, *, delay: float | None = None, **metadata: str) -> GRPCError:
    """What the server's table makes of `reason`."""
    row = TABLE[reason]
    details: list[Any] = [ErrorInfo(domain="aipod", reason=reason, metadata=metadata)]
    delay = row.retry_after if delay is None else delay
    if delay is not None:
        details.append(RetryInfo(retry_delay=Duration(seconds=int(delay), nanos=int(delay % 1 * 1e9))))
    return GRPCError(Status(int(row.code)), "text", details)


def outcome(exc: BaseException, known: Known) -> tuple[Action, str]:
    decision = decide(exc, known)
    assert decision is not None
    assert isinstance(decision.error, aipod.AipodError)
    return decision.action, decision.error.reason


@pytest.mark.parametrize(
    "exc",
    [
        OSError("x"),
        TimeoutError(),
        ConnectionResetError(),
        StreamTerminatedError("x"),
        NoAnswer("status OK without an outcome"),
        GRPCError(Status.INTERNAL, "a proxy's"),
        GRPCError(Status.UNAVAILABLE, "a proxy's"),
        GRPCError(Status.UNKNOWN, "a proxy's"),
        GRPCError(Status.CANCELLED),
        GRPCError(Status.DEADLINE_EXCEEDED),
        GRPCError(Status.INTERNAL, "a stranger's", [ErrorInfo(domain="other", reason="INTERNAL")]),
        BadMessage(Status.INTERNAL, "cannot be read"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_lost_connection_is_tried_again_and_typed(exc: Exception, wrapped: bool) -> None:
    whole = ExceptionGroup("", [ExceptionGroup("", [exc])]) if wrapped else exc
    assert outcome(whole, BEFORE) == (Action.RETRY, "UNREACHABLE")
    for known in (AFTER, WATCHED, STRANGE):
        assert outcome(whole, known) == (Action.RETRY, "JOB_LOST")
        decision = decide(whole, known)
        assert decision is not None
        assert (decision.cause, decision.retry_after, decision.within) == (next(leaves(whole)), 0.0, None)
        assert ("may have run" in str(decision.error)) is (known is not STRANGE)


def test_a_disagreement_about_tls_is_told_at_once_and_tried_again_for_a_job_that_is_somewhere() -> None:
    """Its server's certificate may be renewed. Mutants seen: it is tried again; a job that is there is given up."""
    exc = Disagreement("certificate verify failed")
    assert outcome(exc, BEFORE) == (Action.STOP, "UNREACHABLE")
    assert outcome(exc, STRANGE) == (Action.STOP, "JOB_LOST")
    for known in (AFTER, WATCHED):
        assert outcome(exc, known) == (Action.RETRY, "JOB_LOST")


@pytest.mark.parametrize(
    ("exc", "why"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)"), "Connection refused"),
        (StreamTerminatedError("Connection lost"), "Connection lost"),
        (TimeoutError(), "no answer in time"),
        (GRPCError(Status.UNAVAILABLE, "a proxy's"), "UNAVAILABLE: a proxy's"),
        (GRPCError(Status.CANCELLED), "CANCELLED"),
        (refusal("DRAINING"), "DRAINING: text"),
        (BadAnswer("it goes on at byte 3, not at 2"), "the answer arrived damaged: .*"),
    ],
)
def test_who_watches_is_told_the_cause_in_short(exc: Exception, why: str) -> None:
    """Mutant: the error that is raised in the end says that the job may have run, while it is still being tried."""
    for known in (BEFORE, AFTER, WATCHED):
        decision = decide(exc, known)
        assert decision is not None
        assert decision.action is Action.RETRY
        assert re.fullmatch(why, decision.why)


def test_what_was_not_processed_leaves_the_request_incomplete() -> None:
    decision = decide(StreamRefused("refused"), AFTER)
    assert decision is not None
    assert (decision.action, decision.untouched) == (Action.RETRY, True)


STOPS = {
    "PROBE",
    "BAD_KWARGS", "BAD_TICKET", "BAD_VERSION", "BAD_MESSAGE", "UNKNOWN_METHOD", "OTHER_REQUEST", "DAMAGED",
    "SIZE_MISMATCH", "DIGEST_MISMATCH", "PAYLOAD_TOO_LARGE", "LOAD_FAILED", "MODEL_ERROR", "WORKER_CRASHED",
    "RESULT_NOT_JSON", "RESULT_NOT_TEXT", "RESULT_NO_FILE", "RESULT_NOT_STORED", "CANCELLED", "DEADLINE_EXCEEDED",
    "INTERRUPTED", "RELEASED", "INTERNAL", "SUPERSEDED", "UNAUTHENTICATED", "PERMISSION_DENIED",
}  # fmt: skip


COMES_AGAIN = {"BUSY", "DRAINING", "SPOOL_FULL", "OVERLOADED"}
TRANSIENT = {"OFFSET_MISMATCH", "UPLOAD_STALLED", "TRUNCATED"}
SPECIAL = {"NOT_FOUND", "NOT_STARTED", "WRONG_SPOOL", "BAD_CHUNK"}


def test_every_reason_is_decided_here() -> None:
    assert set(TABLE) == STOPS | COMES_AGAIN | TRANSIENT | SPECIAL


@pytest.mark.parametrize("reason", sorted(STOPS))
def test_reasons_that_stop(reason: str) -> None:
    for known in (BEFORE, AFTER, WATCHED):
        assert outcome(refusal(reason), known) == (Action.STOP, reason)


@pytest.mark.parametrize("reason", sorted(COMES_AGAIN))
def test_reasons_with_retry_info(reason: str) -> None:
    """Before `last` was sent the server's own reason is what a caller who gives up hears; after it, that it may run."""
    assert outcome(refusal(reason, delay=1.5), BEFORE) == (Action.RETRY, reason)
    assert outcome(refusal(reason, delay=1.5), AFTER) == (Action.RETRY, "JOB_LOST")
    decision = decide(refusal(reason, delay=1.5), AFTER)
    assert decision is not None
    assert decision.retry_after == 1.5


def test_a_job_that_a_draining_server_does_not_create_is_for_another_one() -> None:
    decisions = [decide(refusal("DRAINING", delay=1.0, **more), known) for known, more in (
        (BEFORE, {}), (BEFORE, {"kept": "spool-boot1"}), (AFTER, {}),
    )]  # fmt: skip
    assert [decision.draining for decision in decisions if decision is not None] == [True, False, False]
    # For as long as a drain may take, unless what fails once is not to be tried again.
    now = 0.0
    patience = Patience(Config(attempts=2, reconnect=60), clock=lambda: now)
    for _ in range(20):
        assert patience.pause(known=False, draining=True, at_least=1.0) is not None
        now += 2.9
    now = 60.0
    assert patience.pause(known=False, draining=True, at_least=1.0) is None
    assert Patience(Config(attempts=1)).pause(known=False, draining=True, at_least=1.0) is None


def test_an_upload_that_found_a_full_disk_has_not_run() -> None:
    """Though `last` was sent: the server did not take what came before it."""
    told = dataclasses.replace(AFTER, phase=Phase.RECEIVING, receiving=True)
    decision = decide(refusal("SPOOL_FULL", delay=1.5), told)
    assert decision is not None
    assert isinstance(decision.error, aipod.Refused)
    assert "the method has not run" in str(decision.error)
    # It said so in an earlier attempt only: what cannot be stored may be how a run has ended.
    earlier = dataclasses.replace(told, receiving=False)
    assert outcome(refusal("SPOOL_FULL", delay=1.5), earlier) == (Action.RETRY, "JOB_LOST")
    assert outcome(refusal("BUSY", delay=1.5), told) == (Action.RETRY, "JOB_LOST")


@pytest.mark.parametrize("reason", sorted(TRANSIENT))
def test_reasons_that_say_nothing_against_the_request(reason: str) -> None:
    assert outcome(refusal(reason), BEFORE) == (Action.RETRY, "UNREACHABLE")
    assert outcome(refusal(reason), AFTER) == (Action.RETRY, "JOB_LOST")


def test_a_status_without_our_details_is_retried_only_with_retry_info() -> None:
    full = GRPCError(Status.RESOURCE_EXHAUSTED, "full")
    later = GRPCError(Status.RESOURCE_EXHAUSTED, "full", [RetryInfo(retry_delay=Duration(seconds=3))])
    assert outcome(full, BEFORE) == (Action.STOP, "RESOURCE_EXHAUSTED")
    assert outcome(full, AFTER) == (Action.STOP, "JOB_LOST")
    assert outcome(later, BEFORE) == (Action.RETRY, "RESOURCE_EXHAUSTED")
    assert outcome(GRPCError(Status.UNIMPLEMENTED, "no such page"), BEFORE) == (Action.STOP, "UNIMPLEMENTED")
    assert outcome(GRPCError(Status.PERMISSION_DENIED, "no"), AFTER) == (Action.STOP, "JOB_LOST")


def test_a_damaged_chunk_is_sent_once_more() -> None:
    assert outcome(refusal("BAD_CHUNK"), BEFORE) == (Action.RETRY, "BAD_CHUNK")
    assert outcome(refusal("BAD_CHUNK"), Known("t", damaged=1)) == (Action.STOP, "BAD_CHUNK")
    assert outcome(BadAnswer("x"), AFTER) == (Action.RETRY, "BAD_ANSWER")
    assert outcome(BadAnswer("x"), Known("t", damaged=1)) == (Action.STOP, "BAD_ANSWER")


def test_the_wrong_spool() -> None:
    wrong = refusal("WRONG_SPOOL", spool="other-boot1")
    learnt = decide(wrong, BEFORE)
    assert learnt is not None
    assert (learnt.action, learnt.untouched, learnt.spool) == (Action.RELEARN, True, "other-boot1")
    for known in (AFTER, WATCHED):
        decision = decide(wrong, known)
        assert decision is not None
        # As safe as where nothing answers: as long as then.
        assert (decision.action, decision.missed, decision.within) == (Action.RETRY, True, None)
        assert isinstance(decision.error, aipod.JobLost)
        assert decision.why == "WRONG_SPOOL: text; it may be elsewhere, and is looked for until its own server is back"


def test_a_job_that_is_not_there() -> None:
    assert outcome(refusal("NOT_FOUND"), STRANGE) == (Action.STOP, "NOT_FOUND")
    decision = decide(refusal("NOT_FOUND"), WATCHED)
    assert decision is not None
    assert "t answers, but the job is not found there; it may have run" in str(decision.error), "no connection was lost"
    assert (decision.action, decision.missed, decision.within) == (Action.RETRY, True, OUT_OF_SIGHT)
    assert isinstance(decision.error, aipod.JobLost)
    assert decision.why == "NOT_FOUND: text; it may be elsewhere, and is looked for 60 s long"


@pytest.mark.parametrize(
    ("asked", "has", "limit"),
    [
        ("other-boot1", SPOOL, None),  # its own server is away
        (SPOOL, SPOOL, OUT_OF_SIGHT),
        ("0123-boot2", SPOOL, OUT_OF_SIGHT),  # the same, after a reboot
        ("other-boot1", "", OUT_OF_SIGHT),
        ("", SPOOL, OUT_OF_SIGHT),  # a server that does not say
    ],
)
def test_a_job_in_a_spool_that_nobody_serves_now_is_waited_for(asked: str, has: str, limit: float | None) -> None:
    """Mutants seen: for 60 s only (as it was); for a job that its own server does not have any more, too."""
    exc = refusal("NOT_FOUND", **({"spool": asked} if asked else {}))
    decision = decide(exc, dataclasses.replace(WATCHED, spool=has))
    assert decision is not None
    assert (decision.action, decision.missed, decision.within) == (Action.RETRY, True, limit)


@pytest.mark.parametrize(
    ("known", "spool", "action"),
    [
        (AFTER, SPOOL, Action.ANEW),
        (Known("t", Op.RESUME, SPOOL, 5.0), SPOOL, Action.ANEW),
        (Known("t", Op.RESUME, SPOOL, 899.0), SPOOL, Action.ANEW),
        (Known("t", Op.RESUME, SPOOL, 900.0), SPOOL, Action.STOP),  # it may have run and been forgotten
        (Known("t", Op.RESUME, SPOOL, -1.0), SPOOL, Action.STOP),  # the clock was set
        (AFTER, "0123-boot2", Action.STOP),  # the machine was started again: the last second may be lost
        (AFTER, "", Action.STOP),
        (Known("t", Op.RESUME, "", 5.0), SPOOL, Action.STOP),
        (Known("t", Op.RESUME, SPOOL, 5.0, Phase.QUEUED), SPOOL, Action.STOP),  # it was complete: it may have run
        (Known("t", Op.RESUME, SPOOL, 5.0, Phase.RUNNING), SPOOL, Action.STOP),
        (Known("t", Op.RUN), SPOOL, Action.STOP),
        (WATCHED, SPOOL, Action.STOP),
    ],
)
def test_when_a_job_that_was_not_started_is_run_anew(known: Known, spool: str, action: Action) -> None:
    decision = decide(refusal("NOT_STARTED", spool=spool, ttl="900"), known)
    assert decision is not None
    assert decision.action is action
    if action is Action.ANEW:  # should there be no patience for another time: it has not run
        assert isinstance(decision.error, aipod.Unreachable)


def test_a_process_that_has_just_started_outbids_once() -> None:
    exc = refusal("SUPERSEDED", epoch="77")
    decision = decide(exc, Known("t", may_outbid=True))
    assert decision is not None
    assert (decision.action, decision.epoch) == (Action.OUTBID, 77)
    for known in (BEFORE, AFTER):
        assert outcome(exc, known) == (Action.STOP, "SUPERSEDED")
    for epoch in ("?", "9" * 20, "9" * 5000):
        assert outcome(refusal("SUPERSEDED", epoch=epoch), Known("t", may_outbid=True)) == (Action.STOP, "SUPERSEDED")


def test_what_is_not_ours_is_left_alone() -> None:
    class Mine(OSError):
        pass

    assert decide(ValueError(), BEFORE) is None
    mine = Mine()
    decision = decide(ExceptionGroup("", [Local(mine)]), AFTER)
    assert decision is not None
    assert (decision.action, decision.error) == (Action.STOP, mine)


@pytest.mark.parametrize(
    ("state", "kind", "reason"),
    [
        (State(phase=Phase.FAILED, error=Error(reason="MODEL_ERROR", type="E")), aipod.ModelError, "MODEL_ERROR"),
        (State(phase=Phase.FAILED, error=Error(reason="INTERRUPTED")), aipod.Interrupted, "INTERRUPTED"),
        (State(phase=Phase.CANCELLED, error=Error(reason="CANCELLED")), aipod.JobCancelled, "CANCELLED"),
        (
            State(phase=Phase.CANCELLED, error=Error(reason="DEADLINE_EXCEEDED")),
            aipod.JobCancelled,
            "DEADLINE_EXCEEDED",
        ),
        (State(phase=Phase.CANCELLED), aipod.JobCancelled, "CANCELLED"),
        (State(phase=Phase.RELEASED), aipod.JobFailed, "RELEASED"),
        (State(phase=Phase.RELEASED, error=Error(reason="CANCELLED")), aipod.JobFailed, "RELEASED"),
        (State(phase=Phase.FAILED), aipod.JobFailed, "INTERNAL"),
    ],
)  # fmt: skip
def test_outcomes_that_are_no_answer(state: State, kind: type[aipod.JobFailed], reason: str) -> None:
    error = of_state(state)
    assert (type(error), error.reason) == (kind, reason)
