"""Tokens and certificates: who gets in, what a name may do, and that a ticket does not cross names."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

import aipod
from aipod.config import Config, ConfigError
from aipod.errors import Refused
from aipod.identity import ANYONE, MAX_NAMES, Caller, Identities, TokensError, add_token, hash_of, parse_tokens
from tests import stranger
from tests.conftest import ROOT, Serve, Served, run, wait_until
from tests.spools import descriptors
from tests.test_tls import Files, make_files

MODEL = "aipod.examples.basics:Echo"
BAD_FILES = {
    "no TOML": "[alice",
    "a long number": "x = " + "1" * 5000,
    "deep": "x = " + "[" * 100_000,
    "no table": 'alice = "x"',
    "no hash": "[alice]",
    "a short hash": '[alice]\nsha256 = "00"',
    "a token for a hash": '[alice]\nsha256 = "aipod_token"',
    "another key": f'[alice]\nsha256 = "{hash_of("x")}"\nmethod = ["predict"]',
    "no list": f'[alice]\nsha256 = "{hash_of("x")}"\nmethods = "predict"',
    "no names in it": f'[alice]\nsha256 = "{hash_of("x")}"\nversions = [3]',
    "a bad name": f'["a b"]\nsha256 = "{hash_of("x")}"',
    "one token for two": f'[a]\nsha256 = "{hash_of("x")}"\n[b]\nsha256 = "{hash_of("x")}"',
    "too many": "".join(f'[n{number}]\nsha256 = "{hash_of(str(number))}"\n' for number in range(MAX_NAMES + 1)),
}


ALICE = Caller("alice", frozenset({"predict", "echo"}), frozenset({"3"}))


@dataclasses.dataclass
class Tokens:
    """A file of tokens, and the tokens."""

    path: Path
    alice: str  # predict and echo of version 3
    bob: str  # everything


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    alice = add_token(path, "alice", ["predict", "echo"], ["3"])
    return Tokens(path, alice, add_token(path, "bob", [], []))


# --- the file


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_meant(name: str) -> None:
    with pytest.raises(TokensError):
        parse_tokens(BAD_FILES[name])


def test_what_was_added_is_known(tokens: Tokens) -> None:
    known = Identities(str(tokens.path))
    assert known.identify(f"Bearer {tokens.alice}", None) == ALICE
    assert known.identify(f"bearer  {tokens.bob} ", None) == Caller("bob")
    assert tokens.path.stat().st_mode & 0o777 == 0o600
    assert tokens.alice not in tokens.path.read_text()
    with pytest.raises(TokensError, match="cannot add 'alice'"):
        add_token(tokens.path, "alice", [], [])
    with pytest.raises(TokensError, match="a name has letters"):
        add_token(tokens.path, f'x"]\nsha256="{"0" * 64}"\n["y', [], [])
    assert sorted(os.listdir(tokens.path.parent)) == [".tokens.toml.lock", "tokens.toml"]


def test_tokens_that_are_added_at_once_are_all_there(tmp_path: Path) -> None:
    """The file keeps its mode, and a link stays one. Mutants seen: no lock; a fresh file in the link's place."""
    real, path = tmp_path / "real.toml", tmp_path / "tokens.toml"
    real.touch(mode=0o640)
    path.symlink_to(real)
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda number: add_token(path, f"name{number}", [], []), range(20)))
    known = Identities(str(path))
    assert [known.identify(f"Bearer {token}", None).name for token in made] == [f"name{n}" for n in range(20)]
    assert path.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_read_for_a_moment_is_read_the_next_time(tmp_path: Path) -> None:
    """Mutant seen: it counts as seen, and who was taken out stays known."""
    path = tmp_path / "tokens.toml"
    gone = add_token(path, "gone", [], [])
    known = Identities(str(path))
    path.unlink()
    add_token(path, "other", [], [])
    with descriptors(0), pytest.raises(TokensError, match="Too many open files"):
        known._read()
    assert known._read()
    with pytest.raises(Refused):
        known.identify(f"Bearer {gone}", None)


@pytest.mark.parametrize("said", ["", "Bearer", "Bearer ", "Basic YTpi", "Bearer x", "Bearer \udcff", "{alice}"])
def test_who_is_not_known(tokens: Tokens, said: str) -> None:
    with pytest.raises(Refused) as caught:
        Identities(str(tokens.path)).identify(said.format(alice=tokens.alice), None)
    assert caught.value.reason == "UNAUTHENTICATED"


