"""Command line options, each of which exists once: those of every client, and those made from the fields of `Config`.

click takes each from the command line, else from AIPOD_<NAME>, else from its default map: table [aipod] of --config.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import tomllib
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from aipod.cli.help import More
from aipod.config import GIB, HOURS, KIB, MIB, MINUTES, Config, ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB|K|M|G|T)?\Z", re.IGNORECASE)
_SIZES = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1024 * GIB}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h)?\Z", re.IGNORECASE)
_TIMES = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": MINUTES, "min": MINUTES, "h": HOURS}

# Integers that count bytes; the others are plain numbers.
_BYTES = {
    "max_payload", "max_kwargs", "max_message", "reserve", "max_spool", "stream_window", "max_window",
    "connection_window", "max_frame", "max_headers",
}  # fmt: skip

_DEFAULTS = Config()
# Settings of `call` that are no part of `Config`; one file may serve both commands.
CALL_SETTINGS = ("token_file", "to", "version", "upstream", "meta", "timeout", "output", "ticket")
# What says one thing to a server and another to who calls it: a client's has a variable, and a key in the file, of its
# own, as both may be started with the same ones. A server would ask everybody for certificates of its own authority.
_OWN = {name: f"client_{name}" for name in ("tls_ca", "tls_cert", "tls_key")}
# What of `Config` says how a client connects, and how long it tries.
_CONNECTION = ("tls", "tls_ca", "tls_cert", "tls_key", "silence", "connect_timeout", "attempts", "reconnect")
# The names of what every command has that calls a server.
SERVER = ("to", "upstream", "token_file", "meta", *_CONNECTION)
# Their heading in --help-all.
CONNECTION = "Connection options"


class Size(click.ParamType[int]):
    """Bytes, as 1048576 or 1MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = _SIZE.match(str(value))
        if match is None:
            self.fail(f"{value!r} is not a size; write 1048576 or 1MiB", param, ctx)
        return int(float(match[1]) * _SIZES[(match[2] or "")[:1].lower()])


class Seconds(click.ParamType[float]):
    """Seconds, as 90 or 1.5min."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = _TIME.match(str(value))
        if match is None:
            self.fail(f"{value!r} is not a time; write 90, 90s, 1.5min or 2h", param, ctx)
        return float(match[1]) * _TIMES[(match[2] or "").lower()]


class Level(click.ParamType[int | str]):
    """A zstd level, or a word."""

    name = "level"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        try:
            return int(value)
        except ValueError:
            return str(value)


to_option = click.option(
    "--to",
    default="127.0.0.1:50051",
    metavar="ADDRESS",
    envvar="AIPOD_TO",
    help="The server: HOST:PORT or unix:PATH [127.0.0.1:50051].",
)
upstream_option = click.option(
    "--upstream",
    default="",
    metavar="NAME",
    envvar="AIPOD_UPSTREAM",
    help="Which servers a proxy shall ask (header x-upstream).",
)
# Not the token itself: who lists the machine's processes, or reads a --config that many may read, would see it.
token_option = click.option(
    "--token-file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="AIPOD_TOKEN_FILE",
    metavar="FILE",
    help="The token that says who calls, or AIPOD_TOKEN=TOKEN.",
)
meta_option = click.option(
    "--meta",
    cls=More,
    section=CONNECTION,
    multiple=True,
    metavar="K=V",
    envvar="AIPOD_META",
    help="A header to send with the call (its metadata); may be repeated.",
)
output_option = click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    envvar="AIPOD_OUTPUT",
    help="Write the answer to this file; - is stdout.",
)


def timeout_option(help: str, default: float | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--timeout, which means something else to each command."""
    return click.option(
        "--timeout", type=Seconds(), default=default, envvar="AIPOD_TIMEOUT", show_default=True, help=help
    )


