"""What the faces share: their objects, and what their methods have from the client's, signatures and docs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from aipod.client import Call, Job
from aipod.faces.host import Host


class Face:
    """One object of the client's, and the host in whose thread it lives."""

    def __init__(self, host: Host, client: Any) -> None:
        self._host = host
        self._client = client


class JobFace(Face):
    """A job's handle: what asks nobody."""

    _client: Job

    @property
    def ticket(self) -> bytes:
        """What owns the job: a secret."""
        return self._client.ticket

    @property
    def id(self) -> str:
        """The job's public name, as in the server's logs and in header x-job-id."""
        return self._client.id

    def __str__(self) -> str:
        return str(self._client)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"


class CallFace(Face):
    """A call under way: what asks nobody."""

    _client: Call

    @property
    def id(self) -> str:
        """The job's public name, as in the server's logs and in header x-job-id.

        Another one from the moment when the job is begun anew, which is told by events: `Event.job_id`.
        """
        return self._client.id


def like(call: Callable[..., Any], method: Callable[..., Any], prefix: str, words: Mapping[str, str]) -> None:
    """Let `call` look like `method`, of a class whose name has `prefix`; `words` says what is said differently."""
    signature = inspect.signature(method)
    returned = spoken(f"`{signature.return_annotation}`", prefix, words)[1:-1]
    call.__doc__ = spoken(method.__doc__ or "", prefix, words)
    call.__name__ = method.__name__
    call.__qualname__ = f"{prefix}{method.__qualname__}"
    call.__signature__ = signature.replace(return_annotation=returned)  # type: ignore[attr-defined]


def spoken(text: str, prefix: str, words: Mapping[str, str]) -> str:
    """`text` of the client's docs as the face says it."""
    for name in ("Client", "Job", "Call"):
        text = text.replace(f"`{name}.", f"`{prefix}{name}.").replace(f"`{name}`", f"`{prefix}{name}`")
    for word, other in words.items():
        text = text.replace(word, other)
    return text
