"""`serving`: a server for an application that is not trio's, in a child process which lives as long as the scope.

A child, because the server needs trio_asyncio, and importing that changes asyncio for the whole process. One thread
here starts it, hears what it says (see `cli.child`) and waits for its end, so that neither a loop of the application's
nor its handlers of logging are in each other's way.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import json
import logging
import os
import selectors
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from aipod import errors
from aipod.config import Config
from aipod.errors import AipodError, ServeError

log = logging.getLogger("aipod.serving")

# Seconds that the child has, beyond what a drain takes at most, to end by itself; and to end at once.
BEYOND = 5.0
AT_ONCE = 3.0
# Seconds between two looks whether the child has ended, while nothing is heard, and when it has closed its socket.
_LOOK, _LOOK_AT_ONCE = 1.0, 0.02
# Bytes of a line of its log, which `cli.logs` bounds; what is longer, or no JSON, is not the server's own.
_MAX_LINE = 64 * 1024
# As much as a pipe holds.
_READ = 64 * 1024


class serving:
    """A server in a process of its own, within the scope; `async with` in asyncio, `with` in a thread.

        async with aipod.serving(aipod.Config(model="scan:Scan", bind=("127.0.0.1:0",))) as server:
            async with aipod.Client(server.addresses[0]) as client:
                ...

    Entering returns when health answers, and raises what keeps the server from starting: `ServeError` (also its
    `BindError` and `SpoolError`), `JobFailed` (the class does not load), `UsageError`. Leaving drains it: running jobs
    have `config.drain` seconds. Cancelled while it starts, or while it drains: it ends at once.

    Its log is this process's: the loggers and levels are those of the server, and `job` of a record is the job's id. It
    logs below INFO where logger "aipod" is enabled for that when the scope is entered. Signals are this process's too:
    the child leaves them alone. When this process ends, however it does, the child ends at once.

    Where the server ends by itself, the body of `async with` is cancelled, and leaving raises `ServeError`
    (SERVER_ENDED) instead; the body of `with` goes on, `running` is false, and leaving raises the same.

    This is an asyncio-flavored context manager; its loop may be any. It is entered once:
    again, it raises `UsageError`.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._child = _Child(config)
        self._left = False
        self._cancelled = False  # the body was, by us
        self.addresses: list[str] = []

    @property
    def pid(self) -> int:
        """Of the child; 0 before there is one."""
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether the server has started and not ended."""
        return bool(self.addresses) and not self._child.ended.done()

    # From a thread

    def __enter__(self) -> serving:
        self._child.start()
        try:
            self.addresses = self._child.started.result()
        except BaseException:
            self._child.hurry()
            self._end_at_once()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        died = self._leave()
        try:
            with contextlib.suppress(TimeoutError):
                self._child.ended.result(self._config.longest_stop + BEYOND)
        except BaseException:
            self._child.hurry()
            raise
        finally:
            self._end_at_once()
        if died and exc is None:
            raise self._child.error()

    def _end_at_once(self) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                self._child.ended.result(AT_ONCE)
        finally:
            self._child.kill()

    # From asyncio

    async def __aenter__(self) -> serving:
        self._child.start()
        try:
            self.addresses = await asyncio.wrap_future(self._child.started)
        except BaseException:
            self._child.hurry()
            await self._wait_at_once()
            raise
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def cancel() -> None:
            if not self._left:
                self._cancelled = task.cancel()

        def tell(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(cancel)

        self._child.ended.add_done_callback(tell)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        died = self._leave()
        try:
            await self._wait(self._config.longest_stop + BEYOND)
        except BaseException:
            self._child.hurry()
            raise
        finally:
            await self._wait_at_once()
        if not died:
            return
        task = asyncio.current_task()
        ours = self._cancelled and task is not None and task.uncancel() == 0 and kind is asyncio.CancelledError
        if exc is None or ours:
            raise self._child.error() from None

    async def _wait(self, seconds: float) -> None:
        """Wait for the child's end, `seconds` at most."""
        await asyncio.wait([asyncio.wrap_future(self._child.ended)], timeout=seconds)

    async def _wait_at_once(self) -> None:
        try:
            await self._wait(AT_ONCE)
        finally:
            self._child.kill()

    def _leave(self) -> bool:
        """Begin the drain; whether the server had ended before."""
        self._left = True
        died = self._child.ended.done()
        self._child.drain()
        return died


