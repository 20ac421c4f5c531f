"""The client in Node of aipod/docs/wire.md: real processes, a proxy that cuts, servers and callers that are killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

import aipod
from aipod.codec import job_id
from tests.conftest import FIRST, ROOT, Serve, Served, free_port, missing, require, run, wait_until
from tests.models_resume import LONG, answer_to
from tests.proxy import Fault, Proxy, open_proxy

MIB = 1024 * 1024
MODEL = "tests.models_resume:Jobs"
PROGRAM = str(ROOT / "aipod" / "examples" / "node" / "client.js")
pytestmark = pytest.mark.skipif(not FIRST, reason="the same on every Python")


class Same(aipod.Model):
    def echo(self, context: aipod.Context, path: Path, *, starts: str) -> Path:
        return path


def require_node() -> str:
    """Node, with what the client needs."""
    program = require("node")
    needed = json.loads((ROOT / "aipod" / "examples" / "node" / "package.json").read_text())["dependencies"]
    loads = ";".join(f"require('{name}')" for name in needed)
    if subprocess.run([program, "-e", loads], stderr=subprocess.DEVNULL, check=False).returncode != 0:
        missing("what aipod/examples/node/package.json names is not installed (NODE_PATH)")
    return program


@pytest.fixture(scope="module")
def node() -> str:
    return require_node()


class Caller:
    """The client, in a directory with a payload; `starts` has a line for each start of the method."""

    def __init__(self, node: str, directory: Path, payload: bytes) -> None:
        self.node, self.directory, self.payload = node, directory, payload
        self.out, self.ticket, self.starts = (directory / name for name in ("out", "job.ticket", "starts"))
        (directory / "payload").write_bytes(payload)

    def command(self, address: str, method: str, *options: str) -> list[str]:
        starts = f"starts={json.dumps(str(self.starts))}"
        fixed = [self.node, PROGRAM, "--to", address, "-k", starts, "--ticket", str(self.ticket)]
        return [*fixed, *options, method, str(self.directory / "payload")]

    def start(self, address: str, method: str, *options: str) -> subprocess.Popen[str]:
        command = self.command(address, method, *options)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @property
    def runs(self) -> int:
        return self.starts.read_text().count("start") if self.starts.exists() else 0


@pytest.fixture
def caller(node: str, tmp_path: Path) -> Caller:
    return Caller(node, tmp_path, random.Random(8).randbytes(6 * MIB + 5))


async def through_cuts(caller: Caller, served: Served, method: str, *faults: Fault) -> tuple[Proxy, bytes]:
    """The proxy that has cut, and what the client said."""
    async with open_proxy(served.port, *faults) as proxy:
        command = caller.command(proxy.address, method, "-o", str(caller.out))
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        _, err = await process.communicate()
        assert process.returncode == 0, err
    assert proxy.cuts == len(faults)
    assert not caller.ticket.exists()
    assert [path.name for path in caller.directory.glob("out*")] == ["out"]
    return proxy, err


def test_cuts_in_the_upload(serve: Serve, caller: Caller) -> None:
    """What the server has is not sent twice. Mutants seen: it begins at 0 each time; the digest is of a part only."""
    served = serve(MODEL)
    proxy, err = run(lambda: through_cuts(caller, served, "count", Fault(cut_up=2 * MIB), Fault(cut_up=3 * MIB)))
    assert caller.out.read_bytes() == answer_to(caller.payload, LONG)
    assert caller.runs == 1
    assert (
        proxy.total_up < len(caller.payload) + 4 * MIB
    )  # a cut costs the message that it has hit, and what is behind it
    assert (err.count(b"again: "), err.count(b"counting\n")) == (2, 1)


def test_a_cut_in_the_answer(serve: Serve, caller: Caller) -> None:
    """What is here is not fetched twice. Mutant seen: `have` is 0 each time."""
    served = serve("tests.test_node_client:Same")
    _, err = run(lambda: through_cuts(caller, served, "echo", Fault(cut_down=3 * MIB)))
    assert caller.out.read_bytes() == caller.payload
    assert (err.count(b"again: "), b"damaged" in err) == (1, False)  # nothing came that was there already


@pytest.mark.parametrize(("method", "status", "runs"), [("wait_again", 0, 2), ("wait", 1, 1)])
def test_the_server_is_killed_while_the_method_runs(
    serve: Serve, caller: Caller, method: str, status: int, runs: int
) -> None:
    """What may run once more does, the other has failed. Mutant seen: UNAVAILABLE without details is an end."""
    bind = f"127.0.0.1:{free_port()}"
    gate = caller.directory / "gate"
    first = serve(MODEL, bind=bind)
    with caller.start(bind, method, "-k", f"until={json.dumps(str(gate))}") as process:
        wait_until(lambda: caller.runs == 1)
        first.stop(number=signal.SIGKILL)
        serve(MODEL, bind=bind)
        wait_until(lambda: caller.runs == runs)
        gate.touch()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, '"done"\n' if status == 0 else "")
    assert status == 0 or "INTERRUPTED: " in err.splitlines()[-1]


def test_the_caller_is_killed_while_the_method_runs(serve: Serve, caller: Caller) -> None:
    """The same command goes on with the job. Mutant seen: the ticket is written at the end only."""
    served = serve(MODEL)
    gate = caller.directory / "gate"
    options = ("-k", f"until={json.dumps(str(gate))}")
    with caller.start(served.address, "wait", *options) as process:
        wait_until(lambda: caller.runs == 1)
        process.kill()
    assert caller.ticket.stat().st_mode & 0o777 == 0o600
    gate.touch()
    with caller.start(served.address, "wait", *options) as process:
        assert (process.communicate(timeout=60)[0], process.returncode) == ('"done"\n', 0)
    assert caller.runs == 1


def test_an_answer_that_is_not_what_was_stored_is_fetched_again(serve: Serve, caller: Caller) -> None:
    """Mutant seen: the digest is not compared."""
    served = serve(MODEL)
    ticket = os.urandom(16)
    caller.ticket.write_text(json.dumps({"ticket": ticket.hex(), "epoch": 0, "spool": ""}))
    caller.out.with_name(f"out.{job_id(ticket)}.part").write_bytes(b"x" * 70_000)
    with caller.start(served.address, "count", "-k", f"size={2 * MIB}", "-o", str(caller.out)) as process:
        err = process.communicate(timeout=60)[1]
    assert (process.returncode, "damaged" in err) == (0, True)
    assert caller.out.read_bytes() == answer_to(caller.payload, 2 * MIB)


def test_ends(serve: Serve, caller: Caller) -> None:
    """An error of the model's, a method that there is not, no server: their reasons, and the exit status."""
    served = serve(MODEL)
    for method, reason in (("boom", "MODEL_ERROR"), ("nothing", "UNKNOWN_METHOD")):
        caller.ticket.unlink(missing_ok=True)
        with caller.start(served.address, method) as process:
            err = process.communicate(timeout=60)[1]
        assert (process.returncode, err.splitlines()[-1].split(":")[0]) == (1, reason)
    assert caller.runs == 1
