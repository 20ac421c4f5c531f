"""What those see of a job who watch it: its phase, its outcome, its log; and how the spool tells it (`Told`)."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Generator
from typing import Any

import trio

from aipod.errors import TOLD, JobFailed, job_failed
from aipod.results import INLINE
from aipod.spool import ENDED, Look
from aipod.wire.ai import Error, Phase, State

# Seconds that an ended job with an answer of at most `INLINE` is kept at least once that was sent, however short room
# is, for its client may have lost it and look for it that long (Config.reconnect, and then some); and once its client
# has said that it has the answer.
KEEP_ANSWERED = 900.0
KEEP_RELEASED = 60.0

LOG_PIECE = 64 * 1024  # bytes of a log per heartbeat

CONTENT_TYPES = {"json": "application/json", "bytes": "application/octet-stream", "file": "application/octet-stream"}


@dataclasses.dataclass(frozen=True)
class Keep:
    """Seconds that a job is kept while nobody is attached."""

    upload: float = math.inf
    grace: float = math.inf  # queued or running
    ended: float = math.inf

    def of(self, phase: Phase, *, small: bool) -> int:
        """For a job in `phase`, as the wire has it. `small`: what it keeps when it has ended; it may go earlier."""
        if phase == Phase.RECEIVING:
            seconds = self.upload
        elif phase in (Phase.QUEUED, Phase.RUNNING):
            seconds = self.grace
        elif phase == Phase.RELEASED:
            seconds = min(self.ended, KEEP_RELEASED)
        else:
            seconds = min(self.ended, KEEP_ANSWERED) if small else self.ended
        return int(min(seconds, 2**32 - 1))


@dataclasses.dataclass(frozen=True)
class Answer:
    """A stored result."""

    kind: str
    inline: bytes | None
    size: int
    digest: bytes

    @property
    def fields(self) -> dict[str, Any]:
        """The last line of the job's journal."""
        fields: dict[str, Any] = {"phase": "DONE", "kind": self.kind, "answer": self.size, "digest": self.digest.hex()}
        if self.inline is not None:
            fields["inline"] = self.inline.decode("latin-1")
        return fields


def stored_answer(fields: dict[str, Any]) -> Answer:
    """The answer that a journal tells of."""
    inline = fields.get("inline")
    return Answer(
        fields["kind"],
        inline.encode("latin-1") if inline is not None else None,
        fields["answer"],
        bytes.fromhex(fields["digest"]),
    )


def stored_error(fields: dict[str, Any]) -> JobFailed:
    """Why a job has no answer, as its journal tells."""
    if fields["phase"] == "RELEASED":
        return job_failed("RELEASED", "its answer was released")
    return job_failed(fields["reason"], fields["message"], {name: fields[name] for name in TOLD if fields.get(name)})


def phase_of(outcome: Answer | JobFailed) -> Phase:
    """How a job with this outcome has ended."""
    if isinstance(outcome, Answer):
        return Phase.DONE
    return Phase.CANCELLED if outcome.reason in ("CANCELLED", "DEADLINE_EXCEEDED") else Phase.FAILED


class Watched(abc.ABC):
    """What a viewer sees of a job. Changes in the trio thread only."""

    def __init__(self, look: Look, spool_id: str, keep: Keep) -> None:
        self.look = look
        self.phase = Phase.NONE
        self.answer: Answer | None = None
        self.error: JobFailed | None = None
        self.progress = 0.0
        self.message = ""  # the model's, or what is said of the run instead
        self.attempt = 0
        self.epoch = 0
        self.changed = trio.Event()
        # This object says nothing new any more: the job has ended, or somebody else has it now.
        self.over = trio.Event()
        self._spool_id = spool_id
        self._keep = keep

    @property
    @abc.abstractmethod
    def method(self) -> str: ...

    @property
    @abc.abstractmethod
    def durable(self) -> int:
        """Bytes of the payload that need never be sent again."""

    @property
    def place(self) -> int:
        """Jobs that will be run before this one."""
        return 0

    @property
    @abc.abstractmethod
    def quiet(self) -> int:
        """Seconds since the running method was last heard of."""

    @property
    def ended(self) -> bool:
        """The job has its outcome."""
        return self.phase.name in ENDED

    @property
    def small(self) -> bool:
        """An ended job that may go before its time where room is short: nothing of worth would be lost."""
        return self.answer is None or self.answer.size <= INLINE

    def notify(self) -> None:
        """Wake who watches."""
        self.changed.set()
        self.changed = trio.Event()

    def state(self) -> State:
        """The job as its own client sees it."""
        state = State(
            phase=self.phase,
            offset=self.durable,
            spool=self._spool_id,
            progress=self.progress,
            message=self.message,
            attempt=self.attempt,
            place=self.place,
            quiet=self.quiet if self.phase == Phase.RUNNING else 0,
            epoch=self.epoch,
            ttl=self._keep.of(self.phase, small=self.small),
        )
        if self.answer is not None:
            state.size, state.digest = self.answer.size, self.answer.digest
            state.content_type = CONTENT_TYPES[self.answer.kind]
        if self.error is not None:
            told = {name: self.error.metadata.get(name, "") for name in TOLD}
            state.error = Error(message=self.error.message, reason=self.error.reason, **told)
        return state

    async def read_log(self, offset: int) -> bytes:
        """What there is of the log from `offset` on, a piece of it. This is a trio-flavored async function."""
        if self.look.log_size <= offset:
            return b""
        return await trio.to_thread.run_sync(self.look.read_log, offset, LOG_PIECE)

    def read_result(self, offset: int) -> Generator[bytes, None, None]:
        """The bytes of a result that is not inline. Blocks."""
        return self.look.read_result(offset)


class Told(Watched):
    """A job that nobody here works on, as its journal tells it."""

    look: Look

    def __init__(self, look: Look, spool_id: str, keep: Keep) -> None:
        super().__init__(look, spool_id, keep)
        self._fields: dict[str, Any] = {}
        self._quiet = 0

    @property
    def method(self) -> str:
        return str(self._fields.get("method", ""))

    @property
    def quiet(self) -> int:
        return self._quiet

    @property
    def durable(self) -> int:
        return int(self._fields.get("offset", 0))

    def learn(self, fields: dict[str, Any], live: dict[str, Any]) -> None:
        """Take in what the spool says now."""
        before = self._fields, self.progress, self.message
        self._fields = fields
        self.phase = Phase[fields.get("phase", "RECEIVING")]
        self.epoch = fields.get("epoch", 0)
        self.attempt = fields.get("attempt", 0)
        self.progress, self.message = live.get("progress", 0.0), live.get("message", "")
        self._quiet = live.get("quiet", 0)
        if self.phase == Phase.DONE:
            self.answer = stored_answer(fields)
        elif self.ended:
            self.error = stored_error(fields)
        if before != (self._fields, self.progress, self.message):
            self.notify()
