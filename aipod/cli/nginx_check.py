"""What in a configuration of nginx would break jobs: a table of directives, looked up where calls are passed on.

It reads what nginx would read (by crossplane, with all that is included) and needs no nginx. What the values do to a
call was measured with nginx 1.22; deploy/README.md has them all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aipod.config import KIB, MIB, Config
from aipod.errors import UsageError

# A timeout must outlast a few heartbeats, of which one may be late.
_MISSED = 3
_LEAST = _MISSED * Config().tick
_TIME = re.compile(r"(\d{1,18})(ms|[smhdwMy]?)")
_UNITS = {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "M": 2592000, "y": 31536000}
# What becomes of a name that a caller writes, unless a `map` has a list of those that may be.
_FROM_CALLER = re.compile(r"\$\{?(http_|arg_|cookie_|host\b|uri|request|args|document_uri|is_args)")
_VARIABLE = re.compile(r"\$\{?(\w+)")

# Directive: what a value below `_LEAST` cuts.
_TIMEOUTS = {
    "grpc_read_timeout": "cuts jobs between two heartbeats of the server",
    "grpc_send_timeout": "cuts uploads whose server must wait for its disk",
    "client_body_timeout": "cuts uploads whose caller has to think",
    "send_timeout": "cuts answers whose caller has to think",
}
# Directive: nginx's default, and what less than the server's own limit (--max-headers) breaks, in either direction.
# nginx 1.22 passes long trailers on whatever its buffer; 1.31 resets the call.
_BUFFERS = {
    "large_client_header_buffers": ("4 8k", "a longer header ends the connection, with all calls on it; write 4 64k"),
    "grpc_buffer_size": ("4k", "an error may not fit in with its details, and is lost; write 64k"),
}
# What nginx itself answers where a server does not: who cannot be reached, is silent, or has too many calls.
_OWN_ANSWERS = ("502", "503", "504")

# A file that includes itself has no end.
_DEEP = 50

Statement = Mapping[str, Any]  # of crossplane: directive, args, line, file, block
Effective = dict[str, list[Statement]]


@dataclasses.dataclass(frozen=True, order=True)
class Finding:
    """One directive that would break jobs."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


def audit(path: Path) -> list[Finding]:
    """What in the configuration `path`, and what it includes, would break jobs. Raises `UsageError`."""
    import crossplane

    try:
        # A directive that crossplane does not know may be one of a newer nginx; of others it counts the arguments.
        parsed = crossplane.parse(str(path), strict=False, check_ctx=False)
    except OSError as exc:
        raise UsageError(f"{path}: {exc.strerror}") from exc
    except UnicodeDecodeError:
        raise UsageError(f"{path}: it is no text") from None
    if parsed["errors"]:
        raise UsageError(f"nginx's configuration cannot be read: {parsed['errors'][0]['error']}")
    main = _included(parsed["config"], 0, parsed["config"][0]["parsed"])
    return sorted(set(_Audit(main, str(path)).findings()))


def _included(files: list[Any], number: int, block: list[Any], depth: int = 0) -> list[Statement]:
    """The block of a file with what it includes, each statement with its file: crossplane 0.5.8 mixes them up."""
    if depth > _DEEP:
        raise UsageError("nginx's configuration cannot be read: it is nested too deeply")
    found: list[Statement] = []
    for statement in block:
        if statement["directive"] == "include":
            for other in statement["includes"]:
                found += _included(files, other, files[other]["parsed"], depth + 1)
            continue
        whole = {**statement, "file": files[number]["file"]}
        if "block" in statement:
            whole["block"] = _included(files, number, statement["block"], depth + 1)
        found.append(whole)
    return found


