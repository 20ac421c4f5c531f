"""`python -m bench faults [--seconds N] [--seed N]`: random faults, for as long as it is told.

Two servers on one port and one spool are killed (SIGKILL) and started again, a proxy cuts connections by RST, FIN,
silence and throttling, callers with ticket files are killed and started again, others leave their jobs or fetch them
through another client. In the end everybody gets time in peace, and the totals are printed.

Exit status 1 where one of these is not so: every answer is right; no job hangs; none is started twice, or a restartable
one three times; a job ends without its answer only because its server was killed while it ran (one that says so and was
not is wrong), or because its caller has left it; no server has logged a bug, and the last ones drain.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import aipod
from aipod.client import Event
from bench.faults.caller import PATIENT
from bench.faults.model import answer_to
from bench.faults.proxy import WAYS, Proxy, open_proxy
from bench.faults.runs import MOST, Ran, check_starts, may_be_interrupted, read_runs

MODEL = "bench.faults.model:Counted"
ROOT = Path(__file__).resolve().parent.parent.parent
OPTIONS = ("--reuse-port", "--tick", "0.2", "--instances", "2", "--drain", "20", "--reserve", "0")
PEACE = 120.0  # seconds that jobs have in the end; who needs more hangs
CALLERS = 2  # that are processes, and get killed
WORKERS = 6  # that are tasks of this process
LARGEST = 24 << 20  # bytes of a payload or an answer; most are far smaller
ENDS = ("right", "interrupted", "left")


@dataclasses.dataclass
class Totals:
    """What the run has seen. A job's end is one of `ENDS`, or anything that must not be."""

    ends: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    kills: dict[int, float] = dataclasses.field(default_factory=dict)  # servers, and when (monotonic) each was dead
    client_kills: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)

    right: set[str] = dataclasses.field(default_factory=set)  # jobs that had their answer
    # Jobs that were told to be interrupted: when (monotonic) each began, and when it was told.
    interrupted: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def end(self, name: str, how: str, begun: float = 0.0) -> None:
        self.ends[how if how in (*ENDS, "wrong") else "failed"] += 1
        if how not in ENDS:
            self.problems.append(f"{name}: {how}")
        if how == "right":
            self.right.add(name)
        if how == "interrupted":
            self.interrupted[name] = (begun, time.monotonic())

    def check_interrupted(self, runs: Sequence[Ran]) -> None:
        """Count those as wrong whose server was not killed while they ran."""
        for name, (begun, over) in self.interrupted.items():
            if not may_be_interrupted(name, begun, over, runs, self.kills):
                self.ends["interrupted"] -= 1
                self.ends["wrong"] += 1
                self.problems.append(f"{name}: interrupted, though its server was not killed while it ran")


