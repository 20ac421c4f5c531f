"""Command line options made from the fields of `Config`, so that an option exists once."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from aipod.config import GIB, HOURS, KIB, MIB, MINUTES, Config, ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB|K|M|G|T)?\Z", re.IGNORECASE)
_SIZES = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1024 * GIB}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h)?\Z", re.IGNORECASE)
_TIMES = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": MINUTES, "min": MINUTES, "h": HOURS}

# Integers that count bytes; the others are plain numbers.
_BYTES = {"max_payload", "max_kwargs", "max_message", "reserve", "stream_window", "connection_window"}

_DEFAULTS = Config()


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


def config_options(names: Sequence[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds an option for each named field of `Config`, and --config."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    hints = typing.get_type_hints(Config)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            function = _option(fields[name], hints[name])(function)
        return click.option(
            "--config",
            "config_file",
            envvar="AIPOD_CONFIG",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="TOML file with a table [aipod].",
        )(function)

    return decorate


def _option(field: dataclasses.Field[Any], kind: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    flag = "--" + field.name.replace("_", "-")
    default = getattr(_DEFAULTS, field.name)
    default = ", ".join(default) if isinstance(default, tuple) else default
    told = f" [{_show(field.name, default, kind)}]" if default not in ("", False) else ""
    # No default of click's own: a value that was not given must not hide the one in the file.
    common: dict[str, Any] = {
        "envvar": f"AIPOD_{field.name.upper()}",
        "default": None,
        "help": field.metadata["help"].removesuffix(".") + told,
    }
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
    return click.INT if kind is int else click.STRING


def _show(name: str, value: Any, kind: Any) -> str:
    if name in _BYTES:
        for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
            if value and value % size == 0:
                return f"{value // size}{unit}"
    return f"{value:g}s" if kind is float else str(value)


def make_config(config_file: Path | None, options: dict[str, Any], **fixed: Any) -> Config:
    """The configuration: what was given on the command line or in the environment, over the file, over the defaults.

    Raises click.UsageError.
    """
    try:
        values = _read_file(config_file) if config_file is not None else {}
        values |= {name: value for name, value in options.items() if value is not None and value != ()}
        return Config.from_mapping({**values, **fixed})
    except (ConfigError, tomllib.TOMLDecodeError) as exc:
        raise click.UsageError(str(exc)) from exc


def _read_file(path: Path) -> dict[str, Any]:
    """Table [aipod]; values may be written as on the command line ("1MiB", "2h")."""
    table = tomllib.loads(path.read_text()).get("aipod", {})
    hints = typing.get_type_hints(Config)
    for name, value in table.items():
        if name in hints and isinstance(value, str) and hints[name] in (int, float):
            table[name] = _type(name, hints[name]).convert(value, None, None)
    return dict(table)
