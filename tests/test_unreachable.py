"""What commands say where no server answers: what is wrong, that it is tried again, and no more than is known."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, free_port

TICKET = "00" * 16


def command(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "AIPOD_ATTEMPTS": "2"}
    return subprocess.run(
        [sys.executable, "-m", "aipod", *words], cwd=ROOT, env=env, input=stdin, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", ["jobs", "methods"])
def test_a_list_is_asked_for_again_and_says_so(name: str) -> None:
    """Mutant seen: it says nothing until it gives up (as it did, for ten seconds)."""
    address = f"127.0.0.1:{free_port()}"
    done = command(name, "--to", address)
    assert done.returncode == 3
    assert done.stderr.splitlines() == [
        "aipod: note: Connection refused; trying again",
        f"aipod: UNREACHABLE: no lasting connection to {address}: Connection refused "
        "(is it running? --to or AIPOD_TO says which server to call)",
    ]


@pytest.mark.parametrize("name", ["attach", "cancel"])
def test_of_a_job_that_nobody_was_asked_for_nothing_is_known(name: str) -> None:
    """Mutant seen: it may have run, and might run twice (as it was said)."""
    address = f"127.0.0.1:{free_port()}"
    done = command(name, "-", "--to", address, stdin=TICKET)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == (
        f"aipod: JOB_LOST: no lasting connection to {address}: Connection refused; nothing is known of the job. Where "
        "it is, it goes on, and its ticket finds it there"
    )


@pytest.mark.parametrize("name", ["call", "submit", "attach", "cancel", "jobs", "methods", "health"])
def test_help_of_a_client_is_about_clients(name: str) -> None:
    """Mutant seen: a server's help (as it was)."""
    told = " ".join(command(name, "--help-all").stdout.split())
    assert "the server's certificate must come from [the system's]" in told
    assert "says who calls, for a server that asks for one" in told
    assert "a client's certificate" not in told


def test_options_that_are_called_otherwise_are_named() -> None:
    for wrong, right in (("--token", "--token-file"), ("--ca", "--tls-ca"), ("--cert", "--tls-cert")):
        done = command("call", "predict", wrong, "secret")
        assert (done.returncode, f"'{right}'" in done.stderr, "secret" in done.stderr) == (2, True, False)
