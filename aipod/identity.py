"""Who calls, and what they may do: bearer tokens from a file, or the name in a verified certificate.

The file is TOML, a table for each name. It has hashes only: who reads it cannot call.

    [alice]
    sha256 = "…"                       # of the token, in hex; `aipod token` makes both
    methods = ["predict", "log"]       # left out: all
    versions = ["3", "4"]              # left out: all

A token is 32 random bytes, so a plain hash of it cannot be searched for. It is looked up by its hash: how long that
takes tells nothing of any token, and does not grow with their number. The name is bound to the jobs that it begins: a
ticket does not cross names.

The name in a certificate is its first URI (SPIFFE's, say), else its common name, else its first other alternative name:
RFC 5280 sections 4.1.2.6 and 4.2.1.6. Two certificates with one name are one caller.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import logging
import math
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import trio

from aipod.config import MIB
from aipod.errors import Refused, UsageError, why

log = logging.getLogger("aipod.identity")

# Reading so many takes 0.3 s of a thread, which shares the interpreter with the heartbeats (100,000 take 6.5 s, and
# heartbeats wait for 1.5 s of them).
MAX_NAMES = 10_000
MAX_FILE = 4 * MIB
# As long as a SPIFFE id may be is far more than a name needs, and it comes with every job's journal.
_MAX_NAME = 255
# Seconds between two looks at the file. Who is taken out makes no more calls after it; those under way end as they may.
LOOK = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}\Z")
NO_NAME = "a name has letters, digits and . _ @ -, at most 64"
_HASH = re.compile(r"[0-9a-f]{64}\Z")
_KEYS = {"sha256", "methods", "versions"}


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who makes a call. `name` is empty where the server does not ask; None allows every method, or version."""

    name: str = ""
    methods: frozenset[str] | None = None
    versions: frozenset[str] | None = None

    def check(self, method: str, version: str) -> None:
        """Raises `Refused(PERMISSION_DENIED)` where this caller may not run `method` of `version`."""
        for what, asked, allowed in (("method", method, self.methods), ("version", version, self.versions)):
            if allowed is not None and asked not in allowed:
                may = ", ".join(sorted(allowed)) or "none"
                raise Refused("PERMISSION_DENIED", f"{self.name} may not use {what} {asked!r}; it may use: {may}")

    def owns(self, fields: Mapping[str, Any]) -> bool:
        """Whether the job with this journal is this caller's: begun under its name, or by somebody without one."""
        return not self.name or fields.get("owner", "") in ("", self.name)

    def check_owner(self, fields: Mapping[str, Any]) -> None:
        """Raises `Refused(PERMISSION_DENIED)` where the job with this journal is another name's."""
        if not self.owns(fields):
            raise Refused("PERMISSION_DENIED", f"this job is not {self.name}'s: a ticket is good for one name only")


ANYONE = Caller()


class TokensError(UsageError):
    """The file of tokens cannot be used; the text says why."""


def new_token() -> str:
    """A fresh token."""
    return "aipod_" + secrets.token_urlsafe(32)


