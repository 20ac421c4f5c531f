"""What a model has reported of its progress, for other processes, which may miss some."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from aipod.errors import Refused
from aipod.spool.regular import open_regular, read_regular

HEARD_EVERY = 5.0  # seconds between two notes of a model that reports the same again and again


def read_report(path: Path | str) -> dict[str, Any]:
    """What file `path` says; empty where nothing was reported."""
    try:
        told = json.loads(read_regular(path))
    except (Refused, OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


class Report:
    """Writes file `path`, and one beside it. The mutable state is what it says. Blocks."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._told: tuple[float, str] | None = None  # None where nobody has looked yet
        self._heard = 0.0

    def is_noted(self, progress: float, message: str, heard: float) -> bool:
        """Whether that is what `note` has told last; nearly, of `heard`."""
        return (progress, message) == self._told and heard - self._heard < HEARD_EVERY

    def note(self, progress: float, message: str, heard: float = 0.0) -> None:
        """Tell what the model has reported, and that it has (`heard`: when)."""
        if self.is_noted(progress, message, heard):
            return
        self._heard = heard
        if self._told is None:  # an earlier process may have told something, which is no longer true
            before = read_report(self._path)
            self._told = before.get("progress", 0.0), before.get("message", "")
        if (progress, message) == self._told:
            with contextlib.suppress(OSError):
                os.utime(self._path)  # who does nothing but log needs none: the log tells
            return
        self._told = progress, message
        fresh = f"{self._path}.tmp"
        told = json.dumps({"progress": progress, "message": message}).encode()
        with contextlib.suppress(Refused, OSError):
            with os.fdopen(open_regular(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)[0], "wb") as file:
                file.write(told)
            os.replace(fresh, self._path)
