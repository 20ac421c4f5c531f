"""`python -m tests.probe HOW`: says what it finds itself in, then ends in a way of its own."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import trio


def found() -> dict[str, object]:
    """What must be alike in a new process and in a forked one."""
    fields = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "name": __name__,
        "argv": sys.argv,
        "path": sys.path,
        "cwd": os.getcwd(),
        # readline, in the process that runs the tests, sets these two behind the back of os.environ.
        "environment": {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},
        "descriptors": [os.fstat(number)[:2] for number in (0, 2)],
        "open": [name for name in range(100) if os.path.exists(f"/proc/self/fd/{name}")],
        "group": (os.getpgrp(), os.getsid(0)),
        "signals": {name: fields[name] for name in ("SigBlk", "SigIgn", "SigCgt")},
        "handlers": {number.name: str(signal.getsignal(number)).split(" at ")[0] for number in signal.Signals},
        "limits": Path("/proc/self/limits").read_text(),
        "threads": (threading.active_count(), fields["Threads"]),
        "encoding": (sys.stdout.encoding, sys.stdout.line_buffering, sys.stderr.line_buffering),
        "flags": str(sys.flags),
        "loaded": sorted(name for name in sys.modules if name.startswith("tests.models")),
    }


def main() -> None:
    how = sys.argv[1]
    if how == "copy":
        sys.stdout.buffer.write(sys.stdin.buffer.read())
        sys.stderr.write("copied")
        return
    numbers = random.random(), trio._core._run._r.random()
    print(json.dumps({"found": found(), "numbers": numbers}), flush=True)
    if how == "wait":
        time.sleep(60)
    print("not flushed")
    if how == "raise":
        raise ValueError("as it is")
    if how != "return":
        sys.exit(int(how) if how.isdecimal() else how)


if __name__ == "__main__":
    main()