def hash_of(token: str) -> str:
    """What the file has of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def parse_tokens(text: str) -> dict[str, Caller]:
    """The callers by the hashes of their tokens. Raises `TokensError`."""
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:  # also a number of thousands of digits, and tables in tables in tables
        raise TokensError(f"it is no TOML: {exc}") from None
    if len(tables) > MAX_NAMES:
        raise TokensError(f"it has {len(tables)} names; at most {MAX_NAMES}")
    callers: dict[str, Caller] = {}
    for name, table in tables.items():
        if not _NAME.match(name):
            raise TokensError(f"{name!r}: {NO_NAME}")
        if not isinstance(table, dict) or not set(table) <= _KEYS or not isinstance(table.get("sha256"), str):
            raise TokensError(f'[{name}] needs sha256 = "…" and may have methods and versions, nothing else')
        if not _HASH.match(table["sha256"]):
            raise TokensError(f"[{name}] sha256 is not 64 hexadecimal digits, as `aipod token` writes it")
        if table["sha256"] in callers:
            raise TokensError(f"[{name}] has the token of [{callers[table['sha256']].name}]")
        callers[table["sha256"]] = Caller(name, _names(name, table, "methods"), _names(name, table, "versions"))
    return callers


def _checked(raw: bytes) -> str:
    if len(raw) > MAX_FILE:
        raise TokensError(f"it has more than {MAX_FILE} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise TokensError(f"it is no UTF-8: {exc}") from None


def _names(name: str, table: Mapping[str, Any], key: str) -> frozenset[str] | None:
    listed = table.get(key)
    if listed is None:
        return None
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise TokensError(f'[{name}] {key} is not a list of names: {key} = ["a", "b"]')
    return frozenset(listed)


class Identities:
    """Knows callers by what they send. The mutable state is the file's callers, replaced whole when the file changes.

    `path`: the file of tokens, or empty; `certificates`: without tokens, the name is that of the certificate, which the
    connection has verified. With neither, everybody is `ANYONE`.
    """

    def __init__(self, path: str = "", *, certificates: bool = False) -> None:
        """Reads the file. Raises `TokensError`."""
        # Absolute: a model on the loop may call chdir.
        self._path = Path(path).expanduser().absolute() if path else None
        self._certificates = certificates
        self._seen: tuple[int, ...] = ()
        self._callers: dict[str, Caller] = {}
        if self._path is not None:
            self._read()

    def identify(self, authorization: str, certificate: Mapping[str, Any] | None) -> Caller:
        """Who sends this header and has this certificate. Raises `Refused(UNAUTHENTICATED)`."""
        if self._path is not None:
            return self._by_token(authorization)
        if self._certificates:
            return Caller(_name_in(certificate or {}))
        return ANYONE

    def _by_token(self, authorization: str) -> Caller:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Refused(
                "UNAUTHENTICATED",
                "this server wants a token: header authorization: Bearer … (--token-file, AIPOD_TOKEN)",
            )
        found = self._callers.get(hash_of(token.strip()))
        if found is None:
            raise Refused("UNAUTHENTICATED", "this server does not know the token")
        return found

    def knows(self, authorization: str) -> bool:
        """Whether a call with this header has a caller; without tokens its connection has said so already."""
        try:
            return self._path is None or bool(self._by_token(authorization))
        except Refused:
            return False

    async def watch(self) -> None:
        """Read the file again whenever it changes. This is a trio-flavored async function; it never returns.

        A file that cannot be used is an error in the log, and who was known before stays it.
        """
        said = ""
        while True:
            await trio.sleep(LOOK if self._path is not None else math.inf)
            try:
                if await trio.to_thread.run_sync(self._read):
                    said = ""
                    log.info("%s has changed: it has %d names", self._path, len(self._callers))
            except TokensError as exc:
                if exc.message != said:
                    log.error("%s; who was known stays known", exc.message)
                said = exc.message

    def _read(self) -> bool:
        """Whether the file has changed, and is read now. Blocks."""
        assert self._path is not None
        try:
            if _state_of(os.stat(self._path)) == self._seen:
                return False
            # Without O_NONBLOCK a FIFO would hold this thread for ever, and with it the server's end.
            with open(os.open(self._path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise TokensError("it is no regular file")
                raw = file.read(MAX_FILE + 1)
            self._seen = _state_of(found)  # what could not even be read may be readable next time
            self._callers = parse_tokens(_checked(raw))
        except (OSError, TokensError) as exc:
            raise TokensError(f"cannot use the tokens in {str(self._path)!r}: {why(exc)}") from None
        return True


def _state_of(found: os.stat_result) -> tuple[int, ...]:
    """What tells one state of a file from another; the change time as well, for `cp -p` and `mv` keep the other."""
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _name_in(certificate: Mapping[str, Any]) -> str:
    """The name in a certificate as `ssl.SSLSocket.getpeercert` tells it. Raises `Refused(UNAUTHENTICATED)`."""
    alternative = [(kind, str(value)) for kind, value in certificate.get("subjectAltName", ())]
    names = [value for kind, value in alternative if kind == "URI"]
    uris = len(names)
    names += [
        str(value) for relative in certificate.get("subject", ()) for key, value in relative if key == "commonName"
    ]
    names += [value for kind, value in alternative if kind != "URI"]
    for place, name in enumerate(names):
        if not name:  # it would be everybody's
            continue
        # An authority may watch over URIs and let common names be what they are: one must not look like the other.
        if len(name) > _MAX_NAME or not name.isprintable() or (place >= uris and "://" in name):
            raise Refused("UNAUTHENTICATED", "the name in the certificate is too long, or no name")
        return name
    raise Refused("UNAUTHENTICATED", "the certificate has no URI, no common name and no other alternative name")


def add_token(path: Path, name: str, methods: Collection[str], versions: Collection[str]) -> str:
    """Add a table for `name` to the file, which is made where there is none; the token. Raises `TokensError`. Blocks.

    One after the other, where several do so at once; the file is never half written, and keeps its mode and owner.
    """
    token = new_token()
    lines = [f'["{name}"]', f'sha256 = "{hash_of(token)}"']
    for key, listed in (("methods", methods), ("versions", versions)):
        if listed:
            lines.append(f"{key} = [{', '.join(_quoted(item) for item in listed)}]")
    try:
        if not _NAME.match(name):
            raise TokensError(NO_NAME)
        path = path.resolve()  # a link stays one
        with (path.parent / f".{path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = path.stat() if path.exists() else None
            before = _checked(path.read_bytes()) if found is not None else ""
            if any(caller.name == name for caller in parse_tokens(before).values()):
                raise TokensError("it has that name already; delete its table to make a new token for it")
            text = before.rstrip("\n") + ("\n\n" if before.strip() else "") + "\n".join(lines) + "\n"
            parse_tokens(_checked(text.encode()))
            _replace(path, text, found)
    except (OSError, TokensError) as exc:
        raise TokensError(f"cannot add {name!r} to {str(path)!r}: {why(exc)}") from None
    return token


def _replace(path: Path, text: str, like: os.stat_result | None) -> None:
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            if like is not None:
                os.fchmod(file.fileno(), like.st_mode & 0o777)
                if (like.st_uid, like.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), like.st_uid, like.st_gid)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _quoted(text: str) -> str:
    if not text.isprintable():
        raise TokensError(f"{text!r} is no name")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
