"""What a worker process runs: `python -m aipod.worker SOCKET_FD PIPE_FD`. Standard library only.

Loads one instance of a class, then runs one job after the other. Speaks with its server over a Unix socket in frames:
4 bytes length of a JSON head, 4 bytes length of a blob, both big-endian, then the two.

    server: load {model, version, data_dir, lock, path}      worker: ready {description} | error {reason, message}
            (or look: the same without an instance, and without its lock)
    server: run {...} + kwargs JSON                          worker: report {progress, message} ...
    server: cancel                                           worker: done {kind} + result | error {...}
    server: close                                            worker: exits

Before it says ready, it makes sure that it cannot outlive its server and that others can see it live: see `_tether`
and `_hold`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import functools
import gc
import json
import logging
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aipod.methods import describe
from aipod.models import Context, LoadError, load_class
from aipod.results import BadResult, settle

HEAD = struct.Struct(">II")
# kwargs are bounded before they get here (Config.max_kwargs); this only stops a confused peer.
MAX_FRAME = 512 * 1024 * 1024
# Reports are sent at most this often: a heartbeat shows only the newest of a second anyway.
REPORT_EVERY = 0.1
MAX_LINE = 256 * 1024  # characters of a text that a model logs; what comes before them is dropped
LOOK_EVERY = 1.0  # seconds
# Seconds between two looks whether the server has asked for the end: methods may ask in their innermost loops.
ASK_EVERY = 0.01
LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"  # the time is where the line arrives
# Has the worker write the stacks of all its threads to stderr, also while the model holds the GIL.
TELL_STACKS = signal.SIGQUIT
WHILE_LOADING = "while it loaded"


def pack(head: dict[str, Any], blob: bytes = b"") -> bytes:
    text = json.dumps(head).encode()
    return HEAD.pack(len(text), len(blob)) + text + blob


def unpack(buffer: bytearray) -> tuple[dict[str, Any], bytes] | None:
    """Take the first whole frame out of `buffer`; None where there is none yet. Raises ValueError for a bad one."""
    if len(buffer) < HEAD.size:
        return None
    head_size, blob_size = HEAD.unpack_from(buffer)
    if head_size + blob_size > MAX_FRAME:
        raise ValueError(f"a frame of {head_size + blob_size} bytes")
    end = HEAD.size + head_size + blob_size
    if len(buffer) < end:
        return None
    head = json.loads(bytes(buffer[HEAD.size : HEAD.size + head_size]))
    blob = bytes(buffer[HEAD.size + head_size : end])
    del buffer[:end]
    return head, blob


def _tether(pipe: int) -> None:
    """Die when the server does, whatever ends it and whatever the model does (holding the GIL included).

    `pipe` is the read end of a pipe whose only write end is the server's. Linux: its SIGIO is SIGKILL, sent by the
    kernel. Not PR_SET_PDEATHSIG: that belongs to the thread that forked, and trio's threads come and go.

    A model that closes descriptors which are not its own closes that one too. So a thread looks once a second whether
    the server is still the parent. Only a model that has done that, and holds the GIL, may outlive its server.
    """
    server = os.getppid()

    def look() -> None:
        while os.getppid() == server:
            time.sleep(LOOK_EVERY)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=look, daemon=True, name="aipod-parent").start()
    if sys.platform == "linux":
        # Negative: the whole process group, so that what the model has forked does not outlive the server either.
        fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
        poll = select.poll()
        poll.register(pipe, 0)
        if poll.poll(0):  # POLLHUP: the server was gone before the signal was armed
            os._exit(1)
        return

    def watch() -> None:
        os.read(pipe, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="aipod-tether").start()


def _hold(path: str) -> int:
    """flock the worker's own lock file for as long as this process lives; no process that it starts may hold it.

    At the end of each run the file gets another name (`Worker.run`): who finds the name free, or gone, knows that the
    run is over, though this process may live on.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            # One in a session of its own lives on when server and worker are killed: the run would never be over.
            os.register_at_fork(after_in_child=functools.partial(_let_go, fd))
            return fd
        os.close(fd)  # a sweep took it for a dead worker's, between the two calls, and unlinked it


def _let_go(fd: int) -> None:
    with contextlib.suppress(OSError):  # the model has closed it
        os.close(fd)


