"""TLS and mTLS: a job through them, and what is let in."""

from __future__ import annotations

import dataclasses
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import trustme

import aipod
from aipod.config import Config
from aipod.transport.tls import TLSError, client_context, server_context
from tests.conftest import ROOT, Serve, Served, run

MIB = 1024 * 1024


@dataclasses.dataclass
class Files:
    """PEM files of an authority, of a server it vouches for, and of a client."""

    ca: str
    server: str
    client: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("strange"))


def make_files(directory: Path) -> Files:
    ca = trustme.CA()
    files = Files(*(str(directory / f"{name}.pem") for name in ("ca", "server", "client")))
    ca.cert_pem.write_to_path(files.ca)
    ca.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(files.server)
    ca.issue_cert("client@example.org").private_key_and_cert_chain_pem.write_to_path(files.client)
    return files


def config(**settings: object) -> Config:
    return Config.from_mapping({"tls": True, "attempts": 1, **settings})


def echo(served: Served, data: bytes, config: Config) -> bytes:
    async def main() -> bytes:
        async with aipod.Client(served.address, config=config) as client:
            answer: bytes = await client.chaos(iter([data]), metadata=[("x-func-name", "echo")])
            return answer

    return run(main)


def test_a_job_goes_through_tls(serve: Serve, files: Files) -> None:
    served = serve("Plain", "--tls-cert", files.server)
    data = os.urandom(5 * MIB + 1)
    assert echo(served, data, config(tls_ca=files.ca)) == data


def test_tls_over_a_unix_socket(serve: Serve, files: Files, strange: Files, tmp_path: Path) -> None:
    served = serve("Plain", "--tls-cert", files.server, bind=f"unix:{tmp_path}/s")
    assert echo(served, b"x", config(tls_ca=files.ca)) == b"x"
    with pytest.raises(aipod.Unreachable, match="certificate verify failed"):
        echo(served, b"x", config(tls_ca=strange.ca))


def test_with_an_authority_the_server_wants_a_certificate(serve: Serve, files: Files, strange: Files) -> None:
    served = serve("Plain", "--tls-cert", files.server, "--tls-ca", files.ca)
    assert echo(served, b"x" * MIB, config(tls_ca=files.ca, tls_cert=files.client)) == b"x" * MIB
    for own in ("", strange.client):
        with pytest.raises((aipod.Unreachable, aipod.ConnectionLost)):
            echo(served, b"x", config(tls_ca=files.ca, tls_cert=own))
    assert echo(served, b"x", config(tls_ca=files.ca, tls_cert=files.client)) == b"x"


def test_a_client_does_not_talk_to_a_server_that_is_another(serve: Serve, files: Files, strange: Files) -> None:
    served = serve("Plain", "--tls-cert", strange.server)
    with pytest.raises(aipod.Unreachable, match="certificate verify failed"):
        echo(served, b"x", config(tls_ca=files.ca))


def test_with_and_without_tls_do_not_understand_each_other(serve: Serve, files: Files) -> None:
    with_tls, without = serve("Plain", "--tls-cert", files.server), serve("Plain")
    with pytest.raises(aipod.Unreachable):
        echo(with_tls, b"x", Config(attempts=1))
    with pytest.raises(aipod.Unreachable):
        echo(without, b"x", config(tls_ca=files.ca))


def test_a_client_that_does_not_choose_h2_is_dropped(serve: Serve, files: Files) -> None:
    served = serve("Async", "--tls-cert", files.server)
    context = ssl.create_default_context(cafile=files.ca)
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        with context.wrap_socket(sock, server_hostname="localhost") as tls:
            tls.settimeout(10)
            try:
                while tls.recv(4096):
                    pass
            except (ConnectionResetError, ssl.SSLEOFError):
                pass
    assert "did not choose h2" in served.log_text()


def test_a_handshake_that_never_ends_is_given_up(serve: Serve, files: Files) -> None:
    served = serve("Async", "--tls-cert", files.server, "--handshake-timeout", "0.5")
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.settimeout(20)
        assert sock.recv(1) == b""


def test_health_and_call_speak_tls(serve: Serve, files: Files) -> None:
    served = serve("Plain", "--tls-cert", files.server)
    for command in (["health"], ["call", "chaos"]):
        done = subprocess.run(
            [sys.executable, "-m", "aipod", *command, "--to", served.address, "--tls", "--tls-ca", files.ca],
            capture_output=True, text=True, timeout=60, cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("setting", ["tls_cert", "tls_ca"])
def test_a_file_that_is_no_certificate_is_named(tmp_path: Path, files: Files, setting: str) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    settings = {"tls": True, "tls_cert": files.server, setting: str(bad)}
    with pytest.raises(TLSError, match=r"bad\.pem"):
        server_context(Config.from_mapping(settings))
    with pytest.raises(TLSError, match=r"bad\.pem"):
        client_context(Config.from_mapping(settings))


def test_without_a_certificate_there_is_no_tls() -> None:
    assert server_context(Config()) is None
    assert client_context(Config()) is None
