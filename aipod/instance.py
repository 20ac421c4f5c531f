"""One runner of a version and who uses it; and who waits for one. No logic of their own: `pool` changes them."""

from __future__ import annotations

import dataclasses

import trio

from aipod.runner import Runner
from aipod.versions import Data


@dataclasses.dataclass(eq=False)
class Instance:
    """One runner of a version and who uses it. A retired one gets no new jobs and ends when it is free.

    It loads in a task of the pool's, so that a job which leaves meanwhile does not take the load with it: the next one
    has only the rest to wait for.
    """

    version: str
    beside: bool  # see `Waiter`
    runner: Runner
    data: Data
    users: int = 0
    last_used: int = 0
    free_since: float = 0.0  # by trio's clock
    retired: bool = False
    ready: bool = False
    load: trio.CancelScope | None = None  # of the task that loads it, once there is one
    loaded: trio.Event = dataclasses.field(default_factory=trio.Event)  # or not: then `failure` says why
    failure: Exception | None = None


@dataclasses.dataclass(eq=False)
class Waiter:
    """A job in line. `instance` is what it was given. `again`: it has had its turn, but no runner that worked.

    `beside`: it takes long, so it uses none of the instances that its version's other jobs have, but one more.
    """

    version: str
    again: bool = False
    beside: bool = False
    given: trio.Event = dataclasses.field(default_factory=trio.Event)
    instance: Instance | None = None
