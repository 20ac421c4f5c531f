"""`aipod doctor` in front of real nginx that is wrong in one way each: it names the directive."""

from __future__ import annotations

import asyncio
import datetime
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from aipod.config import MIB, Config
from aipod.doctor import Chain, Finding, Level, examine
from aipod.doctor.finding import said, worst_first
from aipod.doctor.idle import Cuts, judge
from aipod.doctor.limits import check_health
from aipod.doctor.load import Carried, judge_down, judge_goaway, judge_up
from aipod.doctor.wire import FAILURES, TIMED_OUT, Fate, attempt, fate_of, probing
from aipod.errors import Unreachable
from aipod.service.probe import AT_ONCE, MAX_BYTES
from tests.conftest import ROOT, Serve, Served, free_port, left_in, run, wait_until
from tests.proxy import open_proxy
from tests.test_nginx import nginx_command, of_nginx_alone

# Seconds that silence is watched for, and after which the configurations cut it that are wrong about it.
WAIT, CUT = 6.0, "2s"
# Doctors at once: as many as the server has probes for.
AT_A_TIME = 8


def directive(name: str, value: str) -> Any:
    """A change of one directive of the server block, which there is once."""

    def change(block: str) -> str:
        block, found = re.subn(rf"^( +){name} [^;]+;", rf"\g<1>{name} {value};", block, flags=re.MULTILINE)
        assert found == 1, name
        return block

    return change


def without_error_pages(block: str) -> str:
    return re.sub(r"^ +error_page [^;]+;\n", "", block, flags=re.MULTILINE)


def without_map(block: str) -> str:
    block = block.replace('if ($aipod_upstream = "") { return 418; }', "")
    return block.replace("grpc://$aipod_upstream", "grpc://segment")


def without_http2(block: str) -> str:
    return re.sub(r"^( +listen [^;]+) http2;", r"\1;", block, flags=re.MULTILINE)


def without_route(block: str) -> str:
    return block.replace("location /ai.AI/", "location /elsewhere/")


def with_tls(block: str) -> str:
    pair = "ssl_certificate server.pem; ssl_certificate_key server.pem;"
    return re.sub(r"^( +listen \S+)( http2)?;", rf"\1 ssl\2; {pair}", block, flags=re.MULTILINE)


# An answer that would clear a terminal, and say that all is well.
EVIL = r"""
        location /ai.AI/ {
            default_type application/grpc;
            add_header grpc-status 13 always;
            add_header grpc-message "%1B[2J%0Aok all is well%E2%80%AE" always;
            return 200;
        }
        location /elsewhere/"""

