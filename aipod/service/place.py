"""Where a job stands in the pool's line, and what it is given there: the `Queue` that job.run waits in."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from aipod.instance import Waiter
from aipod.pool import Lease, Pool


class Place:
    """A job's place in the pool's line. A `train` may take hours, so it does not take the others' instance."""

    def __init__(self, pool: Pool, version: str, method: str) -> None:
        self._pool = pool
        self._version = version
        self._waiter = Waiter(version, beside=method == "train")
        self._leased = False

    def place(self) -> int:
        return self._pool.place(self._waiter)

    def lease(self) -> AbstractAsyncContextManager[Lease]:
        if self._leased:
            self._waiter = Waiter(self._version, again=True, beside=self._waiter.beside)
        self._leased = True
        return self._pool.lease(self._version, self._waiter)

    def join(self) -> Place:
        """Stand in line from now on: a job that is told of before it is in `lease` has its place."""
        self._pool.join(self._waiter)
        return self

    def take(self) -> Lease | None:
        """The lease, where there is an instance that is free now; it is entered by `lease`, or given back."""
        return self._pool.take(self._waiter)

    def give_back(self) -> None:
        """What was taken, if anything was, is not needed."""
        if self._waiter.instance is not None:
            self._pool.give_back(self._waiter)

    def retire(self) -> None:
        self._pool.retire(self._version)
