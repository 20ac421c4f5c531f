"""What any process may do with a job without holding it: read it, and leave a word for its holder. Blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from aipod.config import MIB
from aipod.errors import Refused, refused_when_exhausted
from aipod.spool.journal import Journal
from aipod.spool.regular import keep, open_regular, read_regular
from aipod.spool.report import read_report

READ = 1 * MIB
# Phases that a job never leaves, but for RELEASED.
ENDED = ("DONE", "FAILED", "CANCELLED", "RELEASED")


# What the journal of a released job tells: that it was there, whose request it was, and what its viewers were told.
_TOMBSTONE = (
    "ticketed", "boot", "settled", "fenced", "print", "owner", "method", "version", "epoch", "offset", "attempt",
    "phase",
)  # fmt: skip


def tombstone(state: dict[str, Any]) -> dict[str, Any]:
    """What is left of a journal when its job is released."""
    return {key: state[key] for key in _TOMBSTONE if key in state}


@dataclasses.dataclass(frozen=True)
class Words:
    """What others have left for the holder of a job."""

    stop: bool = False  # it shall be cancelled
    wanted: int = 0  # the highest epoch that has asked for the upload
    watched: int = 0  # when somebody last watched it, in nanoseconds of the file system's clock; 0 for never


class Look:
    """A job's directory, read. `boot` names this run of the machine."""

    def __init__(self, spool_path: Path, job_id: str, boot: str) -> None:
        self.id = job_id
        self._boot = boot
        self.path = spool_path / job_id
        self.has_secrets = False  # the journal of a released job has more than is told, as it was read last
        self._journal = Journal(f"{self.path}/state")

    @functools.cached_property
    def payload(self) -> Path:
        """The file of the payload."""
        return self.path / "in"

    @functools.cached_property
    def result(self) -> Path:
        """The file of a result that is too long for the journal."""
        return Path(self.result_name)

    @functools.cached_property
    def work(self) -> Path:
        """The model's scratch directory."""
        return Path(self.work_name)

    # As text for the many jobs that have neither: a path object takes longer to make than a file.

    @property
    def result_name(self) -> str:
        return f"{self.path}/res"

    @property
    def work_name(self) -> str:
        return f"{self.path}/work"

    def read(self) -> dict[str, Any]:
        """The fold of the journal; empty where there is no such job, or a power cut has left nothing to rely on.

        Of a released job its tombstone, also where there is more.

        Raises `Refused` (DAMAGED), `OSError`.
        """
        state = self._journal.read()
        if _is_lost(state, self._boot):
            return {}
        if state.get("phase") != "RELEASED":
            return state
        left = tombstone(state)
        self.has_secrets = len(left) < len(state)
        return left

    def make_sure(self) -> None:
        """Have it on disk what `read` has read, where the entry is there to stay. Blocks."""
        if self._journal.read().get("settled"):
            sync(self.path / "state")

    @refused_when_exhausted()
    def kwargs(self) -> bytes:
        """The keyword arguments, as JSON. Raises `Refused` (OVERLOADED, DAMAGED), `OSError`."""
        inline = self.read().get("kwargs")
        return inline.encode() if inline is not None else read_regular(self.path / "kw")

    def live(self) -> dict[str, Any]:
        """What the model has reported last; empty where it has reported nothing."""
        return read_report(self.path / "live")

    def quiet(self) -> int:
        """Seconds since a running method was last heard of, as the files tell: nearly what its own process knows."""
        heard = 0.0
        for name in ("state", "live", "log"):
            with contextlib.suppress(OSError):
                heard = max(heard, (self.path / name).stat().st_mtime)
        return max(0, int(time.time() - heard)) if heard else 0

    @property
    def log_size(self) -> int:
        """Bytes of the log."""
        try:
            return (self.path / "log").stat().st_size
        except OSError:
            return 0

    def read_log(self, offset: int, limit: int) -> bytes:
        """At most `limit` bytes of the log from `offset` on, cut at a character; empty where there is no more."""
        try:
            with os.fdopen(open_regular(self.path / "log", os.O_RDONLY)[0], "rb") as file:
                file.seek(offset)
                data = file.read(limit)
        except (Refused, OSError):
            return b""  # none was written, or it cannot be read now: a heartbeat must not pay for that
        return data.decode("utf-8", "ignore").encode()

    def read_result(self, offset: int) -> Generator[bytes, None, None]:
        """The bytes of `res` from `offset` on, in pieces of at most `READ`."""
        return _pieces(self.result, offset)

    def read_payload(self) -> Generator[bytes, None, None]:
        """The bytes of the payload, in pieces of at most `READ`."""
        return _pieces(self.payload, 0)

    # Words for the holder

    def ask(self, epoch: int) -> None:
        """Ask for the upload. The number is in a file's name, so that of two who ask at once the higher one stays."""
        (self.path / want_name(epoch)).touch(mode=0o600)
        for asked in self._asked():
            if asked < epoch:
                (self.path / want_name(asked)).unlink(missing_ok=True)

    def wanted(self) -> int:
        """The highest epoch that has asked for the upload."""
        return max(self._asked(), default=self.read().get("epoch", 0))

    def ask_to_stop(self) -> None:
        """Ask for the job to be cancelled; harmless where it has gone."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / "cancel").touch(mode=0o600)

    def watch(self) -> None:
        """Tell that somebody watches."""
        with contextlib.suppress(OSError):  # it has gone, or the disk is full; that ends the grace, not the watching
            seen = self.path / "seen"
            seen.touch(mode=0o600)
            os.utime(seen)

    def words(self) -> Words:
        """What has been left for the holder."""
        try:
            watched = (self.path / "seen").stat().st_mtime_ns
        except OSError:
            watched = 0
        return Words(os.path.exists(self.path / "cancel"), max(self._asked(), default=0), watched)

    def _asked(self) -> list[int]:
        try:
            names = os.listdir(self.path)
        except OSError:
            return []
        return [int(name[5:]) for name in names if name.startswith("want-") and name[5:].isdecimal()]


def want_name(epoch: int) -> str:
    """The name of the file with which an uploader with `epoch` asks for an upload."""
    return f"want-{epoch:020d}"


def _is_lost(state: dict[str, Any], boot: str) -> bool:
    """Whether what the journal says of an entry may be untrue, because the machine has lost power since.

    Lines and files that were never synced may then be there or not, each by itself; only what is checksummed inside
    the journal is good: the request (the first line), and an outcome without an answer, or with a short one.
    """
    if "boot" not in state:
        return True  # the first line
    if state["boot"] == boot or state.get("settled"):
        return False
    return state.get("phase") not in ENDED or (state["phase"] == "DONE" and state.get("inline") is None)


def sync(path: Path) -> None:
    """fsync a file or a directory, if it is there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # what is no file cannot be synced, and must not be waited for
    except FileNotFoundError:
        return
    try:
        keep(os.fsync, fd)
    finally:
        os.close(fd)


def _pieces(path: Path, offset: int) -> Generator[bytes, None, None]:
    with refused_when_exhausted():
        file = os.fdopen(open_regular(path, os.O_RDONLY)[0], "rb", buffering=0)
    with file:
        file.seek(offset)
        while piece := file.read(READ):
            yield piece
