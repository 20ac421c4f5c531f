"""What a model prints and logs: into the log of the job that runs, and into the server's."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import logging
import os
import re
import time
from collections import deque

import trio

from aipod.runner import Report

log = logging.getLogger("aipod.model")

# What a worker may print before it has to wait; an unprivileged process gets no larger pipe.
PIPE = 1024 * 1024
READ = 64 * 1024  # bytes
# Seconds between two looks into the pipe: a model that prints 50 MB a second takes a tenth of the loop's time, not all.
PAUSE = 0.02
LINE = 8192  # characters; what is longer is cut into lines
# Lines for the server's log that an instance may print in a second. Job logs have bounds of their own.
LINES = 500

# What a terminal would act on: the server's log is not the model's to paint, nor its callers'.
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


class Lines:
    """Cuts text into lines, none empty, none longer than `LINE`; a carriage return ends one too (progress bars)."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> list[str]:
        """The lines that are whole now."""
        *lines, self._rest = re.split("[\r\n]", self._rest + text)
        if len(self._rest) >= LINE:
            lines.append(self._rest)
            self._rest = ""
        return [line[start : start + LINE] for line in lines for start in range(0, len(line), LINE)]

    def end(self) -> list[str]:
        """What is left."""
        return self.feed("\n")


class Excerpt:
    """Text that waits to be taken: its beginning and, where it is over `bound` bytes, the newest of the rest.

    Why a run fails is in what it says last, and often in what it says first.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._clear()

    def _clear(self) -> None:
        self._head: list[str] = []
        self._tail: deque[tuple[str, int]] = deque()
        self._head_room = self._tail_room = self._bound // 2
        self._dropped = False

    def __bool__(self) -> bool:
        return bool(self._head or self._tail)

    def add(self, text: str) -> None:
        """Append whole lines; the newline after the last one may be missing."""
        text = text[-self._bound // 2 :]  # a model may log all it has at once
        text += "" if text.endswith("\n") else "\n"
        size = len(text.encode("utf-8", "replace"))
        if not self._tail and size <= self._head_room:
            self._head.append(text)
            self._head_room -= size
            return
        self._tail.append((text, size))
        self._tail_room -= size
        while self._tail_room < 0 and len(self._tail) > 1:
            _, size = self._tail.popleft()
            self._tail_room += size
            self._dropped = True

    def take(self) -> str:
        """What there is, with a line that says so where something is missing."""
        mark = ["[lines were dropped]\n"] * self._dropped
        text = "".join([*self._head, *mark, *(line for line, _ in self._tail)])
        self._clear()
        return text


class ServerLog:
    """The server's log, for what one instance prints; lines that come too fast are counted instead.

    Several threads may write: then a line more or less is taken.
    """

    def __init__(self, version: str) -> None:
        self._idle = f"version {version}" if version else "import"
        self._second = 0.0  # when it began
        self._taken = 0  # lines since then
        self._dropped = 0

    def write(self, lines: list[str], job_id: str) -> None:
        """Log the lines as this job's; as the version's where that is empty."""
        now = time.monotonic()
        if now - self._second >= 1.0:
            self.end(job_id)
            self._second, self._taken = now, 0
        shown = lines[: LINES - self._taken]
        self._taken += len(shown)
        self._dropped += len(lines) - len(shown)
        for line in shown:
            log.info("%s: %s", self._who(job_id), _CONTROL.sub("?", line), extra={"job": job_id})

    def end(self, job_id: str) -> None:
        """Say how many lines were not shown."""
        if self._dropped:
            text = "%s: %d lines are not shown, more than %d came in a second"
            log.warning(text, self._who(job_id), self._dropped, LINES, extra={"job": job_id})
            self._dropped = 0

    def _who(self, job_id: str) -> str:
        return f"job {job_id}" if job_id else self._idle


class Output:
    """The pipe that is a worker's stdout and stderr.

    The mutable state, whose the lines are and what there is of the last one, belongs to the trio thread. The worker
    prints before it says that a run is over, so what is in the pipe then is that run's. What a process that it has left
    behind prints later is taken for the next run's.
    """

    def __init__(self, version: str) -> None:
        self._pipe, self.write_end = os.pipe()  # the caller closes `write_end`, once the worker has it
        os.set_blocking(self._pipe, False)
        with contextlib.suppress(AttributeError, OSError):  # Linux; and a user may have no more than 64 MiB of them
            fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, PIPE)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._lines = Lines()
        self._server_log = ServerLog(version)
        self._job_id = ""
        self._report: Report | None = None

    def begin(self, job_id: str, report: Report) -> None:
        """From now on what is printed is this job's."""
        self.end()
        self._job_id, self._report = job_id, report

    def end(self) -> None:
        """What is printed from now on is nobody's; what was, is told."""
        self._drain()
        self._tell(self._lines.end())
        self._server_log.end(self._job_id)
        self._job_id, self._report = "", None

    async def relay(self) -> None:
        """Tell what is printed, for as long as anybody may. This is a trio-flavored async function.

        Returns at once where another task does so.
        """
        with contextlib.suppress(trio.ClosedResourceError, trio.BusyResourceError):
            while self._pipe >= 0:
                await trio.lowlevel.wait_readable(self._pipe)
                if not self._drain():
                    return
                await trio.sleep(PAUSE)

    def _drain(self) -> bool:
        """Tell what is in the pipe; whether more may come."""
        for _ in range(PIPE // READ if self._pipe >= 0 else 0):  # a model that never stops must not keep us here
            try:
                data = os.read(self._pipe, READ)
            except BlockingIOError:
                return True
            self._tell(self._lines.feed(self._decoder.decode(data, final=not data)))
            if not data:
                return False
        return True

    def _tell(self, lines: list[str]) -> None:
        if not lines:
            return
        if self._report is not None:
            self._report(None, None, "\n".join(lines))
        self._server_log.write(lines, self._job_id)

    def close(self) -> None:
        """Tell what is left, and give the pipe up. Idempotent."""
        if self._pipe < 0:
            return
        self.end()
        trio.lowlevel.notify_closing(self._pipe)
        os.close(self._pipe)
        self._pipe = -1
