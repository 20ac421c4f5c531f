"""A model that leaves processes behind, for tests/test_deploy.py."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import aipod
from aipod import Context


class Careless(aipod.Model):
    def orphan(self, context: Context, path: Path) -> str:
        """Its child ends at once; the child's child is left, and nobody waits for it."""
        subprocess.run(["sh", "-c", "sleep 0.1 &"], check=True)
        return "left"

    def wait_for(self, context: Context, path: Path, *, file: str) -> str:
        context.log("working")
        while not Path(file).exists():
            time.sleep(0.02)
        return "waited"
