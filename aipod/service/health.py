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
        self._ready = ServiceStatus()
        self._stopped = False
        for status in (self._live, self._serving, self._ready):
            status.set(True)

    def stop_serving(self) -> None:
        """NOT_SERVING for everything but `liveness`, for good."""
        self._stopped = True
        self._serving.set(False)
        self._ready.set(False)

    def set_ready(self, ready: bool) -> None:
        """Whether an instance of the model can run: `readiness` says so."""
        self._ready.set(ready and not self._stopped)

    def service(self) -> Health:
        """The service for grpclib's server."""
        checks: dict[Any, list[ServiceStatus]] = {_Named(name): [self._serving] for name in NAMES}
        checks |= {OVERALL: [self._serving], _Named("liveness"): [self._live], _Named("readiness"): [self._ready]}
        return Health(checks)
