"""`python -m tests.killed_server N FILE JOB serve …`: `python -m aipod serve …`, killed at its N-th durable step.

A step is whatever changes the entry of the job with that id: before a file is opened to be written, made, renamed,
linked, cut or removed, and after a line was appended to a journal. FILE gets a byte for every step: a test learns how
many there are from a run with N = 0, which is not killed.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from typing import Any

from aipod.cli import run
from aipod.spool.journal import Journal

_WRITES = os.O_WRONLY | os.O_RDWR
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod"}


def main() -> None:
    at, log, job = int(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.argv[3]
    steps = itertools.count(1)

    def step() -> None:
        if next(steps) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(log, b".")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES):
            path = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else os.fsdecode(args[0])
            if job in path:
                step()

    append = Journal.append

    def append_and_step(self: Journal, fields: dict[str, Any], *, sync: bool = False) -> None:
        append(self, fields, sync=sync)
        if job in str(self._path):
            step()

    Journal.append = append_and_step  # type: ignore[method-assign]
    sys.addaudithook(hook)
    sys.exit(run(sys.argv[4:]))


if __name__ == "__main__":
    main()
