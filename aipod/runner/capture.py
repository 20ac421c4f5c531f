"""What a model in the server's own process says: its reports, what it prints and logs, from whatever thread.

A method's context variables are those of everything that it awaits, and of the threads that trio and asyncio start for
it: they tell whose a line is. A thread that the model starts by itself has none: what that prints goes where all does.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import trio

from aipod.runner import Report
from aipod.runner.output import Excerpt, Lines, ServerLog
from aipod.worker import LOG_FORMAT

# Bytes of log between two turns of the loop, so that a method that logs in a loop stays small.
MAX_LOG = 256 * 1024

_capture: contextvars.ContextVar[Capture | None] = contextvars.ContextVar("aipod_capture", default=None)


class Capture:
    """What is said within `with capture:` is this run's. Told in the trio thread, what comes in between as one."""

    def __init__(self, server_log: ServerLog, job_id: str = "", report: Report = lambda *args: None) -> None:
        self._server_log = server_log
        self.job_id = job_id
        self._report: Report | None = report
        self._trio = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()  # guards what follows; see `_held`
        self._progress: tuple[float, str] | None = None  # the newest
        self._log = Excerpt(MAX_LOG)
        self._lines = Lines()
        self._due = False  # a flush is
        self._said = False  # anything at all, as most runs never do

    def __enter__(self) -> None:
        self._before = _capture.set(self)

    def __exit__(self, *exc: object) -> None:
        """What threads of the run say later is dropped."""
        _capture.reset(self._before)
        if self._said:
            self.print("\n")
        self._server_log.end(self.job_id)
        if self._said:
            self._flush()
        self._report = None

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Have the lock. What this thread says meanwhile goes where all does: it would wait here for itself.

        The collector may run at any time, and what it finds may print or log: a `__del__` of the model's, a warning.
        """
        before = _capture.set(None)
        try:
            with self._lock:
                yield
        finally:
            _capture.reset(before)

    def report(self, progress: float | None, message: str | None, text: str | None) -> None:
        """As `Report`, from any thread."""
        with self._held():
            if progress is not None:
                self._progress = progress, message or ""
            if text is not None:
                self._log.add(text)
            self._said = True
            due, self._due = self._due, True
        if not due:
            with contextlib.suppress(trio.RunFinishedError):
                self._trio.run_sync_soon(self._flush)

    def print(self, text: str) -> None:
        """What was written to stdout or stderr."""
        with self._held():
            self._said = True
            lines = self._lines.feed(text)
        if lines:
            self.report(None, None, "\n".join(lines))
            self._server_log.write(lines, self.job_id)

    def _flush(self) -> None:
        with self._held():
            (progress, message), text = self._progress or (None, None), self._log.take()
            self._progress, self._due = None, False
        if self._report is not None:
            self._report(progress, message, text or None)


def current_job() -> str:
    """Whose code runs in this thread or task: the id of a job that runs in this process, empty where there is none."""
    capture = _capture.get()
    return "" if capture is None else capture.job_id


class _Stream:
    """Stands for sys.stdout or sys.stderr."""

    def __init__(self, stream: Any) -> None:
        self.under = stream

    def write(self, text: str) -> int:
        capture = _capture.get()
        if capture is None:
            return int(self.under.write(text))
        before = _capture.set(None)  # the server's log may end here too
        try:
            capture.print(text)
        finally:
            _capture.reset(before)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.under, name)


class _Handler(logging.Handler):
    """Copies what a run logs into its job's log; the process's log has it anyway."""

    def emit(self, record: logging.LogRecord) -> None:
        capture = _capture.get()
        if capture is not None:
            try:
                capture.report(None, None, self.format(record))
            except Exception:
                self.handleError(record)
        last = logging.lastResort
        if last is not None and record.levelno >= last.level and not _is_heard(record.name):
            before = _capture.set(None)
            try:
                last.handle(record)
            finally:
                _capture.reset(before)


def _is_heard(name: str) -> bool:
    """Whether a logger's records have another handler; where they have none, `logging` takes its last resort."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        if any(handler is not _handler for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


_handler = _Handler()
_handler.setFormatter(logging.Formatter(LOG_FORMAT))
_lock = threading.Lock()  # guards what follows
_users = 0  # servers of this process that are in `captured`


@contextlib.contextmanager
def captured() -> Iterator[None]:
    """Within it, `Capture` gets what is printed and logged in this process. Several may be in it, from any thread.

    sys.stdout and sys.stderr are others meanwhile, and the root logger has a handler more: a `logging.basicConfig` that
    comes later needs `force=True`.
    """
    global _users
    with _lock:
        _users += 1
        logging.getLogger().addHandler(_handler)
        for name in ("stdout", "stderr"):  # again: somebody may have set another since
            if not isinstance(getattr(sys, name), _Stream):
                setattr(sys, name, _Stream(getattr(sys, name)))
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                logging.getLogger().removeHandler(_handler)
                for name in ("stdout", "stderr"):
                    while isinstance(stream := getattr(sys, name), _Stream):
                        setattr(sys, name, stream.under)
