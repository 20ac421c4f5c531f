"""grpc.health.v1: `""`, ai.AI, the health and reflection services, `liveness`, `readiness`.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md. Anybody may ask, so what a call costs is bounded where
it comes in (`transport.server`): its messages are short, and a connection has few of them at once.
"""

from __future__ import annotations

import asyncio
from typing import Any

from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

from aipod.service.schema import health_message
from aipod.transport.requests import end_request

CheckRequest, CheckResponse = health_message("HealthCheckRequest"), health_message("HealthCheckResponse")
ListRequest, ListResponse = health_message("HealthListRequest"), health_message("HealthListResponse")

# The server as a whole, and what there is in it.
_SERVICES = ("", "ai.AI", "grpc.health.v1.Health")
_REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


class ServingStatus:
    """Whether new jobs are taken, and the service that tells. asyncio-flavored.

    `liveness` stays SERVING for as long as the process can answer at all.
    """

    def __init__(self, *, reflection: bool) -> None:
        self._services = (*_SERVICES, *(_REFLECTION if reflection else ()))
        self._serving = self._ready = True
        self._closed = False
        self._changed = asyncio.Event()

    def stop_serving(self) -> None:
        """NOT_SERVING for everything but `liveness`, for good."""
        self._serving = False
        self._tell()

    def set_ready(self, ready: bool) -> None:
        """Whether an instance of the model can run: `readiness` says so."""
        self._ready = ready
        self._tell()

    def close(self) -> None:
        """End every Watch: else its connection would stay to the last moment."""
        self._closed = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _all(self) -> dict[str, Any]:
        """What each name is now."""
        told = {**dict.fromkeys(self._services, self._serving), "liveness": True}
        told["readiness"] = self._serving and self._ready
        return {name: CheckResponse.SERVING if serving else CheckResponse.NOT_SERVING for name, serving in told.items()}

    def __mapping__(self) -> dict[str, Handler]:
        one, several = Cardinality.UNARY_UNARY, Cardinality.UNARY_STREAM
        return {
            "/grpc.health.v1.Health/Check": Handler(self._check, one, CheckRequest, CheckResponse),
            "/grpc.health.v1.Health/List": Handler(self._list, one, ListRequest, ListResponse),
            "/grpc.health.v1.Health/Watch": Handler(self._watch, several, CheckRequest, CheckResponse),
        }

    async def _check(self, stream: Stream[Any, Any]) -> None:
        status = self._all().get((await _request(stream)).service)
        if status is None:
            raise GRPCError(Status.NOT_FOUND, "unknown service")
        await stream.send_message(CheckResponse(status=status))

    async def _list(self, stream: Stream[Any, Any]) -> None:
        await _request(stream)
        statuses = {name: CheckResponse(status=status) for name, status in self._all().items()}
        await stream.send_message(ListResponse(statuses=statuses))

    async def _watch(self, stream: Stream[Any, Any]) -> None:
        """The status at once, and whenever it has changed; what a slow peer misses in between is not sent later."""
        service = (await _request(stream)).service
        told = None
        while True:
            changed = self._changed
            status = self._all().get(service, CheckResponse.SERVICE_UNKNOWN)
            if status != told:
                await stream.send_message(CheckResponse(status=status))
                told = status
            if self._closed:
                raise GRPCError(Status.UNAVAILABLE, "the server is shutting down")
            await changed.wait()


async def _request(stream: Stream[Any, Any]) -> Any:
    request = await stream.recv_message()
    if request is None:
        raise GRPCError(Status.INVALID_ARGUMENT, "the request ended before its message")
    end_request(stream)
    return request
