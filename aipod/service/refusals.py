"""What a caller is told that does not get the job that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aipod.errors import Refused
from aipod.identity import Caller
from aipod.job.request import Request
from aipod.spool import Spool
from aipod.wire.ai import Op, Open


class Refusals:
    """Made and raised for the jobs of one spool. `ttl`: seconds for which every job is remembered."""

    def __init__(self, spool: Spool, ttl: float) -> None:
        self._spool = spool
        self._ttl = ttl

    @staticmethod
    def draining() -> Refused:
        """For whoever brings something new: it is nowhere yet, and may be brought to any other server."""
        return Refused("DRAINING", "the server is shutting down; try again")

    def kept(self) -> Refused:
        """For the caller of a job that is here to stay: it must not be created anywhere else."""
        text = "the server is shutting down; the job waits for the next one"
        return Refused("DRAINING", text, {"kept": self._spool.id})

    def not_found(self) -> Refused:
        """For who asks for a job that there is not."""
        # `spool`: who knows that the job is in another one waits until that has its server again.
        return Refused(
            "NOT_FOUND", "there is no such job here: it never was, or has expired", {"spool": self._spool.id}
        )

    def not_started(self) -> Refused:
        """For a RESUME of a job that there is not, and never will be."""
        # `ttl`: who sent `last` longer ago may have been forgotten instead.
        known = {"spool": self._spool.id, "ttl": str(int(self._ttl))}
        return Refused("NOT_STARTED", "there is no such job, and none can start under this ticket", known)

    def check_spool(self, open_: Open) -> None:
        """Raises `Refused(WRONG_SPOOL)` where the caller means another one."""
        if open_.spool and not self._spool.is_named(open_.spool):
            raise Refused("WRONG_SPOOL", "that job lives in another spool", {"spool": self._spool.id})

    def check_same(self, request: Request, fields: Mapping[str, Any]) -> None:
        """Raises `Refused` where the job that there is, is not the request's."""
        Caller(request.owner).check_owner(fields)
        if fields.get("fenced"):
            if request.open is not None and request.open.op == Op.RESUME:
                raise self.not_started()
        elif fields.get("print") != request.fingerprint:
            raise Refused(
                "OTHER_REQUEST", "this ticket is another request's: method, version, arguments or source differ"
            )
