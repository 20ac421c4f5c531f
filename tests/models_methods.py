"""A class that says what its methods take."""

from pathlib import Path
from typing import Any

import aipod


class Described(aipod.Model):
    @aipod.method(restartable=True, timeout=60)
    def predict(self, context: aipod.Context, path: Path, *, top: int, mode: str = "fast") -> dict[str, Any]:
        """The top ones."""
        return {"top": top, "mode": mode}
