"""A caller that `python -m bench faults` kills: `python -m bench.faults.caller ADDRESS DIRECTORY METHOD KWARGS`.

One call with a ticket file, whose answer goes to a file. `DIRECTORY` has `payload`, and gets `ticket`, `answer`. Prints
"done", or the reason why there is no answer.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import aipod

# A silent server is given up soon: the run shall see many faults. The rest as by default, but for a first connection:
# servers are down for seconds.
PATIENT = aipod.Config(silence=2.0, connect_timeout=2.0, attempts=100)


async def main(address: str, directory: Path, method: str, kwargs: str) -> str:
    async with aipod.Client(address, config=PATIENT) as client:
        try:
            await client.chaos(
                directory / "payload",
                metadata=[("x-func-name", method)],
                kwargs=json.loads(kwargs),
                ticket_file=directory / "ticket",
                save_to=directory / "answer",
            )
        except aipod.AipodError as exc:
            return f"{exc.reason}: {exc.message}".replace("\n", " ")
    return "done"


if __name__ == "__main__":
    print(asyncio.run(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])))
