"""The journal of one job."""

from __future__ import annotations

import errno
import json
import os
import zlib
from pathlib import Path
from typing import Any


class Journal:
    """Append-only lines, each checksummed; a torn line (power cut, full disk) is as if never written.

    `read` remembers how far it came, so that a reader who comes again every second reads only what is new.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state: dict[str, Any] = {}
        self._read = 0

    def append(self, fields: dict[str, Any], *, sync: bool = False) -> None:
        """Add a line. Raises `OSError`; then the journal is as before."""
        text = json.dumps(fields, separators=(",", ":"))
        line = f"{zlib.crc32(text.encode()):08x} {text}\n".encode()
        fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                # The line before was torn. With a line break behind it, it might come to life after all.
                size = os.pread(fd, size, 0).rfind(b"\n") + 1
                os.ftruncate(fd, size)
            try:
                if os.write(fd, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if sync:
                    os.fdatasync(fd)
            except OSError:
                os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)

    def read(self) -> dict[str, Any]:
        """The fold of all whole lines, later ones over earlier ones; empty where there is none."""
        try:
            with self._path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size < self._read:  # another file than the one that was read
                    self._state, self._read = {}, 0
                file.seek(self._read)
                raw = file.read()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return {}  # a model can do that to its job
        whole, _, _ = raw.rpartition(b"\n")
        self._read += len(whole) + 1 if whole else 0
        for line in whole.split(b"\n"):
            check, _, text = line.partition(b" ")
            if text and check == b"%08x" % zlib.crc32(text):
                self._state.update(json.loads(text))
        return dict(self._state)
