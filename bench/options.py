"""What can be said to every benchmark on the command line."""

from __future__ import annotations

import argparse
import dataclasses
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
    """Bytes, from 1048576 or 1MiB."""
    try:
        return Size().convert(text, None, click.Context(click.Command("bench")))
    except click.UsageError as exc:
        raise argparse.ArgumentTypeError(exc.message) from None
