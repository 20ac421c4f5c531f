"""Where an answer goes: memory or a file, checked as it comes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from aipod.codec import decode_chunk, new_hasher
from aipod.config import MIB
from aipod.errors import AipodError, Refused, UsageError
from aipod.wire.ai import Raw, State

# A binary answer above it is for a file, not for memory.
MAX_IN_MEMORY = 64 * MIB


def check_target(save_to: str | os.PathLike[str]) -> None:
    """Raises `UsageError` where no file can be written at `save_to`: better now than after the upload."""
    path = Path(save_to)
    if path.is_dir():
        raise UsageError(f"{str(path)!r} is a directory; name a file in it to write the answer to")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{str(path.parent)!r} is no directory that can be written to; the answer was to go there")


class Sink:
    """Collects one result. The methods that take data block: call them from a thread."""

    def __init__(self, state: State, save_to: str | os.PathLike[str] | None) -> None:
        self._state = state
        self._target = None if save_to is None else Path(save_to)
        self.received = 0
        self._hasher = new_hasher()
        self._memory = bytearray()
        if self._target is None and self.is_binary and state.size > MAX_IN_MEMORY:
            raise AipodError(
                "RESULT_TOO_LARGE",
                f"the answer has {state.size} bytes; pass save_to=FILE to receive more than {MAX_IN_MEMORY}",
            )
        self._part = None
        if self._target is not None:
            self._part = self._target.with_name(f".{self._target.name}.{os.getpid()}-{id(self):x}.part")
            self._file = self._part.open("wb", buffering=0)

    @property
    def is_binary(self) -> bool:
        return self._state.content_type != "application/json"

    def add(self, message: Raw) -> None:
        """Take one chunk. Raises `AipodError` where it is not the one that must come now."""
        if message.offset != self.received:
            raise AipodError("BAD_ANSWER", f"the answer goes on at byte {message.offset}, not at {self.received}")
        if not message.data:
            return
        try:
            data = decode_chunk(message.data)
        except Refused as exc:
            raise AipodError("BAD_ANSWER", f"the answer cannot be read: {exc}; call again") from None
        self._hasher.update(data)
        self.received += len(data)
        if self._part is None:
            self._memory += data
        else:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]

    def finish(self) -> Any:
        """The answer: a path where it was saved, else bytes or what the JSON says. Raises `AipodError`."""
        if self.received != self._state.size or self._hasher.digest() != self._state.digest:
            raise AipodError("BAD_ANSWER", "the answer that arrived is not the one that was stored; call again")
        if self._part is not None:
            assert self._target is not None
            self._file.close()
            self._part.replace(self._target)
            return self._target
        return bytes(self._memory) if self.is_binary else json.loads(self._memory)

    def discard(self) -> None:
        """Leave nothing behind; harmless after `finish`."""
        if self._part is not None:
            self._file.close()
            self._part.unlink(missing_ok=True)
