# Layers: a module may import only from strictly lower rows (tests/test_tree.py enforces it, and the doors below it).
#
#   __main__
#   cli                          commands; the only print and argv
#   faces  testing  examples     the client for threads and for trio; what starts from all of this
#   server  client  embedded  doctor    lifecycles, and what looks at the way there
#   service                      gRPC method bodies: guard clauses, then a viewer of one job
#   job  pool                    the story of one job: receive, queue, lease, run, store, reply; who runs it
#   instance                     one runner of a version, and who waits for one
#   runner                       how an instance's methods are executed: process, loop
#   spool  versions              what is on disk: jobs, and the data of versions
#   packing                      chunks for the wire, at the level that fits the moment
#   codec  trash  transport  restarts  identity  systemd  prometheus     one hard thing each
#   worker                       the child process (standard library only)
#   methods                      what a class offers, and what fits it (standard library only)
#   models  results              what the author of a model sees and returns (standard library only)
#   alarm  blocks  errors  config  hands  heaps  levels  metrics  tracing  wire   import nothing of aipod
#
# Doors: transport/bridge imports trio_asyncio; transport/ touches grpclib and h2 internals; spool writes the spool
# directory and uses filelock; runner starts processes and model threads (and embedded and
# cli/demo a server, cli/nginx_conf `nginx -t`).
"""Large inputs to Python model code and the answer back, over one gRPC stream, through any number of proxies.

Names load on first use, so that a worker process, which imports this package before anything else, loads neither
trio nor grpclib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aipod.client import Call, Client, Job
    from aipod.config import Config
    from aipod.embedded import serving
    from aipod.errors import (
        AipodError,
        Interrupted,
        JobCancelled,
        JobFailed,
        JobLost,
        ModelError,
        Refused,
        ServeError,
        Unreachable,
        UsageError,
    )
    from aipod.faces.sync import SyncClient
    from aipod.faces.trio import TrioClient
    from aipod.models import Context, Model, method
    from aipod.server import serve

__version__ = "0.1.0"

__all__ = [
    "AipodError",
    "Call",
    "Client",
    "Config",
    "Context",
    "Interrupted",
    "Job",
    "JobCancelled",
    "JobFailed",
    "JobLost",
    "Model",
    "ModelError",
    "Refused",
    "ServeError",
    "SyncClient",
    "TrioClient",
    "Unreachable",
    "UsageError",
    "method",
    "serve",
    "serving",
]

_HOME = {
    **dict.fromkeys(
        (
            "AipodError",
            "Interrupted",
            "JobCancelled",
            "JobFailed",
            "JobLost",
            "ModelError",
            "Refused",
            "ServeError",
            "Unreachable",
            "UsageError",
        ),
        "errors",
    ),
    **dict.fromkeys(("Context", "Model", "method"), "models"),
    "Call": "client",
    "Client": "client",
    "Config": "config",
    "Job": "client",
    "SyncClient": "faces.sync",
    "TrioClient": "faces.trio",
    "serve": "server",
    "serving": "embedded",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'aipod' has no attribute {name!r}")
    return getattr(importlib.import_module(f"aipod.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