class _Audit:
    def __init__(self, main: list[Statement], path: str) -> None:
        self._main = main
        self._path = path
        self._http = [statement for block in _named(main, "http") for statement in block["block"]]
        self._lists = {
            block["args"][-1].lstrip("$"): block["block"]
            for kind in ("map", "geo")
            for block in _named(self._http, kind)
        }

    def findings(self) -> Iterator[Finding]:
        for statement in _named(self._main, "worker_shutdown_timeout"):
            yield self._of(statement, "a reload cuts the jobs that last longer; leave it out")
        places = 0
        for server in _named(self._http, "server"):
            for passing, effective in _passing(server["block"], _own(self._http)):
                places += 1
                yield from self._timeouts(passing, effective)
                yield from self._sizes(passing, effective)
                yield from self._routes(passing, effective)
                yield from self._answers(passing, effective, server["block"])
                yield from self._http2(server, effective)
        if not places:
            yield Finding(
                self._path, 1, "no location has grpc_pass: nothing reaches a server (proxy_pass does not carry gRPC)"
            )

    def _of(self, statement: Statement, why: str) -> Finding:
        words = " ".join([statement["directive"], *statement["args"]])
        return Finding(statement["file"], statement["line"], f"{words}: {why}")

    def _absent(self, passing: Statement, name: str, why: str) -> Finding:
        return Finding(passing["file"], passing["line"], f"{name} is not set here: {why}")

    def _timeouts(self, passing: Statement, effective: Effective) -> Iterator[Finding]:
        for name, why in _TIMEOUTS.items():
            for statement in effective.get(name, []):
                if _seconds(statement["args"][0]) < _LEAST:
                    yield self._of(statement, f"{why}; at least {_LEAST:g}s")

    def _sizes(self, passing: Statement, effective: Effective) -> Iterator[Finding]:
        why = "cuts every upload that comes to it; write 0, the server has --max-payload"
        for statement in effective.get("client_max_body_size", []):
            if _bytes(statement["args"][0]):
                yield self._of(statement, why)
        if "client_max_body_size" not in effective:
            yield self._absent(passing, "client_max_body_size", f"{why} (default 1m)")
        for name, (default, why) in _BUFFERS.items():
            for statement in effective.get(name, []):
                if _bytes(statement["args"][-1]) < Config().max_headers:
                    yield self._of(statement, why)
            if name not in effective:
                yield self._absent(passing, name, f"{why} (default {default})")

    def _routes(self, passing: Statement, effective: Effective) -> Iterator[Finding]:
        if self._is_callers(passing["args"][0]):
            why = "callers choose where nginx connects to; list the names that may be in a map"
            yield self._of(passing, why)
        for statement in effective.get("grpc_next_upstream", []):
            if "non_idempotent" in statement["args"]:
                yield self._of(statement, "a method may run twice; leave non_idempotent out")

    def _is_callers(self, text: str, depth: int = 5) -> bool:
        """Whether something that a caller writes becomes part of `text`."""
        if _FROM_CALLER.search(text):
            return True
        values = (
            row["args"][-1] for name in _VARIABLE.findall(text) for row in self._lists.get(name, []) if row["args"]
        )
        return depth > 0 and any(self._is_callers(value, depth - 1) for value in values)

    def _answers(self, passing: Statement, effective: Effective, server: list[Statement]) -> Iterator[Finding]:
        pages = {code: page["args"][-1] for page in effective.get("error_page", []) for code in page["args"][:-1]}
        wanted = [*_OWN_ANSWERS]
        if any(_bytes(statement["args"][0]) for statement in effective.get("client_max_body_size", [])):
            wanted.append("413")
        bad = [code for code in wanted if code not in pages or not _speaks_grpc(pages[code], server)]
        if bad:
            why = "to callers nginx's own errors are no gRPC; answer them with grpc-status (aipod nginx-conf shows how)"
            yield self._absent(passing, f"error_page {' '.join(bad)}", why)

    def _http2(self, server: Statement, effective: Effective) -> Iterator[Finding]:
        if any(statement["args"] == ["on"] for statement in effective.get("http2", [])):
            return
        for listen in _named(server["block"], "listen"):
            if not {"http2", "quic"} & set(listen["args"]):
                yield self._of(
                    listen, "without HTTP/2 there is no gRPC; write http2 here, or from nginx 1.25.1 on http2 on;"
                )
        if not any(_named(server["block"], "listen")):
            yield self._of(server, "without a listen with http2 there is no gRPC")


def _named(block: list[Statement], name: str) -> Iterator[Statement]:
    return (statement for statement in block if statement["directive"] == name)


def _own(block: list[Statement]) -> Effective:
    found: Effective = {}
    for statement in block:
        if "block" not in statement:
            found.setdefault(statement["directive"], []).append(statement)
    return found


def _passing(block: list[Statement], outer: Effective) -> Iterator[tuple[Statement, Effective]]:
    """Each grpc_pass in `block`, with the directives that hold there: a level that has one hides those outside."""
    effective = {**outer, **_own(block)}
    for statement in block:
        if statement["directive"] == "grpc_pass":
            yield statement, effective
        elif statement["directive"] in ("location", "if", "limit_except"):
            yield from _passing(statement["block"], effective)


def _speaks_grpc(target: str, server: list[Statement]) -> bool:
    """Whether the location that an error page is has a grpc-status and, as some clients want, status 200."""
    for location in _named(server, "location"):
        *how, name = location["args"]
        if how in (["~"], ["~*"]):
            found = _matches(name, target)
        else:
            found = target == name or (how != ["="] and not name.startswith("@") and target.startswith(name))
        own = _own(location["block"])
        headers = {statement["args"][0].lower() for statement in own.get("add_header", [])}
        status = {statement["args"][0] for statement in own.get("return", [])}
        if found and "grpc-status" in headers and status <= {"200"}:
            return True
    return False


def _matches(pattern: str, target: str) -> bool:
    try:
        return re.search(re.sub(r"\(\?<(\w+)>", r"(?P<\1>", pattern), target) is not None
    except re.error:  # Python's are not all that PCRE has; one for error pages needs nothing more
        return False


def _seconds(text: str) -> float:
    parts = _TIME.findall(text)
    if "".join(map("".join, parts)) != text.replace(" ", ""):
        return float("inf")  # nginx says what is wrong with it
    return sum(int(number) * _UNITS[unit] for number, unit in parts)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,18})([kKmMgG]?)", text)
    if match is None:
        return 0
    return int(match[1]) * {"": 1, "k": KIB, "m": MIB, "g": KIB * MIB}[match[2].lower()]