class _Child:
    """The child, and the thread that has to do with it. The other methods are for any thread, and do not block."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._sock, self._theirs = socket.socketpair()
        self._lock = threading.Lock()  # guards what follows: a pid is not signalled once it may be another process's
        self._process: subprocess.Popen[bytes] | None = None
        self._is_begun = False
        self.started: Future[list[str]] = Future()
        self.ended: Future[int] = Future()  # with the exit status
        # Whoever waits for them may be cancelled; they are not.
        self.started.set_running_or_notify_cancel()
        self.ended.set_running_or_notify_cancel()

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    def start(self) -> None:
        if self._is_begun:
            raise errors.UsageError("this server was entered before: make another one with aipod.serving")
        self._is_begun = True
        # A daemon: an interpreter that ends without leaving the scope must not wait for it.
        threading.Thread(target=self._run, daemon=True, name="aipod-serving").start()

    def drain(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.send(b"stop\n", socket.MSG_DONTWAIT)

    def hurry(self) -> None:
        """Have it end at once, in order."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # not close(): a process that was forked may have it too

    def kill(self) -> None:
        with self._lock:
            if self._process is not None and self._process.returncode is None and not self.ended.done():
                log.error("the server (pid %d) does not end; killing it", self.pid)
                self._process.kill()

    def error(self) -> ServeError:
        """Why it has ended."""
        status = self.ended.result()
        text = f"the server (pid {self.pid}) has ended by itself, with {_status(status)}; its log says why"
        return ServeError("SERVER_ENDED", text)

    # In the thread

    def _run(self) -> None:
        status = 1
        try:
            with self._sock, self._theirs:
                process = self._spawn()
                assert process.stderr is not None
                with process.stderr as output:
                    self._theirs.close()  # ours: its end is to be seen
                    self._listen(process, output)
                status = process.returncode
        except BaseException as exc:
            if self._process is not None:  # it ends as its socket has
                status = self._process.wait()
            self._fail(ServeError("SERVER_FAILED", f"the server cannot be started: {exc}"), exc)
        finally:
            text = f"the server has ended while it started, with {_status(status)}; its log says why"
            self._fail(ServeError("SERVER_ENDED", text))
            self.ended.set_result(status)

    def _spawn(self) -> subprocess.Popen[bytes]:
        home = str(Path(__file__).parent.parent)
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            # -P: not the current directory first; it gets this process's sys.path.
            [sys.executable, "-uP", "-Xfaulthandler", "-m", "aipod.cli.child", str(self._theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(self._theirs.fileno(),),
            start_new_session=True,  # Ctrl-C on the terminal is the application's business
            env={**os.environ, "PYTHONPATH": path},
        )
        with self._lock:
            self._process = process
        hello = {
            "config": dataclasses.asdict(self._config),
            "path": sys.path,
            "parent": os.getpid(),
            "debug": logging.getLogger("aipod").isEnabledFor(logging.DEBUG),
        }
        with contextlib.suppress(OSError):  # nobody wants it any more
            self._sock.sendall(json.dumps(hello).encode() + b"\n")
        return process

    def _listen(self, process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
        """Take what the child says, until it has ended. What it has started may live on, and have its stderr."""
        said, heard = _Lines(), _Lines()
        with selectors.DefaultSelector() as ends:
            ends.register(output, selectors.EVENT_READ, (lambda: os.read(output.fileno(), _READ), said, self._log))
            ends.register(self._sock, selectors.EVENT_READ, (lambda: self._sock.recv(_READ), heard, self._hear))
            wait, over = _LOOK, False
            while not over:
                with self._lock:
                    over = process.poll() is not None
                # Once it is over, one read takes all that it has left in a pipe.
                for key, _ in ends.select(0 if over else wait):
                    read, lines, take = key.data
                    try:
                        data = read()
                    except ConnectionError:
                        data = b""
                    for line in lines.feed(data):
                        take(line)
                    if not data:
                        ends.unregister(key.fileobj)
                        wait = _LOOK_AT_ONCE if take == self._hear else wait
        for line in said.feed(b"\n"):
            self._log(line)

    def _hear(self, line: str) -> None:
        told = json.loads(line)
        if "addresses" in told:
            self.started.set_result(told["addresses"])
        else:
            self._fail(_error(told["error"]))

    def _fail(self, error: Exception, cause: BaseException | None = None) -> None:
        """Tell who waits for the start, if anybody still does."""
        if not self.started.done():
            error.__cause__ = cause
            self.started.set_exception(error)

    def _log(self, line: str) -> None:
        """Log as this process what the child has logged."""
        try:
            told = json.loads(line)
            logger, level = logging.getLogger(told.pop("logger")), logging.getLevelNamesMapping()[told.pop("level")]
            when, text = datetime.datetime.fromisoformat(told.pop("time")).timestamp(), str(told.pop("message", ""))
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("the server says: %s", line)
            return
        if not logger.isEnabledFor(level):
            return
        trace = told.pop("trace", None)
        record = logger.makeRecord(logger.name, level, "(aipod)", 0, text, (), None, "")
        vars(record).update({name: value for name, value in told.items() if name not in vars(record)})
        record.created, record.msecs = when, when % 1 * 1000
        record.process, record.processName, record.exc_text = self.pid, "aipod", trace
        try:
            logger.handle(record)
        except Exception:  # of a filter of the application's, say: as where a handler of logging's own goes wrong
            logging.Handler().handleError(record)


class _Lines:
    """Cuts bytes into lines; a line that is too long is cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE:
            lines.append(self._rest)
            self._rest = b""
        return [text for line in lines if (text := line.decode(errors="replace").rstrip())]


def _error(told: dict[str, Any]) -> AipodError:
    """The exception that the child has told of, of its class."""
    from aipod.spool import SpoolError
    from aipod.transport.listeners import BindError
    from aipod.transport.tls import TLSError

    elsewhere: dict[str, type[AipodError]] = {kind.__name__: kind for kind in (SpoolError, BindError, TLSError)}
    kind: type[AipodError] = {**vars(errors), **elsewhere}.get(told["kind"], ServeError)
    error = kind.__new__(kind)
    AipodError.__init__(error, told["reason"], told["message"], told["metadata"])
    return error


def _status(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"
