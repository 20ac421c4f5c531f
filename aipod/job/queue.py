"""What a job needs of who runs it: a place in line, and a lease. Given by `service`, so that a job knows no pool."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from aipod.results import Result
from aipod.runner import Report, Task


class Lease(Protocol):
    """What `run_job` needs of `pool.Lease`."""

    @property
    def lock_name(self) -> str: ...

    @property
    def stopped(self) -> bool: ...

    async def run(self, task: Task, report: Report) -> Result: ...


class Queue(Protocol):
    """A place in line for an instance."""

    def place(self) -> int: ...

    def lease(self) -> AbstractAsyncContextManager[Lease]: ...

    def retire(self) -> None:
        """The version's data has changed: instances that loaded the former data end."""
