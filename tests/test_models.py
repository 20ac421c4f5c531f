"""Which methods a caller may call, how a class is found, and what a context does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aipod
from aipod.models import Context, LoadError, Options, exported, is_async, load_class, method


class Base:
    def inherited(self) -> None: ...


class Model(aipod.Model, Base):
    helper = 1
    alias = Base.inherited

    class Nested: ...

    def predict(self) -> None: ...

    @method(restartable=True, timeout=5)
    def train(self) -> None: ...

    @property
    def prop(self) -> int:
        return 1

    @staticmethod
    def static() -> None: ...

    @classmethod
    def of_class(cls) -> None: ...

    def load(self) -> None: ...
    def warm_up(self) -> None: ...
    def close(self) -> None: ...
    def version(self) -> None: ...  # type: ignore[override]
    def data_dir(self) -> None: ...  # type: ignore[override]
    def _private(self) -> None: ...
    def __call__(self) -> None: ...


class AsyncModel(aipod.Model):
    async def _helper(self) -> None: ...
    def predict(self) -> None: ...


def test_exported_is_what_the_body_defines_and_neither_hooks_nor_attributes() -> None:
    assert exported(Model) == {
        "alias": Options(),
        "predict": Options(),
        "train": Options(restartable=True, timeout=5),
    }


def test_any_async_def_makes_the_class_async() -> None:
    assert is_async(AsyncModel)
    assert not is_async(Model)


def test_a_flavor_is_one_of_two() -> None:
    assert method(flavor="asyncio")(lambda: None).__aipod__.flavor == "asyncio"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="curio"):
        method(flavor="curio")


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("source", "spec", "text"),
    [
        ("", "nothing", "is not MODULE:CLASS"),
        ("", ":Class", "is not MODULE:CLASS"),
        ("", "made:", "is not MODULE:CLASS"),
        ("", "no_such_module:Class", "there is no module 'no_such_module'"),
        ("", "made.no_such:Class", "made"),
        ("", "made:Class", "has no class 'Class'"),
        ("Class = 5", "made:Class", "has no class 'Class'"),
        ("class Class: ...", "made:Class", "no public method"),
        ("class Class:\n  def load(self): ...", "made:Class", "no public method"),
        ("import no_such_dependency", "made:Class", "no_such_dependency"),
        ("raise OSError('no licence')", "made:Class", "OSError: no licence"),
        ("this is no python", "made:Class", "SyntaxError"),
    ],
)
def test_a_class_that_cannot_be_served(modules: Path, source: str, spec: str, text: str) -> None:
    (modules / "made.py").write_text(source)
    with pytest.raises(LoadError, match=text):
        load_class(spec)


def test_a_class_that_can(modules: Path) -> None:
    (modules / "made.py").write_text("class Class:\n  def predict(self, context, path): ...")
    assert load_class("made:Class").__name__ == "Class"


def context(tmp_path: Path, reports: list[Any] | None = None) -> Context:
    return Context(
        job_id="id",
        method="predict",
        version="1",
        metadata={"a": "b"},
        work_dir=str(tmp_path / "work"),
        new_version=str(tmp_path / "data" / ".new-id"),
        timeout=None,
        report=lambda *args: reports.append(args) if reports is not None else None,
    )


def test_directories_exist_once_they_are_asked_for(tmp_path: Path) -> None:
    made = context(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert made.work_dir.is_dir()
    assert made.new_version.is_dir()
    assert made.work_dir == tmp_path / "work"


def test_reports_are_bounded_and_can_be_sent(tmp_path: Path) -> None:
    reports: list[Any] = []
    made = context(tmp_path, reports)
    made.progress(7)
    made.progress(-1, "x" * 5000)
    made.progress(float("nan"), "\udcff")
    made.log("text")
    assert reports == [(1.0, "", None), (0.0, "x" * 1000, None), (0.0, "\\udcff", None), (None, None, "text")]


def test_cancelled_and_deadline(tmp_path: Path) -> None:
    made = context(tmp_path)
    assert not made.cancelled
    made.cancel()
    assert made.cancelled
    assert made.deadline is None
