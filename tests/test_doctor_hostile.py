"""`aipod doctor` and `health` before a server that lies, or never ends: they say so, and end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator

import pytest
import zstandard
from grpclib.const import Cardinality, Handler
from grpclib.server import Server

from aipod.config import Config
from aipod.doctor import Chain, Finding, Level
from aipod.doctor.hop import judge_server
from aipod.doctor.idle import check_connection
from aipod.doctor.load import check_rate
from aipod.service.schema import health_message
from aipod.wire.ai import Raw
from tests.conftest import run
from tests.stock_server import Betterproto
from tests.test_cli import Done, aipod


@contextlib.asynccontextmanager
async def listening(server: Server) -> AsyncIterator[str]:
    await server.start("127.0.0.1", 0)
    assert server._server is not None
    try:
        yield f"127.0.0.1:{server._server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


class Liar:
    """Answers as `aipod.probe` does, but tells `took` of what it was sent; after `honest` calls, it never ends."""

    def __init__(self, took: str = "{}", honest: float = float("inf")) -> None:
        self._took = took
        self._honest = honest
        self._calls = itertools.count(1)

    def __mapping__(self) -> dict[str, Handler]:
        return {"/ai.AI/chaos": Handler(self.probe, Cardinality.STREAM_STREAM, Raw, Raw)}

    async def probe(self, stream: object) -> None:
        number = next(self._calls)
        asked = json.loads(zstandard.decompress((await stream.recv_message()).data))  # type: ignore[attr-defined]
        await self._send(stream, '{"version": "1", "limits": {}}')
        while number > self._honest:
            await stream.send_message(Raw(data=b"PONG"))  # type: ignore[attr-defined]
            await asyncio.sleep(0.2)
        if "take" in asked:
            await self._send(stream, self._took)

    @staticmethod
    async def _send(stream: object, told: str) -> None:
        await stream.send_message(Raw(data=zstandard.compress(told.encode())))  # type: ignore[attr-defined]

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Chain]:
        async with listening(Server([self], codec=Betterproto())) as address:
            yield Chain(address, Config(), [])


NO_COUNT = ('{"took": "x"}', '{"took": -1}', '{"took": Infinity}', '{"took": 1' + "0" * 400 + "}", "{}", "[]")


@pytest.mark.parametrize("took", NO_COUNT, ids=lambda took: took[:16])
def test_a_count_that_is_none(took: str) -> None:
    async def main() -> list[Finding]:
        async with Liar(took).listening() as chain:
            return await check_rate(chain, 0.2, 0.0, None, direct=True)

    up = next(one for one in run(main) if one.what == "upload-rate")
    assert (up.level, "aipod.probe" in up.found) == (Level.BROKEN, True)


def test_limits_that_no_server_has() -> None:
    limits = {"max_payload": 10**400, "max_message": float("inf"), "max_kwargs": float("nan"), "tick": -1, "x": 1}
    (finding,) = judge_server({"limits": {**limits, "upload_stall": 60.0}})
    assert finding.found == "the server's own (0 is none): --upload-stall 60"


def test_a_call_that_never_ends_is_not_waited_for() -> None:
    async def main() -> list[Finding]:
        async with Liar(honest=0).listening() as chain:
            return await check_connection(chain, 0.2)

    assert [one.what for one in run(main)] == ["idle-connection"]


class Strange:
    """Health with a status that gRPC does not know."""

    def __mapping__(self) -> dict[str, Handler]:
        request, response = health_message("HealthCheckRequest"), health_message("HealthCheckResponse")
        return {"/grpc.health.v1.Health/Check": Handler(self.check, Cardinality.UNARY_UNARY, request, response)}

    async def check(self, stream: object) -> None:
        await stream.recv_message()  # type: ignore[attr-defined]
        await stream.send_message(health_message("HealthCheckResponse")(status=99))  # type: ignore[attr-defined]


def test_a_status_that_is_none() -> None:
    async def main() -> Done:
        async with listening(Server([Strange()])) as address:
            return await asyncio.to_thread(aipod, "health", "--to", address)

    done = run(main)
    assert (done.status, done.out, done.err) == (1, b"UNKNOWN (99)\n", "")