class Servers:
    """Two servers on one port and one spool."""

    def __init__(self, directory: Path, totals: Totals) -> None:
        self._directory = directory
        self._totals = totals
        self._numbers = itertools.count()
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self._processes: list[subprocess.Popen[bytes]] = []

    async def start(self) -> None:
        """Have two; returns when they listen."""
        fresh = [self._spawn() for _ in range(2 - len(self._processes))]
        self._processes += fresh
        for process in fresh:
            assert process.stdout is not None
            await asyncio.to_thread(process.stdout.readline)

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "aipod", "serve", MODEL, "--bind", f"127.0.0.1:{self.port}", *OPTIONS]
        command += ["--spool", str(self._directory / "spool"), "--data", str(self._directory / "data")]
        with (self._directory / f"server-{next(self._numbers)}.log").open("w") as log:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=ROOT)

    def kill(self, rng: random.Random) -> None:
        """SIGKILL one, or both."""
        for _ in range(rng.choice((1, 1, 2))):
            if self._processes:
                process = self._processes.pop(rng.randrange(len(self._processes)))
                process.kill()
                process.communicate()
                self._totals.kills[process.pid] = time.monotonic()

    def stop(self) -> None:
        """Drain both; what is wrong with them is a problem."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            if process.returncode != 0:
                self._totals.problems.append(f"a server ended with status {process.returncode}")
        for path in self._directory.glob("server-*.log"):
            text = path.read_text()
            if "a bug of aipod" in text or "Traceback" in text:
                self._totals.problems.append(f"{path.name}:\n{text[-4000:]}")


@dataclasses.dataclass
class Plan:
    """One job."""

    name: str
    method: str
    payload: bytes
    seconds: float
    length: int
    runs: str
    begun: float = dataclasses.field(default_factory=time.monotonic)
    done: bool = False  # its caller was told that it is

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"name": self.name, "runs": self.runs, "seconds": self.seconds, "length": self.length}

    @property
    def metadata(self) -> list[tuple[str, str]]:
        return [("x-func-name", self.method)]

    def note(self, event: Event) -> None:
        self.done = self.done or event.phase == "DONE"

    def is_right(self, answer: bytes) -> bool:
        return answer == answer_to(hashlib.sha256(self.payload).hexdigest(), self.length)


class Run:
    """The faults and the jobs of one run. asyncio-flavored."""

    def __init__(self, directory: Path, seconds: float, seed: int) -> None:
        self._directory = directory
        self._until = time.monotonic() + seconds
        self._rng = random.Random(seed)
        self._numbers = itertools.count()
        self.totals = Totals()
        self.servers = Servers(directory, self.totals)
        self.runs = directory / "runs"

    @property
    def _over(self) -> bool:
        return time.monotonic() >= self._until

    async def run(self) -> collections.Counter[str]:
        """Until the time is over and every job has ended; what was done to connections."""
        await self.servers.start()
        try:
            async with open_proxy(self.servers.port, random.Random(self._rng.random())) as proxy:
                jobs = [self._worker(proxy) for _ in range(WORKERS)] + [self._callers(proxy) for _ in range(CALLERS)]
                workers = [asyncio.create_task(job) for job in jobs]
                await self._do_harm()
                proxy.be_kind()
                await self.servers.start()
                _, hanging = await asyncio.wait(workers, timeout=PEACE)
                for task in hanging:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                self.totals.ends["hangs"] = len(hanging)
                self.totals.problems += [f"{len(hanging)} jobs hang"] * bool(hanging)
                for task in workers:
                    if not task.cancelled() and (exc := task.exception()) is not None:
                        self.totals.problems.append(f"a bug of the run: {exc!r}")
                return proxy.done
        finally:
            await asyncio.to_thread(self.servers.stop)

    async def _do_harm(self) -> None:
        while not self._over:
            await self._pause(2, 8)
            self.servers.kill(self._rng)
            await self._pause(0, 2)
            await self.servers.start()

    async def _pause(self, low: float, high: float) -> None:
        left = max(0.0, self._until - time.monotonic())
        await asyncio.sleep(min(self._rng.uniform(low, high), left))

    def _size(self) -> int:
        """Of each magnitude as many, and many small ones."""
        return int(2 ** self._rng.uniform(0, LARGEST.bit_length())) - 1

    def _plan(self) -> Plan:
        method = self._rng.choice(("work", "work", "again"))
        return Plan(
            f"{method}-{next(self._numbers)}",
            method,
            self._rng.randbytes(self._size()),
            self._rng.choice((0.0, 0.0, self._rng.uniform(0, 2))),
            self._size(),
            str(self.runs),
        )

    # Jobs of this process

    async def _worker(self, proxy: Proxy) -> None:
        while not self._over:
            async with aipod.Client(proxy.address, config=PATIENT) as one:
                async with aipod.Client(proxy.address, config=PATIENT) as other:
                    for _ in range(self._rng.randint(1, 10)):
                        if not self._over:
                            await self._job(one, other)

    async def _job(self, one: aipod.Client, other: aipod.Client) -> None:
        plan, way = self._plan(), self._rng.choice(("call", "call", "call", "submit", "leave"))
        path = self._directory / f"payload-{plan.name}"
        await asyncio.to_thread(path.write_bytes, plan.payload)
        try:
            how = await _end(self._do(plan, way, path, one, other))
            how = "INTERRUPTED: after it was done" if plan.done and how == "interrupted" else how
            self.totals.end(plan.name, how, plan.begun)
        finally:
            path.unlink()

    async def _do(self, plan: Plan, way: str, path: Path, one: aipod.Client, other: aipod.Client) -> str:
        if way == "submit":
            job = await one.submit("chaos", path, metadata=plan.metadata, kwargs=plan.kwargs)
            handle = self._rng.choice((job, other.attach(str(job))))
            answer = await handle.wait(on_event=plan.note)
            await handle.release()
        else:
            # The answer's file: bytes in memory have a limit, and files have more ways to fail.
            out = path.with_suffix(".answer")
            try:
                async with asyncio.timeout(self._rng.uniform(0, 3) if way == "leave" else None):
                    await one.chaos(path, metadata=plan.metadata, kwargs=plan.kwargs, save_to=out, on_event=plan.note)
            except TimeoutError:
                return "left"
            answer = await asyncio.to_thread(out.read_bytes)
            out.unlink()
        return "right" if await asyncio.to_thread(plan.is_right, answer) else "wrong"

    # Callers that are killed

    async def _callers(self, proxy: Proxy) -> None:
        while not self._over:
            plan = self._plan()
            with tempfile.TemporaryDirectory(dir=self._directory) as name:
                directory = Path(name)
                await asyncio.to_thread((directory / "payload").write_bytes, plan.payload)
                how = await _end(self._call(plan, proxy, directory))
                self.totals.end(plan.name, how, plan.begun)

    async def _call(self, plan: Plan, proxy: Proxy, directory: Path) -> str:
        first = plan.name
        for generation in itertools.count():
            if not (directory / "ticket").exists():
                plan.name = f"{first}.{generation}"  # nothing is known of the job: it is another one
            command = [sys.executable, "-m", "bench.faults.caller", proxy.address, str(directory), plan.method]
            process = await asyncio.create_subprocess_exec(
                *command, json.dumps(plan.kwargs), stdout=subprocess.PIPE, cwd=ROOT
            )
            try:
                out = await self._outlive(process)
            finally:
                if process.returncode is None:
                    _kill(process)
                    await process.wait()
            if out and out != "done":
                return _how(*out.split(": ", 1))
            if out or ((directory / "answer").exists() and not (directory / "ticket").exists()):
                answer = await asyncio.to_thread((directory / "answer").read_bytes)
                return "right" if await asyncio.to_thread(plan.is_right, answer) else "wrong"
        raise AssertionError

    async def _outlive(self, process: asyncio.subprocess.Process) -> str:
        """What the caller printed; empty where it was killed before."""
        talk = asyncio.create_task(process.communicate())
        patience = None if self._over else self._rng.uniform(0.5, 8)
        done, _ = await asyncio.wait([talk], timeout=patience)
        if not done:
            _kill(process)
            self.totals.client_kills += 1
        out, _ = await talk
        if process.returncode not in (0, -signal.SIGKILL):
            return f"a caller ended with status {process.returncode}"
        return out.decode().strip()


async def _end(job: Coroutine[Any, Any, str]) -> str:
    """How the job has ended."""
    try:
        return await job
    except aipod.AipodError as exc:
        return _how(exc.reason, exc.message)


def _kill(process: asyncio.subprocess.Process) -> None:
    """Not `process.kill()`: where the process has just ended that takes its status, which asyncio then has no more."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