# Each is wrong in one way: what is changed, what the doctor finds, and the directive that it names.
WRONG: dict[str, tuple[Any, str, str]] = {
    "body": (directive("client_max_body_size", "1m"), "body-limit", "client_max_body_size"),
    "body timeout": (directive("client_body_timeout", CUT), "idle-request", "client_body_timeout"),
    "read timeout": (directive("grpc_read_timeout", CUT), "idle-response", "grpc_read_timeout"),
    "grpc_send timeout": (directive("grpc_send_timeout", CUT), "untaken-request", "grpc_send_timeout"),
    "send timeout": (directive("send_timeout", CUT), "untaken-response", "send_timeout"),
    "keepalive": (directive("keepalive_timeout", CUT), "idle-connection", "keepalive_timeout"),
    "requests": (directive("keepalive_requests", "3"), "calls-per-connection", "keepalive_requests"),
    "headers": (directive("large_client_header_buffers", "4 2k"), "header-limit", "large_client_header_buffers"),
    "buffer": (directive("grpc_buffer_size", "4k"), "download-frames", "grpc_buffer_size"),
    "streams": (directive("http2_max_concurrent_streams", "1"), "streams", "http2_max_concurrent_streams"),
    "errors": (without_error_pages, "proxy-errors", "error_page"),
    "map": (without_map, "routing", "map $http_x_upstream"),
    "http1": (without_http2, "http2", "http2"),
    "route": (without_route, "server", "location /ai.AI/"),
    "tls http1": (lambda block: without_http2(with_tls(block)), "http2", "http2"),
    "certificate": (with_tls, "certificate", "ssl_certificate"),
}
RIGHT = {
    "right": lambda block: block,
    "window": directive("client_body_buffer_size", "16k"),  # too small only for a distant caller
    "health": lambda block: block.replace("location /grpc.health.v1.Health/", "location /elsewhere/"),
    "evil": lambda block: block.replace("\n        location /ai.AI/", EVIL),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    started = Served("tests.models_proxied:Segment", tmp_path_factory.mktemp("server"), ("--drain", "5"), "127.0.0.1:0")
    try:
        yield started
    finally:
        assert started.stop() == 0
        assert left_in(started.spool) == [], "no job has begun"


class Proxies:
    """One nginx with a server block for each configuration."""

    def __init__(self, directory: Path, upstream: str) -> None:
        self.directory = directory
        self.addresses: dict[str, str] = {}
        ca = trustme.CA()
        ca.cert_pem.write_to_path(str(directory / "ca.pem"))
        soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=5, hours=12)
        pair = ca.issue_cert("127.0.0.1", not_after=soon).private_key_and_cert_chain_pem
        pair.write_to_path(str(directory / "server.pem"))
        text = re.sub(
            r"server 127\.0\.0\.1:5005\d ", f"server {upstream} ", (ROOT / "deploy" / "nginx.conf").read_text()
        )
        text = text.replace("/var/log/nginx", str(directory))
        temporary = [f"{name}_temp_path {directory};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")]
        text = text.replace("\nhttp {\n", "\n".join(["\nhttp {", *temporary, ""]))
        start, end = text.index("    server {\n"), text.rindex("}")
        blocks = []
        for name, change in {**RIGHT, **{name: wrong[0] for name, wrong in WRONG.items()}}.items():
            self.addresses[name] = f"127.0.0.1:{free_port()}"
            block = text[start:end].replace("listen 127.0.0.1:8080 http2;", f"listen {self.addresses[name]} http2;")
            changed = change(block)
            assert changed != block or name == "right", name
            blocks.append(changed)
        (directory / "nginx.conf").write_text(text[:start] + "".join(blocks) + text[end:])

    def config(self, name: str) -> Config:
        tls = name in ("tls http1", "certificate")
        return Config(tls=True, tls_ca=str(self.directory / "ca.pem")) if tls else Config()


