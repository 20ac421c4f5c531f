"""README and guides: what they tell to do is done, and what they name is there. tests/walk.py has their conventions."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

import aipod
from aipod.cli import cli as cli
from aipod.client import Event
from aipod.config import Config
from aipod.errors import TABLE
from tests.conftest import FIRST, ROOT, missing, require
from tests.test_node_client import require_node
from tests.walk import FENCE, fences, where

README, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
GUIDES = sorted((ROOT / "aipod" / "docs").glob("*.md"))
DEPLOY = ROOT / "deploy" / "README.md"
OURS = [README, CHINESE, *GUIDES]
WALKED = [path for path in (README, *GUIDES) if any(f.language == "sh" and f.tested for f in fences(path))]
LANGUAGES = {"", "sh", "text", "python", "toml", "yaml"}
# What the walks use besides Python.
PROGRAMS = re.compile(r"\b(nginx|node|curl|openssl)\b")
each = pytest.mark.parametrize("document", OURS, ids=lambda path: path.stem)


@pytest.mark.skipif(not FIRST, reason="the same on every Python")
@pytest.mark.parametrize("document", WALKED, ids=lambda path: path.stem)
def test_what_it_says_is_done(document: Path, tmp_path: Path) -> None:
    """In an empty directory, and in a network of its own. Mutants seen: a wrong output, option, import, address."""
    commands = "\n".join(line for f in fences(document) if f.language == "sh" and f.tested for line in f.commands)
    for name in {"unshare", *PROGRAMS.findall(commands)}:
        require_node() if name == "node" else require(name)
    if subprocess.run(["unshare", "-n", "ip", "link"], capture_output=True, check=False).returncode != 0:
        missing("no network namespaces: not root, or no ip")
    command = ["unshare", "-n", sys.executable, "-m", "tests.walk", str(document), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


@each
def test_every_fence_is_of_a_known_kind_and_can_be_parsed(document: Path) -> None:
    """So also what is not run is right. Python is a whole program, and has a name; what is a file is used."""
    text = document.read_text()
    for fence in fences(document):
        assert fence.language in LANGUAGES, where(fence)
        if fence.language == "python":
            assert fence.name, where(fence)
            ast.parse(fence.text)
        elif fence.language == "toml":
            tomllib.loads(fence.text)
        elif fence.language == "yaml":
            yaml.safe_load(fence.text)
        elif fence.language == "sh":
            subprocess.run(["bash", "-n"], input=fence.text, text=True, check=True)
        if fence.name:
            assert text.replace(fence.text, "").count(fence.name.removesuffix(".py")), where(fence)
    assert text.count("```") == 2 * len(fences(document)), "a fence that is not read"


@each
def test_few_fences_are_not_run(document: Path) -> None:
    assert sum(not fence.tested for fence in fences(document)) <= 1


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    found = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("document", [*OURS, DEPLOY], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_guide_is_in_the_readme() -> None:
    for guide in GUIDES:
        assert README.read_text().count(f"(aipod/docs/{guide.name})") >= 1, guide.name


def options(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)
    for name in command.list_commands(click.Context(command)) if isinstance(command, click.Group) else ():
        subcommand = command.get_command(click.Context(command), name)
        assert subcommand is not None
        yield from options(subcommand)


# Options of others, and of bench.
FOREIGN = {
    "--require",
    "--quick",
    "--json",
    "--plots",
    "--to",
    "--size",
    "--directory",
    "--seconds",
    "--help",
    "--help-all",
    "--workers",
    "--reload",
}


HAS = {
    "Client": dir(aipod.Client),
    "Config": [field.name for field in dataclasses.fields(Config)],
    "Event": [field.name for field in dataclasses.fields(Event)],
    "Job": dir(aipod.Job),
    "context": [*dir(aipod.Context), "metadata", "job_id", "version", "method"],
}


@each
def test_what_it_names_is_there(document: Path) -> None:
    """Options of aipod's commands, the commands, public names, what classes have, files of the tree, metrics."""
    text = document.read_text()
    known = {*options(cli), *FOREIGN}
    prose = FENCE.sub(lambda fence: fence[3] if fence[2] == "sh" else "", text)
    for command in re.findall(r"`([^`\n]+)`", prose):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", command):
            assert option in known, option
    for name in re.findall(r"`@?aipod\.([A-Za-z]+)\b(?![./`]?\w*\.py)", prose):
        assert name in {*aipod.__all__, "probe"} or importlib.util.find_spec(f"aipod.{name}"), name
    for name in re.findall(r"`aipod ([a-z][a-z-]*)", prose):
        assert name in cli.list_commands(click.Context(cli)), name
    for name in re.findall(r"python -m ([\w.]+)", prose):
        assert importlib.util.find_spec(name) is not None, name
    for kind, name in re.findall(r"\b(Client|Config|Job|Event|context)\.([a-z_]+)\b", prose):
        assert name in HAS[kind], (kind, name)
    for name in re.findall(r"Config\(([a-z_]+)=", prose):
        assert name in HAS["Config"], name
    for name in re.findall(r"`((?:aipod|tests|schema|bench|deploy|\.ci)/[\w./-]+)`", prose):
        assert (ROOT / name).exists(), name
    families = (ROOT / "aipod" / "prometheus" / "families.py").read_text()
    for name in re.findall(r"`(aipod_(?!server)[a-z_]+)`", prose):
        assert name.removesuffix("_total") in families, name


def test_settings_in_parentheses_are_settings() -> None:
    """Of a client: `silence`, `attempts`, `reconnect`."""
    known = {field.name for field in dataclasses.fields(Config)}
    for document in (README, *(guide for guide in GUIDES if guide.stem not in ("benchmarks", "cli"))):
        for name in re.findall(r"\(`(?!aipod_)([a-z_]+)`\)", document.read_text()):
            assert name in known | {"timeout", "on_event"}, (document.name, name)


def test_the_table_of_reasons_is_that_of_the_code() -> None:
    """Mutants seen: a reason is missing; another status; another pause."""
    rows = re.findall(
        r"^\| ([A-Z_]+) \| ([A-Z_]+) \| ?([\d.]*)(?: s)? \|", Path(GUIDES[0].parent / "failures.md").read_text(), re.M
    )
    told = {reason: (status, float(pause) if pause else None) for reason, status, pause in rows}
    assert told == {reason: (row.code.name, row.retry_after) for reason, row in TABLE.items()}


def test_the_chinese_readme_says_the_same() -> None:
    """The same fences, links, headings and rows of tables."""
    for pattern in (r"^```.*?^```$", r"\]\(([^)]+)\)", r"^#+ ", r"^\|[^|]*", r"^- ", r"`[^`\n]+`"):
        english, chinese = (found(pattern, path) for path in (README, CHINESE))
        if pattern.startswith(("^\\|", "^- ")):
            assert len(english) == len(chinese), pattern
        elif pattern.startswith("`"):
            assert sorted(english) == sorted(chinese)
        else:
            assert [one for one in english if not one.startswith("README")] == [
                one for one in chinese if not one.startswith("README")
            ]


def found(pattern: str, path: Path) -> list[str]:
    return re.findall(pattern, path.read_text(), re.MULTILINE | re.DOTALL)


def test_they_are_in_the_package() -> None:
    """As data: `pip install .` takes them along."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["aipod"]
    packed = {path for pattern in data for path in (ROOT / "aipod").glob(pattern)}
    assert set(GUIDES) <= packed
    node = ROOT / "aipod" / "examples" / "node"
    assert {path for path in node.iterdir() if path.name != "node_modules"} <= packed
    json.loads((node / "package.json").read_text())
