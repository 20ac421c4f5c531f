"""What a server says of a disk that has no room."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import trio

import aipod
from aipod.client import Event
from aipod.errors import Refused
from aipod.service.shortage import Shortage
from aipod.spool import Spool
from tests.conftest import Serve, run
from tests.wire import Refusal, call


def refused(spool: Spool, wanted: int) -> Refused:
    with pytest.raises(Refused) as caught:
        spool.check_space(wanted)
    return caught.value


def test_the_log_tells_each_change_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Mutants seen: a line for each refusal; nobody looks whether there is room again."""
    caplog.set_level(logging.INFO)
    spool = Spool.open(tmp_path / "spool", "app", reserve=0)
    shortage = Shortage(spool)

    def said() -> list[str]:
        levels = [record.levelname for record in caplog.records]
        caplog.clear()
        return levels

    for _ in range(3):
        shortage.note(refused(spool, 1 << 60))
    shortage.note(Refused("BUSY", "no"))
    trio.run(shortage.look)
    assert said() == ["WARNING"]
    spool.reserve = 1 << 60
    for _ in range(3):
        shortage.note(ExceptionGroup("", [refused(spool, 0)]))
    shortage.note(refused(spool, 1 << 59))
    trio.run(shortage.look)
    assert said() == ["WARNING"]
    spool.reserve = 0
    for _ in range(2):
        trio.run(shortage.look)
    assert said() == ["INFO"]
    shortage.note(refused(spool, 1 << 60))
    assert said() == ["WARNING"]


def test_who_brings_what_never_fits_is_refused_at_once(serve: Serve) -> None:
    """Mutant seen: it is tried for as long as there are attempts."""
    served = serve("Plain", "--reserve", "100000GiB")
    events: list[Event] = []

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            with pytest.raises(aipod.Refused, match=r"it never has: .*the method has not run") as caught:
                await client.chaos(b"x", on_event=events.append)
            assert caught.value.reason == "SPOOL_FULL"

    run(main)
    assert {event.phase for event in events} == {"CONNECTING"}
    assert max(event.connection for event in events) == 1


def test_a_reserve_that_is_not_there_is_told_at_the_start_and_when_it_is_missed(serve: Serve) -> None:
    served = serve("Plain", "--reserve", "100000GiB")
    reserve = 100000 << 30
    assert f"fewer than the {reserve} that uploads must leave (--reserve)" in served.log_text()

    async def main() -> None:
        for _ in range(3):
            async with call(served.address, os.urandom(16), name="predict", size=7) as one:  # and {}
                with pytest.raises(Refusal, match=f"9 more are wanted, {reserve} stay free"):
                    await one.outcome()

    run(main)
    assert served.log_text().count("calls are refused") == 1
