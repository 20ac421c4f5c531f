"""TLS and mTLS: a job through them, and what is let in."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trustme
from grpclib.const import Cardinality

import aipod
from aipod.config import Config
from aipod.transport.channel import Channel, open_call, read_status
from aipod.transport.tls import TLSError, client_context, server_context
from aipod.wire.ai import Raw
from tests.conftest import ROOT, Serve, Served, run, wait_until
from tests.test_transport import descriptors

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
        with pytest.raises((aipod.Unreachable, aipod.JobLost)):
            echo(served, b"x", config(tls_ca=files.ca, tls_cert=own))
    assert echo(served, b"x", config(tls_ca=files.ca, tls_cert=files.client)) == b"x"


def test_who_wants_certificates_may_be_reached_from_outside(serve: Serve, files: Files) -> None:
    """Without --insecure."""
    served = serve("Plain", "--tls-cert", files.server, "--tls-ca", files.ca, bind="0.0.0.0:0")
    served.address = f"127.0.0.1:{served.port}"
    assert echo(served, b"x", config(tls_ca=files.ca, tls_cert=files.client)) == b"x"


WHO = """
import json, socket, sys, trio
from grpclib.const import Cardinality
from aipod.config import Config
from aipod.transport import bridge
from aipod.transport.requests import TrioHandler, peer_certificate, send_message
from aipod.transport.server import Server
from aipod.wire.ai import Raw

class Service:
    def __mapping__(self):
        return {"/who/who": TrioHandler(self.who, Cardinality.STREAM_STREAM, Raw, Raw)}

    async def who(self, stream):
        await bridge.inline(stream.send_initial_metadata)
        await bridge.inline(send_message, stream, Raw(data=json.dumps(peer_certificate(stream)).encode()))
        await bridge.inline(stream.send_trailing_metadata)

