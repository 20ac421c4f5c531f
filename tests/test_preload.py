"""Versions that are loaded before the server listens, closed when nobody uses them, or cannot be loaded at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from aipod.errors import JobFailed
from tests.calls import own
from tests.conftest import Serve, Served, wait_until
from tests.test_cli import aipod

MODEL = "tests.models_preload:Marked"


SERVICES = ("readiness", "liveness", "ai.AI")


def status(served: Served, service: str) -> str:
    return aipod("health", "--to", served.address, service).out.decode().strip()


def count(data: Path, what: str) -> int:
    return len(list(data.glob(f"{what}-*")))


def test_a_server_that_listens_has_loaded_what_it_was_told_to_and_closes_what_is_idle(serve: Serve) -> None:
    served = serve(MODEL, "--preload", "a", "--preload", "b", "--instances", "2", "--idle", "0.5")
    assert [count(served.data, f"loaded-{version}") for version in "ab"] == [2, 2]
    wait_until(lambda: [count(served.data, f"closed-{version}") for version in "ab"] == [2, 2])
    assert own(served.address, "predict", version="a") == "a"
    assert [count(served.data, f"loaded-{version}") for version in "ab"] == [3, 2]


def test_what_does_not_load_is_told_at_the_start(tmp_path: Path) -> None:
    where = ("--bind", "127.0.0.1:0", "--spool", str(tmp_path / "spool"), "--data", str(tmp_path / "data"))
    for version, text in (
        ("bad", "LOAD_FAILED: ValueError: while it loaded: no such weights"),
        ("../a", "BAD_VERSION: version '../a'"),
    ):
        done = aipod("serve", MODEL, *where, "--preload", version)
        assert (done.status, done.out) == (1, b"")
        assert done.last.startswith(f"aipod: {text}")
    assert list((tmp_path / "spool" / "workers").iterdir()) == []


def test_a_server_none_of_whose_instances_load_is_not_ready_until_one_does(serve: Serve) -> None:
    served = serve(MODEL)

    def fail(version: str) -> None:
        with pytest.raises(JobFailed, match=r"^while it loaded: no such weights$"):
            own(served.address, "predict", version=version)

    for _ in range(4):
        fail("bad")  # it has no data: a name that a caller has made up
    assert status(served, "readiness") == "SERVING"
    (served.data / "v").mkdir()
    (served.data / "v" / "unreadable").touch()
    for _ in range(3):
        fail("v")
    assert [status(served, service) for service in SERVICES] == ["NOT_SERVING", "SERVING", "SERVING"]
    (served.data / "v" / "unreadable").unlink()
    assert own(served.address, "predict", version="v") == "v"  # after a pause
    assert status(served, "readiness") == "SERVING"
    assert "3 instances in a row have died or not loaded: not ready" in served.log_text()


def test_a_server_whose_instances_keep_dying_in_their_runs_is_not_ready_until_it_has_one_again(serve: Serve) -> None:
    """Mutant seen: only loads that fail count."""
    served = serve(MODEL)
    for n in range(3):
        assert status(served, "readiness") == "SERVING", n
        with pytest.raises(JobFailed, match="exited with status 7"):
            own(served.address, "die")
    assert [status(served, service) for service in SERVICES] == ["NOT_SERVING", "SERVING", "SERVING"]
    assert own(served.address, "predict") == "default"  # after a pause
    assert status(served, "readiness") == "SERVING"
    with pytest.raises(JobFailed, match="exited with status 7"):
        own(served.address, "die")  # the first of a new row
    assert status(served, "readiness") == "SERVING"
