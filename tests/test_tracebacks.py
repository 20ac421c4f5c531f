"""A model's traceback is told to callers where the server was told to give it away, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import DebugInfo
from google.rpc.status_pb2 import Status

import aipod
from aipod.service.status import MAX_TRACE
from tests import stranger, test_cli
from tests.calls import own
from tests.conftest import Serve, Served, run


def trace_of(reply: stranger.Reply) -> str | None:
    """The DebugInfo's detail; None where there is none."""
    assert reply.code is grpc.StatusCode.INTERNAL
    assert reply.info.reason == "MODEL_ERROR"
    assert "trace" not in reply.info.metadata
    for detail in Status.FromString(reply.trailers["grpc-status-details-bin"]).details:
        info = DebugInfo()
        if detail.Unpack(info):
            return info.detail
    return None


def boom(served: Served, text: str) -> aipod.ModelError:
    with pytest.raises(aipod.ModelError) as caught:
        own(served.address, "boom", text=text)
    return caught.value


@pytest.mark.parametrize("model", ["InProcess", "OnLoop"])
def test_all_callers_are_told_the_traceback_where_the_server_gives_it_away(serve: Serve, model: str) -> None:
    """Mutant seen: DebugInfo is not sent."""
    served = serve(f"tests.models_bad:{model}", "--tracebacks")
    mark = os.urandom(8).hex()
    for trace in (trace_of(stranger.ask(served.address, "boom", {"text": mark})), boom(served, mark).metadata["trace"]):
        assert trace is not None
        assert trace.startswith("Traceback (most recent call last):\n")
        assert "raise LookupError(text)" in trace
        assert trace.endswith(f"LookupError: {mark}\n")
    assert served.log_text().count("raise LookupError(text)") == 2


@pytest.mark.parametrize("text", ["x" * 30_000, "é%" * 3000, "\n" * 10_000, "😀" * 2500, "\udcff" * 1000, ""])
def test_a_stock_client_gets_the_status_however_long_the_traceback_is(serve: Serve, text: str) -> None:
    """gRPC's C core refuses trailers above 8 KiB. Mutant seen: `MAX_TRACE` of it beside a text of `MAX_TEXT`."""
    served = serve("tests.models_bad:InProcess", "--tracebacks")
    reply = stranger.ask(served.address, "boom", {"text": text})
    trace = trace_of(reply)
    assert trace is not None
    assert min(len(trace.encode()), 600) > 200
    assert len(trace.encode()) <= MAX_TRACE
    told = boom(served, text).metadata["trace"]
    assert told.endswith(trace)
    assert sum(len(key) + len(value) + 32 for key, value in reply.trailers.items()) < 7 * 1024


def test_the_command_line_shows_it_with_debug_only(serve: Serve, tmp_path: Path) -> None:
    """Mutant seen: a terminal acts on what is in it."""
    served = serve("tests.models_bad:InProcess", "--tracebacks")
    command = ("call", "--to", served.address, "boom", "-k", "text=\x1b[31mred")
    done = test_cli.aipod(*command, forked=True)
    assert (done.status, "Traceback" in done.err) == (1, False)
    done = test_cli.aipod(*command, "--debug", forked=True)
    assert done.status == 1
    model = done.err.partition("\nIn the model:\n")[2]
    assert "\n    raise LookupError(text)\n" in model
    assert "LookupError: red\n" in model
    assert done.last.startswith("aipod: MODEL_ERROR: LookupError: ")


def test_a_server_that_does_not_give_it_away_does_not_tell_another_one_s_either(serve: Serve, tmp_path: Path) -> None:
    """Mutants seen: it tells what the journal has; it tells a plain client."""
    tells = serve("tests.models_bad:InProcess", "--tracebacks")
    quiet = serve("tests.models_bad:InProcess", directory=tmp_path)

    async def traces() -> list[str | None]:
        found = []
        async with aipod.Client(tells.address) as client, aipod.Client(quiet.address) as other:
            job = await client.submit("boom", text="x")
            for attached in (job, client.attach(job.ticket), other.attach(job.ticket)):
                with pytest.raises(aipod.ModelError) as caught:
                    await attached.wait()
                found.append(caught.value.metadata.get("trace"))
            await job.release()
        return found

    first, again, elsewhere = run(traces)
    assert tells.stop() == 0
    assert first == again
    assert first is not None
    assert elsewhere is None
    assert trace_of(stranger.ask(quiet.address, "boom", {"text": "x"})) is None
    assert "trace" not in boom(quiet, "x").metadata
    assert quiet.log_text().count("raise LookupError(text)") == 2
