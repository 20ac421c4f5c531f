"""A TCP proxy on loopback that cuts, holds or corrupts what it carries, after an exact number of bytes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable


@dataclasses.dataclass
class Fault:
    """What happens to one connection; counts are of bytes in one direction, None is never."""

    cut_up: int | None = None  # reset both sides once so many bytes have gone up
    stall_up: int | None = None  # carry nothing more up once so many bytes have gone up, until `cut`
    swallow_up: int | None = None  # carry nothing more in either direction, though it is taken, once so many are up
    cut_down: int | None = None
    # End it by FIN, once this is true: a reset takes along what the client has not read yet, and the end of a
    # connection what it has not looked at.
    fin_down: Callable[[], bool] | None = None
    flip_down: int | None = None  # invert the byte at this offset
    frames_up: int | None = (
        None  # reset both sides behind so many HTTP/2 frames (up, the preface goes along with the first)
    )
    frames_down: int | None = None


class Proxy:
    """Faults are taken from `faults` by each new connection in turn; one beyond the last has none."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.port = 0
        self.faults: list[Fault] = []
        self.connections = 0
        self.cuts = 0  # that faults have made
        self.total_up = 0  # bytes of all connections
        self.up = 0  # bytes of the newest connection
        self.down = 0
        # Called for each connection; what it gives is called with all that the client has sent, cut off or not.
        self.tap: Callable[[], Callable[[bytes], None]] = lambda: _look_away
        self.delay = 0.0  # seconds that everything is on its way, in each direction, of connections from then on
        self.rate = 0.0  # bytes a second in each direction; 0: as fast as can be
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._down = asyncio.Event()
        self._down.set()
        self._trapped = 0  # connections up to this one are cut as soon as something goes up
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def hold(self) -> None:
        """Carry nothing in either direction, and say nothing."""
        self._flowing.clear()

    def hold_down(self) -> None:
        """Carry nothing downwards until `let_down`."""
        self._down.clear()

    def let_down(self) -> None:
        self._down.set()

    def trap(self) -> None:
        """Reset the connections that there are when they are next used, and carry nothing of that use."""
        self._trapped = self.connections

    def switch(self, port: int) -> None:
        """Reset every connection; new ones go to another port."""
        self._target = port
        self.cut()

    def freeze(self) -> None:
        """Carry nothing more for the connections that there are; new ones are carried."""
        self._flowing.clear()
        self._flowing = asyncio.Event()
        self._flowing.set()

    def cut(self) -> None:
        """Reset every connection."""
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = self.faults[self.connections] if self.connections < len(self.faults) else Fault()
        self.connections += 1
        self.up = self.down = 0
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._target)
            except BaseException:
                writer.transport.abort()
                raise
            self._open |= {writer, back_writer}
            try:
                async with asyncio.TaskGroup() as group:
                    if self.delay:
                        group.create_task(self._carry_late(reader, back_writer))
                        group.create_task(self._carry_late(back_reader, writer))
                    else:
                        group.create_task(self._carry(reader, back_writer, fault, up=True))
                        group.create_task(self._carry(back_reader, writer, fault, up=False))
            except* (OSError, _Cut):
                pass
            finally:
                for end in (writer, back_writer):
                    end.transport.abort()
                    self._open.discard(end)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault, *, up: bool
    ) -> None:
        limits = (fault.cut_up, fault.stall_up, fault.swallow_up) if up else (fault.cut_down,)
        limit = next((limit for limit in limits if limit is not None), None)
        frames = fault.frames_up if up else fault.frames_down
        counter = _Frames(_PREFACE if up else 0)
        tap = self.tap() if up else _look_away
        carried = 0
        flowing, number = self._flowing, self.connections
        while True:
            data = await reader.read(8 * 1024 if self.rate else 64 * 1024)
            if self.rate:
                await asyncio.sleep(len(data) / self.rate)
            await flowing.wait()
            if not up:
                await self._down.wait()
            if not data or (up and number <= self._trapped):
                raise _Cut
            tap(data)
            if frames is not None and (end := counter.find(data, frames)) is not None:
                limit = carried + end
            if limit is not None:
                data = data[: limit - carried]
            flip = fault.flip_down
            if not up and flip is not None and carried <= flip < carried + len(data):
                data = data[: flip - carried] + bytes([data[flip - carried] ^ 0xFF]) + data[flip - carried + 1 :]
            writer.write(data)
            await writer.drain()
            carried += len(data)
            if up:
                self.total_up += len(data)
                self.up = carried
            else:
                self.down = carried
            if limit is not None and carried >= limit:
                if up and fault.stall_up is not None:
                    await asyncio.Event().wait()
                self.cuts += 1
                if not up and fault.fin_down is not None:
                    while not fault.fin_down():
                        await asyncio.sleep(0.01)
                    writer.write_eof()
                    await asyncio.Event().wait()  # until the client has read it all and closes
                if not up or fault.swallow_up is None:
                    raise _Cut
                self.freeze()
                while data := await reader.read(64 * 1024):
                    tap(data)
                await flowing.wait()

    async def _carry_late(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Without faults: what comes now goes out `delay` from now, as much as it may be meanwhile."""
        loop = asyncio.get_running_loop()
        while data := await reader.read(256 * 1024):
            loop.call_later(self.delay, writer.write, data)
        await asyncio.sleep(self.delay)
        raise _Cut


class _Cut(Exception):
    pass


def _look_away(data: bytes) -> None:
    pass


_PREFACE = 24  # bytes of RFC 9113 section 3.4


class _Frames:
    """Counts the HTTP/2 frames in one direction of a connection."""

    def __init__(self, before: int) -> None:
        self._skip = before
        self._header = b""
        self._count = 0  # frames that have begun

    def find(self, data: bytes, wanted: int) -> int | None:
        """Where in `data`, which comes next, frame number `wanted` ends; None where it does not."""
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
                at += step
            else:
                part = data[at : at + 9 - len(self._header)]
                self._header += part
                at += len(part)
                if len(self._header) < 9:
                    return None
                self._skip = int.from_bytes(self._header[:3], "big")
                self._header = b""
                self._count += 1
            if not self._skip and self._count == wanted:
                return at
        return None


@contextlib.asynccontextmanager
async def open_proxy(port: int, *faults: Fault) -> AsyncIterator[Proxy]:
    """A proxy in front of 127.0.0.1:`port`. This is an asyncio-flavored async function."""
    proxy = Proxy(port)
    proxy.faults = list(faults)
    server = await asyncio.start_server(proxy._serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in proxy._tasks:
            task.cancel()
        await asyncio.gather(*proxy._tasks, return_exceptions=True)
