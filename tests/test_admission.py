"""How many jobs a server takes, of one version and in all. (--max-jobs: tests/test_resume_deaths.py)"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

import aipod
import aipod.client
from aipod.errors import Refused
from tests import stranger
from tests.calls import own, plain_version
from tests.conftest import Serve, run, wait_until

LIMIT = 3


def test_one_version_does_not_take_the_room_of_others(serve: Serve, tmp_path: Path) -> None:
    """Its jobs that upload or wait are bounded, of own and of plain clients; who is refused has sent nothing.

    Mutants seen: jobs that run count; plain clients' do not; those that have been answered do.
    """
    served = serve("tests.models_lifecycle:Work", "--instances", "1", "--max-queued", str(LIMIT))
    until, mark = tmp_path / "until", tmp_path / "mark"
    kwargs = {"mark": str(mark), "until": str(until)}
    large = tmp_path / "large"
    large.write_bytes(bytes(50_000_000))

    def entries() -> int:
        return len(list(served.spool.glob("*/state")))

    async def main() -> None:
        async with aipod.Client(served.address, config=aipod.Config(attempts=1)) as client:
            jobs = [await client.submit("predict", version="a", **kwargs)]
            while not mark.exists():
                await asyncio.sleep(0.02)
            jobs += [await client.submit("predict", version="a", **kwargs) for _ in range(LIMIT)]
            before = entries()
            with pytest.raises(Refused, match=r"3 jobs of version a .*--max-queued") as caught:
                await client.predict(large, version="a", **kwargs)
            assert caught.value.reason == "OVERLOADED"
            assert caught.value.retry_after is not None
            assert entries() == before
            other = await client.submit("predict", version="b", **{**kwargs, "mark": f"{mark}.b"})
            until.touch()
            assert [await job.wait() for job in (*jobs, other)] == ["done"] * (LIMIT + 2)
            for _ in range(2 * LIMIT):
                assert await client.predict(version="a", **kwargs) == "done"

    run(main)


def test_a_payload_that_exceeds_the_spool_s_quota_waits_until_there_is_room(serve: Serve, tmp_path: Path) -> None:
    """Refused before its first byte, and sent by itself when the other job is over. Mutant seen: both are taken."""
    served = serve("tests.models_lifecycle:Gated", "--instances", "2", "--max-spool", "8MiB")
    gate, large = tmp_path / "gate", tmp_path / "large"
    large.write_bytes(bytes(5_000_000))
    waits: list[str] = []
    entries: list[int] = []

    def note(event: aipod.client.Event) -> None:
        if event.phase == "WAITING":
            waits.append(event.message)
            entries.append(len(list(served.spool.glob("*/state"))))
            gate.touch()

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            first = await client.submit("predict", large, mark=str(tmp_path / "first"), gate=str(gate))
            kwargs = {"mark": str(tmp_path / "second"), "gate": str(tmp_path / "first")}
            second = asyncio.create_task(client.predict(large, on_event=note, kwargs=kwargs))
            assert await first.wait() == "done"
            await first.release()
            assert await second == "done"

    run(main)
    assert entries[0] == 1
    assert waits[0].startswith("SPOOL_FULL: ")
    assert "(--max-spool)" in waits[0]
    assert served.log_text().count("calls are refused") == 1


def test_plain_clients_stand_in_the_same_line(serve: Serve, tmp_path: Path) -> None:
    served = serve("tests.models_lifecycle:Work", "--instances", "1", "--max-queued", "1")
    until, mark = tmp_path / "until", tmp_path / "mark"
    kwargs = {"mark": str(mark), "until": str(until)}
    with stranger.open_channel(served.address) as channel:
        calls: list[Any] = []
        for _ in range(2):
            first = stranger.first_message("predict", kwargs, version="a")
            calls.append(stranger.start(channel, "predict", iter([first])))
            wait_until(mark.exists)
            wait_until(lambda: len(list(served.spool.glob("*/state"))) == len(calls))
        reply = plain_version(served.address, "predict", "a", **kwargs)
        assert (reply.code, reply.info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        until.touch()
        assert plain_version(served.address, "predict", "b", **kwargs).json() == "done"
        assert [stranger.reply_of(call).json() for call in calls] == ["done"] * 2
    assert own(served.address, "predict", version="a", **kwargs) == "done"
