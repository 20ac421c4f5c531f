"""`aipod nginx-conf`: nginx takes what it makes, what it is told cannot become syntax, what breaks jobs is named."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from aipod.cli.nginx_check import audit
from aipod.cli.nginx_setup import Setup, Upstream
from aipod.cli.nginx_template import render
from aipod.errors import UsageError
from tests.conftest import ROOT, free_port, require
from tests.test_cli import aipod
from tests.test_tls import Files, files  # noqa: F401  the fixture

CONF = ROOT / "deploy" / "nginx.conf"
ONE = ("--upstream", "scan=127.0.0.1:50051")
SCAN = Upstream("scan", ("127.0.0.1:50051",))


def made_by(text: str) -> list[str]:
    """The command that a configuration says that it was made by."""
    lines = re.search(r"^# Made by: (aipod nginx-conf .*?[^\\])$", text, re.MULTILINE | re.DOTALL)
    assert lines is not None
    return shlex.split(lines[1].replace("\\\n#", ""))[1:]


def test_the_committed_file_is_what_the_command_makes() -> None:
    """So it is never edited: `aipod nginx-conf … -o deploy/nginx.conf`, as its first lines say."""
    done = aipod(*made_by(CONF.read_text()), forked=True)
    assert (done.status, done.err) == (0, "")
    assert done.out.decode() == CONF.read_text()


TLS = ("--tls-cert={server}", "--tls-key={server}", "--listen=[::1]:{port}", "--listen={port}")
TO_SERVERS = ("--server-ca={ca}", "--server-name=localhost", "--server-cert={client}", "--server-key={client}")


@pytest.mark.parametrize(
    "arguments",
    [
        ONE,
        ("--upstream=scan=[::1]:1,unix:/run/aipod/scan.sock,localhost:65535", *TLS),
        ("--upstream=a=127.0.0.1:1,127.0.0.2:1", "--upstream=b=127.0.0.1:2", "--default=b", *TLS, *TO_SERVERS),
        ("--upstream=a.B-c_d=127.0.0.1:1,127.0.0.2:1", "--shared-spool=a.B-c_d", "--insecure", "--listen={port}"),
        (*ONE, "--log-stdout"),
    ],
    ids=["one server", "tls", "tls on both sides", "everybody", "as in a container"],
)
def test_nginx_takes_it(files: Files, tmp_path: Path, arguments: tuple[str, ...]) -> None:  # noqa: F811
    """Also with warnings for errors. Where nginx need not be root, all that it writes is in --run-dir."""
    require("nginx")
    values = {**vars(files), "port": free_port()}
    told = [argument.format_map(values) for argument in arguments]
    output = tmp_path / "nginx.conf"
    done = aipod("nginx-conf", *told, "--run-dir", str(tmp_path), "--check", "-o", str(output), forked=True)
    assert (done.status, done.out, done.err) == (0, b"", "")
    assert aipod(*made_by(output.read_text()), forked=True).out.decode() == output.read_text()
    assert aipod("nginx-conf", "--check", str(output), forked=True).out.decode().endswith("would break jobs\n")
    said = subprocess.run(
        ["nginx", "-t", "-c", str(output), "-e", "stderr"], capture_output=True, text=True, timeout=20
    )
    assert said.returncode == 0
    assert "[warn]" not in said.stderr
    paths = re.findall(
        r"^\s*(?:pid|error_log|access_log|\w+_temp_path) (\S+?);?(?: aipod;)?$", output.read_text(), re.M
    )
    assert len(paths) == 8
    streams = {"/dev/stdout", "/dev/stderr"} if "--log-stdout" in arguments else set()
    assert {os.path.dirname(path) for path in paths if path not in streams} == {str(tmp_path)}
    assert streams <= set(paths)


def test_each_version_of_nginx_has_its_word_for_http2() -> None:
    """nginx 1.22 does not know the directive, 1.25.1 warns of the parameter."""
    texts = {
        version: render(Setup(upstreams=(SCAN,), nginx=version)) for version in ((1, 22), (1, 25), (1, 25, 1), (1, 27))
    }
    assert {version: " http2;" in text for version, text in texts.items()} == {
        (1, 22): True,
        (1, 25): True,
        (1, 25, 1): False,
        (1, 27): False,
    }
    assert all(("http2 on;" in text) is (" http2;" not in text) for text in texts.values())


BAD: dict[str, tuple[str, ...]] = {
    "no upstream": (),
    "no server": ("--upstream=scan",),
    "empty server": ("--upstream=scan=",),
    "one empty server": ("--upstream=scan=127.0.0.1:1,",),
    "no port": ("--upstream=scan=127.0.0.1",),
    "port 0": ("--upstream=scan=127.0.0.1:0",),
    "port 65536": ("--upstream=scan=127.0.0.1:65536",),
    "port of other digits": ("--upstream=scan=127.0.0.1:\u0665",),
    "syntax in an address": ("--upstream=scan=127.0.0.1:1;}server{",),
    "a line in an address": ("--upstream=scan=127.0.0.1:1\n",),
    "syntax in a host": ("--upstream=scan=a b:1",),
    "a variable for a host": ("--upstream=scan=$http_host:1",),
    "no IPv6 address": ("--upstream=scan=[::g]:1",),
    "a zone": ("--upstream=scan=[fe80::1%lo]:1",),
    "a scheme": ("--upstream=scan=grpc://127.0.0.1:1",),
    "a relative socket": ("--upstream=scan=unix:s",),
    "syntax in a socket": ("--upstream=scan=unix:/s;",),
    "an address twice": ("--upstream=scan=127.0.0.1:1,127.0.0.1:1",),
    "a name twice": (*ONE, "--upstream=SCAN=127.0.0.1:2"),
    "a name of map's own": ("--upstream=Default=127.0.0.1:1",),
    "a zone's name": ("--upstream=aipod_callers=127.0.0.1:1",),
    "an expression for a name": ("--upstream=~.*=127.0.0.1:1",),
    "syntax in a name": ('--upstream=a";b=127.0.0.1:1',),
    "an empty name": ("--upstream==127.0.0.1:1",),
    "another default": (*ONE, "--default=x"),
    "another shared spool": (*ONE, "--shared-spool=x"),
    "listens in the clear": (*ONE, "--listen=8080"),
    "listens in the clear on an address": (*ONE, "--listen=10.0.0.1:8080"),
    "listens in the clear on a name": (*ONE, "--listen=example.org:8080"),
    "listens to syntax": (*ONE, "--insecure", "--listen=8080 default_server"),
    "listens on a unix socket": (*ONE, "--insecure", "--listen=unix:/s"),
    "listens on port 0": (*ONE, "--insecure", "--listen=0"),
    "a certificate without its key": (*ONE, "--tls-cert=/x"),
    "a key without its certificate": (*ONE, "--tls-key=/x"),
    "syntax in a path": (*ONE, "--tls-cert=/x;", "--tls-key=/x"),
    "a quote in a path": (*ONE, '--run-dir=/x"'),
    "a line in a path": (*ONE, "--run-dir=/x\n"),
    "servers of any name": (*ONE, "--server-ca=/x"),
    "servers of no authority": (*ONE, "--server-name=x"),
    "a certificate for nobody": (*ONE, "--server-cert=/x", "--server-key=/x"),
    "a certificate for servers without its key": (*ONE, "--server-ca=/x", "--server-name=x", "--server-cert=/x"),
    "syntax in the servers' name": (*ONE, "--server-ca=/x", "--server-name=x;"),
    "an old nginx": (*ONE, "--nginx=1.20.2"),
    "no version": (*ONE, "--nginx=new"),
    "a file and upstreams": (*ONE, "--check", "x.conf"),
    "a file that is not checked": ("x.conf",),
    "no file": ("--check", "/nowhere/nginx.conf"),
    "no configuration": ("--check", str(Path(sys.executable).resolve())),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_refused(name: str, tmp_path: Path) -> None:
    output = tmp_path / "nginx.conf"
    done = aipod("nginx-conf", *BAD[name], "-o", str(output), forked=True)
    assert (done.status, done.out) == (2, b"")
    assert re.match("aipod: USAGE: .+", done.last)
    assert not output.exists()


def test_without_nginx_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "nginx.conf"
    environ = {"PATH": str(Path(sys.executable).parent)}
    done = aipod("nginx-conf", *ONE, "--check", "-o", str(output), environ=environ)
    assert (done.status, done.out) == (1, b"")
    assert "nginx is not installed here" in done.last
    assert list(tmp_path.iterdir()) == []
    done = aipod("nginx-conf", *ONE, environ=environ)  # which needs none
    assert made_by(done.out.decode())[-1] == "--nginx=1.22"


def test_what_nginx_does_not_take_is_not_written(tmp_path: Path) -> None:
    require("nginx")
    output = tmp_path / "nginx.conf"
    output.write_text("before")
    key = tmp_path / "none.pem"
    done = aipod(
        *("nginx-conf", *ONE, f"--tls-cert={key}", f"--tls-key={key}", "--check", "-o", str(output)), forked=True
    )
    assert done.status == 1
    assert re.match(r"aipod: NGINX_CHECK: nginx does not take it: .*cannot load certificate.*none\.pem", done.last)
    assert output.read_text() == "before"
    assert list(tmp_path.iterdir()) == [output]


# ---- what would break jobs


def changed(pattern: str, new: str) -> str:
    """The committed configuration, wrong in one way."""
    text, found = re.subn(pattern, new, CONF.read_text(), flags=re.MULTILINE)
    assert found
    return text


WRONG = {
    "worker_shutdown_timeout 60s": (r"^events", "worker_shutdown_timeout 60s;\nevents"),
    "listen 127.0.0.1:8080": (r" http2;", ";"),
    "client_max_body_size 1g": (r"client_max_body_size 0", "client_max_body_size 1g"),
    "client_max_body_size is not set": (r" client_max_body_size 0;", ""),
    "client_body_timeout 2s": (r"client_body_timeout 300s", "client_body_timeout 2s"),
    "grpc_read_timeout 500ms": (r"grpc_read_timeout 60s", "grpc_read_timeout 500ms"),
    "grpc_send_timeout 2": (r"grpc_send_timeout 300s", "grpc_send_timeout 2"),
    "send_timeout 0m1s": (r" send_timeout 180s", ' send_timeout "0m1s"'),
    "large_client_header_buffers 4 8k": (r"large_client_header_buffers 4 64k", "large_client_header_buffers 4 8k"),
    "large_client_header_buffers is not set": (r" large_client_header_buffers 4 64k;", ""),
    "grpc_buffer_size 4k": (r"grpc_buffer_size 64k", "grpc_buffer_size 4k"),
    "grpc_buffer_size is not set": (r" grpc_buffer_size 64k;", ""),
    "grpc_next_upstream error timeout non_idempotent": (r"error timeout;", "error timeout non_idempotent;"),
    "grpc_pass grpc://$http_x_upstream": (r"grpc://\$aipod_upstream", "grpc://$http_x_upstream"),
    # the same by the map, which has a list but takes others as well
    "grpc_pass grpc://$aipod_upstream": (r'^ +default +"";', "default $http_x_upstream;"),
    "error_page 502 503 504 is not set": (r" error_page 429 500 502 503 504 = \S+;", ""),
    "error_page 502 503 504 is not set here: to callers": (r" add_header grpc-status [^;]+;", ""),
    "error_page 502 503 504 is not set here: to callers nginx's own": (r"return 200;", "return 503;"),
    "no location has grpc_pass": (r"grpc_pass grpc:", "proxy_pass http:"),
}


@pytest.mark.parametrize("finding", WRONG)
def test_each_directive_that_breaks_jobs_is_named(finding: str, tmp_path: Path) -> None:
    """And nothing else is, though one place may have it twice: there are two locations."""
    path = tmp_path / "nginx.conf"
    path.write_text(changed(*WRONG[finding]))
    found = audit(path)
    assert found
    assert {str(one).partition(": ")[2].startswith(finding) for one in found} == {True}
    assert {one.file for one in found} == {str(path)}


def test_what_only_nginx_can_read_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "nginx.conf"
    odd = 'location ~ "^/(?R)?x" { return 200; } send_timeout %s; client_max_body_size %s; location /ai.AI/' % (
        (9 * "123456789" * 600,) * 2
    )
    path.write_text(changed(r"location /ai.AI/", odd).replace(" client_max_body_size 0;", "").replace("180s", "181s"))
    assert audit(path) == []


def test_a_finding_does_nothing_to_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "nginx.conf"
    path.write_text(changed(r"grpc://\$aipod_upstream", '"grpc://$http_x_upstream\x1b]0;x\x07"'))
    done = aipod("nginx-conf", "--check", str(path), forked=True)
    assert (done.status, b"grpc_pass" in done.out, b"\x1b" in done.out) == (1, True, False)


def test_the_tested_configuration_breaks_nothing(tmp_path: Path) -> None:
    assert audit(CONF) == []
    path = tmp_path / "nginx.conf"
    path.write_text(render(Setup(upstreams=(SCAN,), nginx=(1, 25, 1))))  # which nginx 1.22 could not read
    assert audit(path) == []


def test_the_nearest_directive_counts_also_of_an_included_file(tmp_path: Path) -> None:
    """A directive hides those of the levels outside, and all are named where they are."""
    (tmp_path / "here.conf").write_text("\nclient_max_body_size 5m;\n")
    path = tmp_path / "nginx.conf"
    path.write_text(changed(r"^( +)(location /ai.AI/ \{)", r"\1\2 include here.conf; grpc_read_timeout 1s;"))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "include" in text)
    assert [str(one).partition(";")[0] for one in audit(path)] == [
        f"{tmp_path}/here.conf:2: client_max_body_size 5m: cuts every upload that comes to it",
        f"{path}:{line}: grpc_read_timeout 1s: cuts jobs between two heartbeats of the server",
    ]
    (tmp_path / "here.conf").write_text("include here.conf;")
    with pytest.raises(UsageError, match="cannot be read"):
        audit(path)


def test_check_says_each_on_a_line(tmp_path: Path) -> None:
    path = tmp_path / "nginx.conf"
    path.write_text(changed(r"grpc_read_timeout 60s", "grpc_read_timeout 2s"))
    done = aipod("nginx-conf", "--check", str(path), forked=True)
    assert done.status == 1
    (line,) = done.out.decode().splitlines()
    assert re.match(rf"{re.escape(str(path))}:\d+: grpc_read_timeout 2s: .*; at least 3s$", line)
    assert done.last == f"aipod: NGINX_CHECK: {path}: 1 things in it would break jobs"


@pytest.mark.parametrize(
    "text",
    [
        *("http {", "http { map", "http } {", "http { server { location / { grpc_pass"),
        "http { server { listen 1 http2; location / { grpc_pass $x; grpc_read_timeout; } } }",
        "http { map $a $b { x y; } server { location { grpc_pass; error_page; } } }",
        "http { server { location / { grpc_pass $b; send_timeout $x; add_header; return; error_page 502 /; } } }",
        "http { map; geo; server; }",
        "http { server { if { grpc_pass grpc://x; client_max_body_size x y; } } }",
        "worker_shutdown_timeout;",
    ],
)
def test_a_file_that_is_not_whole_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "nginx.conf"
    path.write_text(text)
    with pytest.raises(UsageError, match="cannot be read"):
        audit(path)


def test_a_check_writes_nothing_where_nginx_would(tmp_path: Path) -> None:
    """So who is not root can check what root is to run. Mutant seen: it is checked with its own paths."""
    real = require("nginx")
    seen, wrapper = tmp_path / "seen", tmp_path / "bin" / "nginx"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f'#!/bin/sh\nfor word; do case $word in *.conf) cp "$word" {seen};; esac; done\nexec {real} "$@"\n'
    )
    wrapper.chmod(0o755)
    done = aipod("nginx-conf", *ONE, "--check", environ={"PATH": f"{wrapper.parent}:{os.environ['PATH']}"})
    assert done.status == 0
    assert "/var/log/nginx/aipod.log" in done.out.decode()
    assert "/var/log/nginx" not in seen.read_text()
    assert (
        len(re.findall(r"^\s*(?:pid|error_log|access_log|\w+_temp_path) \S*aipod-nginx-", seen.read_text(), re.M)) == 8
    )


def test_the_commands_in_the_readme_work() -> None:
    """Without their --check and -o."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "deploy" / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    commands = [re.sub(r"--check -o \S+|…", "", line) for line in lines if line.startswith("aipod nginx-conf ")]
    assert len(commands) == 2
    for command in commands:
        done = aipod(*shlex.split(command)[1:], forked=True)
        assert (done.status, done.err) == (0, "")