def test_names_in_certificates() -> None:
    """Mutants seen: the common name before the URI; an empty name, which is nobody's and so sees everybody's jobs."""
    known = Identities(certificates=True)
    common = ((("countryName", "DE"),), (("commonName", "scanner"),))
    other, uri = (("DNS", "other"), ("DNS", "more")), (("DNS", "other"), ("URI", "spiffe://example.org/scanner"))
    assert known.identify("", {"subject": common, "subjectAltName": other}) == Caller("scanner")
    assert known.identify("", {"subject": (), "subjectAltName": other}) == Caller("other")
    for subject in (common, ()):
        certificate = {"subject": subject, "subjectAltName": uri}
        assert known.identify("", certificate) == Caller("spiffe://example.org/scanner")
    empty = {"subject": ((("commonName", ""),),), "subjectAltName": (("URI", ""), ("DNS", ""))}
    for nameless in (None, {}, empty):
        with pytest.raises(Refused, match="has no URI, no common name and no other"):
            known.identify("", nameless)
    assert Identities().identify("Bearer x", {"subject": common}) is ANYONE


@pytest.mark.parametrize("name", ["x" * 256, "a\nb", "spiffe://example.org/scanner"])
def test_names_that_are_none(name: str) -> None:
    """A common name is no URI: who may have the one need not be who may have the other.

    Mutants seen: any length; any letter; any common name.
    """
    known = Identities(certificates=True)
    for certificate in ({"subject": ((("commonName", name),),)}, {"subjectAltName": (("DNS", name),)}):
        with pytest.raises(Refused, match="no name") as caught:
            known.identify("", certificate)
        assert caught.value.reason == "UNAUTHENTICATED"


def test_jobs_without_a_name_are_open_to_who_has_the_ticket() -> None:
    assert Caller("a").owns({})
    assert Caller("a").owns({"owner": "a"})
    assert not Caller("a").owns({"owner": "b"})
    assert ANYONE.owns({"owner": "b"})


def test_a_token_is_shown_nowhere() -> None:
    assert "secret" not in repr(Config(token="secret"))
    with pytest.raises(ConfigError) as caught:
        Config(token="secret word")
    assert "secret" not in str(caught.value)


# --- a server that asks


@pytest.fixture
def asking(serve: Serve, tokens: Tokens) -> Served:
    return serve(MODEL, "--tokens", str(tokens.path))


def client(served: Served, token: str) -> aipod.Client:
    return aipod.Client(served.address, config=Config(token=token, attempts=1))


def refusal(served: Served, token: str, method: str, **options: Any) -> Refused:
    async def main() -> None:
        async with client(served, token) as caller:
            await caller.chaos(b"x", metadata=[("x-func-name", method)], **options)

    with pytest.raises(Refused) as caught:
        run(main)
    return caught.value


def test_who_gets_in_and_what_they_may_do(asking: Served, tokens: Tokens) -> None:
    assert refusal(asking, "", "predict").reason == "UNAUTHENTICATED"
    assert refusal(asking, "x", "predict").reason == "UNAUTHENTICATED"
    assert refusal(asking, tokens.alice, "sleep", version="3").message == (
        "alice may not use method 'sleep'; it may use: echo, predict"
    )
    assert refusal(asking, tokens.alice, "predict", version="4").reason == "PERMISSION_DENIED"
    assert refusal(asking, tokens.alice, "predict").message == "alice may not use version 'default'; it may use: 3"

    async def main() -> None:
        async with client(asking, tokens.alice) as alice:
            assert len(await alice.predict(b"x", version="3")) == 64
        async with client(asking, tokens.bob) as bob:
            assert len(await bob.predict(b"x")) == 64
            # What the caller says of itself is not said twice.
            with pytest.raises(Refused, match="does not know the token"):
                await bob.predict(b"x", metadata=[("authorization", "Bearer other")])

    run(main)
    assert tokens.alice not in asking.log_text()
    assert hash_of(tokens.alice) not in asking.log_text()


