"""How many jobs a server works on: those that it holds, and those that are about to be held. No I/O."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trio

from aipod.config import Config
from aipod.errors import Refused
from aipod.job.job import Job
from aipod.metrics import QUEUE, RUN, UPLOAD
from aipod.wire.ai import Phase


class Room:
    """Counts. The mutable state is which jobs are held, and which are coming, and who waits for one of these."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.held: dict[str, Job] = {}
        self._coming: dict[str, str] = {}  # of which version those that are new
        self._awaited: dict[str, trio.Event] = {}

    @property
    def _count(self) -> int:
        return len(self.held) + len(self._coming)

    @property
    def left(self) -> bool:
        """Whether this process may work on one job more."""
        return self._count < self._config.max_jobs

    @contextlib.contextmanager
    def coming(self, job_id: str, version: str = "") -> Iterator[None]:
        """Count a job as one of this process's before it is in `held`: hundreds may come at once. Raises `Refused`.

        `version`: of a new job, which is refused where too many of the same are before it.
        """
        if (refused := self.why_not(job_id, version)) is not None:
            raise refused
        self._coming[job_id] = version
        try:
            yield
        finally:
            self._coming.pop(job_id, None)
            if (awaited := self._awaited.pop(job_id, None)) is not None:
                awaited.set()

    async def arrival(self, job_id: str) -> None:
        """Wait until the job is not about to be held any more. This is a trio-flavored async function."""
        if job_id in self._coming:
            await self._awaited.setdefault(job_id, trio.Event()).wait()

    def why_not(self, job_id: str, version: str = "") -> Refused | None:
        """Why `coming` would refuse the job; None where it would not."""
        if not self.left and job_id not in self.held:
            limit = self._config.max_jobs
            return Refused(
                "OVERLOADED", f"the server has {limit} jobs that have not ended (--max-jobs); try again later"
            )
        most = self._config.max_queued
        if version and self._count >= most and self._waiting(version) >= most:
            text = f"{most} jobs of version {version} upload or wait already (--max-queued)"
            return Refused("OVERLOADED", f"{text}; try again later")
        return None

    def _waiting(self, version: str) -> int:
        """How many jobs of `version` have not begun to run."""
        waiting = (Phase.RECEIVING, Phase.QUEUED)
        held = sum(job.request.version == version and job.phase in waiting for job in self.held.values())
        return held + sum(coming == version for coming in self._coming.values())

    def now(self) -> dict[str, int]:
        """How many jobs are in which phase."""
        phases = [job.times.phase for job in self.held.values()]
        phases += [UPLOAD for job_id in self._coming if job_id not in self.held]
        return {phase: phases.count(phase) for phase in (UPLOAD, QUEUE, RUN)}
