"""The configuration of nginx in front of aipod: what deploy/nginx.conf is, for any models and servers."""

from __future__ import annotations

import re
import shlex

from aipod.cli.nginx_setup import HTTP2_DIRECTIVE, Setup, Upstream


def render(setup: Setup) -> str:
    """The configuration."""
    values = {
        "VERSION": "1.25.1 or newer" if setup.nginx >= HTTP2_DIRECTIVE else "1.22 or newer",
        "COMMAND": " \\\n#     ".join(map(shlex.quote, setup.arguments)),
        "MAIN": _main(setup),
        "HTTP": _temporary(setup),
        "MAP": _map(setup),
        "UPSTREAMS": "\n".join(map(_upstream, setup.upstreams)),
        "LOG": "/dev/stdout" if setup.log_stdout else f"{setup.run_dir or '/var/log/nginx'}/aipod.log",
        "LISTEN": _listen(setup),
        "SERVER_TLS": _server_tls(setup),
        "SCHEME": "grpcs" if setup.server_ca else "grpc",
    }
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], _TEXT)


def _main(setup: Setup) -> str:
    lines = [f"pid {setup.run_dir}/nginx.pid;"] if setup.run_dir else []
    if setup.run_dir or setup.log_stdout:
        lines.append(f"error_log {'/dev/stderr' if setup.log_stdout else setup.run_dir + '/error.log'};")
    if setup.run_dir:
        lines.insert(0, "# What nginx writes is here, so it need not be root.")
    return "".join(f"\n{line}" for line in lines) + "\n" if lines else ""


def _temporary(setup: Setup) -> str:
    """Distributions compile in directories that only root may create."""
    if not setup.run_dir:
        return ""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return "".join(f"    {kind}_temp_path {setup.run_dir}/{kind};\n" for kind in kinds) + "\n"


def _map(setup: Setup) -> str:
    lines = [f'        ""  {setup.default or setup.upstreams[0].name};  # no header, or an empty one']
    lines += [f'        "{upstream.name}"  {upstream.name};' for upstream in setup.upstreams]
    return "\n".join(lines) + "\n"


_SHARED = """\
    # These servers share a spool: whichever is asked answers for any job, so least_conn, because jobs differ in length:
    # the next one goes where the fewest run.
"""
_SEPARATE = """\
    # These servers have a spool each: a job stays with the server that its id is given to. "consistent", so that a
    # server that is added or leaves moves few jobs.
"""


def _upstream(upstream: Upstream) -> str:
    text, method = "", ""
    if len(upstream.servers) > 1:
        text = _SHARED if upstream.shared_spool else _SEPARATE
        method = "least_conn" if upstream.shared_spool else "hash $aipod_affinity consistent"
    lines = [f"zone {upstream.name} 64k", *filter(None, [method])]
    lines += [f"server {server} fail_timeout=2s" for server in upstream.servers]
    body = "".join(f"        {line};\n" for line in lines)
    return f"{text}    upstream {upstream.name} {{\n{body}    }}\n"


def _listen(setup: Setup) -> str:
    new = setup.nginx >= HTTP2_DIRECTIVE
    words = "".join([" ssl" if setup.tls_cert else "", "" if new else " http2"])
    lines = [f"listen {address}{words}" for address in setup.listen]
    lines += ["http2 on"] if new else []
    if setup.tls_cert:
        lines += [f"ssl_certificate {setup.tls_cert}", f"ssl_certificate_key {setup.tls_key}"]
        lines += ["ssl_protocols TLSv1.2 TLSv1.3", "ssl_session_cache shared:aipod_tls:10m"]
    return "".join(f"        {line};\n" for line in lines)