@pytest.fixture(scope="module")
def proxies(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxies]:
    directory = tmp_path_factory.mktemp("nginx")
    made = Proxies(directory, served.address)
    command = [*nginx_command(directory), "-g", f"daemon off; pid {directory}/pid;"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until((directory / "pid").exists)
            yield made
        finally:
            process.terminate()
            assert process.wait(20) == 0


async def findings_of(
    target: str, config: Config, metadata: list[tuple[str, str]], wait: float = WAIT
) -> dict[str, Finding]:
    found: list[Finding] = []
    told: list[tuple[int, int]] = []
    await examine(Chain(target, config, metadata), wait, found, lambda done, of: told.append((done, of)))
    assert told == [] or told == [(done, told[0][1]) for done in range(told[0][1] + 1)]
    by_name = {finding.what: finding for finding in found}
    assert len(by_name) == len(found), "each is told once"
    return by_name


def doctor(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aipod", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def wrong_in(found: dict[str, Finding]) -> dict[str, str]:
    return {finding.what: finding.nginx for finding in found.values() if finding.level <= Level.CHANGE}


@of_nginx_alone
def test_each_wrong_configuration_is_named_and_nothing_else(proxies: Proxies) -> None:
    """Mutants seen, one for each: the check's own finding, or another one's beside it."""

    async def main() -> dict[str, dict[str, Finding]]:
        turns = asyncio.Semaphore(AT_A_TIME)
        found = {}

        async def one(name: str) -> None:
            async with turns:
                to = proxies.addresses[name]
                found[name] = await findings_of(to, proxies.config(name), [("x-upstream", "segment")])

        async with asyncio.TaskGroup() as group:
            for name in ("right", *WRONG):
                group.create_task(one(name))
        return found

    found = run(main, timeout=120)
    assert wrong_in(found.pop("right")) == {}
    for name, (_, what, nginx) in WRONG.items():
        wrong = wrong_in(found[name])
        assert nginx in wrong.pop(what), name
        # On a busy machine a heartbeat, or the next piece, may come too late for a timeout that short.
        if nginx.endswith("_timeout"):
            for late in ("call-time", "upload-rate", "download-rate"):
                assert nginx in wrong.pop(late, nginx), name
        assert wrong == {}, name
    assert found["body"]["body-limit"].value == MIB
    assert found["body"]["untaken-request"].level is Level.UNCHECKED
    assert found["requests"]["calls-per-connection"].value == 3
    assert found["requests"]["goaway"].level is Level.FINE
    for name, what in (("body timeout", "idle-request"), ("send timeout", "untaken-response")):
        assert 1.5 < found[name][what].value < WAIT
    assert found["certificate"]["certificate"].value == pytest.approx(5.5, abs=0.1)
    assert found["certificate"]["tls"].value.startswith("TLSv1.")
    assert re.search("404;.*418:", found["errors"]["proxy-errors"].found), "of a method, and of an upstream"
    # Silence hides what is later; that is said, not guessed.
    assert found["body timeout"]["untaken-request"].level is Level.UNCHECKED
    assert found["read timeout"]["idle-request"].level is Level.UNCHECKED


def test_a_server_without_a_proxy(served: Served) -> None:
    found = run(lambda: findings_of(served.address, Config(), [], wait=2))
    assert wrong_in(found) == {}
    assert "the server itself" in found["proxy-version"].found
    assert "--max-message 67108864" in found["server-limits"].found
    # What only proxies have is not spoken of.
    assert not {"reload", "routing", "proxy-errors", "upload-window", "download-frames"} & set(found)
    assert found["untaken-response"].level is found["call-time"].level is Level.FINE


@of_nginx_alone
def test_a_distant_caller_is_told_of_a_small_window(proxies: Proxies) -> None:
    async def main() -> tuple[dict[str, Finding], dict[str, Finding]]:
        async def through(name: str) -> dict[str, Finding]:
            async with open_proxy(int(proxies.addresses[name].rpartition(":")[2])) as far:
                far.delay = 0.03
                return await findings_of(far.address, Config(), [], wait=1)

        near, small = await asyncio.gather(through("right"), through("window"))
        return near, small

    near, small = run(main)
    assert near["ping-hop"].value > 0.06, "there and back"
    assert near["upload-window"].level is Level.FINE
    assert small["upload-window"].level is Level.CHANGE
    assert small["upload-window"].value == 65536
    # 50 MiB/s at 60 ms are 3 MiB; a busy machine makes more of the round trip.
    assert re.fullmatch(r"client_body_buffer_size (4|8|16|32)m;", small["upload-window"].nginx)


def test_the_command_with_nothing_to_change(proxies: Proxies) -> None:
    done = doctor(proxies.addresses["right"], "--wait", "1s")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(
        r"^ok +idle-response +a server that sends nothing but PINGs is waited for: 1.0 s and longer$", done.stdout, re.M
    )
    assert re.search(r"^\? +reload +worker_shutdown_timeout: only a reload shows it", done.stdout, re.M)
    assert "nginx: " not in done.stdout
    assert "CHANGE" not in done.stdout


def test_the_command_with_something_to_change(proxies: Proxies) -> None:
    done = doctor(proxies.addresses["map"], "--wait", "1s", "--upstream", "segment")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("CHANGE  routing"), "the worst comes first"
    assert "nginx: map $http_x_upstream $aipod_upstream { ... }" in done.stdout
    # Who names none may have one server only, and that is well.
    done = doctor(proxies.addresses["map"], "--wait", "1s", "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["well"], told["whole"], told["to"]) == (0, True, True, proxies.addresses["map"])
    routing = next(finding for finding in told["findings"] if finding["what"] == "routing")
    assert (routing["level"], set(routing)) == ("NOTE", {"level", "what", "found", "nginx", "others", "value"})


def test_health_that_is_not_routed_is_good_to_know(proxies: Proxies) -> None:
    def look(name: str) -> Finding:
        return run(lambda: check_health(Chain(proxies.addresses[name], Config(), [])))[0]

    assert look("right").level is Level.FINE
    assert (look("health").level, look("health").nginx) == (
        Level.NOTE,
        "location /grpc.health.v1.Health/ { grpc_pass ...; }",
    )


def test_what_is_answered_does_nothing_to_a_terminal(proxies: Proxies) -> None:
    done = doctor(proxies.addresses["evil"])
    assert done.returncode == 1
    assert all(line.isprintable() for line in done.stdout.splitlines()), done.stdout
    assert re.search(
        r"^BROKEN  server +a call is answered by grpc-status 13 \( \[2J ok all is well \)$", done.stdout, re.M
    )
    assert len(said("a\x1b\n" * 1000)) <= 160


def test_wrong_usage_and_nobody_there(served: Served) -> None:
    done = doctor("127.0.0.1:1", "--json")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("aipod: UNREACHABLE: no server answers at 127.0.0.1:1")
    for arguments in (["nonsense"], [served.address, "--wait", "3h"], [served.address, "--quick", "--wait", "2s"]):
        done = doctor(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("aipod: USAGE: ")


def test_ctrl_c_prints_what_was_found(proxies: Proxies) -> None:
    command = [sys.executable, "-m", "aipod", "doctor", proxies.addresses["right"], "--wait", "100s"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        log = proxies.directory / "aipod.log"
        before = log.read_text().count("/aipod.doctor/")
        wait_until(lambda: log.read_text().count("/aipod.doctor/") > before)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip()) == (130, "aipod: STOPPED: by Ctrl-C")
    assert re.search("^ok +body-limit +no limit$", out, re.MULTILINE)
    assert "idle-response" not in out
    assert out.endswith("(this is not all: it was ended before everything was checked)\n")


def test_a_server_that_wants_tls_or_has_another_certificate(serve: Serve, proxies: Proxies) -> None:
    pair = str(proxies.directory / "server.pem")
    served = serve("Plain", "--tls-cert", pair)
    with pytest.raises(Unreachable, match="perhaps the server wants TLS"):
        run(lambda: findings_of(served.address, Config(), []))
    found = run(lambda: findings_of(served.address, Config(tls=True), []))
    assert wrong_in(found) == {"tls": "ssl_certificate"}
    with pytest.raises(Unreachable, match="the server speaks no TLS: leave out --tls"):
        run(lambda: findings_of(serve("Plain").address, Config(tls=True), []))
    config = Config(tls=True, tls_ca=str(proxies.directory / "ca.pem"))
    found = run(lambda: findings_of(served.address, config, [], wait=1))
    assert set(wrong_in(found)) == {"certificate"}, "it is good for five days only"


def test_a_server_that_wants_a_token(serve: Serve, tmp_path: Path) -> None:
    tokens, mine = tmp_path / "tokens.toml", tmp_path / "mine"
    command = [sys.executable, "-m", "aipod", "token", "me", "--tokens", str(tokens), "-o", str(mine)]
    subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=ROOT)
    served = serve("Plain", "--tokens", str(tokens))
    found = run(lambda: findings_of(served.address, Config(), []))
    assert wrong_in(found) == {"server": ""}
    assert found["server"].others == "call with a token that may: --token-file"
    found = run(lambda: findings_of(served.address, Config(token=mine.read_text().strip()), [], wait=1))
    assert wrong_in(found) == {}


# ---- what follows from what was measured, where no nginx does it


def test_the_whole_time_of_a_call_is_told_from_silence() -> None:
    """As Envoy's route timeout does it: heartbeats do not help. It is not in nginx."""
    cut = Fate(15.0, status=4, text="upstream request timeout")
    found = {finding.what: finding for finding in judge(Cuts(cut, cut, cut, cut, cut), 20, None)}
    assert found["call-time"].level is Level.BROKEN
    assert "Envoy" in found["call-time"].others


def test_a_silence_that_is_cut_between_heartbeats_is_named() -> None:
    cut, late = Fate(1.0, reset=1), Fate(3.0, reset=1)
    found = {finding.what: finding for finding in judge(Cuts(cut, None, cut, None, late), 20, None)}
    assert (found["call-time"].level, found["call-time"].nginx) == (Level.BROKEN, "client_body_timeout 300s;")


def test_two_timers_are_told_from_each_other_by_how_they_cut() -> None:
    silent, unread = Fate(2.0, reset=2), Fate(10.0, reset=1)
    found = {finding.what: finding for finding in judge(Cuts(silent, silent, silent, unread, None), 20, None)}
    named = {what: finding.nginx for what, finding in found.items() if finding.level is Level.CHANGE}
    assert named == {"idle-response": "grpc_read_timeout 60s;", "untaken-response": "send_timeout 180s;"}
    assert found["idle-request"].level is found["untaken-request"].level is Level.UNCHECKED


def test_a_proxy_that_buffers_is_named() -> None:
    held = Fate(10.0, lost=True, text=TIMED_OUT, early=True)
    found = {finding.what: finding for finding in judge(Cuts(held, None, held, None, held), 20, None)}
    assert (found["call-time"].level, found["idle-request"].level) == (Level.BROKEN, Level.UNCHECKED)
    assert "buffered" in found["call-time"].found


def test_a_transfer_that_is_cut() -> None:
    cut = Carried(2 * MIB, 0.5, fate=Fate(0.5, reset=2, headers={":status": "200"}))
    (up,), (down,) = judge_up(cut, 0.001, direct=False), judge_down(cut, direct=False)
    assert (up.level, down.level) == (Level.BROKEN, Level.BROKEN)
    assert ("client_max_body_size 0;" in up.nginx, "send_timeout 180s;" in down.nginx) == (True, True)
    refused = Carried(0, 0.5, fate=Fate(0.5, status=8, reason="OVERLOADED", headers={":status": "200"}))
    assert judge_up(refused, 0.001, direct=False)[0].level is Level.UNCHECKED


def test_connections_whose_calls_die_with_them() -> None:
    assert [finding.level for finding in judge_goaway(200, 200, False)] == [Level.FINE, Level.BROKEN]


def test_the_worst_comes_first() -> None:
    found = [Finding(level, "x", "") for level in reversed(Level)]
    assert [finding.level for finding in worst_first(found)] == sorted(Level)


# ---- aipod.probe, the server's part


def asked(served: Served, asked: dict[str, Any], **config: Any) -> Fate:
    return run(lambda: attempt(Chain(served.address, Config(**config), []), asked))


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"nothing": 1}, "has no 'nothing'"),
        ({"silent": "1"}, "silent is not of type float"),
        ({"silent": True}, "silent is not of type float"),
        ({"silent": 601}, "between 0 and 600"),
        ({"silent": -1}, "between 0 and 600"),
        ({"give": 1.5}, "give is not of type int"),
        ({"give": MAX_BYTES + 1}, "between 0"),
        ({"beat": 1}, "beat is not of type bool"),
    ],
)
def test_what_a_probe_cannot_ask_for(served: Served, kwargs: dict[str, Any], text: str) -> None:
    told = asked(served, kwargs)
    assert told.reason == "BAD_KWARGS"
    assert text in told.text


