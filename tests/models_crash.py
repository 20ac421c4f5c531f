"""Models that end their worker, or try to, for tests/test_isolation.py."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
import time
from pathlib import Path

import aipod
from aipod import Context
from tests.marks import say


class Fragile(aipod.Model):
    def predict(self, context: Context, path: Path, *, how: str) -> str:
        if how == "null pointer":
            ctypes.string_at(0)
        elif how == "kill":
            os.kill(os.getpid(), 9)
        elif how == "exit":
            os._exit(3)
        elif how == "abort":
            os.abort()
        elif how == "raise":
            raise ValueError("it said so")
        elif how == "sys.exit":
            sys.exit(4)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def allocate(self, context: Context, path: Path, *, group: str) -> int:
        """Until the limit of a control group ends it."""
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
        taken = [os.urandom(1 << 20) for _ in range(1000)]
        return len(taken)

    def fork_bomb(self, context: Context, path: Path, *, mark: str) -> None:
        """Ten threads, each of which starts processes that start processes."""

        def fork(left: int) -> None:
            for _ in range(left):
                if os.fork() == 0:
                    fork(left - 1)
                    time.sleep(60)
                    os._exit(0)

        threads = [threading.Thread(target=fork, args=(2,)) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        say(mark, str(os.getpid()))
        time.sleep(60)
