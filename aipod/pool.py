"""Instances of all versions: started on first use, leased, replaced, released.

The mutable state is the line of jobs that wait and the list of instances; it changes only in synchronous steps of the
trio thread, each followed by `_assign`, which alone decides who gets what.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable

import trio

from aipod.errors import JobFailed, Refused, job_failed
from aipod.instance import Instance, Waiter
from aipod.restarts import Restarts
from aipod.results import Result
from aipod.runner import Report, Runner, RunnerBroken, Task
from aipod.versions import Data, Fixed

log = logging.getLogger("aipod.pool")

# Seconds between two tries to load an instance, while none can be: callers may be sent elsewhere meanwhile.
PROBE = 10.0
# Times that an instance loads anew because its data was replaced meanwhile.
LOADS = 5

MakeRunner = Callable[[str], Runner]


class Pool:
    """Made by `open_pool`."""

    def __init__(
        self,
        make: MakeRunner,
        data: Callable[[str], Data],
        *,
        shared: bool,
        at_once: int,
        per_version: int,
        total: int,
        idle: float,
        restarts: Restarts,
        nursery: trio.Nursery,
        timers: trio.Nursery,
    ) -> None:
        self._make = make
        self._data = data
        # One instance per version runs the jobs that it has, or several run one each.
        self._at_once = at_once if shared else 1
        self._per_version = 1 if shared else per_version
        # Where there may be one only, it would be closed for the other, and loaded again, with each change of methods.
        self._has_beside = not shared and total > 1
        self._total = total
        self._idle = idle  # seconds
        self._restarts = restarts
        self._probing = False  # a task tries to load what has failed
        self._waking: set[str] = set()  # versions whose turn a task waits for
        self._timers = timers  # cancelled before the instances are shut down
        # The pool's own: instances that are evicted or retired are shut down in it, not by the job that found them.
        self._nursery = nursery
        self._instances: list[Instance] = []
        self._closing: list[Instance] = []  # they still take their memory, so they count to `total`
        # Bounded by Config.max_jobs, and the calls that are open: each waiter is one job.
        self._line: list[Waiter] = []
        self._clock = itertools.count(1)

    async def preload(self, version: str) -> None:
        """Start all instances that `version` may have, at once. This is a trio-flavored async function.

        Raises `JobFailed` where one does not load.
        """
        left, loaded = min(self._per_version, self._total), trio.Event()

        async def start() -> None:
            nonlocal left
            async with self.lease(version, Waiter(version)):
                left -= 1
                if not left:
                    loaded.set()
                await loaded.wait()  # else the next one would lease the same instance

        async with trio.open_nursery() as nursery:
            for _ in range(left):
                nursery.start_soon(start)

    async def end_idle(self) -> None:
        """Shut instances that nobody has used for `idle` seconds. This is a trio-flavored async function."""
        while True:
            now = trio.current_time()
            for instance in self._free():
                if instance.free_since + self._idle <= now:
                    log.info("closing an instance of version %s: idle for %g s", instance.version, self._idle)
                    self._shut(instance)
            # What becomes free from now on is due later than all of these.
            await trio.sleep_until(min((one.free_since for one in self._free()), default=now) + self._idle)

    def _of(self, version: str) -> list[Instance]:
        return [instance for instance in self._instances if instance.version == version]

    def _free(self) -> list[Instance]:
        return [instance for instance in self._instances if instance.users == 0 and instance.ready]

    @property
    def in_line(self) -> int:
        """How many jobs have no instance."""
        return len(self._line)

    def states(self) -> dict[str, int]:
        """How many instances do what."""
        doing = ["loading" if not one.ready else "busy" if one.users else "idle" for one in self._instances]
        return {state: doing.count(state) for state in ("loading", "idle", "busy")} | {"closing": len(self._closing)}

    def place(self, waiter: Waiter) -> int:
        """How many jobs are before `waiter` in its line; none once an instance is its own, or loads."""
        if waiter.given.is_set():
            return 0
        before = itertools.takewhile(lambda w: w is not waiter, self._line)
        return sum((other.version, other.beside) == (waiter.version, waiter.beside) for other in before)

    @contextlib.asynccontextmanager
    async def lease(self, version: str, waiter: Waiter) -> AsyncIterator[Lease]:
        """Wait in line for an instance of `version`, first come, first served, and start it where needed.

        This is a trio-flavored async function. Cancelled in line: the place is given up; a load goes on, for who comes
        next. Raises `JobFailed` and `Refused` where the instance does not load.
        """
        instance = await self._wait(waiter)
        try:
            if not instance.ready:
                await self._wait_loaded(instance)
            yield Lease(self, instance)
        finally:
            self._return(instance)

    async def _wait(self, waiter: Waiter) -> Instance:
        self.join(waiter)
        try:
            if waiter.given.is_set():  # as nearly always: a turn of the loop less
                await trio.lowlevel.checkpoint_if_cancelled()
            else:
                await waiter.given.wait()
        except BaseException:
            if waiter.instance is not None:  # given and cancelled in the same moment
                self._return(waiter.instance)
            raise
        finally:
            with contextlib.suppress(ValueError):  # it was given its instance
                self._line.remove(waiter)
        assert waiter.instance is not None
        return waiter.instance

    def join(self, waiter: Waiter) -> None:
        """Stand in line, if not yet; who does enters `lease` with the same `waiter`, before it waits for anything."""
        if waiter.instance is None and waiter not in self._line:  # else it was taken, or given by now
            waiter.beside = waiter.beside and self._has_beside
            self._line.insert(0 if waiter.again else len(self._line), waiter)
            self._assign()

    def take(self, waiter: Waiter) -> Lease | None:
        """What `lease` gives, if one is free now; then `waiter` enters `lease`, or who has it calls `give_back`."""
        waiter.beside = waiter.beside and self._has_beside
        # Nobody stands in line for it: `_assign` would have given it away.
        instance = self._find_free(waiter.version, waiter.beside)
        if instance is None or not instance.ready:
            return None
        self._give(instance, waiter)
        return Lease(self, instance)

    def give_back(self, waiter: Waiter) -> None:
        """What was taken is not needed."""
        assert waiter.instance is not None, "it was taken"
        self._return(waiter.instance)

    async def _wait_loaded(self, instance: Instance) -> None:
        if instance.load is None:
            instance.load = trio.CancelScope()
            self._nursery.start_soon(self._start, instance)
        await instance.loaded.wait()
        if instance.failure is not None:
            await trio.lowlevel.checkpoint_if_cancelled()  # of `preload`, which has heard of another's
            raise instance.failure

    async def _start(self, instance: Instance) -> None:
        assert instance.load is not None
        began = trio.current_time()
        try:
            with instance.load:
                await self._load(instance)
                instance.ready = True
        except Exception as exc:  # Refused too: there may be no process to be had
            instance.failure = exc
            self._failed(instance.version, "load")
            if not instance.users:
                log.warning("version %s: what nobody waits for any more did not load: %s", instance.version, exc)
        finally:
            instance.loaded.set()
        if instance.ready:
            self._restarts.loaded(instance.version, trio.current_time() - began)
            self._nursery.start_soon(self._watch, instance)
        if not instance.users and instance in self._instances:
            self._settle(instance)
        self._assign()

    async def _load(self, instance: Instance) -> None:
        for _ in range(LOADS):
            await instance.runner.start()
            if not instance.data.replaced:
                return
            # It may have read a part of the former data and a part of what is there now.
            await _shutdown(instance)
            instance.data.close()
            instance.data, instance.runner = self._data(instance.version), self._make(instance.version)
        raise job_failed("LOAD_FAILED", f"the data of version {instance.version} was replaced in each of {LOADS} loads")

    async def _watch(self, instance: Instance) -> None:
        status = await instance.runner.wait()
        if instance in self._free():
            log.warning("an instance of version %s has died, unused: exit status %s", instance.version, status)
            self._failed(instance.version, "idle")
            self._shut(instance)
            self._assign()

    def _failed(self, version: str, when: str) -> None:
        others = any(one.ready and not one.runner.broken for one in self._instances)
        self._restarts.failed(version, when, others=others)
        if not self._restarts.able and not self._probing:
            self._probing = True
            self._timers.start_soon(self._probe)

    async def _probe(self) -> None:
        while not self._restarts.able:
            await trio.sleep(PROBE)
            for version in self._restarts.suspects:
                try:
                    async with self.lease(version, Waiter(version)):
                        break
                except (JobFailed, Refused) as exc:
                    log.warning("version %s cannot be loaded yet: %s: %s", version, exc.reason, exc)
                except Exception as exc:  # whatever it is: nobody asked, and all that runs would end with the server
                    log.error("version %s cannot be loaded yet: a bug of aipod", version, exc_info=exc)
        self._probing = False

    async def _wake(self, version: str) -> None:
        """Assign once an instance of `version` may be started."""
        await trio.sleep_until(self._restarts.due(version))
        self._waking.discard(version)
        self._assign()

    def _assign(self) -> None:
        """Give instances to whom they are due, in the order of the line."""
        blocked: set[tuple[str, bool]] = set()
        for waiter in list(self._line):
            line = waiter.version, waiter.beside
            if line in blocked:
                continue
            instance = self._find(*line)
            if instance is None:
                blocked.add(line)
                continue
            self._line.remove(waiter)
            self._give(instance, waiter)

    def _give(self, instance: Instance, waiter: Waiter) -> None:
        instance.users += 1
        waiter.instance = instance
        waiter.given.set()

    def _usable(self, version: str, beside: bool) -> list[Instance]:
        return [instance for instance in self._of(version) if instance.beside == beside and not instance.retired]

    def _find_free(self, version: str, beside: bool) -> Instance | None:
        for instance in self._of(version):
            if instance.ready and instance.users == 0 and instance.runner.broken:
                self._restarts.died("idle")
                self._shut(instance)
            elif not instance.retired and instance.data.replaced:
                self._retire(instance)  # by another process, which cannot call `retire`
        for instance in sorted(self._usable(version, beside), key=lambda one: (not one.ready, -one.last_used)):
            if instance.users < (self._at_once if instance.ready else 1):  # one that loads has who hears of its failure
                return instance
        return None

    def _find(self, version: str, beside: bool) -> Instance | None:
        """One that is free, or is about to be made; None where there is none yet."""
        if (instance := self._find_free(version, beside)) is not None:
            return instance
        mine = self._usable(version, beside)
        if len(mine) >= (1 if beside else self._per_version):
            return None
        if len(self._instances) + len(self._closing) >= self._total:
            if not self._closing:
                self._evict()
            return None
        if self._restarts.due(version) > trio.current_time():
            if version not in self._waking:
                self._waking.add(version)
                self._timers.start_soon(self._wake, version)
            return None
        self._instances.append(Instance(version, beside, self._make(version), self._data(version)))
        return self._instances[-1]

    def _evict(self) -> None:
        """Begin to make room: close the instance that nobody has wanted for longest, where there is one.

        Also one that still loads: callers that come and go must not keep the others out for as long as loads take.
        """
        if unused := [instance for instance in self._instances if instance.users == 0]:
            self._shut(min(unused, key=lambda one: one.last_used))

    def _return(self, instance: Instance) -> None:
        instance.users -= 1
        instance.last_used = next(self._clock)
        instance.retired = instance.retired or (instance.ready and instance.runner.broken)
        if instance.users == 0:
            self._settle(instance)
        self._assign()

    def _settle(self, instance: Instance) -> None:
        """Nobody uses the instance: it waits for the next job, or goes."""
        instance.free_since = trio.current_time()
        loading = instance.load is not None and not instance.loaded.is_set()
        if not instance.ready and not loading:
            self._instances.remove(instance)  # it did not load, or nobody came to load it
            instance.data.close()
        elif instance.retired:
            self._shut(instance)

    def learn(self, instance: Instance) -> None:
        """A run has ended by itself."""
        if instance.runner.broken:
            self._failed(instance.version, "run")
        else:
            self._restarts.ran(instance.version)

    def retire(self, version: str) -> None:
        """The version's data has changed: its instances end when they are free, the next job gets a new one."""
        for instance in self._of(version):
            self._retire(instance)
        self._assign()

    def _retire(self, instance: Instance) -> None:
        instance.retired = True
        if instance.users == 0:
            self._shut(instance)

    def _shut(self, instance: Instance, nursery: trio.Nursery | None = None) -> None:
        self._instances.remove(instance)
        self._closing.append(instance)
        (nursery or self._nursery).start_soon(self._close, instance)

    async def _close(self, instance: Instance) -> None:
        try:
            if instance.load is not None:
                instance.load.cancel()
                await instance.loaded.wait()
            if instance.ready:
                await _shutdown(instance)
        finally:
            instance.data.close()
            self._closing.remove(instance)
            self._assign()

    async def release(self) -> None:
        """Shut all instances down, `close` hooks included. Nothing may be leased any more."""
        async with trio.open_nursery() as nursery:
            for instance in list(self._instances):
                self._shut(instance, nursery)