class Link:
    """The socket to the server: written to by several threads; read by the main one, and looked at by all of a run."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._frames: deque[tuple[dict[str, Any], bytes]] = deque()  # came during a run, and were no cancel
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._looked = 0.0
        self.runs = 0  # that are over
        # The server takes the end of this socket for the end of the worker: nothing that the model starts may hold it.
        sock.set_inheritable(False)
        os.register_at_fork(after_in_child=sock.close)

    def send(self, head: dict[str, Any], blob: bytes = b"") -> None:
        with self._lock:
            self._sock.sendall(pack(head, blob))

    def receive(self) -> tuple[dict[str, Any], bytes] | None:
        """The next frame; None when the server has closed the socket."""
        if self._frames:
            return self._frames.popleft()
        while (frame := unpack(self._buffer)) is None:
            data = self._sock.recv(1 << 20)
            if not data:
                return None
            self._buffer += data
        return frame

    def end_run(self) -> None:
        """The run is over: its threads that go on find it cancelled, and take nothing of what comes from now on."""
        with self._looking:
            self.runs += 1

    def is_cancelled(self, run: int) -> bool:
        """Whether the server has asked for the end of the run, or is gone, or the run is over; `run`: what `runs` was.

        Does not wait; for any thread. Not by a thread that listens: a run would begin with the wait until that has
        handed it over.
        """
        if time.monotonic() - self._looked < ASK_EVERY or not self._looking.acquire(blocking=False):
            return False
        try:
            if run != self.runs:
                return True
            gone = False
            with contextlib.suppress(BlockingIOError):  # but `receive` may have read more than the task
                data = self._sock.recv(1 << 16, socket.MSG_DONTWAIT)
                self._buffer += data
                gone = not data
            frames = list(iter(lambda: unpack(self._buffer), None))
            self._frames.extend(frame for frame in frames if frame[0]["op"] != "cancel")
            return gone or any(frame[0]["op"] == "cancel" for frame in frames)
        except OSError:  # this is a child of the model's, which has no socket
            return False
        finally:
            self._looked = time.monotonic()
            self._looking.release()


class Reporter:
    """What a running method reports. Progress is sent, coalesced, from a thread: it never waits for the server.

    The log goes where prints go, to `output`: at once, so that a crash does not take it along, and in their order.
    """

    def __init__(self, link: Link, output: int) -> None:
        self._link = link
        self._output = output
        self._wake = threading.Event()
        self._lock = threading.RLock()  # guards what follows; a signal handler of the model's may log as well
        self._job = ""
        self._progress: dict[str, Any] = {}
        self._sending = threading.Lock()  # a report is never sent after the `done` that ends its run
        threading.Thread(target=self._run, daemon=True, name="aipod-reporter").start()

    def begin(self, job_id: str) -> None:
        """From now on reports of this job are sent, and no other's."""
        with self._lock:
            self._job = job_id

    def end(self) -> None:
        """Send what is pending. What a thread of the job reports later is dropped: the next caller must not see it."""
        with self._lock:
            self._job = ""
        self.flush()

    def report(self, job_id: str, progress: float | None, message: str | None, log: str | None) -> None:
        with self._lock:
            if job_id != self._job:
                return
            if log is not None:
                self._write(log)
            if progress is not None:
                self._progress = {"progress": progress, "message": message or ""}
                self._wake.set()

    def _write(self, text: str) -> None:
        # A newline before it too: what was printed without one is not the beginning of this line. Empty ones vanish.
        data = memoryview(f"\n{text[-MAX_LINE:]}\n".encode("utf-8", "backslashreplace"))
        with contextlib.suppress(OSError):  # the model has closed it
            while data:
                data = data[os.write(self._output, data) :]

    def flush(self) -> None:
        with self._sending:
            with self._lock:
                progress, self._progress = self._progress, {}
            if progress:
                self._link.send({"event": "report", **progress})

    def _run(self) -> None:
        pause = threading.Event()
        try:
            while True:
                self._wake.wait()
                self._wake.clear()
                self.flush()
                pause.wait(REPORT_EVERY)
        except OSError:
            os._exit(1)  # the server has closed the socket: nobody is left to compute for


