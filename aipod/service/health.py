"""grpc.health.v1: `""`, ai.AI, the health and reflection services, `liveness`, `readiness`.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md; grpclib's own service does the work.
"""

from __future__ import annotations

from typing import Any

from grpclib.health.check import ServiceStatus
from grpclib.health.service import OVERALL, Health

NAMES = (
    "ai.AI",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "readiness",
)


class _Named:
    """Something that grpclib takes for a service of this name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __mapping__(self) -> dict[str, Any]:
        return {f"/{self._name}/": None}


class ServingStatus:
    """Whether new jobs are taken. `liveness` stays SERVING for as long as the process can answer at all."""

    def __init__(self) -> None:
        self._serving = ServiceStatus()
        self._live = ServiceStatus()
        self._live.set(True)
        self._serving.set(True)

    def stop_serving(self) -> None:
        """NOT_SERVING for everything but `liveness`, for good."""
        self._serving.set(False)

    def service(self) -> Health:
        """The service for grpclib's server."""
        checks: dict[Any, list[ServiceStatus]] = {_Named(name): [self._serving] for name in NAMES}
        return Health({OVERALL: [self._serving], _Named("liveness"): [self._live], **checks})
