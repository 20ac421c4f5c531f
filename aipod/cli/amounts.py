"""Sizes, rates and times for people: short, and of a width that stays the same while they grow.

Units are decimal, as those of networks and disks.
"""

from __future__ import annotations

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size(count: float) -> str:
    """Bytes: 512 B, 1.2 kB, 45.0 MB, 678 GB."""
    number, unit = _scaled(count)
    return f"{number} {unit}"


def sizes(done: float, total: float | None) -> str:
    """So many bytes of all: 1.2/5.0 GB, or 300 kB/5.0 GB; without a total where that is not known, or 0."""
    if not total:
        return size(done)
    (number, unit), (_, whole) = _scaled(done), _scaled(total)
    return f"{number}/{size(total)}" if unit == whole else f"{number} {unit}/{size(total)}"


def seconds(count: float) -> str:
    """A time: 0.3 s, 12 s, 4 min 5 s, 2 h 10 min, 3 d 4 h."""
    if count < 9.95:
        return f"{count:.1f} s"
    whole = round(count)
    for unit, above, of, below in (("d", 86400, 3600, "h"), ("h", 3600, 60, "min"), ("min", 60, 1, "s")):
        if whole >= above:
            rest = whole % above // of
            return f"{whole // above} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def _scaled(count: float) -> tuple[str, str]:
    if count < 999.5:
        return f"{count:.0f}", _UNITS[0]
    place = next((n for n in range(1, len(_UNITS)) if count / 1000**n < 999.5), len(_UNITS) - 1)
    value = count / 1000**place
    return (f"{value:.1f}" if value < 99.95 else f"{value:.0f}"), _UNITS[place]
