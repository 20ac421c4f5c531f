"""`python -m aipod`."""

from __future__ import annotations

import sys


def main() -> None:
    """The command `aipod`; exits with its status."""
    try:
        from aipod.cli import run
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
