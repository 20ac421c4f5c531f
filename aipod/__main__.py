"""`python -m aipod`."""

from __future__ import annotations

import gc
import os
import signal
import sys


def main() -> None:
    """The command `aipod`; exits with its status."""
    # Most of a command's start is imports, in which KeyboardInterrupt may become anything. `run` has it back.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    gc.disable()  # until the command is imported: see `lasting_imports`
    from aipod.cli import run

    sys.exit(run(sys.argv[1:]))


def _leave(*_: object) -> None:
    """Nothing was begun, so there is nothing to end."""
    os.write(2, b"aipod: STOPPED: by Ctrl-C\n")
    os._exit(130)


if __name__ == "__main__":
    main()
