"""The machine, the versions and the commit: a figure means nothing without them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from bench import data
from bench.processes import ROOT

PACKAGES = (
    "grpclib", "h2", "trio", "trio-asyncio", "betterproto2", "protobuf", "zstandard", "xxhash", "grpcio", "pyarrow",
    "httpx", "starlette", "uvicorn", "uvloop", "httptools",
)  # fmt: skip
EXTRA = "pip install -e '.[bench]'"
# What peers, and one kind of data, need beyond aipod itself; all are in the extra `bench`, but for nginx.
NEEDS = {
    data.NUMPY: ("numpy",),
    "flight": ("pyarrow",),
    "grpcio_aio": ("grpc",),
    "grpcio_sync": ("grpc",),
    "first": ("grpc",),
    "web": ("httpx", "starlette", "uvicorn", "uvloop", "httptools"),
}


def absent() -> dict[str, str]:
    """The peers that cannot run here (and the kind of data that cannot be made), and what each misses."""
    missing = {} if shutil.which("nginx") else {"nginx": "the program nginx is not installed"}
    for peer, modules in NEEDS.items():
        for module in modules:
            if importlib.util.find_spec(module) is None:
                missing[peer] = f"{module} is not installed: {EXTRA}"
    return missing


def describe() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    processor = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "system": platform.platform(),
            "processor": processor,
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
        },
        "python": platform.python_version(),
        "versions": versions,
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain")),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