def test_a_probe_takes_no_more_than_a_payload_may_have(serve: Serve) -> None:
    served = serve("Plain", "--max-payload", "1000")
    assert asked(served, {"take": 1001}).reason == "PAYLOAD_TOO_LARGE"
    assert asked(served, {"take": 1000}).fine


def test_only_so_many_probes_at_once_and_a_drain_ends_them(serve: Serve) -> None:
    served = serve("Plain")

    chain = Chain(served.address, Config(), [])

    async def hold(together: asyncio.Barrier) -> Fate:
        async with chain.sound() as channel, probing(chain, channel) as probe:
            await probe.ask({"silent": 600})
            await together.wait()
            try:
                while await probe.receive() is not None:
                    pass
            except FAILURES as exc:
                return fate_of(exc, probe, 0)
            return fate_of(None, probe, 0)

    async def main() -> list[Fate]:
        together = asyncio.Barrier(AT_ONCE + 1)
        held = [asyncio.create_task(hold(together)) for _ in range(AT_ONCE)]
        await together.wait()
        assert (await attempt(chain)).reason == "OVERLOADED"
        served.process.send_signal(signal.SIGTERM)
        return await asyncio.gather(*held)

    assert {told.reason for told in run(main)} == {"DRAINING"}
    served.process.communicate(timeout=30)
    assert served.process.returncode == 0
