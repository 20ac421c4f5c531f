"""`trio` for models, imported at its first use.

A module of models is imported in the server and again in each worker process. Only classes of async methods use trio;
they run in the server, which has it. For the workers the import would be most of what they take to start (0.2 s).
"""

from __future__ import annotations

from typing import Any


class _Trio:
    def __getattr__(self, name: str) -> Any:
        import trio

        return getattr(trio, name)


trio = _Trio()
