"""A model that tells which trace it was called in."""

from __future__ import annotations

import time
from pathlib import Path

import aipod


class Traced(aipod.Model):
    def predict(self, context: aipod.Context, path: Path) -> str:
        """The trace context that its own spans would belong to."""
        return context.metadata["traceparent"]

    def fail(self, context: aipod.Context, path: Path) -> None:
        raise ValueError("a-secret-in-a-message")

    @aipod.method(restartable=True)
    def wait(self, context: aipod.Context, path: Path, *, mark: str, gate: str) -> str:
        """Runs until the file `gate` is there."""
        Path(mark).touch()
        while not Path(gate).exists():
            time.sleep(0.01)
        return "done"
