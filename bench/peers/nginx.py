"""A real nginx between client and server: `serve --to=PORT --kind=grpc|http`.

For gRPC with what `aipod nginx-conf` writes. For HTTP as nginx's own documents advise for large bodies
(https://nginx.org/en/docs/http/ngx_http_proxy_module.html): neither requests nor answers are buffered on its disk,
connections to the server are kept, HTTP/1.1. One worker each, as there is one connection.
"""

from __future__ import annotations

import ctypes
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from aipod.cli.nginx_conf import version_here
from aipod.cli.nginx_setup import Setup, Upstream
from aipod.cli.nginx_template import render
from bench.peers import common

HTTP = """
worker_processes 1;
pid {run}/nginx.pid;
error_log {run}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {run}/body; proxy_temp_path {run}/proxy; fastcgi_temp_path {run}/f; uwsgi_temp_path {run}/u;
  scgi_temp_path {run}/s;
  upstream web {{ server 127.0.0.1:{to}; keepalive 8; }}
  server {{
    listen 127.0.0.1:{port};
    client_max_body_size 0;
    location / {{
      proxy_pass http://web;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_request_buffering off;
      proxy_max_temp_file_size 0;
    }}
  }}
}}
"""
READY = 30.0
_PR_SET_PDEATHSIG = 1


def _configuration(run: str, to: int, kind: str, port: int) -> str:
    if kind == "http":
        return HTTP.format(run=run, to=to, port=port)
    upstream = Upstream("bench", (f"127.0.0.1:{to}",))
    return render(Setup(upstreams=(upstream,), listen=(f"127.0.0.1:{port}",), run_dir=run, nginx=version_here()))


def _die_with_parent() -> None:
    """This process's main thread, which lives as long as the process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def serve(to: int, kind: str) -> None:
    program = shutil.which("nginx")
    if program is None:
        sys.exit("nginx is not installed")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with tempfile.TemporaryDirectory() as run:
        port, conf = _free_port(), Path(run, "nginx.conf")
        conf.write_text(_configuration(run, to, kind, port))
        command = [program, "-p", run, "-c", str(conf), "-e", f"{run}/error.log", "-g", "daemon off;"]
        nginx = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
        try:
            _wait_for(port, nginx)
            common.announce(port)
            nginx.wait()
            sys.exit(Path(run, "error.log").read_text())
        finally:
            nginx.terminate()
            nginx.wait()


def _wait_for(port: int, nginx: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + READY
    while time.monotonic() < until and nginx.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port)):
                return
        except OSError:
            time.sleep(0.02)
    sys.exit("nginx does not answer")


if __name__ == "__main__":
    common.main(serve, {})