class Worker:
    """One instance and the job it runs, all in the main thread."""

    def __init__(self, link: Link, output: int, instance: Any, lock: str) -> None:
        self._link = link
        self._lock = lock  # the name that the lock file has now
        self._instance = instance
        self._reporter = Reporter(link, output)

    def _make_context(self, head: dict[str, Any]) -> Context:
        return Context(
            job_id=head["job_id"],
            method=head["method"],
            version=head["version"],
            metadata=head["metadata"],
            work_dir=head["work_dir"],
            new_version=head["new_version"],
            timeout=head["timeout"],
            report=functools.partial(self._reporter.report, head["job_id"]),
            asked=functools.partial(self._link.is_cancelled, self._link.runs),
        )

    def run(self) -> None:
        """Run jobs until the server says close, then call the `close` hook."""
        while (frame := self._link.receive()) is not None and frame[0]["op"] != "close":
            task, kwargs_json = frame
            if task["op"] != "run":
                continue  # a cancel that has come too late
            self._reporter.begin(task["job_id"])
            head, blob = self._run_one(task, kwargs_json)
            self._reporter.end()
            self._link.end_run()
            # Before the server knows, so that the name which it writes down for the next run is held from then on.
            os.rename(self._lock, task["next_lock"])
            self._lock = task["next_lock"]
            self._link.send(head, blob)
        self._instance.close()

    def _run_one(self, head: dict[str, Any], kwargs_json: bytes) -> tuple[dict[str, Any], bytes]:
        payload, work_dir = Path(head["payload"]), Path(head["work_dir"])
        context = self._make_context(head)
        try:
            function = getattr(self._instance, head["method"])
            value = function(context, payload, **json.loads(kwargs_json))
            result = settle(value, payload=payload, work_dir=work_dir, res=Path(head["res"]))
        except BadResult as exc:
            return {"event": "error", "reason": exc.reason, "message": str(exc)}, b""
        except BaseException as exc:  # SystemExit too: the caller wants to know, and the instance lives on
            return failure("MODEL_ERROR", exc), b""
        return {"event": "done", "kind": result.kind, "inline": result.inline is not None}, result.inline or b""


def explain(exc: BaseException) -> dict[str, str]:
    """An exception's class, text and traceback, cut: a model may put its whole input into it."""
    return {
        "type": type(exc).__name__[:200],
        "message": _told(str, exc)[:4096],
        # As it is logged, and may go on the wire: lines of the source, and texts, need not be UTF-8.
        "trace": _told(_trace_of, exc),
    }


def _trace_of(exc: BaseException) -> str:
    text = "".join(traceback.format_exception(exc))[-16384:]
    return text.encode("utf-8", "backslashreplace").decode()


def _told(function: Callable[..., str], *args: Any) -> str:
    """What `function` says; an exception's `__str__` is code of the model's, and may raise whatever it likes."""
    try:
        return function(*args)
    except BaseException as exc:
        return f"[no text: {type(exc).__name__} when it was asked for]"


def failure(reason: str, exc: BaseException) -> dict[str, Any]:
    """An exception as the `error` event."""
    return {"event": "error", "reason": reason, **explain(exc)}


def load_failure(exc: BaseException) -> dict[str, Any]:
    """Why there is no instance, as the `error` event. No method has run, so it must not sound as if one had."""
    told = failure("LOAD_FAILED", exc)
    if isinstance(exc, LoadError):
        return {**told, "type": ""}  # the text says it all
    return {**told, "message": f"{WHILE_LOADING}: {told['message']}"}


def _set_up_logging() -> None:
    """What the model logs goes to stderr, which the server reads; not where it sets up logging by itself."""
    logging.lastResort = logging.StreamHandler()
    logging.lastResort.setFormatter(logging.Formatter(LOG_FORMAT))
    logging.getLogger().setLevel(logging.INFO)


def main() -> None:
    gc.freeze()  # what is imported here stays: to look for garbage in it is a tenth of what a worker's start costs
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    os.set_inheritable(int(sys.argv[2]), False)
    output = os.dup(sys.stderr.fileno())  # whatever the model makes of its stdout and stderr
    _tether(int(sys.argv[2]))
    frame = link.receive()
    if frame is None:
        return
    head = frame[0]
    lock = _hold(head["lock"]) if head["op"] == "load" else -1  # a look is no run that others would wait for
    if head["files"]:
        # The server has raised its own limit; select() takes no descriptor above 1023.
        resource.setrlimit(resource.RLIMIT_NOFILE, (head["files"], resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    faulthandler.register(TELL_STACKS)
    sys.path[:] = head["path"]
    _set_up_logging()
    try:
        cls = load_class(head["model"])
        description = describe(cls)
        if head["op"] == "look":
            link.send({"event": "ready", **description})
            return
        instance = cls()
        instance.version = head["version"]
        instance.data_dir = Path(head["data_dir"])
        for hook in ("load", "warm_up"):
            getattr(instance, hook, lambda: None)()
    except BaseException as exc:
        link.send(load_failure(exc))
        return
    if not hasattr(instance, "close"):
        instance.close = lambda: None
    worker = Worker(link, output, instance, head["lock"])
    link.send({"event": "ready", **description})
    worker.run()
    os.close(lock)


if __name__ == "__main__":
    main()
