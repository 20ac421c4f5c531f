"""Models that misbehave, in a worker process and on the loop."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import aipod
from aipod import Context


class Base:
    def inherited(self, context: Context, path: Path) -> str:
        return "must not be reachable"


class InProcess(aipod.Model, Base):
    helper = 1

    def load(self) -> None: ...
    def warm_up(self) -> None: ...
    def close(self) -> None: ...

    def chaos(self, context: Context, path: Path, **kwargs: object) -> dict[str, object]:
        return {"size": path.stat().st_size, "kwargs": kwargs, "version": self.version}

    def predict(self, context: Context, path: Path, **kwargs: object) -> int:
        return path.stat().st_size

    def train(self, context: Context, path: Path) -> None:
        (context.new_version / "half").write_text("half")
        raise ValueError("half trained")

    def boom(self, context: Context, path: Path, *, text: str) -> None:
        context.log("about to fail")
        (context.work_dir / "scratch").write_text("x")
        raise LookupError(text)

    def leave(self, context: Context, path: Path) -> None:
        sys.exit(3)

    def not_json(self, context: Context, path: Path) -> object:
        return {1, 2}

    def not_a_number(self, context: Context, path: Path) -> float:
        return float("nan")

    def no_file(self, context: Context, path: Path) -> Path:
        return context.work_dir / "nothing"

    def no_text(self, context: Context, path: Path) -> bytes:
        return b"\xff"

    def random(self, context: Context, path: Path, *, length: int, log: int = 200_000) -> bytes:
        context.log("x" * log)
        return os.urandom(length)

    def vandal(self, context: Context, path: Path) -> str:
        """Writes to what is not its own."""
        with path.open("ab") as file:
            file.write(b"x")
        return "written"

    def _private(self, context: Context, path: Path) -> str:
        return "must not be reachable"


class OnLoop(aipod.Model, Base):
    helper = 1

    def load(self) -> None: ...
    def warm_up(self) -> None: ...
    async def close(self) -> None: ...

    async def chaos(self, context: Context, path: Path, **kwargs: object) -> dict[str, object]:
        return {"size": path.stat().st_size, "kwargs": kwargs, "version": self.version}

    async def predict(self, context: Context, path: Path, **kwargs: object) -> int:
        return path.stat().st_size

    async def train(self, context: Context, path: Path) -> None:
        (context.new_version / "half").write_text("half")
        raise ValueError("half trained")

    async def boom(self, context: Context, path: Path, *, text: str) -> None:
        context.log("about to fail")
        (context.work_dir / "scratch").write_text("x")
        raise LookupError(text)

    async def leave(self, context: Context, path: Path) -> None:
        sys.exit(3)

    @aipod.method(flavor="asyncio")
    async def leave_asyncio(self, context: Context, path: Path) -> None:
        sys.exit(3)

    def leave_thread(self, context: Context, path: Path) -> None:
        sys.exit(3)

    async def not_json(self, context: Context, path: Path) -> object:
        return {1, 2}

    async def not_a_number(self, context: Context, path: Path) -> float:
        return float("nan")

    async def no_file(self, context: Context, path: Path) -> Path:
        return context.work_dir / "nothing"

    async def no_text(self, context: Context, path: Path) -> bytes:
        return b"\xff"

    async def _private(self, context: Context, path: Path) -> str:
        return "must not be reachable"


class NothingToCall(aipod.Model):
    def load(self) -> None: ...


class LoadFails(aipod.Model):
    def load(self) -> None:
        raise OSError("no weights here")

    def chaos(self, context: Context, path: Path) -> None: ...


class LoadExits(aipod.Model):
    def load(self) -> None:
        sys.exit("no licence here")

    def chaos(self, context: Context, path: Path) -> None: ...
