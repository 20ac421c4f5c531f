"""`aipod nginx-conf`."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from aipod.cli import end_on_signals, plain
from aipod.cli.help import Command, More
from aipod.cli.nginx_check import audit
from aipod.cli.nginx_setup import LISTEN, OLDEST, Setup, Upstream
from aipod.cli.nginx_template import render
from aipod.errors import AipodError, UsageError

# `nginx -t` resolves the names of the servers.
_TEST_SECONDS = 60.0
_PATHS = ("tls_cert", "tls_key", "server_ca", "server_cert", "server_key", "run_dir")


def _path_option(
    flag: str, help: str, kind: type[click.Option] = More
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(flag, metavar="PATH", default="", help=help, cls=kind)


@click.command("nginx-conf", cls=Command)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option(
    "--upstream",
    "upstreams",
    multiple=True,
    metavar="NAME=ADDRESS,...",
    help="The name in callers' header x-upstream, and its servers: HOST:PORT, [::1]:PORT, unix:/PATH; may be repeated.",
)
@click.option("--default", default="", metavar="NAME", help="The upstream of calls that name none. [the first]")
@click.option(
    "--shared-spool",
    multiple=True,
    metavar="NAME",
    help="The servers of this upstream share one --spool, so calls go where the fewest run; may be repeated. In "
    "others, which have one each, the job's id chooses the server.",
)
@click.option(
    "--listen", multiple=True, metavar="[HOST:]PORT", help=f"Where nginx listens [{LISTEN[0]}]; may be repeated."
)
@click.option("--insecure", is_flag=True, help="Listen on other than loopback addresses without TLS.")
@_path_option("--tls-cert", "PEM file with nginx's certificate chain.", click.Option)
@_path_option("--tls-key", "PEM file with its key.", click.Option)
@_path_option("--server-ca", "PEM file with the authorities of the servers' certificates, where servers speak TLS.")
@click.option("--server-name", cls=More, default="", help="The name that those certificates have, of all servers.")
@_path_option("--server-cert", "PEM file with the certificate that nginx shows to them (their --tls-ca).")
@_path_option("--server-key", "PEM file with its key.")
@_path_option("--run-dir", "Where nginx has its pid, logs and temporary files, where it does not run as root.")
@click.option("--log-stdout", cls=More, is_flag=True, help="Log to stdout and stderr, as in a container.")
@click.option(
    "--nginx", default="", metavar="VERSION", help="The version of nginx [that of `nginx -v` here, else 1.22]."
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write it to this file. [stdout]")
@click.option("--check", is_flag=True, help="Check it, or FILE, by `nginx -t` and for what would break jobs.")
def nginx_conf(
    file: Path | None,
    upstreams: tuple[str, ...],
    shared_spool: tuple[str, ...],
    listen: tuple[str, ...],
    nginx: str,
    output: Path | None,
    check: bool,
    **options: Any,
) -> None:
    """Write a complete configuration of nginx for one or several models with any number of servers.

    \b
    aipod nginx-conf --upstream scan=10.0.0.5:50051,10.0.0.6:50051 --upstream report=127.0.0.1:50051 \\
        --listen 8443 --tls-cert /etc/nginx/aipod.crt --tls-key /etc/nginx/aipod.key --check -o nginx.conf

    With --check nothing is written that nginx does not take. `--check FILE` checks a configuration that there is, with
    all that it includes: each line names a directive that would break jobs, and says what to write.
    """
    end_on_signals()
    if file is not None:
        if not check or upstreams:
            raise click.UsageError("FILE is what --check looks at; it goes with no --upstream (write one with -o)")
        _check(file)
        click.echo(f"{file}: nothing in it would break jobs")
        return
    names = {text.partition("=")[0] for text in upstreams}
    for name in shared_spool:
        if name not in names:
            raise click.UsageError(f"--shared-spool {name} is none of the upstreams")
    options |= {name: os.path.abspath(options[name]) for name in _PATHS if options[name]}
    setup = Setup(
        upstreams=tuple(Upstream.parse(text, shared_spool) for text in upstreams),
        listen=listen or LISTEN,
        nginx=_version(nginx) if nginx else version_here(),
        **options,
    )
    if check:
        with tempfile.TemporaryDirectory(prefix="aipod-nginx-") as directory:
            # Else only root could check one that root is to run.
            path = Path(directory) / "nginx.conf"
            path.write_text(render(setup if setup.run_dir else replace(setup, run_dir=directory)))
            _check(path)
    if output is None:
        click.echo(render(setup), nl=False)
        return
    # Beside and renamed: nginx may be told to reload at any time.
    fresh = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    try:
        fresh.write_text(render(setup))
        fresh.replace(output)
    finally:
        fresh.unlink(missing_ok=True)


def _version(text: str) -> tuple[int, ...]:
    if not re.match(r"[0-9]{1,4}(\.[0-9]{1,4}){1,2}\Z", text):
        raise UsageError(f"{text!r} is no version of nginx; write 1.22, or 1.27.3")
    return tuple(map(int, text.split(".")))


def version_here() -> tuple[int, ...]:
    """What `nginx -v` says. Raises `UsageError`."""
    program = shutil.which("nginx")
    if program is None:
        return OLDEST  # what it takes, newer ones take as well, with a warning
    said = subprocess.run([program, "-v"], capture_output=True, text=True, timeout=_TEST_SECONDS).stderr
    match = re.search(r"nginx/(\d+(?:\.\d+)+)", said)
    return _version(match[1]) if match else OLDEST


def _check(path: Path) -> None:
    """Raises `AipodError` where jobs would break, or nginx does not take it; `UsageError` where it cannot be read."""
    findings = audit(path)
    for finding in findings:
        click.echo(plain(str(finding)))
    if findings:
        raise AipodError("NGINX_CHECK", f"{path}: {len(findings)} things in it would break jobs")
    program = shutil.which("nginx")
    if program is None:
        found = "nothing in it would break jobs, but nginx is not installed here"
        raise AipodError("NGINX_CHECK", f"{found}; run nginx -t -c FILE where it is")
    with tempfile.TemporaryDirectory(prefix="aipod-nginx-") as directory:
        command = [program, "-t", "-q", "-c", os.path.abspath(path), "-e", f"{directory}/error.log"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TEST_SECONDS)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "[emerg]" in line] or done.stderr.splitlines()
        hint = " (not root: run it as who runs nginx)" if "Permission denied" in done.stderr and os.getuid() else ""
        raise AipodError("NGINX_CHECK", f"nginx does not take it: {'; '.join(lines)}{hint}")
