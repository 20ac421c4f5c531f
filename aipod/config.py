"""One frozen, validated `Config` for server and client; every default with its reason.

Sizes are bytes, times are seconds. The field metadata is what `--help`, the environment and the TOML file are made
from, so an option exists once.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
SECONDS = 1.0
MINUTES = 60 * SECONDS
HOURS = 60 * MINUTES

# At most this much payload in one chunk: small enough to bound a message, large enough that one zstd frame per chunk
# costs nothing (measured: -2.6 % to +1.2 % in size against one continuous stream at level 3).
CHUNK = 1 * MIB

# Also the name of directories under the state home.
_MODEL = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*\Z")

# RFC 6750 section 2.1.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*\Z")

AUTO = "auto"
# zstd's own names for them go further, but no data makes it worth its time.
_LEVELS = range(-100, 20)
# What is small is packed at one level: zstd's own choice.
_SMALL = 3

LOG_FORMATS = ("auto", "text", "json")
RUNNERS = ("auto", "process", "thread", "loop")


class ConfigError(ValueError):
    """A setting is out of range or unknown; the text names it and says what is allowed."""


def _setting(
    default: Any,
    help_text: str,
    *,
    client: str = "",
    low: float | None = None,
    high: float | None = None,
    secret: bool = False,
) -> Any:
    """`client`: what a client's help says instead, where the setting means something else there."""
    metadata = {"help": help_text, "client": client or help_text, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a server (`model` set) or a client. Raises `ConfigError` where a value cannot be meant."""

    model: str = _setting("", "MODULE:CLASS to serve.")
    bind: tuple[str, ...] = _setting(
        ("127.0.0.1:50051",),
        "Address to listen on: HOST:PORT, [::1]:PORT or unix:PATH; may be repeated. Not where sockets are handed down.",
    )
    spool: str = _setting("", "Directory where jobs live; 'tmp' is a fresh one, removed at exit.")
    data: str = _setting("", "Directory with one subdirectory per version.")
    # One that drains leaves new connections to the others, and one that loads its models does so too.
    reuse_port: bool = _setting(False, "Let several servers listen on one address (SO_REUSEPORT); not for one alone.")
    insecure: bool = _setting(False, "Allow other than loopback addresses without --tokens or --tls-ca.")
    tokens: str = _setting("", "TOML file with who may call, and what (see aipod token); read again when it changes.")

    # Numbers about the server and the names of the model's methods, for whoever can reach it: no payloads, no callers.
    metrics: str = _setting(
        "", "HOST:PORT for Prometheus to scrape (path /metrics), loopback only without --insecure; none where empty."
    )
    # A person reads a terminal; what else takes a server's stderr is a program, and wants one object a line.
    log_format: str = _setting("auto", "Lines of aipod serve's log: text, json, or auto (text on a terminal).")

    # Paths and source lines of the model are in them.
    tracebacks: bool = _setting(False, "Tell callers the traceback of a model's exception, not only the log.")

    # It tells anybody the schema, which is no secret; but some want a public server to say nothing unasked.
    reflection: bool = _setting(True, "Answer gRPC reflection, with which tools find the schema.")

    # Jobs
    # A class with async methods runs on the loop, any other in processes. Threads are for plain methods that cannot be
    # in a process of their own: models that share memory, libraries that do not bear it. A crash ends the server then,
    # and code that holds the GIL stops its heartbeats.
    runner: str = _setting(
        "auto",
        "What executes methods: auto (process, or loop for a class with async methods), process, thread (of this "
        "process: what shares memory, or cannot have a process of its own) or loop.",
    )
    instances: int = _setting(
        1,
        "Instances per version, one job at a time each (process and thread runner); `train` has one more of its own.",
        low=1,
        high=1024,
    )
    # Each instance is a process with a model in it; beyond this an idle one of another version is closed first.
    max_instances: int = _setting(16, "Instances of all versions together.", low=1, high=4096)
    # Async methods wait for others, so hundreds at once are usual. Each has its kwargs in memory while it runs, 16 MiB
    # at most: 4 GiB, and what the methods make of them.
    concurrency: int = _setting(256, "Jobs at once in one instance (loop runner).", low=1, high=100_000)
    idle: float = _setting(0.0, "Seconds after which an instance that nobody uses is closed; 0 is none.", low=0)
    preload: tuple[str, ...] = _setting((), "Version whose instances are loaded at the start; may be repeated.")
    # A proxy's timeout is never below a second, so one tick a second keeps every hop awake.
    tick: float = _setting(1 * SECONDS, "Seconds between heartbeats.", low=0.01, high=60)
    drain: float = _setting(
        30 * SECONDS, "Seconds that running jobs get to finish at shutdown.", low=0, high=24 * HOURS
    )
    # Long enough for a model that looks at context.cancelled once per batch.
    cancel_grace: float = _setting(
        5 * SECONDS, "Seconds between asking a cancelled run to stop, SIGTERM and SIGKILL.", low=0, high=1 * HOURS
    )
    load_timeout: float = _setting(10 * MINUTES, "Seconds that a model may take to load.", low=1, high=24 * HOURS)

    # Each has a lock's descriptor and a task, and goes on when its caller has left.
    max_jobs: int = _setting(10_000, "Jobs at once that have not ended.", low=1)
    # One version that is asked for a lot must not take the room of all others.
    max_queued: int = _setting(5000, "Jobs of one version at once that upload or wait in line.", low=1)

    # Payloads
    max_payload: int = _setting(0, "Largest payload, uncompressed; 0 is none but the disk's reserve.", low=0)
    max_kwargs: int = _setting(16 * MIB, "Largest kwargs, as JSON; 0 is none.", low=0, high=256 * MIB)
    max_message: int = _setting(64 * MIB, "Largest gRPC message; 0 is none.", low=0, high=1 * GIB)
    reserve: int = _setting(1 * GIB, "Free disk space that uploads leave for results.", low=0)
    # Nearly: see spool.quota.
    max_spool: int = _setting(0, "What all jobs in the spool may take on its disk; 0 is none.", low=0)
    # Many missed heartbeats of a client that is gone without a word.
    upload_stall: float = _setting(60 * SECONDS, "Seconds in which nothing comes before an upload is given up.", low=1)
    upload_ttl: float = _setting(
        1 * HOURS, "Seconds that an abandoned upload, or the job of a killed server, is kept.", low=1
    )

    # Jobs that nobody watches
    # A client looks for its job for as long as this before it gives up.
    grace: float = _setting(10 * MINUTES, "Seconds that a job goes on while nobody watches it.", low=1)
    ttl: float = _setting(24 * HOURS, "Seconds that an ended job's answer is kept.", low=1)

    # Transport
    max_streams: int = _setting(1000, "Calls at once per connection; 0 is none.", low=0, high=100_000)
    # Every nginx upstream connection has one call, so this is also how many calls nginx can bring at once. Handshakes
    # of TLS count. One more than that ends the one that has been idle longest (for a second at least): peers that ask
    # for nothing keep nobody out.
    max_connections: int = _setting(
        1000, "Connections at once; one that is idle makes room for a new one; 0 is none.", low=0
    )
    # What a stream holds before anything is known about it, times the streams of a connection.
    stream_window: int = _setting(256 * KIB, "HTTP/2 window that a stream begins with.", low=64 * KIB, high=1 * GIB)
    # 1 Gbit/s at a round trip of 130 ms.
    max_window: int = _setting(16 * MIB, "HTTP/2 window that a stream may grow to.", low=64 * KIB, high=1 * GIB)
    # What is on the wire at once; also what the windows of its streams may grow by, all together.
    connection_window: int = _setting(64 * MIB, "HTTP/2 window of a connection.", low=64 * KIB, high=2 * GIB - 1)
    # Per-frame work in Python dominates: 16 KiB frames carry a third of what these do. A chunk and its fields go into
    # one; larger ones gain nothing, and other streams would wait for them.
    max_frame: int = _setting(
        1088 * KIB, "Longest HTTP/2 DATA frame, in both directions.", low=16 * KIB, high=16 * MIB - 1
    )
    # What gRPC's C core takes at most; 40 bytes of it can come as one byte.
    max_headers: int = _setting(16 * KIB, "Largest list of headers, uncompressed.", low=4 * KIB, high=64 * KIB)
    # The widest of our messages has 16 fields, nested ones included twice that; `Open.released` repeats, so a few
    # hundred are honest.
    max_fields: int = _setting(512, "Protobuf fields in one message.", low=128, high=100_000)
    # Above it the connection is read more slowly (RFC 9113 section 10.5), but never punished: stock clients may ping as
    # they like.
    frame_rate: int = _setting(
        1000, "HTTP/2 frames a second that are neither payload nor requests; more are read later.", low=100
    )
    # Above them the peer is told to calm down (CVE-2023-44487, CVE-2025-8671); a client that gives up all its calls at
    # once is no attacker. The figures are nghttp2's.
    reset_burst: int = _setting(1000, "Streams that a peer may reset at once.", low=1)
    reset_rate: int = _setting(33, "Streams that a peer may reset per second, in the long run.", low=1)
    # A connection that says nothing useful costs a descriptor.
    handshake_timeout: float = _setting(10 * SECONDS, "Seconds for a new connection to speak HTTP/2.", low=0.1)
    max_age: float = _setting(0.0, "Seconds after which a connection is told to go elsewhere; 0 is none.", low=0)
    max_age_grace: float = _setting(1 * HOURS, "Seconds that its calls have then.", low=0)
    max_idle: float = _setting(0.0, "Seconds without a call after which a connection ends; 0 is none.", low=0)
    ping_interval: float = _setting(5 * SECONDS, "Seconds between HTTP/2 PINGs, with or without calls.", low=0.1)
    ping_timeout: float = _setting(2 * MINUTES, "Seconds without data or an answer to PING: the peer is dead.", low=0.1)
    # Below it the connection is as good as dead: no heartbeat of ours would get through either.
    send_stall: float = _setting(2 * MINUTES, "Seconds that a peer may refuse to take data.", low=1)

    # TLS
    tls: bool = _setting(
        False,
        "Client: speak TLS; the server's name is checked.",
        client="Speak TLS; the server's certificate must name the host that is called.",
    )
    tls_cert: str = _setting(
        "",
        "PEM file with the server's certificate chain; where there is one it speaks TLS.",
        client="PEM file with the certificate chain that says who calls, for a server that asks for one.",
    )
    tls_key: str = _setting("", "PEM file with its key, where the certificate's file has none.")
    tls_ca: str = _setting(
        "",
        "PEM file with the authorities that a client's certificate must come from; where there is one all need one.",
        client="PEM file with the authorities that the server's certificate must come from [the system's].",
    )

    # Client
    token: str = _setting("", "Client: bearer token, for a server that wants one.", secret=True)
    connect_timeout: float = _setting(10 * SECONDS, "Seconds to connect.", low=0.1)
    silence: float = _setting(15 * SECONDS, "Seconds without a heartbeat before a server is lost.", low=0.1)
    attempts: int = _setting(5, "Times a request is tried while it is not complete.", low=1, high=100)
    # See `levels`: 9 at most, by what the wire and the processor bear.
    level: int | str = _setting(AUTO, "zstd level of what is sent: -100 to 19, or auto.")
    # As long as the server keeps a job that nobody watches. Also for what drains to be followed by another server.
    reconnect: float = _setting(10 * MINUTES, "Seconds without progress before a job is given up.", low=0)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check_type(field.name, value, hints[field.name])
            low, high = field.metadata.get("low"), field.metadata.get("high")
            if low is not None and not value >= low:
                raise ConfigError(f"{field.name} = {value!r} is too small; it must be at least {low:g}")
            if high is not None and not value <= high:
                raise ConfigError(f"{field.name} = {value!r} is too large; it must be at most {high:g}")
        if self.model and not _MODEL.match(self.model):
            raise ConfigError(f"model = {self.model!r} is not MODULE:CLASS, for example mypackage.mymodule:MyModel")
        if ".py:" in self.model:
            module, _, name = self.model.partition(".py:")
            raise ConfigError(f"model = {self.model!r} names a file; name its module: {module}:{name}")
        if 0 < self.max_message < 2 * MIB:
            raise ConfigError(f"max_message = {self.max_message} is less than a chunk takes; at least {2 * MIB}, or 0")
        if self.runner not in RUNNERS:
            raise ConfigError(f"runner = {self.runner!r} is not one of {', '.join(RUNNERS)}")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format = {self.log_format!r} is not one of {', '.join(LOG_FORMATS)}")
        if self.level != AUTO and self.level not in _LEVELS:
            raise ConfigError(f"level = {self.level!r} is not {AUTO}, nor a number from -100 to 19")
        if self.connection_window < self.stream_window:
            raise ConfigError("connection_window must be at least stream_window")
        if self.max_window < self.stream_window:
            raise ConfigError("max_window must be at least stream_window")
        if self.token and not _TOKEN.match(self.token):
            raise ConfigError("token has characters that no header can have; it is one word, without spaces")
        names, each = len(set(self.preload)), 1 if self.runner == "loop" else self.instances
        if names > 1 and names * each > self.max_instances:  # of one version as many are loaded as there may be
            raise ConfigError(
                f"preload = {', '.join(self.preload)} takes {names * each} instances, max_instances = "
                f"{self.max_instances}: what is loaded first would be closed for the others; name fewer versions, or "
                f"set max_instances to at least {names * each}"
            )
        if not self.bind:
            raise ConfigError("bind is empty; give at least one address, for example 127.0.0.1:50051")

    @property
    def message_limit(self) -> int:
        """`max_message`, or what the 4-byte length prefix of a gRPC message can say."""
        return self.max_message or 2**32 - 1

    @property
    def small_level(self) -> int:
        """`level` for what is packed at once, and for streams."""
        return self.level if isinstance(self.level, int) else _SMALL

    @property
    def kwargs_limit(self) -> int:
        """`max_kwargs`, or what one message can bring."""
        return self.max_kwargs or 2**32 - 1

    @property
    def stream_limit(self) -> int:
        """`max_streams`, or as many as HTTP/2 has stream ids."""
        return self.max_streams or 2**31 - 1

    @property
    def longest_stop(self) -> float:
        """Seconds that a server may take to end when it is told to; whoever stops it must wait as long (deploy/).

        What `serve` itself takes for a drain at most, if every step takes all of its time, and some air.
        """
        return self.drain + 5 * self.cancel_grace + 15

    @property
    def app(self) -> str:
        """MODULE.CLASS, the name under which the spool belongs to this model."""
        return self.model.replace(":", ".")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Config:
        """Build from a plain mapping, such as table `[aipod]` of a TOML file. Raises `ConfigError`."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; known ones: {', '.join(sorted(known - {'model'}))}")
        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**settings)


def _check_type(name: str, value: object, kind: Any) -> None:
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{name} = {value!r} is not a list of strings")
        return
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        wanted = kind.__name__ if isinstance(kind, type | types.GenericAlias) else str(kind)
        raise ConfigError(f"{name} = {value!r} is not of type {wanted}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} = {value!r} is not a finite number")


def state_home(environ: Mapping[str, str]) -> Path:
    """Where state lives: `$STATE_DIRECTORY` (systemd), `$XDG_STATE_HOME/aipod`, else `~/.local/state/aipod`."""
    if environ.get("STATE_DIRECTORY"):
        return Path(environ["STATE_DIRECTORY"].split(":")[0])
    if environ.get("XDG_STATE_HOME"):
        return Path(environ["XDG_STATE_HOME"]) / "aipod"
    return Path.home() / ".local" / "state" / "aipod"