def test_a_stock_client(asking: Served, tokens: Tokens) -> None:
    """It gets the two gRPC statuses; health is answered without a token."""

    def ask(token: str, method: str) -> stranger.Reply:
        return stranger.ask(asking.address, method, version="3", metadata=[("authorization", f"Bearer {token}")])

    assert ask("x", "predict").code is grpc.StatusCode.UNAUTHENTICATED
    assert ask("x", "predict").messages == [], "not even a heartbeat"
    denied = ask(tokens.alice, "sleep")
    assert (denied.code, denied.info.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    assert ask(tokens.alice, "predict").code is grpc.StatusCode.OK
    health = [sys.executable, "-m", "aipod", "health", "--to", asking.address]
    assert subprocess.run(health, cwd=ROOT, capture_output=True, text=True).stdout == "SERVING\n"


def test_a_ticket_does_not_cross_names(asking: Served, tokens: Tokens) -> None:
    """Mutants seen: no look at the owner before ATTACH, CANCEL and RELEASE; in lists."""

    async def main() -> None:
        async with client(asking, tokens.bob) as bob, client(asking, tokens.alice) as alice:
            job = await bob.submit("predict", b"x", version="3")
            theirs = alice.attach(job.ticket)
            for use in (theirs.wait, theirs.cancel, theirs.release):
                with pytest.raises(Refused, match="this job is not alice's") as caught:
                    await use()
                assert caught.value.reason == "PERMISSION_DENIED"
            listing = [("x-func-name", "aipod.jobs")]
            assert [entry["id"] for entry in await bob.chaos(metadata=listing)] == [job.id]
            assert await alice.chaos(metadata=listing) == []
            assert len(await job.wait()) == 64
            assert len(await bob.attach(job.ticket).wait()) == 64, "as often as it is asked"

    run(main)


def test_a_request_with_another_names_ticket(asking: Served, tokens: Tokens, tmp_path: Path) -> None:
    """RUN and RESUME, and `open.released`. Mutants seen: no look at the owner in either."""
    file = tmp_path / "ticket"

    async def main() -> None:
        async with client(asking, tokens.bob) as bob:
            job = await bob.submit("predict", b"x", version="3", ticket_file=file)
        async with client(asking, tokens.alice) as alice:
            with pytest.raises(Refused, match="this job is not alice's"):
                await alice.predict(b"x", version="3", ticket_file=file)
            # As of a client that says that it has bob's answer.
            mine = await alice.submit("predict", b"x", version="3")
            await mine.wait()
        opening = stranger.Open(ticket=mine.ticket, op=4, released=[job.ticket])  # RELEASE
        metadata = [("x-job-id", mine.id), ("authorization", f"Bearer {tokens.alice}")]
        reply = stranger.ask_sync(asking.address, "chaos", [stranger.Raw(open=opening)], metadata=metadata)
        assert reply.code is grpc.StatusCode.OK
        async with client(asking, tokens.bob) as bob:
            assert len(await bob.attach(job.ticket).wait()) == 64

    run(main)


def test_a_token_that_is_taken_back_and_a_file_that_breaks(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    carol = add_token(path, "carol", [], [])
    served = serve(MODEL, "--tokens", str(path))

    async def main() -> int:
        async with client(served, carol) as caller:
            return len(await caller.predict(b"x"))

    assert run(main) == 64
    path.write_text("[broken")
    wait_until(lambda: "who was known stays known" in served.log_text())
    assert run(main) == 64
    path.unlink()
    dave = add_token(path, "dave", [], [])
    wait_until(lambda: "has changed: it has 1 names" in served.log_text())
    assert refusal(served, carol, "predict").reason == "UNAUTHENTICATED"
    carol = dave
    assert run(main) == 64


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("tls"))


def test_the_name_in_a_certificate_owns_its_jobs(serve: Serve, files: Files) -> None:
    served = serve(MODEL, "--tls-cert", files.server, "--tls-ca", files.ca)
    config = Config(tls=True, tls_ca=files.ca, tls_cert=files.client, attempts=1)

    async def main() -> str:
        async with aipod.Client(served.address, config=config) as caller:
            job = await caller.submit("predict", b"x")
            assert len(await job.wait()) == 64
            return job.id

    journal = (served.spool / run(main) / "state").read_text()
    assert re.search('"owner": ?"client@example.org"', journal)


def test_two_certificates_with_one_name_are_one_caller(serve: Serve, tmp_path: Path) -> None:
    """And share its jobs; one with another name does not. Mutant seen: the name is not the certificate's."""
    ca = trustme.CA()
    paths = [tmp_path / f"{name}.pem" for name in ("ca", "server", "mine", "renewed", "other")]
    ca.cert_pem.write_to_path(paths[0])
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(paths[1])
    for path, name in zip(paths[2:], ("scanner", "scanner", "printer"), strict=True):
        ca.issue_cert("x@example.org", common_name=name).private_key_and_cert_chain_pem.write_to_path(path)
    served = serve(MODEL, "--tls-cert", str(paths[1]), "--tls-ca", str(paths[0]))

    def caller(path: Path) -> aipod.Client:
        settings = Config(tls=True, tls_ca=str(paths[0]), tls_cert=str(path), attempts=1)
        return aipod.Client(served.address, config=settings)

    async def main() -> None:
        async with caller(paths[2]) as mine, caller(paths[3]) as renewed, caller(paths[4]) as other:
            job = await mine.submit("predict", b"x")
            assert len(await renewed.attach(job.ticket).wait()) == 64
            listing = [("x-func-name", "aipod.jobs")]
            assert [entry["id"] for entry in await renewed.chaos(metadata=listing)] == [job.id]
            assert await other.chaos(metadata=listing) == []
            with pytest.raises(Refused, match="this job is not printer's"):
                await other.attach(job.ticket).wait()

    run(main)


def test_with_certificates_and_tokens_both_are_needed_and_the_token_names_the_caller(
    serve: Serve, files: Files, tokens: Tokens
) -> None:
    """Mutants seen: a certificate is enough; the name is the certificate's."""
    served = serve(MODEL, "--tls-cert", files.server, "--tls-ca", files.ca, "--tokens", str(tokens.path))

    async def predict(**settings: str) -> str:
        config = Config(tls=True, tls_ca=files.ca, attempts=1, **settings)
        async with aipod.Client(served.address, config=config) as caller:
            job = await caller.submit("predict", b"x", version="3")
            await job.wait()
            return job.id

    async def main() -> str:
        with pytest.raises((aipod.Unreachable, aipod.JobLost)):
            await predict(token=tokens.alice)
        with pytest.raises(Refused) as caught:
            await predict(tls_cert=files.client)
        assert caught.value.reason == "UNAUTHENTICATED"
        return await predict(tls_cert=files.client, token=tokens.alice)

    journal = (served.spool / run(main) / "state").read_text()
    assert re.search('"owner": ?"alice"', journal)


# --- the command line


def aipod_command(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = [sys.executable, "-m", "aipod", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(env or {})})


def test_a_token_made_and_used_on_the_command_line(serve: Serve, tmp_path: Path) -> None:
    path, mine = str(tmp_path / "tokens.toml"), tmp_path / "mine"
    made = aipod_command("token", "erin", "--tokens", path, "--method", "predict")
    assert made.returncode == 0
    mine.write_text(made.stdout)
    served = serve(MODEL, "--tokens", path)
    call = ("call", "--to", served.address)
    assert len(aipod_command(*call, "predict", "--token-file", str(mine)).stdout) == 67
    assert len(aipod_command(*call, "predict", env={"AIPOD_TOKEN": made.stdout}).stdout) == 67
    denied = aipod_command(*call, "sleep", "--token-file", str(mine))
    assert (denied.returncode, denied.stderr) == (
        1,
        "aipod: PERMISSION_DENIED: erin may not use method 'sleep'; it may use: predict "
        "(whoever runs the server can allow it in the file of serve --tokens)\n",
    )
    without = aipod_command(*call, "predict")
    assert without.returncode == 1
    assert without.stderr.startswith("aipod: UNAUTHENTICATED: ")
    assert "--token-file" in without.stderr
    # The command line goes before the environment, and that before the file.
    config = tmp_path / "config.toml"
    config.write_text(f'[aipod]\ntoken_file = "{mine}"')
    assert len(aipod_command(*call, "predict", "--config", str(config)).stdout) == 67
    wrong = {"AIPOD_TOKEN": "wrong"}
    assert "does not know" in aipod_command(*call, "predict", "--config", str(config), env=wrong).stderr
    assert len(aipod_command(*call, "predict", "--token-file", str(mine), env=wrong).stdout) == 67
    config.write_text('[aipod]\ntoken = "secret"')
    refused = aipod_command(*call, "predict", "--config", str(config))
    assert (refused.returncode, "secret" in refused.stderr) == (2, False)


def test_a_token_goes_into_a_file_of_its_own_or_is_not_made(tmp_path: Path) -> None:
    path, mine = str(tmp_path / "tokens.toml"), tmp_path / "mine"
    make = ("token", "erin", "--tokens", path, "-o", str(mine))
    assert aipod_command(*make).returncode == 0
    assert mine.stat().st_mode & 0o777 == 0o600
    assert Identities(path).identify(f"Bearer {mine.read_text()}", None) == Caller("erin")
    known = Path(path).read_text()
    for target in (mine, tmp_path / "other"):  # there is such a file, and there is such a name
        again = aipod_command(*make[:-1], str(target))
        assert again.returncode in (1, 2)
        assert Path(path).read_text() == known
    assert "it has that name already" in again.stderr
    assert not (tmp_path / "other").exists()
    (tmp_path / "empty").touch()
    empty = aipod_command("jobs", "--token-file", str(tmp_path / "empty"))
    assert (empty.returncode, "there is no token in it" in empty.stderr) == (2, True)


def test_a_file_of_tokens_that_cannot_be_used(tmp_path: Path) -> None:
    for text in (None, "[alice"):
        path = tmp_path / "tokens.toml"
        if text is not None:
            path.write_text(text)
        ended = aipod_command("serve", MODEL, "--tokens", str(path), "--bind", "127.0.0.1:0", "--spool", "tmp")
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"aipod: USAGE: cannot use the tokens in {str(path)!r}")


def test_tokens_let_a_server_listen_anywhere(serve: Serve, tokens: Tokens) -> None:
    served = serve(MODEL, "--tokens", str(tokens.path), bind="0.0.0.0:0")
    assert "tokens come unencrypted" in served.log_text()
