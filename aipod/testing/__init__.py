"""`serve`: a class of one's own behind a real server, for tests of one's own; the fixture `aipod_server` is the same.

The server is in the test's process, in a thread of its own, and listens on a unix socket in a temporary directory: no
port, no process, nothing left. The class may be defined anywhere, in the test too, and be looked at while it runs. The
client is the real one, so payload, answer and errors are what they would be.

The server needs trio_asyncio, and importing that changes asyncio; `transport.bridge` takes care that whoever asks
asyncio for a loop gets one of asyncio's, or of the policy that is set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from aipod.config import Config
from aipod.errors import AipodError, leaves

__all__ = ["Served", "serve"]

# Seconds that methods which run when the scope is left may take: nothing ends a thread. A test that hangs there is one
# that fails.
LEFT = 10.0


@dataclasses.dataclass(frozen=True)
class Served:
    """A server of `serve`."""

    address: str  # what any of aipod's clients is given
    data: Path  # directory with one subdirectory per version


@contextlib.contextmanager
def serve(model: type | str, **settings: Any) -> Iterator[Served]:
    """Serve a class within the scope.

        with aipod.testing.serve(Scan) as server:
            async with aipod.Client(server.address) as client:
                assert await client.predict(b"the word") == ["word"]

    `model`: the class; or MODULE:CLASS, which runs in worker processes as `aipod serve` would run it. A class runs in
    threads of this process, one job at a time unless `instances` says otherwise; one with async methods on the server's
    loop. `settings` are fields of `Config`. Others than usual: callers get the traceback of a model's exception
    (`metadata["trace"]`), jobs that run when the scope is left have no time (a method in a thread has 10 s to look at
    `context.cancelled`), and no free disk is asked for.

    For any thread, whatever loop it runs; blocks for some ten milliseconds, the first time in a process for what is
    imported. Raises as `aipod.serve`, and `AipodError` (STILL_RUNNING) where a method does not end.
    """
    with warnings.catch_warnings():
        # What trio_asyncio uses is deprecated from Python 3.12 on, which a test suite may take for an error.
        warnings.simplefilter("ignore", DeprecationWarning)
        from aipod.server import serve as serve_in_trio

    import trio

    with tempfile.TemporaryDirectory(prefix="aipod-test-", ignore_cleanup_errors=True) as directory:
        usual = {
            "model": model if isinstance(model, str) else "",
            "bind": (f"unix:{directory}/socket",),
            "spool": f"{directory}/spool",
            "data": f"{directory}/data",
            "tracebacks": True,
            "drain": 0.0,
            "reserve": 0,
        }
        config = Config.from_mapping({**usual, **settings})
        started: Future[tuple[str, Callable[[], None]]] = Future()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                cls = None if isinstance(model, str) else model

                async def run(*, task_status: Any) -> None:
                    await serve_in_trio(config, cls=cls, task_status=task_status)

                addresses: list[str] = await nursery.start(run)
                soon = trio.lowlevel.current_trio_token().run_sync_soon
                started.set_result((addresses[0], functools.partial(soon, nursery.cancel_scope.cancel)))

        ended: Future[None] = Future()

        def run_server() -> None:
            error: BaseException | None = None
            try:
                trio.run(main)
            except BaseException as exc:
                error = next(leaves(exc))
            if error is not None and not started.done():
                started.set_exception(error)
                error = None
            if error is not None:
                ended.set_exception(error)
            else:
                ended.set_result(None)

        threading.Thread(target=run_server, daemon=True, name="aipod-test-server").start()
        address, end = started.result()
        try:
            yield Served(address, Path(config.data))
        finally:
            with contextlib.suppress(trio.RunFinishedError):
                end()
            try:
                ended.result(LEFT)
            except TimeoutError:
                text = f"a method still runs {LEFT:g} s after its test; have it look at context.cancelled"
                raise AipodError("STILL_RUNNING", text) from None
