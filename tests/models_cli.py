"""A model that people at a terminal look at; it counts its runs in the file that `mark` names."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import aipod
from aipod import Context

MESSAGE = "epoch 3 表示 of many more than anybody would like to wait for, and then some more"


class Person(aipod.Model):
    def predict(self, context: Context, path: Path, *, mark: str = "", gate: str = "") -> dict[str, int]:
        """Count bytes, until the file `gate` is there. What is in a file beside it is logged."""
        if mark:
            with open(mark, "a") as file:
                file.write("run\n")
        context.log("first line 漢字")
        context.log("\x1b[31mred\x1b[0m \x1b]0;title\x07\x1b[2J")
        context.progress(0.25, MESSAGE)
        while gate and not Path(gate).exists():
            if context.cancelled:
                Path(f"{mark}.cancelled").touch()
                raise RuntimeError("cancelled")
            with contextlib.suppress(FileNotFoundError):
                context.log(Path(f"{gate}.say").read_text())
                Path(f"{gate}.say").unlink()
            time.sleep(0.01)
        return {"size": path.stat().st_size}

    def echo(self, context: Context, path: Path) -> Path:
        return path

    def fail(self, context: Context, path: Path) -> None:
        raise ValueError("no \x1b[31mway\x1b[0m\nout")
