"""What callers try who have a token for less, or none: other methods and versions, other names' jobs, floods."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from h2.exceptions import ProtocolError

from aipod.codec import job_id
from aipod.identity import MAX_NAMES, Identities, TokensError, add_token, hash_of
from aipod.wire.ai import Op
from tests import stranger
from tests.conftest import Serve, Served, left_in, wait_until
from tests.test_identity import Tokens
from tests.test_transport import Peer

Code = grpc.StatusCode
GONE = (OSError, AssertionError, ProtocolError)  # to a `Peer` whose connection made room
OPS = (None, Op.RUN, Op.RESUME)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    alice = add_token(path, "alice", ["predict"], ["3"])
    return Tokens(path, alice, add_token(path, "bob", [], []))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tokens: Tokens) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("server")
    server = Served("tests.models_strangers:Stranger", directory, ("--tokens", str(tokens.path)), "127.0.0.1:0")
    yield server
    assert server.stop() == 0, server.log_text()
    assert left_in(server.spool) == []
    assert not any(token in server.log_text() for token in (tokens.alice, tokens.bob))


def bearer(token: str) -> tuple[str, str]:
    return "authorization", f"Bearer {token}"


def ask(
    served: Served,
    rpc: str,
    metadata: Sequence[tuple[str, str]],
    *,
    version: str = "",
    kwargs: Any = None,
    op: Op | None = None,
    ticket: bytes = b"",
    released: Sequence[bytes] = (),
) -> stranger.Reply:
    """A call without a payload, by a plain client or (`op`) as by our own."""
    first = stranger.first_message(rpc, kwargs or {}, version)
    metadata = list(metadata)
    if op is not None:
        raw = first if rpc == "chaos" else first.raw
        ticket = ticket or secrets.token_bytes(16)
        raw.open.CopyFrom(stranger.Open(ticket=ticket, op=int(op), size=0, epoch=1, released=released))
        raw.last = True
        metadata.append(("x-job-id", job_id(ticket)))
    return stranger.ask_sync(served.address, rpc, [first], metadata=metadata, timeout=20)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("rpc", "name", "version", "kwargs", "code"),
    [
        ("predict", None, "3", {}, Code.OK),
        ("chaos", "predict", "", {"version": "3"}, Code.OK),
        ("train", None, "3", {}, Code.PERMISSION_DENIED),
        ("train", "predict", "3", {}, Code.PERMISSION_DENIED),
        ("train", "aipod.methods", "3", {}, Code.PERMISSION_DENIED),
        ("log", None, "3", {}, Code.PERMISSION_DENIED),
        ("chaos", "train", "", {"version": "3"}, Code.PERMISSION_DENIED),
        ("chaos", None, "", {"version": "3"}, Code.PERMISSION_DENIED),
        ("chaos", "Predict", "", {"version": "3"}, Code.UNIMPLEMENTED),
        ("chaos", "predict.train", "", {"version": "3"}, Code.UNIMPLEMENTED),
        ("chaos", "", "", {"version": "3"}, Code.UNIMPLEMENTED),
        ("chaos", "aipod.train", "", {"version": "3"}, Code.UNIMPLEMENTED),
        ("predict", None, "", {}, Code.PERMISSION_DENIED),
        ("predict", None, "4", {}, Code.PERMISSION_DENIED),
        ("predict", None, "", {"version": "4"}, Code.PERMISSION_DENIED),
        ("predict", None, "", {"version": 4}, Code.PERMISSION_DENIED),
        ("predict", None, "4", {"version": ""}, Code.PERMISSION_DENIED),
        ("predict", None, "3", {"version": "4"}, Code.INVALID_ARGUMENT),
        ("predict", None, "", b'{"version": "3", "vers\\u0069on": "4"}', Code.PERMISSION_DENIED),
    ],
)
def test_a_token_for_one_method_and_version(
    served: Served, tokens: Tokens, op: Op | None, rpc: str, name: str | None, version: str, kwargs: Any, code: Code
) -> None:
    """Through each way to say them, and for each kind of call that brings a request. Mutant seen: no check."""
    if isinstance(kwargs, bytes):
        kwargs = stranger.zstandard.compress(kwargs)
    named = [("x-func-name", name)] if name is not None else []
    reply = ask(served, rpc, [bearer(tokens.alice), *named], version=version, kwargs=kwargs, op=op)
    if op == Op.RESUME and code is Code.OK:  # what has never begun is not resumed
        assert reply.info.reason == "NOT_STARTED"
    else:
        assert reply.code is code, reply.details


@pytest.mark.parametrize("op", [*OPS, Op.ATTACH, Op.CANCEL, Op.RELEASE])
@pytest.mark.parametrize("name", ["predict", "aipod.jobs"])
@pytest.mark.parametrize(
    "said",
    [
        [],
        ["Bearer"],
        ["Bearer {alice}", "Bearer {alice}"],
        ["Bearer x", "Bearer {alice}"],
        ["Bearer {alice}, Bearer {bob}"],
        ["Basic {alice}"],
        ["{alice}"],
    ],
)
def test_who_is_not_known_does_nothing(
    served: Served, tokens: Tokens, op: Op | None, name: str, said: Sequence[str]
) -> None:
    """Mutant seen: of two headers the last one counts."""
    header = [("authorization", one.format(alice=tokens.alice, bob=tokens.bob)) for one in said]
    reply = ask(served, "chaos", [*header, ("x-func-name", name)], kwargs={"version": "3"}, op=op)
    assert (reply.code, reply.info.reason, reply.messages) == (Code.UNAUTHENTICATED, "UNAUTHENTICATED", [])


@pytest.mark.parametrize("op", [Op.RUN, Op.RESUME, Op.ATTACH, Op.CANCEL, Op.RELEASE])
def test_another_names_job(served: Served, tokens: Tokens, op: Op) -> None:
    """With its ticket, before it is there and after it has ended; nor does `open.released` let it go.

    Mutant seen: the check is made of a job that is not there yet.
    """
    ticket = secrets.token_bytes(16)

    def alices(op: Op, **options: Any) -> stranger.Reply:
        return ask(served, "predict", [bearer(tokens.alice)], version="3", op=op, **options)

    def bobs(op: Op) -> stranger.Reply:
        return ask(served, "predict", [bearer(tokens.bob)], version="3", op=op, ticket=ticket)

    if op not in (Op.RUN, Op.RESUME):
        assert alices(op, ticket=ticket).info.reason == "NOT_FOUND"
    assert bobs(Op.RUN).code is Code.OK
    reply = alices(op, ticket=ticket)
    assert (reply.code, reply.details) == (
        Code.PERMISSION_DENIED,
        "this job is not alice's: a ticket is good for one name only",
    )
    assert alices(Op.RUN, released=[ticket]).code is Code.OK
    assert alices(Op.RELEASE, released=[ticket]).info.reason == "NOT_FOUND"
    assert bobs(Op.ATTACH).messages[-1] != b"PONG", "the answer is still there"
    assert bobs(Op.RELEASE).code is Code.OK


def write(path: Path, text: str) -> None:
    fresh = path.with_name("fresh")
    fresh.write_text(text)
    os.replace(fresh, path)


def test_a_file_of_tokens_that_becomes_something_else(serve: Serve, tmp_path: Path) -> None:
    """A FIFO, a directory, nothing, too much, a link to a good one: who was known stays known, and the server ends.

    Mutants seen: a FIFO is opened as a file is, and the server does not end; all of a file is read, however long it is.
    """
    path, other = tmp_path / "tokens.toml", tmp_path / "other.toml"
    carol = add_token(path, "carol", [], [])
    dave = add_token(other, "dave", [], [])
    served = serve("tests.models_strangers:Stranger", "--tokens", str(path))

    def gets_in(token: str) -> bool:
        return ask(served, "predict", [bearer(token)]).code is Code.OK

    def said(text: str) -> None:
        wait_until(lambda: text in served.log_text())
        assert gets_in(carol)

    path.unlink()
    os.mkfifo(path)
    said("it is no regular file; who was known stays known")
    path.unlink()
    path.mkdir()
    said("Is a directory")
    path.rmdir()
    said("No such file or directory")
    with path.open("w") as file:
        file.truncate(1 << 40)
    said("it has more than 4194304 bytes")
    path.unlink()
    path.symlink_to(other)
    wait_until(lambda: gets_in(dave))
    assert not gets_in(carol)
    assert served.log_text().count("who was known stays known") == 4
    path.unlink()
    os.mkfifo(path)
    wait_until(lambda: served.log_text().count("who was known stays known") == 5)


def test_as_many_names_as_there_may_be(tmp_path: Path) -> None:
    """Who is known is found by the hash: the comparisons do not grow with the names. Mutant seen: one after another."""
    path = tmp_path / "tokens.toml"
    path.write_text("".join(f'[n{number}]\nsha256 = "{hash_of(str(number))}"\n' for number in range(MAX_NAMES)))
    known = Identities(str(path))
    compared = 0

    class Counted(str):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return super().__eq__(other)

        __hash__ = str.__hash__

    known._callers = {Counted(key): caller for key, caller in known._callers.items()}
    assert known.identify(f"Bearer {MAX_NAMES - 1}", None).name == f"n{MAX_NAMES - 1}"
    assert not known.knows("Bearer nobody")
    assert compared < 20
    path.write_text("".join(f'[n{number}]\nsha256 = "{hash_of(str(number))}"\n' for number in range(MAX_NAMES + 1)))
    with pytest.raises(TokensError, match="10001 names; at most 10000"):
        known._read()


def test_calls_of_nobody_keep_nobody_out(serve: Serve, tokens: Tokens) -> None:
    """A connection that brings one after the other makes room for a new one. Mutant seen: such a call is one."""
    served = serve("tests.models_strangers:Stranger", "--max-connections", "1", "--tokens", str(tokens.path))
    refused = 0

    def lets_in() -> bool:
        with contextlib.suppress(*GONE), Peer(served) as peer:
            return peer.call(bearer(tokens.bob)).status == 0
        return False

    def flood(peer: Peer) -> None:
        nonlocal refused
        with contextlib.suppress(*GONE):
            while True:
                assert peer.call().status == Code.UNAUTHENTICATED.value[0]
                refused += 1

    with Peer(served) as peer:
        thread = threading.Thread(target=flood, args=[peer])
        thread.start()
        wait_until(lambda: refused)
        wait_until(lets_in)
        thread.join()
