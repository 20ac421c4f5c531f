"""Models that do to their job, their process or their server what no model should."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import aipod
from aipod import Context
from tests.lazily import trio
from tests.marks import say


class Mute(Exception):
    """An exception without a text."""

    def __str__(self) -> str:
        raise KeyboardInterrupt


def dig(base: Path, depth: int) -> None:
    """Directories inside one another, each with a file."""
    fd = os.open(base, os.O_RDONLY)
    for _ in range(depth):
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
        os.mkdir("below", dir_fd=fd)
        below = os.open("below", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


class InProcess(aipod.Model):
    def chaos(self, context: Context, path: Path) -> int:
        return path.stat().st_size

    def wait(self, context: Context, path: Path, *, mark: str, until: str) -> None:
        say(mark, str(os.getpid()))
        while not Path(until).exists():
            time.sleep(0.01)

    def files(self, context: Context, path: Path) -> int:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def remove_entry(self, context: Context, path: Path) -> None:
        shutil.rmtree(path.parent)

    def remove_entry_and_raise(self, context: Context, path: Path) -> None:
        shutil.rmtree(path.parent)
        raise ValueError

    def replace_payload(self, context: Context, path: Path) -> int:
        path.unlink()
        path.mkdir()
        (path / "file").touch()
        return 1

    def replace_journal(self, context: Context, path: Path) -> None:
        (path.parent / "state").unlink()
        (path.parent / "state").mkdir()

    def replace_journal_and_raise(self, context: Context, path: Path) -> None:
        self.replace_journal(context, path)
        raise ValueError

    def block_journal(self, context: Context, path: Path) -> None:
        """Whoever opens it waits for somebody at the other end."""
        for name in ("state", "log", "live"):
            (path.parent / name).unlink(missing_ok=True)
            os.mkfifo(path.parent / name)
        context.progress(0.5)
        context.log("a line")

    def block_journal_and_raise(self, context: Context, path: Path) -> None:
        self.block_journal(context, path)
        raise ValueError

    def replace_result(self, context: Context, path: Path) -> Path:
        (path.parent / "res").mkdir()
        (context.work_dir / "result").touch()
        return context.work_dir / "result"

    def dig(self, context: Context, path: Path, *, depth: int) -> None:
        dig(context.work_dir, depth)
        dig(context.new_version, depth)
        raise ValueError

    def replace_version(self, context: Context, path: Path) -> None:
        fresh = context.new_version
        fresh.rmdir()
        fresh.write_text("no directory")

    def mute(self, context: Context, path: Path) -> None:
        raise Mute

    def close_descriptors(self, context: Context, path: Path, *, mark: str) -> None:
        os.closerange(3, 1024)
        say(mark, str(os.getpid()))
        time.sleep(60)

    def sparse(self, context: Context, path: Path) -> Path:
        result = context.work_dir / "result"
        result.touch()
        os.truncate(result, 1 << 38)
        return result


EXCEPTIONS = {kind.__name__: kind for kind in (KeyboardInterrupt, GeneratorExit, BaseException, SystemExit, Mute)}


class OnLoop(aipod.Model):
    async def chaos(self, context: Context, path: Path) -> int:
        return path.stat().st_size

    async def with_trio(self, context: Context, path: Path, *, kind: str) -> None:
        await trio.sleep(0)
        raise EXCEPTIONS[kind]

    @aipod.method(flavor="asyncio")
    async def with_asyncio(self, context: Context, path: Path, *, kind: str) -> None:
        raise EXCEPTIONS[kind]

    def in_thread(self, context: Context, path: Path, *, kind: str) -> None:
        raise EXCEPTIONS[kind]

    async def chdir(self, context: Context, path: Path) -> None:
        os.chdir("/")

    async def close(self) -> None:
        raise KeyboardInterrupt


class ThreadCloses(OnLoop):
    def close(self) -> None:  # type: ignore[override]
        raise SystemExit

    async def chaos(self, context: Context, path: Path) -> int:
        return 1


class LoadInterrupted(aipod.Model):
    async def load(self) -> None:
        raise KeyboardInterrupt

    async def chaos(self, context: Context, path: Path) -> None: ...


class WarmUpInterrupted(aipod.Model):
    def warm_up(self) -> None:
        raise GeneratorExit

    async def chaos(self, context: Context, path: Path) -> None: ...


class LoadMute(aipod.Model):
    def load(self) -> Any:
        raise Mute

    def chaos(self, context: Context, path: Path) -> None: ...


class LoadHangs(aipod.Model):
    """Its first load hangs."""

    def load(self) -> None:
        mark = self.data_dir.parent / "loading"
        if not mark.exists():
            mark.touch()
            time.sleep(60)

    async def chaos(self, context: Context, path: Path) -> str:
        return "loaded"


class KillsServer(aipod.Model):
    """Version `bad` kills its server as it is loaded, once there is a file `go` in its data."""

    def load(self) -> None:
        while self.version == "bad":
            if (self.data_dir / "go").exists():
                os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(0.01)

    def chaos(self, context: Context, path: Path) -> int:
        return path.stat().st_size
