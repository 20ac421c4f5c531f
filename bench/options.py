"""What can be said to every benchmark on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import click

from aipod.cli.options import Size

MIB = 1 << 20
GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Options:
    directory: Path  # a fresh one, for spools and answers
    data: Path  # where data to send is kept from run to run
    quick: bool = False
    size: int = 0  # bytes of a transfer; 0 is the benchmark's own
    jobs: int = 0  # small jobs of a run, or jobs at once; 0 is the benchmark's own
    seconds: float = 0.0  # that jobs run; 0 is the benchmark's own


def size(text: str) -> int:
    """Bytes, from 1048576 or 1MiB; at least one, as 0 is the benchmark's own."""
    try:
        value = Size().convert(text, None, click.Context(click.Command("bench")))
    except click.UsageError as exc:
        raise argparse.ArgumentTypeError(exc.message) from None
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r}: at least one byte")
    return value


def count(text: str) -> int:
    """At least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def seconds(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
