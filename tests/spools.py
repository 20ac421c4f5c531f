"""A spool directory for tests, and how a server that was killed leaves it."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aipod.errors import Refused
from aipod.spool import Entry, Spool, Sweeper
from tests.conftest import left_in

A, B, C = "a" * 32, "b" * 32, "c" * 32
PLAIN: dict[str, Any] = {"ticketed": False}
TICKETED: dict[str, Any] = {"ticketed": True}
UPLOAD_TTL, TTL = 3600.0, 86400.0


def opened(path: Path, app: str = "m.Class") -> Spool:
    return Spool.open(path, app, reserve=0)


def claimed(spool: Spool, job_id: str, fields: dict[str, Any] = PLAIN, kwargs: bytes = b"{}", **options: Any) -> Entry:
    """A new entry, where there must be none."""
    entry = spool.claim(job_id, fields, kwargs, **options)
    assert entry is not None
    return entry


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Broom:
    """A process that sweeps: how often it finds something is what it says."""

    def __init__(self, spool: Spool) -> None:
        self.clock = Clock()
        self._sweeper = Sweeper(spool, upload_ttl=UPLOAD_TTL, ttl=TTL, clock=self.clock)

    def sweep(self) -> int:
        return sum(self._sweeper.sweep())

    def orphans(self) -> list[str]:
        return self._sweeper.orphans()


def sweep(spool: Spool) -> int:
    """One sweep of a process that has just been started."""
    return Broom(spool).sweep()


def left_empty(tmp_path: Path) -> Iterator[Spool]:
    """A spool in which a test must leave nothing."""
    spool = opened(tmp_path / "spool")
    yield spool
    assert left_in(spool.path) == []


def refusal(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(Refused) as caught:
        function(*args, **kwargs)
    return caught.value.reason


@contextlib.contextmanager
def killed(spool: Spool, job_id: str, fields: dict[str, Any]) -> Iterator[Entry]:
    """An entry as a server leaves it that is killed at the end of the block: there, and not held."""
    entry = claimed(spool, job_id, fields)
    yield entry
    entry._close()
    entry._lock.release()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may be longer, which is what a full disk looks like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def descriptors(free: int) -> Iterator[None]:
    """This process may open `free` more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
