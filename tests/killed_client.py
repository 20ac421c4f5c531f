"""`python -m tests.killed_client N HOME ADDRESS`: a call with a ticket file and `save_to`, killed at its N-th step.

A step is whatever changes a file in the directory HOME: before one is opened to be written, renamed, linked or removed,
and after a piece of the answer was written.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import aipod
from aipod.client.part import Part

_WRITES = os.O_WRONLY | os.O_RDWR
_CHANGES = {"os.rename", "os.remove", "os.link"}


async def ask(home: Path, address: str) -> Any:
    """The call, which any process may continue."""
    kwargs = {"mark": str(home / "mark"), "gate": str(home)}
    async with aipod.Client(address) as client:
        return await client.chaos(
            home / "payload",
            metadata=[("x-func-name", "gated_echo")],
            kwargs=kwargs,
            ticket_file=home / "ticket",
            save_to=home / "answer",
        )


def main() -> None:
    at, home, address = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    steps = itertools.count(1)

    def step() -> None:
        if next(steps) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        changes = event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES)
        if changes and not isinstance(args[0], int) and os.fsdecode(args[0]).startswith(f"{home}/"):
            step()

    write = Part.write

    def write_and_step(self: Part, *pieces: bytes) -> None:
        write(self, *pieces)
        step()

    Part.write = write_and_step  # type: ignore[method-assign]
    sys.addaudithook(hook)
    asyncio.run(ask(home, address))


if __name__ == "__main__":
    main()