def _server_tls(setup: Setup) -> str:
    if not setup.server_ca:
        return ""
    lines = ["grpc_ssl_verify on", "grpc_ssl_verify_depth 3", f"grpc_ssl_trusted_certificate {setup.server_ca}"]
    lines += [f"grpc_ssl_name {setup.server_name}", "grpc_ssl_server_name on", "grpc_ssl_protocols TLSv1.2 TLSv1.3"]
    if setup.server_cert:
        lines += [f"grpc_ssl_certificate {setup.server_cert}", f"grpc_ssl_certificate_key {setup.server_key}"]
    body = "".join(f"        {line};\n" for line in lines)
    return f"        # The servers' TLS. Without `verify` nginx would take any certificate.\n{body}"


_TEXT = r"""# nginx @VERSION@ in front of aipod: models behind one address, chosen by the caller's header x-upstream.
#
# Made by: aipod nginx-conf \
#     @COMMAND@
# Rather make it anew than change it. What you do change, `aipod nginx-conf --check FILE` looks at.
#
# A job is silent for at most one second in the direction to the client, because the server sends a heartbeat every
# second. So no timeout below limits how long a job may take; each limits how long a peer may say nothing at all.

worker_processes auto;
# Two descriptors per call (client and upstream), and room for listeners and logs.
worker_rlimit_nofile 20000;
@MAIN@
# Not set: worker_shutdown_timeout. Without it a reload lets running jobs finish, however long they take.

events {
    # Per worker process: each call has an upstream connection of its own, clients' connections carry many calls.
    worker_connections 8192;
}

http {
@HTTP@    # Which upstream a call goes to. Only what is listed here can be reached: the header's value itself never gets
    # into grpc_pass, where any caller could name any host, port or unix socket. Names are compared without case.
    map $http_x_upstream $aipod_upstream {
        default     "";            # a name that is not listed: refused below
@MAP@    }

    # What the servers of a group with separate spools are chosen by: a caller that comes back for its job brings its
    # id, and must get to the server that has it. Where that one was down when the job began, another one has it: a
    # caller that was told so brings a number besides, until it is led there. Plain gRPC clients have neither, and go
    # anywhere.
    map $http_x_job_id $aipod_affinity {
        default $http_x_job_id$http_x_job_missed;
        ""      $request_id;
    }

    # One that cannot be reached is left out for 2 s only, so that a group which was restarted as a whole is back before
    # callers have used up their retries. The zone makes nginx's worker processes count together.

@UPSTREAMS@
    # One line per call when it ends. A call's status is in a trailer, or in a header where there was no answer.
    log_format aipod '$remote_addr [$time_iso8601] $request_uri to="$http_x_upstream" at=$upstream_addr '
                     'job=$http_x_job_id grpc=$sent_trailer_grpc_status$sent_http_grpc_status http=$status '
                     'up=$request_length down=$bytes_sent seconds=$request_time';
    access_log @LOG@ aipod;

    # A caller's address may have this many calls under way; the rest are told UNAVAILABLE and may come again.
    limit_conn_zone $binary_remote_addr zone=aipod_callers:10m;
    limit_conn_status 503;

    # What a caller is told where there is no answer of an upstream: grpc-message for a grpc-status of the table in
    # the server block. Without it a gRPC client sees "HTTP status 502" or worse, "UNKNOWN".
    map $aipod_grpc_status $aipod_grpc_message {
        default "refused by the proxy";
        5       "x-upstream names no upstream of this proxy";
        8       "larger than the proxy allows";
        12      "the proxy serves no such method";
        14      "the upstream cannot be reached, or the proxy has too many calls";
    }

    server {
@LISTEN@
        # ---- the caller's connection -------------------------------------------------------------------------------

        # Calls at once on one connection; the server's own limit (--max-streams). More wait in the client.
        http2_max_concurrent_streams 1000;
        limit_conn aipod_callers 1000;
        # A connection without any call stays open for an hour, so that the next call need not connect. nginx does not
        # count a client's PINGs as activity.
        keepalive_timeout 1h;
        # After so many calls, or so long, nginx asks a client to connect anew. Rarely: aipod's client finishes its
        # calls on the old connection, but some gRPC clients drop them, and grpcio may lose messages of one that it
        # sends again by itself. A reload asks too: let a grpcio client send its payload when the server has answered.
        keepalive_requests 1000000;
        keepalive_time 24h;
        # A connection that does not say what it wants. A new one sends its first request at once.
        client_header_timeout 10s;
        # Caller's metadata: one header may have 64 KiB. One that is longer than its buffer ends the whole connection,
        # with every call on it.
        large_client_header_buffers 4 64k;
        # Payloads of any size: the server limits them (--max-payload), and says so before the first byte.
        client_max_body_size 0;
        # The caller sends nothing while its upload is not complete. Longer than the server's own limit (--upload-stall,
        # 60 s), so that its clear answer comes first.
        client_body_timeout 300s;
        # HTTP/2 window of an upload, and memory per call: at 64 KiB a distant caller would wait for every window.
        client_body_buffer_size 1m;
        # The caller takes nothing of what waits for it. Longer than the server's own limit (120 s) again.
        send_timeout 180s;
        # Frames to the caller, with grpc_buffer_size: fewer and larger ones cost it less.
        http2_chunk_size 64k;

        # ---- the upstream's connection -----------------------------------------------------------------------------

        # Servers are near; one that is up accepts at once.
        grpc_connect_timeout 5s;
        # The upstream sends nothing. A server that lives sends a heartbeat a second: 60 missed ones mean that its host
        # hangs. The caller is told INTERNAL (a reset); aipod's client gives up by itself after 15 s.
        grpc_read_timeout 60s;
        # The upstream takes nothing: its disk is slow, or it hangs. Its heartbeats tell the two apart for the caller,
        # so there is time.
        grpc_send_timeout 300s;
        # Finds a host that vanished without a word, also in calls where nothing is to be sent.
        grpc_socket_keepalive on;
        # The other server of the group, where one cannot be connected. Never for a request that has been sent, in
        # whole or in part: a method must not run twice. nginx resends none of those, as the body is not kept and
        # non_idempotent is not listed here.
        grpc_next_upstream error timeout;
        grpc_next_upstream_tries 3;
        # The headers and trailers of an answer must fit: an error with its details has a few KiB, and newer nginx
        # resets a call where there is less room. Also the piece in which an answer is passed on. Per call.
        grpc_buffer_size 64k;
@SERVER_TLS@
        # ---- where calls go ----------------------------------------------------------------------------------------

        location /ai.AI/ {
            if ($aipod_upstream = "") { return 418; }
            grpc_pass @SCHEME@://$aipod_upstream;
        }

        # Health of a server of the group that x-upstream names. Watch is cut after grpc_read_timeout; use Check.
        location /grpc.health.v1.Health/ {
            if ($aipod_upstream = "") { return 418; }
            grpc_pass @SCHEME@://$aipod_upstream;
        }

        # Everything else, reflection too, is not for the outside.
        location / { return 404; }

        # ---- errors as gRPC clients understand them ----------------------------------------------------------------

        # HTTP status to grpc-status: https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md,
        # with 413 as RESOURCE_EXHAUSTED. 418 is only a mark for "unknown upstream" (NOT_FOUND).
        error_page 418 = /.grpc-status/5;
        error_page 403 = /.grpc-status/7;
        error_page 413 = /.grpc-status/8;
        error_page 404 405 = /.grpc-status/12;
        error_page 400 408 = /.grpc-status/13;
        error_page 429 500 502 503 504 = /.grpc-status/14;
        error_page 401 = /.grpc-status/16;

        location ~ ^/\.grpc-status/(?<aipod_grpc_status>[0-9]+)$ {
            internal;
            default_type application/grpc;
            add_header grpc-status $aipod_grpc_status always;
            add_header grpc-message $aipod_grpc_message always;
            # 200: what is wrong is in grpc-status, and some clients look no further after any other status.
            return 200;
        }
    }
}
"""
