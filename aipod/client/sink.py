"""Where an answer goes: memory or a file, checked as it comes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import json
import os
import select
import stat
import tempfile
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from aipod.client.failure import BadAnswer
from aipod.client.part import Part, followed, is_special
from aipod.codec import chunk_pieces, new_hasher
from aipod.config import MIB
from aipod.errors import AipodError, Refused, UsageError
from aipod.transport.inbox import recycle
from aipod.wire.ai import Raw, State

# A binary answer above it is for a file, not for memory.
MAX_IN_MEMORY = 64 * MIB
# Bytes of chunks that may wait for the disk: as on the server (`job.upload`). The stream's window holds what follows.
AHEAD = 4 * MIB
# Bytes of an answer that a thread takes before others have their turn: calls share a few threads.
STRETCH = 16 * MIB
# Seconds between two looks at whether a FIFO has a reader, and whether the caller still waits for it.
_LOOK = 0.05


def check_target(save_to: str | os.PathLike[str]) -> None:
    """Raises `UsageError` where no answer can be written to `save_to`: better now than after the upload."""
    path = Path(save_to)
    if path.is_dir():
        raise UsageError(f"{str(path)!r} is a directory; name a file in it to write the answer to")
    if path.is_socket():
        raise UsageError(f"{str(path)!r} is a socket; an answer goes to a file, a FIFO or a device")
    if is_special(path):
        if not os.access(path, os.W_OK):
            raise UsageError(f"{str(path)!r} cannot be written to; the answer was to go there")
        return
    parent = followed(path).parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{str(parent)!r} is no directory that can be written to; the answer was to go there")


def make_durable(path: str | os.PathLike[str]) -> None:
    """Have the answer that was saved at `path` on the disk, its name as well. Blocks. Raises OSError.

    It takes as long as the disk takes to write what the system has not yet written: 0.8 s of 1 GiB, measured once.
    """
    target = followed(Path(path))
    if is_special(target):
        return
    for one, flags in ((target, 0), (target.parent, os.O_DIRECTORY)):
        fd = os.open(one, os.O_RDONLY | flags)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Sink:
    """Collects one result. The methods that take data block: call them from a thread.

    A file is replaced by the whole answer at once, at the end. What cannot be replaced gets a copy of the whole answer.
    What has `received` stays over any number of connections, and in a `part` with the job's name over processes.
    """

    def __init__(self, state: State, save_to: str | os.PathLike[str] | None, part: Part | None = None) -> None:
        self._state = state
        self._target = None if save_to is None else Path(save_to)
        self.received = 0
        self._hasher = new_hasher()
        self._memory = bytearray()
        self._lock = threading.Lock()  # a caller who gives up calls `discard` while a thread may still write
        self._discarded = threading.Event()
        if self._target is None and self.is_binary and state.size > MAX_IN_MEMORY:
            raise AipodError(
                "RESULT_TOO_LARGE",
                f"the answer has {state.size} bytes; pass save_to=FILE to receive more than {MAX_IN_MEMORY}",
            )
        self._part: Part | None = None
        if self._target is not None and is_special(self._target):
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - `discard` closes it
        elif self._target is not None:
            self._part = part or Part(self._target)
            self._hasher = self._part.hasher
            self.received = self._part.size

    @property
    def is_binary(self) -> bool:
        return self._state.content_type != "application/json"

    def matches(self, state: State) -> bool:
        """Whether `state` is about the answer that is collected here."""
        return (state.size, state.digest) == (self._state.size, self._state.digest)

    def add(self, message: Raw) -> None:
        """Take one chunk. Raises `BadAnswer` where it is not the one that must come now, and takes nothing."""
        if message.offset != self.received:
            raise BadAnswer(f"it goes on at byte {message.offset}, not at {self.received}")
        if not message.data:
            return
        try:
            pieces = chunk_pieces(message.data)
        except Refused as exc:
            raise BadAnswer(f"it cannot be read: {exc}") from None
        if self._part is not None:
            self._part.write(*pieces)
        for piece in pieces:
            if self._target is None:
                self._memory += piece
            elif self._part is None:
                view = memoryview(piece)
                with self._lock:
                    while view and not self._discarded.is_set():
                        view = view[self._file.write(view) :]
            self._hasher.update(piece)
            self.received += len(piece)

    def finish(self, *, durable: bool = False) -> Any:
        """The answer: a path where it was saved, on the disk where it shall be `durable`, else bytes or what the JSON
        says.

        Raises `BadAnswer` where it is not the one that was stored: then nothing of it can be used. Waits for the reader
        of a FIFO, until `discard`.
        """
        if self.received != self._state.size or self._hasher.digest() != self._state.digest:
            raise BadAnswer("it is not the one that was stored")
        if self._target is None:
            return bytes(self._memory) if self.is_binary else json.loads(self._memory)
        if self._part is not None:
            if not self._part.deliver():
                return None
            if durable:
                make_durable(self._target)
            return self._target
        with self._lock:
            if self._discarded.is_set():
                return None
            self._copy_to(self._target)
        return self._target

    def _copy_to(self, target: Path) -> None:
        out = self._open_special(target)
        if out is None:
            return
        try:
            poll = select.poll()
            poll.register(out, select.POLLOUT)
            self._file.seek(0)
            while piece := self._file.read(MIB):
                view = memoryview(piece)
                while view:
                    if self._discarded.is_set():
                        return
                    poll.poll(_LOOK * 1000)
                    with contextlib.suppress(BlockingIOError):
                        view = view[os.write(out, view) :]
        except BrokenPipeError:
            raise AipodError("NOT_SAVED", f"the reader of {str(target)!r} went away before the answer's end") from None
        finally:
            os.close(out)

    def _open_special(self, target: Path) -> int | None:
        """A descriptor that never blocks, so that `discard` can end what waits for it; None if it has."""
        while not self._discarded.is_set():
            try:
                return os.open(target, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError as exc:
                if exc.errno != errno.ENXIO or not stat.S_ISFIFO(target.stat().st_mode):
                    raise
            self._discarded.wait(_LOOK)  # nobody has opened the FIFO for reading yet
        return None

    def leave(self) -> None:
        """Leave behind what a later process can go on with; harmless after `finish`."""
        if self._part is not None:
            self._part.leave()
        else:
            self.discard()

    def discard(self) -> None:
        """Leave nothing behind; harmless after `finish`."""
        if self._part is not None:
            self._part.remove()
        elif self._target is not None:
            self._discarded.set()
            with self._lock:
                self._file.close()


class Filling:
    """Fills a sink while more is received: a thread takes what has come, and what comes meanwhile.

    asyncio-flavored. `run` has a function run in a thread and raises what it raises; `tell` is called when more is in
    the sink. Who leaves calls `settle`, or, cancelled, `drop`; cancelled, `settle` does that.
    """

    def __init__(
        self, sink: Sink, run: Callable[[Callable[[], None]], Coroutine[Any, Any, None]], tell: Callable[[], None]
    ) -> None:
        self._sink = sink
        self._run = run
        self._tell = tell
        self._waiting: collections.deque[Raw] = collections.deque()
        self._put = 0  # bytes that came, which the loop counts
        self.wire = 0  # of them, what is in the sink, which the thread counts
        self._filling: asyncio.Task[None] | None = None
        self._arrival = asyncio.Event()
        self._room = asyncio.Event()
        self._is_full = False  # somebody waits for room
        self._loop = asyncio.get_running_loop()
        self._ended = False

    async def add(self, message: Raw, *, inline: bool) -> None:
        """Take one chunk, at once where it is to be `inline` and none is before it; waits where too many wait.

        Raises what adding an earlier one has raised.
        """
        if inline and self._filling is None:
            self._put += len(message.data)
            self._sink.add(message)
            self.wire += len(message.data)
            self._tell()
            return
        self._put += len(message.data)
        self._waiting.append(message)
        self._arrival.set()
        if self._filling is None:
            self._filling = asyncio.create_task(self._fill(), name="aipod-fill")
        while self._put - self.wire > AHEAD and not self._filling.done():
            self._room.clear()
            self._is_full = True
            await self._room.wait()
        if self._filling.done():
            await self.settle()

    async def settle(self) -> None:
        """Until all is in the sink, to which nothing is added then. Raises what adding it has raised."""
        if self._filling is not None:
            self._ended = True
            self._arrival.set()
            try:
                await asyncio.wait([self._filling])
            except asyncio.CancelledError:
                await self.drop()
                raise
            filling, self._filling = self._filling, None
            filling.result()

    async def drop(self) -> None:
        """Take nothing more. A thread that waits for a disk is left to itself."""
        self._waiting.clear()
        if self._filling is not None:
            filling, self._filling = self._filling, None
            filling.cancel()
            await asyncio.wait([filling])
            _ = filling.cancelled() or filling.exception()

    async def _fill(self) -> None:
        try:
            while self._waiting or not self._ended:
                self._arrival.clear()
                if self._waiting:
                    await self._run(self._add_waiting)
                    self._tell()
                    self._room.set()
                else:
                    await self._arrival.wait()
        finally:
            self._room.set()

    def _add_waiting(self) -> None:
        until = self._sink.received + STRETCH
        while self._waiting and self._sink.received < until:
            message = self._waiting.popleft()
            size = len(message.data)
            self._sink.add(message)
            recycle(message.data)
            self.wire += size
            if self._is_full and self._put - self.wire <= AHEAD:
                self._is_full = False
                self._loop.call_soon_threadsafe(self._room.set)
