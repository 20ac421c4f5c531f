"""Heartbeats go on whatever the model does to its process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.calls import Pulse, calls, own
from tests.conftest import FIRST, Serve

SECONDS = 10 if FIRST else 4


@pytest.mark.slow
def test_heartbeats_while_a_model_holds_the_gil_and_while_one_burns_cpu(serve: Serve, tmp_path: Path) -> None:
    served = serve("tests.models_lifecycle:Work", "--instances", "4")
    pulses = {(client, method): Pulse() for client in ("own", "plain") for method in ("hold", "burn")}
    with calls() as threads:
        futures = {}
        for (client, method), pulse in pulses.items():
            kwargs = {"mark": str(tmp_path / f"{client}-{method}"), "seconds": SECONDS}
            if client == "own":
                future = threads.submit(own, served.address, method, on_event=pulse.event, **kwargs)
            else:
                future = threads.submit(pulse.read, served.address, method, **kwargs)
            futures[client, method] = future
    for method, answer in (("hold", "held"), ("burn", "burnt")):
        assert futures["own", method].result() == answer
        assert futures["plain", method].result().json() == answer
    for pulse in pulses.values():
        assert len(pulse.times) >= SECONDS - 1
        assert pulse.longest_gap < 2
