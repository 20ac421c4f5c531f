"""What a check says: a level, what was measured, and the directive to change. No I/O."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from aipod.config import GIB, KIB, MIB

# Characters of what a proxy or server says of itself that are shown.
_SAID = 160


class Level(enum.IntEnum):
    """How bad it is; the worst comes first."""

    BROKEN = 0  # jobs do not get through
    CHANGE = 1  # they do, but are cut, slow, or not told why they fail
    NOTE = 2  # good to know
    FINE = 3
    UNCHECKED = 4  # and why


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at. Texts are for a terminal: printable, on one line."""

    level: Level
    what: str  # the same in every version: scripts look for it
    found: str
    nginx: str = ""  # what to write in nginx's configuration
    others: str = ""  # what it is called elsewhere
    value: float | str | None = None  # the figure in `found`, in bytes, seconds, bytes a second or a number

    def as_dict(self) -> dict[str, Any]:
        """For a script."""
        return {**dataclasses.asdict(self), "level": self.level.name}


def worst_first(findings: list[Finding]) -> list[Finding]:
    """`findings` in the order in which they are to be read."""
    return sorted(findings, key=lambda finding: (finding.level, finding.what))


def is_well(findings: list[Finding]) -> bool:
    """Whether there is nothing to change."""
    return all(finding.level > Level.CHANGE for finding in findings)


def said(text: str) -> str:
    """What came from outside as a short line that a terminal does nothing else with than to show it."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: 2 * _SAID])
    return " ".join(shown.split())[:_SAID]


def size(count: float) -> str:
    """Bytes for people."""
    for unit, bytes_ in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count >= bytes_:
            return f"{count / bytes_:.3g} {unit}"
    return f"{count:.0f} bytes"


def seconds(span: float) -> str:
    """A time for people."""
    return f"{span:.1f} s" if span >= 1 else f"{span * 1000:.1f} ms"