def _how(reason: str, text: str = "") -> str:
    return "interrupted" if reason == "INTERRUPTED" else f"{reason}: {text}"


def _print(seconds: float, seed: int, totals: Totals, done: collections.Counter[str], starts: Any) -> None:
    ends = ", ".join(f"{totals.ends[how]} {how}" for how in (*ENDS, "failed", "wrong", "hangs"))
    cuts = ", ".join(f"{done[way]} {way}" for way in WAYS if way != "well")
    print(f"faults  {seconds:g} s, seed {seed}")
    print(f"        jobs  {totals.ends.total()}: {ends}")
    print(f"        cuts  {cuts}; kills: {len(totals.kills)} of servers, {totals.client_kills} of callers")
    for method, counts in starts.items():
        runs = ", ".join(f"{counts[count]} jobs {count} times" for count in sorted(counts)) or "none"
        print(f"        runs  {method}: {runs} (at most {MOST[method]})")


def main(arguments: list[str]) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of faults; then come seconds of peace (60)")
    parser.add_argument("--seed", type=int, help="of what is chosen by chance (default: another one each time)")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="work there, and leave what there is")
    options = parser.parse_args(arguments)
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    with contextlib.ExitStack() as stack:
        directory = options.keep
        if directory is None:
            temporary = tempfile.TemporaryDirectory(prefix="aipod-faults-", ignore_cleanup_errors=True)
            directory = Path(stack.enter_context(temporary))
        directory.mkdir(parents=True, exist_ok=True)
        run = Run(directory.absolute(), options.seconds, seed)
        done = asyncio.run(run.run())
        runs = read_runs(run.runs.read_text()) if run.runs.exists() else []
    totals = run.totals
    totals.check_interrupted(runs)
    starts = check_starts([ran.name for ran in runs], totals.right, totals.problems)
    _print(options.seconds, seed, totals, done, starts)
    for problem in totals.problems:
        print(f"must not be: {problem}")
    return 1 if totals.problems else 0
