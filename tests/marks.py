"""What a model tells its test, by a file."""

from __future__ import annotations

from pathlib import Path


def say(mark: str | Path, text: str) -> None:
    """Write `mark` in one step: whoever sees the file sees all of `text`."""
    fresh = Path(f"{mark}.tmp")
    fresh.write_text(text)
    fresh.rename(mark)