def server_options(*more: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds what says which server is called and how, and the fields `more`; see `take_server`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function = config_options((*_CONNECTION, *more), text="client", section=CONNECTION)(function)
        return to_option(upstream_option(token_option(meta_option(function))))

    return decorate


@dataclasses.dataclass(frozen=True)
class Server:
    """Which server a command calls, and how."""

    to: str
    config: Config
    metadata: Sequence[tuple[str, str]]


def take_server(options: dict[str, Any]) -> Server:
    """The server from what the options of `server_options` are. Raises click.UsageError."""
    rest = dict(options)
    to, upstream, meta = rest.pop("to"), rest.pop("upstream"), rest.pop("meta")
    rest["token"] = _token(rest.pop("token_file"))
    metadata = [split_pair(pair, "--meta") for pair in meta]
    if upstream:
        metadata.append(("x-upstream", upstream))
    return Server(to, make_config(rest), metadata)


def _token(path: Path | None) -> str:
    """From the file that the command line names, else from the environment, else from the file that --config names."""
    source = click.get_current_context().get_parameter_source("token_file")
    told = os.environ.get("AIPOD_TOKEN", "").strip()
    if path is None or (told and source is not ParameterSource.COMMANDLINE):
        return told
    try:
        if token := path.read_text().strip():
            return token
        raise click.UsageError(f"--token-file {path}: there is no token in it")
    except OSError as exc:
        raise click.UsageError(f"--token-file {path}: {exc.strerror}") from exc
    except UnicodeDecodeError:
        raise click.UsageError(f"--token-file {path}: it is no text") from None


def repeat_server(context: click.Context) -> str:
    """The options of `server_options` as they were given on the command line, to be given to another command."""
    words: list[str] = []
    for param in context.command.params:
        name = str(param.name)
        if name not in SERVER:
            continue
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            value = context.params[name]
            for one in value if isinstance(value, tuple) else (value,):
                words += [param.opts[0]] if one is True else [param.opts[0], str(one)]
    return "".join(" " + shlex.quote(word) for word in words)


def split_pair(pair: str, option: str) -> tuple[str, str]:
    """NAME=VALUE in two. Raises click.UsageError."""
    name, equals, value = pair.partition("=")
    if not equals or not name:
        raise click.UsageError(f"{option} {pair!r} is not NAME=VALUE")
    return name, value


def config_options(
    names: Sequence[str], text: str = "help", *, often: Sequence[str] = (), section: str = "More options"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds an option for each named field of `Config`, and --config. `text`: which help they have.

    All but those `often` needed are for --help-all, below the heading `section`.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    hints = typing.get_type_hints(Config)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            kind: dict[str, Any] = {} if name in often else {"cls": More, "section": section}
            function = _option(fields[name], hints[name], text, kind)(function)
        return click.option(
            "--config",
            cls=More,
            section=section,
            metavar="FILE",
            envvar="AIPOD_CONFIG",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            is_eager=True,
            expose_value=False,
            callback=_use_file,
            help="TOML file with a table [aipod].",
        )(function)

    return decorate


def _option(
    field: dataclasses.Field[Any], kind: Any, text: str, more: dict[str, Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    flag = "--" + field.name.replace("_", "-")
    default = getattr(_DEFAULTS, field.name)
    default = ", ".join(default) if isinstance(default, tuple) else default
    told = f" [{_show(field.name, default, kind)}]" if default not in ("", False) and kind is not bool else ""
    variable = f"AIPOD_{field.name.upper()}"
    if text == "client" and field.name in _OWN:
        variable = f"AIPOD_{_OWN[field.name].upper()}"
        told = f"; {variable} in the environment"
    # No default of click's own: a value that was not given must not hide the one in the file.
    common: dict[str, Any] = {
        "envvar": variable,
        "default": None,
        "help": field.metadata[text].removesuffix(".") + told,
        **more,
    }
    if kind is bool and default:
        return click.option(f"{flag}/--no-{flag.removeprefix('--')}", **common)
    if kind is bool:
        return click.option(flag, is_flag=True, **common)
    if typing.get_origin(kind) is tuple:
        return click.option(flag, multiple=True, metavar="TEXT", **common)
    return click.option(flag, type=_type(field.name, kind), **common)


def _type(name: str, kind: Any) -> click.ParamType[Any]:
    if name in _BYTES:
        return Size()
    if kind is float:
        return Seconds()
    if kind == int | str:
        return Level()
    return click.INT if kind is int else click.STRING


def _show(name: str, value: Any, kind: Any) -> str:
    if name in _BYTES:
        for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
            if value and value % size == 0:
                return f"{value // size}{unit}"
    return f"{value:g}s" if kind is float else str(value)


def make_config(options: dict[str, Any]) -> Config:
    """The configuration from what was given, wherever. Raises click.UsageError."""
    try:
        return Config.from_mapping({name: value for name, value in options.items() if value not in (None, ())})
    except ConfigError as exc:
        raise click.UsageError(str(exc)) from exc


def _use_file(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Make table [aipod] click's default map; values may be written as on the command line ("1MiB", "2h")."""
    if path is None:
        return
    try:
        table = tomllib.loads(path.read_text()).get("aipod", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise click.UsageError(f"{path} is no TOML file: {exc}") from exc
    known = [field.name for field in dataclasses.fields(Config) if field.repr]  # a secret is not for such a file
    known += [*CALL_SETTINGS, *_OWN.values()]
    if not isinstance(table, dict):
        raise click.UsageError(f"{path}: aipod is not a table; write [aipod]")
    for name in table:
        if name not in known:
            raise click.UsageError(f"{path}: unknown setting {name!r}; known ones: {', '.join(sorted(known))}")
    found: dict[str, Any] = {}
    for param in context.command.params:
        key = _key(param)
        if key not in table:
            continue
        value = found[str(param.name)] = table[key]
        if isinstance(param, click.Option):
            if isinstance(value, bool) and not param.is_flag:
                raise click.UsageError(f"{path}: {key} is true or false, which it cannot be")
            if param.multiple and isinstance(value, str):
                found[str(param.name)] = [value]
    context.default_map = found


def _key(param: click.Parameter) -> str:
    """What a setting is called in the file: as its variable."""
    return param.envvar.removeprefix("AIPOD_").lower() if isinstance(param.envvar, str) else str(param.name)