async def main():
    async with bridge.open_loop(), trio.open_nursery() as calls:
        sock = socket.create_server(("127.0.0.1", 0))

        async def start():
            server = Server([Service()], Config(tls_cert=sys.argv[1], tls_ca=sys.argv[2]), bridge.Spawner(calls))
            await server.listen([sock])
            return server

        server = await bridge.to_trio(start)()
        print(sock.getsockname()[1], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        server.stop_listening()
        server.abort()
        calls.cancel_scope.cancel()

trio.run(main)
"""


def test_the_certificate_of_the_caller_is_handed_up(files: Files) -> None:
    async def main(address: str) -> Any:
        channel = Channel(address, config(tls_ca=files.ca, tls_cert=files.client))
        async with channel.request("/who/who", Cardinality.STREAM_STREAM, Raw, Raw) as stream:
            await open_call(stream)
            await stream.end()
            message = await stream.recv_message()
            await read_status(stream)
        await channel.aclose()
        return json.loads(message.data)

    command = [sys.executable, "-c", WHO, files.server, files.ca]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            port = int(server.stdout.readline())  # type: ignore[union-attr]
            certificate = run(lambda: main(f"127.0.0.1:{port}"))
        finally:
            server.stdin.close()  # type: ignore[union-attr]
    assert ["email", "client@example.org"] in certificate["subjectAltName"]
    assert server.returncode == 0


def test_a_client_that_leaves_waits_for_a_goodbye_but_not_for_long(serve: Serve, files: Files) -> None:
    served = serve("Plain", "--tls-cert", files.server)

    async def main() -> bool:
        async with aipod.Client(served.address, config=config(tls_ca=files.ca)) as client:
            await client.chaos(metadata=[("x-func-name", "echo")])
            protocol: Any = client._link.channel()._protocol
            served.process.send_signal(signal.SIGSTOP)
        return bool(protocol.ended.is_set())

    try:
        assert run(main)
    finally:
        served.process.send_signal(signal.SIGCONT)


def refused_at_once(address: str, **settings: object) -> str:
    """What a call is refused with, which is not tried again."""
    seen: list[str] = []

    async def main() -> str:
        async with aipod.Client(address, config=Config.from_mapping(settings)) as client:
            with pytest.raises(aipod.Unreachable) as caught:
                await client.chaos(metadata=[("x-func-name", "echo")], on_event=lambda event: seen.append(event.phase))
            return caught.value.message

    text = run(main)
    assert seen == ["CONNECTING"]
    return text


def test_a_client_does_not_talk_to_a_server_that_is_another(serve: Serve, files: Files, strange: Files) -> None:
    """Nor tries it again: it says what to do. Mutants seen: it is tried again; the advice is for any other mistake."""
    served = serve("Plain", "--tls-cert", strange.server)
    told = refused_at_once(served.address, tls=True, tls_ca=files.ca)
    assert "certificate verify failed: " in told
    assert told.endswith("; --tls-ca FILE (Config.tls_ca) says which authority the server's certificate comes from")


def test_a_client_does_not_talk_to_another_host(serve: Serve, files: Files) -> None:
    served = serve("Plain", "--tls-cert", files.server, bind="127.0.0.2:0")
    told = refused_at_once(served.address, tls=True, tls_ca=files.ca)
    assert "IP address mismatch" in told
    assert told.endswith("; call the server by a name that its certificate has")


def test_with_and_without_tls_do_not_understand_each_other(serve: Serve, files: Files) -> None:
    with_tls, without = serve("Plain", "--tls-cert", files.server), serve("Plain")
    with pytest.raises(aipod.Unreachable, match="perhaps the server wants TLS"):
        echo(with_tls, b"x", Config(attempts=1))
    told = refused_at_once(without.address, tls=True, tls_ca=files.ca)
    assert told.endswith("the server speaks no TLS: leave out --tls (Config.tls)")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n<html>", "the server speaks HTTP/1, and no HTTP/2 without TLS: add --tls"),
        (b"\x15\x03\x01\0\x02\x02\x46" + bytes(20), "the server speaks TLS, and no HTTP/2 without it: add --tls"),
    ],
)
def test_what_is_no_grpc_is_told_by_its_first_bytes(answer: bytes, told: str) -> None:
    """As nginx and OpenSSL answer on a port for TLS. Mutant seen: nobody looks at them."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:

        def serve() -> None:
            with listener.accept()[0] as sock:
                sock.sendall(answer)
                while sock.recv(4096):
                    pass

        done = threads.submit(serve)
        assert told in refused_at_once(f"127.0.0.1:{listener.getsockname()[1]}")
        done.result()


def test_a_server_says_what_it_misses(files: Files, strange: Files) -> None:
    """By an alert, which Python's own servers do not send. Mutant seen: nobody asks why the connection was lost."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files.ca)
    context.load_cert_chain(files.server)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:

        def handshake(sock: socket.socket, arrived: ssl.MemoryBIO, to_send: ssl.MemoryBIO) -> None:
            tls = context.wrap_bio(arrived, to_send, server_side=True)
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                sock.sendall(to_send.read())
                arrived.write(sock.recv(65536))

        def serve() -> None:
            with listener.accept()[0] as sock:
                to_send = ssl.MemoryBIO()
                with pytest.raises(ssl.SSLError):
                    handshake(sock, ssl.MemoryBIO(), to_send)
                sock.sendall(to_send.read())
                while sock.recv(65536):
                    pass

        for own, said in (("", "certificate required"), (strange.client, "unknown ca")):
            done = threads.submit(serve)
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            told = refused_at_once(address, tls=True, tls_ca=files.ca, tls_cert=own)
            assert f"wants a certificate that it can verify, and says: {said}; --tls-cert FILE" in told
            done.result()


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


def test_handshakes_count_as_connections_and_make_room(serve: Serve, files: Files) -> None:
    """Else silent sockets would have all descriptors that jobs need, until their handshakes are given up.

    Mutants seen: a connection counts when its handshake is over; handshakes make no room.
    """
    served = serve("Plain", "--tls-cert", files.server, "--max-connections", "5", "--handshake-timeout", "600")
    assert echo(served, b"x", config(tls_ca=files.ca)) == b"x"
    before = descriptors(served)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection(("127.0.0.1", served.port))) for _ in range(30)]
        wait_until(lambda: len(select.select(socks, [], [], 0)[0]) == 25)  # closed
        wait_until(lambda: descriptors(served) <= before + 5)

        def is_served() -> bool:
            with contextlib.suppress(aipod.Unreachable):
                return echo(served, b"x", config(tls_ca=files.ca)) == b"x"
            return False

        wait_until(is_served)
        assert len(select.select(socks, [], [], 0)[0]) == 26
    wait_until(lambda: descriptors(served) <= before)


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


@pytest.mark.parametrize("setting", ["tls_cert", "tls_key", "tls_ca"])
def test_settings_of_tls_that_would_do_nothing_are_refused(files: Files, setting: str) -> None:
    """Payloads would go over the wire as they are, and everybody be let in."""
    settings = Config.from_mapping({setting: files.server})
    with pytest.raises(TLSError, match=r"without tls:.*--tls"):
        client_context(settings)
    if setting != "tls_cert":
        with pytest.raises(TLSError, match="without tls_cert"):
            server_context(settings)