async def _shutdown(instance: Instance) -> None:
    try:
        await instance.runner.shutdown()
    except Exception as exc:
        # A close hook that raises must not keep the others from closing.
        log.error("closing an instance of version %s failed", instance.version, exc_info=exc)


class Lease:
    """An instance that a job may use until it leaves `Pool.lease`."""

    def __init__(self, pool: Pool, instance: Instance) -> None:
        self._pool = pool
        self._instance = instance

    @property
    def lock_name(self) -> str:
        """The worker lock that is held until the run is over; empty where the server's own process runs it."""
        return self._instance.runner.lock_name

    @property
    def stopped(self) -> bool:
        """As `Runner.stopped`."""
        return self._instance.runner.stopped

    async def run(self, task: Task, report: Report) -> Result:
        """Run the task; as `Runner.run`."""
        try:
            result = await self._instance.runner.run(task, report)
        except (JobFailed, RunnerBroken):
            self._pool.learn(self._instance)
            raise
        self._pool.learn(self._instance)
        return result


@contextlib.asynccontextmanager
async def open_pool(
    make: MakeRunner,
    data: Callable[[str], Data] = lambda version: Fixed(),
    *,
    shared: bool,
    at_once: int = 256,
    per_version: int,
    total: int,
    idle: float = 0.0,
    restarts: Restarts | None = None,
) -> AsyncIterator[Pool]:
    """A pool whose instances are all gone when the `async with` is left. This is a trio-flavored async function.

    At most `per_version` instances of a version, one more for the jobs that want it beside them, and `total` of all;
    where they are `shared`, one of a version, with `at_once` jobs. Those that nobody has used for `idle` seconds are
    shut, where that is not 0.
    """
    async with trio.open_nursery() as nursery, trio.open_nursery() as timers:
        pool = Pool(
            make,
            data,
            shared=shared,
            at_once=at_once,
            per_version=per_version,
            total=total,
            idle=idle,
            restarts=restarts or Restarts(lambda version: True, lambda able: None),
            nursery=nursery,
            timers=timers,
        )
        if idle:
            timers.start_soon(pool.end_idle)
        try:
            yield pool
        finally:
            timers.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await pool.release()
