"""A module that takes long to import, as large libraries do; it says in the file AIPOD_TEST_MARK that it has begun."""

from __future__ import annotations

import os
import time
from pathlib import Path

import aipod
from aipod import Context
from tests.marks import say

say(os.environ["AIPOD_TEST_MARK"], str(os.getpid()))
time.sleep(60)


class Slow(aipod.Model):
    def chaos(self, context: Context, path: Path) -> None: ...
