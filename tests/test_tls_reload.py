"""Certificates, keys and authorities that are replaced while a server runs: who gets in, who goes on, who does not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest

import aipod
from aipod.config import Config
from aipod.transport.tls import Followed, TLSError, client_context, server_context
from tests.conftest import Serve, Served, run, wait_until
from tests.gates import GATED, MODEL, SMALL, Gate
from tests.test_tls import Files, config, echo, make_files

GOAWAY = 7  # RFC 9113 section 6.8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # with empty SETTINGS
READ_AGAIN = "the files of TLS have changed and are read again"


class Secret:
    """A directory of PEM files as Kubernetes mounts it: `..data` is a link that is switched."""

    def __init__(self, directory: Path, files: dict[str, str]) -> None:
        self.directory = directory
        directory.mkdir()
        self._count = 0
        self.put(files)
        for name in files:
            (directory / name).symlink_to(f"..data/{name}")

    def put(self, files: dict[str, str]) -> None:
        self._count += 1
        fresh = self.directory / f"..{self._count}"
        fresh.mkdir()
        for name, source in files.items():
            shutil.copy(source, fresh / name)
        (self.directory / "..new").symlink_to(fresh.name)
        os.replace(self.directory / "..new", self.directory / "..data")

    def path(self, name: str) -> str:
        return str(self.directory / name)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("new"))


def reread(served: Served, times: int = 1) -> None:
    wait_until(lambda: served.log_text().count(READ_AGAIN) == times)


def test_a_new_certificate_is_shown_to_new_connections(serve: Serve, old: Files, new: Files, tmp_path: Path) -> None:
    """A call under way goes on, and so does its connection; files that do not fit leave everything as it was.

    Mutants seen: the first context for ever; what is broken is taken; a link's own status instead of its target's.
    """
    secret, gate = Secret(tmp_path / "tls", {"cert": old.server}), Gate(tmp_path)
    served = serve(MODEL, "--tls-cert", secret.path("cert"))

    async def main() -> None:
        async with aipod.Client(served.address, config=config(tls_ca=old.ca)) as caller:
            waiting = asyncio.create_task(caller.chaos(b"x", metadata=GATED, kwargs=gate.kwargs))
            await asyncio.to_thread(wait_until, lambda: gate.runs)
            broken = tmp_path / "broken"
            broken.write_bytes(Path(new.server).read_bytes()[:-400])
            secret.put({"cert": str(broken)})
            await asyncio.to_thread(wait_until, lambda: "what was read before stays" in served.log_text())
            assert await asyncio.to_thread(presented, served, old.ca)
            secret.put({"cert": new.server})
            await asyncio.to_thread(reread, served)
            assert not await asyncio.to_thread(presented, served, old.ca)
            assert await asyncio.to_thread(presented, served, new.ca)
            assert await asyncio.to_thread(grpcio_gets_in, served, new)
            assert not await asyncio.to_thread(grpcio_gets_in, served, old)
            gate.gate.touch()
            assert await waiting == SMALL
            assert await caller.chaos(b"x", metadata=GATED, kwargs=gate.kwargs) == SMALL, "the same connection"

    run(main)
    assert served.log_text().count("what was read before stays") == 1
    assert "the files of TLS have changed, and cannot use certificate" in served.log_text()


def presented(served: Served, ca: str) -> bool:
    """Whether the server has a certificate of `ca`."""
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        try:
            with context.wrap_socket(sock, server_hostname="localhost"):
                return True
        except ssl.SSLCertVerificationError:
            return False


def grpcio_gets_in(served: Served, files: Files) -> bool:
    """Whether a stock client of those files is connected, within the time that such a client tries."""
    pem = Path(files.client).read_bytes()
    credentials = grpc.ssl_channel_credentials(Path(files.ca).read_bytes(), pem, pem)
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(f"localhost:{served.port}", credentials, options) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            return bool(check(b"", timeout=20))
        except grpc.RpcError as exc:
            if exc.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False


def test_an_authority_that_is_taken_away_lets_nobody_in(serve: Serve, old: Files, new: Files, tmp_path: Path) -> None:
    """Not by a session of before either, nor on a connection of before; a call under way finishes.

    Mutants seen: no GOAWAY for connections; a connection that was in its handshake stays; one context whose
    authorities are exchanged, with which sessions go on.
    """
    secret, gate = Secret(tmp_path / "tls", {"ca": old.ca}), Gate(tmp_path)
    served = serve(MODEL, "--tls-cert", old.server, "--tls-ca", secret.path("ca"))
    mine = Config(tls=True, tls_ca=old.ca, tls_cert=old.client, attempts=1, reconnect=0)
    sessions = {version: Session(served, old, version) for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)}
    for session in sessions.values():
        assert session.connect(), "the first time"
        assert session.connect(), "and again"
        assert session.reused
    slow = Handshake(served, old)
    slow.begin()

    async def main() -> None:
        async with aipod.Client(served.address, config=mine) as caller:
            waiting = asyncio.create_task(caller.chaos(b"x", metadata=GATED, kwargs=gate.kwargs))
            await asyncio.to_thread(wait_until, lambda: gate.runs)
            secret.put({"ca": new.ca})
            await asyncio.to_thread(reread, served)
            gate.gate.touch()
            assert await waiting == SMALL
            with pytest.raises((aipod.Unreachable, aipod.JobLost)):
                await caller.chaos(b"x", metadata=GATED, kwargs=gate.kwargs)

    run(main)
    for session in sessions.values():
        assert not session.connect()
        assert not session.reused
    assert not grpcio_gets_in(served, old)
    assert GOAWAY in slow.finish()
    assert echo(served, b"x", config(tls_ca=old.ca, tls_cert=new.client)) == b"x"


def client_tls(files: Files, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files.ca)
    context.load_cert_chain(files.client)
    context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    return context


class Session:
    """A client that resumes its session, as often as it is let in."""

    def __init__(self, served: Served, files: Files, version: ssl.TLSVersion) -> None:
        self._port, self._context = served.port, client_tls(files, version)
        self._session: ssl.SSLSession | None = None
        self.reused: bool | None = None

    def connect(self) -> bool:
        """Whether the server speaks HTTP/2 with it."""
        self.reused = None
        with socket.create_connection(("127.0.0.1", self._port), timeout=20) as sock:
            with contextlib.suppress(ssl.SSLError, ConnectionResetError):
                with self._context.wrap_socket(sock, server_hostname="localhost", session=self._session) as tls:
                    self.reused = tls.session_reused
                    tls.sendall(PREFACE)
                    if tls.recv(1):
                        self._session = tls.session
                        return True
        return False


class Handshake:
    """A client that pauses before it shows its certificate."""

    def __init__(self, served: Served, files: Files) -> None:
        self._sock = socket.create_connection(("127.0.0.1", served.port), timeout=20)
        self._arrived, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = client_tls(files).wrap_bio(self._arrived, self._to_send, server_hostname="localhost")

    def begin(self) -> None:
        """Say hello, and hear what the server has to say."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        self._sock.sendall(self._to_send.read())
        while self._tls.version() is None or not self._to_send.pending:
            self._arrived.write(self._sock.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.do_handshake()

    def finish(self) -> list[int]:
        """Show the certificate; the types of all HTTP/2 frames until the server closes."""
        self._tls.write(PREFACE)
        self._sock.sendall(self._to_send.read())
        data = b""
        with self._sock:
            while True:
                try:
                    piece = self._tls.read(65536)
                except ssl.SSLWantReadError:
                    if raw := self._sock.recv(65536):
                        self._arrived.write(raw)
                    else:
                        break
                except ssl.SSLError:
                    break
                else:
                    if not piece:
                        break
                    data += piece
        types = []
        while len(data) >= 9:
            types.append(data[3])
            data = data[9 + int.from_bytes(data[:3], "big") :]
        return types


def test_a_client_shows_its_new_certificate_when_it_connects_again(
    serve: Serve, old: Files, new: Files, tmp_path: Path
) -> None:
    """Mutant seen: the first context for ever."""
    theirs = Secret(tmp_path / "theirs", {"ca": old.ca})
    mine = Secret(tmp_path / "mine", {"cert": old.client})
    served = serve("Plain", "--tls-cert", old.server, "--tls-ca", theirs.path("ca"))
    settings = config(tls_ca=old.ca, tls_cert=mine.path("cert"))

    async def main() -> None:
        async with aipod.Client(served.address, config=settings) as caller:

            async def hello() -> Any:
                return await caller.chaos(metadata=[("x-func-name", "hello")])

            assert await hello() == "hello world"
            theirs.put({"ca": new.ca})
            mine.put({"cert": new.client})
            await asyncio.to_thread(reread, served)
            assert await hello() == "hello world"

    run(main)


def test_what_cannot_be_used_is_not(old: Files, new: Files, tmp_path: Path) -> None:
    """A FIFO would hold the thread that opens it for ever. Mutant seen: it is opened."""
    secret = Secret(tmp_path / "tls", {"cert": old.server, "key": old.server})
    paths = {"tls_cert": secret.path("cert"), "tls_key": secret.path("key")}
    followed = Followed(server_context, Config.from_mapping(paths))
    assert followed.context is not None
    first = followed.context.newest
    assert followed.renew() is None
    for files in ({"cert": new.server, "key": old.server}, {"cert": new.server}):
        secret.put(files)
        for _ in range(2):  # it is tried again though nothing has changed since: a lack of descriptors passes, say
            with pytest.raises(TLSError, match="cannot use certificate"):
                followed.renew()
    os.mkfifo(tmp_path / "fifo")
    (secret.directory / "key").unlink()
    (secret.directory / "key").symlink_to(tmp_path / "fifo")
    with pytest.raises(TLSError, match="is no regular file"):
        followed.renew()
    assert followed.context.newest is first
    (secret.directory / "key").unlink()
    (secret.directory / "key").symlink_to(new.server)
    assert followed.renew() is False, "read again, and no authorities among it"
    assert followed.context.newest is not first
    assert followed.renew() is None


def test_without_tls_there_is_nothing_to_follow() -> None:
    for make in (server_context, client_context):
        followed = Followed(make, Config())
        assert followed.context is None
        assert followed.renew() is None
