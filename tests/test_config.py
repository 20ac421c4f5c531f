"""Settings: ranges, types, where they come from, and what a person is told about a wrong one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
import pytest

from aipod.cli.options import Seconds, Size, config_options, make_config
from aipod.config import GIB, KIB, MIB, Config, ConfigError, state_home

RANGES = [
    (field.name, field.metadata["low"], field.metadata["high"])
    for field in dataclasses.fields(Config)
    if field.metadata["low"] is not None
]


def test_defaults_are_those_that_are_documented() -> None:
    config = Config()
    assert (config.tick, config.silence, config.drain) == (1, 15, 30)
    assert (config.ping_interval, config.ping_timeout) == (5, 120)
    assert (config.max_message, config.max_kwargs, config.max_streams) == (64 * MIB, 16 * MIB, 1000)
    assert (config.max_payload, config.reserve, config.upload_ttl) == (0, GIB, 3600)
    assert (config.attempts, config.level) == (5, "auto")
    assert config.bind == ("127.0.0.1:50051",)


def test_every_setting_is_explained() -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(Config))


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().tick = 2  # type: ignore[misc]


@pytest.mark.parametrize(("name", "low", "high"), RANGES)
def test_ranges(name: str, low: float, high: float | None) -> None:
    kind = type(getattr(Config(), name))
    with pytest.raises(ConfigError, match=f"{name} = .* too small; it must be at least"):
        Config(**{name: kind(low - 1)})
    if high is not None:
        with pytest.raises(ConfigError, match=f"{name} = .* too large; it must be at most"):
            Config(**{name: kind(high + 1)})


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"tick": "1"}, "tick = '1' is not of type float"),
        ({"tick": True}, "tick = True is not of type float"),
        ({"tick": float("nan")}, "tick = nan"),
        ({"ping_timeout": float("inf")}, "ping_timeout = inf is not a finite number"),
        ({"attempts": 3.0}, "attempts = 3.0 is not of type int"),
        ({"level": 3.0}, "level = 3.0 is not of type int | str"),
        ({"level": True}, "level = True is not of type int | str"),
        ({"level": "high"}, "level = 'high' is not auto, nor a number from -100 to 19"),
        ({"level": 20}, "level = 20 is not auto"),
        ({"level": -101}, "level = -101 is not auto"),
        ({"instances": True}, "instances = True is not of type int"),
        ({"insecure": 1}, "insecure = 1 is not of type bool"),
        ({"spool": 5}, "spool = 5 is not of type str"),
        ({"bind": "127.0.0.1:1"}, "bind = '127.0.0.1:1' is not a list of strings"),
        ({"bind": [1]}, "bind = .* is not a list of strings"),
        ({"bind": []}, "bind is empty"),
        ({"runner": "fibre"}, "runner = 'fibre' is not one of auto, process, thread, loop"),
        ({"preload": ["a", "b"], "max_instances": 1}, "a, b takes 2 instances, .* max_instances to at least 2"),
        ({"preload": ["a", "b", "c"], "instances": 6}, "takes 18 instances, max_instances = 16: "),
        ({"stream_window": 128 * MIB}, "connection_window must be at least stream_window"),
        ({"tikc": 1}, "unknown setting 'tikc'; known ones: .*tick"),
    ],
)
def test_what_cannot_be_meant_is_named(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Config.from_mapping(values)


def test_what_is_preloaded_must_find_room_beside_each_other() -> None:
    """Of one version as many instances are loaded as there may be; one named twice is loaded once."""
    for values in (
        {"preload": ["a", "b"], "max_instances": 2},
        {"preload": ["a", "a"], "max_instances": 1},
        {"preload": ["a"], "max_instances": 1, "instances": 4},
        {"preload": ["a", "b"], "max_instances": 2, "instances": 4, "runner": "loop"},
    ):
        assert Config.from_mapping(values).preload == tuple(values["preload"])


def test_whole_numbers_are_times_too() -> None:
    assert Config.from_mapping({"tick": 2, "bind": ["[::1]:0"]}).tick == 2


def test_the_app_is_named_after_the_class() -> None:
    assert Config(model="package.module:Class").app == "package.module.Class"


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b", "XDG_STATE_HOME": "/x"}, "/var/lib/a"),
        ({"XDG_STATE_HOME": "/x"}, "/x/aipod"),
        ({}, str(Path.home() / ".local/state/aipod")),
    ],
)
def test_where_state_lives(environ: dict[str, str], path: str) -> None:
    assert str(state_home(environ)) == path


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1048576", MIB), ("1MiB", MIB), ("1m", MIB), ("1.5 GiB", 3 * GIB // 2), ("2k", 2 * KIB), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5min", 90), ("2h", 7200), ("250ms", 0.25), ("3 s", 3)])
def test_times(text: str, seconds: float) -> None:
    assert Seconds().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "x", "-1", "1 parsec", "1e9", "nan", "inf", "1MiB MiB", "0x10"])
def test_what_is_neither(text: str) -> None:
    for kind in (Size(), Seconds()):
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)


@click.command()
@config_options(("bind", "insecure", "spool", "drain", "tick", "max_payload"))
def command(**options: Any) -> Config:
    """What every command does with its options."""
    return make_config(options)


CERTIFICATES = ("tls_ca", "tls_cert", "tls_key")


@click.command()
@config_options(CERTIFICATES)
def server(**options: Any) -> Config:
    return make_config(options)


@click.command()
@config_options(CERTIFICATES, text="client")
def client(**options: Any) -> Config:
    return make_config(options)


def configured(*arguments: str | Path, command: click.Command = command) -> Config:
    config = command.main([str(argument) for argument in arguments], standalone_mode=False)
    assert isinstance(config, Config)
    return config


def test_command_line_then_environment_then_file_then_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "aipod.toml"
    file.write_text('[aipod]\ntick = "2s"\nmax_payload = "1MiB"\ndrain = 5\nbind = ["127.0.0.1:1"]\ninsecure = true\n')
    monkeypatch.setenv("AIPOD_TICK", "3s")
    monkeypatch.setenv("AIPOD_DRAIN", "4s")
    config = configured("--config", file, "--tick", "250ms")
    assert (config.tick, config.drain, config.max_payload) == (0.25, 4, MIB)
    assert (config.bind, config.insecure, config.spool) == (("127.0.0.1:1",), True, "")


@pytest.mark.parametrize("where", ["environment", "file"])
def test_a_server_and_a_client_of_one_environment_have_certificates_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Mutant seen: one name for both, so that a server asks everybody for certificates of its own authority."""
    pairs = {f"{prefix}{name}": f"{prefix}{name}.pem" for prefix in ("", "client_") for name in CERTIFICATES}
    arguments: tuple[str | Path, ...] = ()
    if where == "file":
        file = tmp_path / "aipod.toml"
        file.write_text("[aipod]\n" + "".join(f'{name} = "{value}"\n' for name, value in pairs.items()))
        arguments = ("--config", file)
    else:
        for name, value in pairs.items():
            monkeypatch.setenv(f"AIPOD_{name.upper()}", value)
    for command, prefix in ((server, ""), (client, "client_")):
        config = configured(*arguments, command=command)
        assert [getattr(config, name) for name in CERTIFICATES] == [f"{prefix}{name}.pem" for name in CERTIFICATES]
    assert configured(*arguments, "--tls-ca", "given", command=client).tls_ca == "given"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"[aipod]\ntick = ", "TOML|value"),
        (b"[aipod]\ntick = 2\ntick = 3\n", "TOML|overwrite"),
        (b"aipod = 3\n", r"\[aipod\]"),
        (b"[[aipod]]\ntick = 2\n", r"\[aipod\]"),
        (b"[aipod]\ntikc = 2\n", "unknown setting 'tikc'"),
        (b"[aipod]\ntick = 'soon'\n", "not a time"),
        (b"[aipod]\ntick = 0\n", "too small"),
        (b"[aipod]\nmax_payload = 'much'\n", "not a size"),
        (b"[aipod]\nmax_payload = -1\n", "not a size"),
        (b"[aipod]\nspool = '\xff'\n", "utf-8"),
    ],
)
def test_a_wrong_file_is_a_usage_error(tmp_path: Path, text: bytes, told: str) -> None:
    file = tmp_path / "aipod.toml"
    file.write_bytes(text)
    with pytest.raises(click.UsageError, match=told):
        configured("--config", file)
