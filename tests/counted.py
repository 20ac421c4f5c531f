"""`python -m tests.counted serve ...`: the server of aipod, counting what its threads call. Read by its own model."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from typing import Any

import aipod

# Functions of Python's, by qualified name and the end of their file; no coroutines, each of whose turns is a call.
FUNCTIONS = {
    ("_Step.__init__", "hands.py"): "steps",
    ("Forgetter._release_some", "forget.py"): "releases",
    ("ThreadCache.start_thread_soon", "_thread_cache.py"): "threads",
    ("Runner.spawn_impl", "_run.py"): "tasks",
    ("EpollIOManager.get_events", "_io_epoll.py"): "turns",
    ("encode_pieces", "codec.py"): "messages",
    ("_line", "journal.py"): "lines",
    ("CancelScope.__enter__", "_run.py"): "scopes",
    ("H2Connection._receive_ping_frame", "connection.py"): "pings",
}
# They enter a scope whenever their time has come, whatever is called.
CLOCKS = {"_Clock.run", "sleep_until", "BaseTrioEventLoop._main_loop_one"}
calls: Counter[str] = Counter(dict.fromkeys((*FUNCTIONS.values(), "calls", "files", "writes"), 0))


def _count(frame: Any, event: str, function: Any) -> None:
    if event == "call":
        calls["calls"] += 1  # also each time that a coroutine goes on
        code = frame.f_code
        name = FUNCTIONS.get((code.co_qualname, code.co_filename.rpartition("/")[2]))
        if name is not None and (name != "scopes" or frame.f_back.f_code.co_qualname not in CLOCKS):
            calls[name] += 1
    elif event == "c_call":
        if getattr(function, "__module__", None) in ("posix", "fcntl") and "path" not in function.__name__:
            calls["files"] += 1
        elif function.__name__ == "send" and hasattr(getattr(function, "__self__", None), "getpeername"):
            # Not trio's own socket, by which threads wake the loop: it has no peer's port.
            calls["writes"] += isinstance(function.__self__.getsockname(), tuple)


class Counting(aipod.Model):
    async def chaos(self, context: aipod.Context, path: Any) -> int:
        return len(path.read_bytes())

    async def cost(self, context: aipod.Context, path: Any) -> dict[str, int]:
        from tests import counted

        return dict(counted.calls)


def main() -> None:
    threading.setprofile(_count)
    sys.setprofile(_count)
    from aipod.__main__ import main

    main()


if __name__ == "__main__":
    from tests import counted

    counted.main()
