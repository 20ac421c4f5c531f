"""The process runner: a worker process per instance, so that a crash, a hang or a held GIL stays in it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import outcome
import trio

from aipod import worker
from aipod.errors import JobFailed, Refused, job_failed, refused_when_exhausted
from aipod.results import Result
from aipod.runner import STOPPING, Description, Report, RunnerBroken, Task, failed
from aipod.runner.output import Output
from aipod.spool import Spool

# Seconds that a worker has to write its stacks, before it is ended; nothing tells when it has.
STACKS = 0.2


class ProcessRunner:
    """One worker process (see `aipod.worker`).

    The mutable state is the process and its socket; only the task that leases this runner touches them.
    """

    shared = False

    def __init__(
        self,
        model: str,
        version: str,
        data_dir: Path,
        spool: Spool | None,
        *,
        load_timeout: float,
        grace: float,
        files: int = 0,
    ) -> None:
        """`spool`: None for one that is there to `look` only. `files`: the worker's own limit of open files; 0 is this
        process's.
        """
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._runs = 0  # that are over
        self._version = version
        self._hello = {
            "op": "load",
            "model": model,
            "version": version,
            "data_dir": str(data_dir),
            "lock": "" if spool is None else str(spool.worker_lock(self.lock_name)),
            "path": sys.path,
            "files": files,
        }
        self._spool = spool
        self._load_timeout = load_timeout
        self._grace = grace
        self._buffer = bytearray()
        self._process: trio.Process | None = None
        self._output: Output | None = None
        self._stream: trio.SocketStream | None = None
        self._tether = -1  # write end of the pipe whose end the worker cannot survive
        self._loaded = False
        self._broken = False
        self._unread = False  # the worker has ended with something of ours unread

    async def start(self) -> Description:
        async with trio.open_nursery() as nursery:
            description = await outcome.acapture(self._start, nursery)
            nursery.cancel_scope.cancel()
        return description.unwrap()

    async def _start(self, nursery: trio.Nursery) -> Description:
        try:
            nursery.start_soon((await self._spawn()).relay)
            with trio.move_on_after(self._load_timeout):
                await self._send(self._hello)
                event, _ = await self._receive()
                if event["event"] == "ready":
                    self._loaded = True
                    return Description.of(event)
                raise failed(event)
            raise job_failed("LOAD_FAILED", f"the model did not load within {self._load_timeout:g} s (--load-timeout)")
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._end(0)
            raise

    async def look(self) -> Description:
        """Have the class imported and described, without an instance; the worker is gone afterwards."""
        self._hello["op"] = "look"
        description = await self.start()
        await self.shutdown()
        return description

    async def _spawn(self) -> Output:
        with _startable(), contextlib.ExitStack() as stack, contextlib.ExitStack() as on_error:
            ours, theirs = socket.socketpair()
            stack.enter_context(theirs)
            on_error.enter_context(ours)
            read_end, self._tether = os.pipe()
            stack.callback(os.close, read_end)
            self._output = output = Output(self._version)
            stack.callback(os.close, output.write_end)
            on_error.callback(output.close)
            self._process = await trio.lowlevel.open_process(
                # -P: not the current directory first; the worker gets this process's sys.path. -u: prints at once.
                [sys.executable, "-uP", "-Xfaulthandler", "-m", "aipod.worker", str(theirs.fileno()), str(read_end)],
                stdin=subprocess.DEVNULL,
                stdout=output.write_end,
                stderr=output.write_end,
                pass_fds=(theirs.fileno(), read_end),
                start_new_session=True,  # Ctrl-C on the terminal is the server's business
                env={**os.environ, "PYTHONPATH": _python_path()},
            )
            on_error.pop_all()
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        return output

    @property
    def lock_name(self) -> str:
        """The worker's lock has a new name for each run, so that a journal which names one tells of that run only."""
        return self._lock_of(self._runs)

    def _lock_of(self, runs: int) -> str:
        return f"{self._name}-{runs}"

    @property
    def broken(self) -> bool:
        return self._broken or self._process is None or self._process.poll() is not None

    @property
    def stopped(self) -> bool:
        if self._process is None or self._process.returncode is not None:
            return False
        try:
            with open(f"/proc/{self._process.pid}/stat", "rb") as file:  # made by the kernel: no disk to wait for
                return file.read().rpartition(b")")[2].split(maxsplit=1)[0] in (b"T", b"t")
        except (OSError, IndexError):  # it is gone; or elsewhere than on Linux
            return False

    async def run(self, task: Task, report: Report) -> Result:
        assert self._spool is not None, "who is there to look only runs nothing"
        if self.broken or self._output is None:
            raise RunnerBroken
        # Else a send that is cancelled before its first byte would cost the worker.
        await trio.lowlevel.checkpoint_if_cancelled()
        head = {
            "op": "run",
            "job_id": task.job_id,
            "method": task.method,
            "version": task.version,
            "metadata": dict(task.metadata),
            "payload": str(task.payload),
            "work_dir": task.work_dir,
            "res": task.res,
            "new_version": task.new_version,
            "timeout": task.timeout,
            "next_lock": str(self._spool.worker_lock(self._lock_of(self._runs + 1))),
        }
        running = False
        self._output.begin(task.job_id, report)
        try:
            await self._send(head, task.kwargs)
            running = True
            return await self._result(report)
        except trio.Cancelled:
            task.remark(STOPPING)
            with trio.CancelScope(shield=True):
                await self._stop(report, ask=running)
            raise
        except JobFailed as exc:
            if self._broken:
                with trio.CancelScope(shield=True):
                    await self._end(0)
            if not running or self._unread:
                raise RunnerBroken from exc  # it has not got the whole task
            raise
        finally:
            self._output.end()

    async def _result(self, report: Report) -> Result:
        while True:
            event, blob = await self._receive()
            if event["event"] == "report":
                report(event["progress"], event["message"], None)
                continue
            self._runs += 1
            if event["event"] == "done":
                return Result(event["kind"], blob if event["inline"] else None)
            raise failed(event)

    async def _stop(self, report: Report, *, ask: bool) -> None:
        """Three steps: ask, SIGTERM, SIGKILL. Returns when the method has ended; the worker lives on if it obeyed.

        One that does not says before the second where it is: all its threads' stacks go to stderr.
        """
        if ask:
            with trio.move_on_after(self._grace) as asked, contextlib.suppress(JobFailed):
                await self._send({"op": "cancel"})
                await self._result(report)
            if not asked.cancelled_caught and not self._broken:
                return
            if self._process is not None and self._process.poll() is None and not self._broken:
                os.kill(self._process.pid, worker.TELL_STACKS)
                await trio.sleep(STACKS)
        self._signal(signal.SIGTERM)
        await self._end(self._grace)

    async def shutdown(self) -> None:
        try:
            with trio.move_on_after(self._grace):
                if not self._broken:
                    with contextlib.suppress(JobFailed):
                        await self._send({"op": "close"})
                    await self.wait()
        finally:
            with trio.CancelScope(shield=True):
                await self._end(0)

    async def wait(self) -> int | None:
        """Also the one who hears what is printed between the runs, and meanwhile."""
        if self._process is None or self._output is None:
            return None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._output.relay)
            status = await self._process.wait()
            nursery.cancel_scope.cancel()
        return status

    async def _end(self, grace: float) -> None:
        """Make sure that the process is gone, and take its things away. Idempotent."""
        self._broken = True
        if self._process is not None and self._tether >= 0:
            with trio.move_on_after(grace):
                await self._process.wait()
            self._signal(signal.SIGKILL)
            await self._process.wait()
            # What the model started and left behind is still in the group.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._stream is not None:
            await trio.aclose_forcefully(self._stream)
            self._stream = None
        if self._tether >= 0:
            os.close(self._tether)
            self._tether = -1
        if self._output is not None:
            self._output.close()
        if self._spool is not None:
            for runs in (self._runs, self._runs + 1):  # a run that was over when it was ended has renamed it
                self._spool.forget_worker(self._lock_of(runs))

    def _signal(self, number: int) -> None:
        """Signal the worker and the processes that the model started, which are in its session."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def _send(self, head: dict[str, Any], blob: bytes = b"") -> None:
        assert self._stream is not None
        try:
            await self._stream.send_all(worker.pack(head, blob))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise await self._crashed() from None

    async def _receive(self) -> tuple[dict[str, Any], bytes]:
        """The next frame. Cancelled: what has arrived is kept. Raises `JobFailed` (see `_crashed`)."""
        assert self._stream is not None
        while (frame := worker.unpack(self._buffer)) is None:
            try:
                data = await self._stream.receive_some()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                data = b""
                # The kernel resets a Unix socket that is closed with data in it, else it says that it has ended. The
                # worker reads in order, and what was sent to it last is the task.
                self._unread = isinstance(exc.__cause__, ConnectionResetError)
            if not data:
                raise await self._crashed()
            self._buffer += data
        return frame

    async def _crashed(self) -> JobFailed:
        """What to say about a worker that closed its socket: it is ending, or made to end.

        WORKER_CRASHED, or LOAD_FAILED where it had no instance yet: no method was running.
        """
        self._broken = True
        with trio.move_on_after(self._grace):
            await self.wait()
        self._signal(signal.SIGKILL)
        status = await self.wait()
        text, metadata = explain_exit(status)
        if not self._loaded:
            return job_failed("LOAD_FAILED", f"the worker process {text} {worker.WHILE_LOADING}", metadata)
        return job_failed("WORKER_CRASHED", f"the worker process {text}", metadata)


@contextlib.contextmanager
def _startable() -> Iterator[None]:
    """Turn what the system says when it starts no process into what a job can be told: `Refused`, `JobFailed`."""
    try:
        with refused_when_exhausted():
            yield
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.ENOMEM):
            text = f"the server cannot start another process: {exc.strerror}; try again later"
            raise Refused("OVERLOADED", text) from None
        # The interpreter was replaced, say. Its path is for the server's log only.
        text = f"the server cannot start a worker process: {exc.strerror}; start the server anew"
        raise job_failed("LOAD_FAILED", text, {"trace": str(exc)}) from exc


def _python_path() -> str:
    """The environment's PYTHONPATH with aipod's own home before it, wherever this process has it from."""
    return os.pathsep.join(filter(None, (str(Path(worker.__file__).parent.parent), os.environ.get("PYTHONPATH"))))


def explain_exit(status: int | None) -> tuple[str, dict[str, str]]:
    """A process's exit status for a person, and for ErrorInfo."""
    if status is None:
        return "ended", {}
    if status >= 0:
        return f"exited with status {status}", {"exit": str(status)}
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"was killed by {name}{hint}", {"signal": name}
