"""What a class tells of its methods, which keyword arguments fit them, and how callers hear of both."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aipod
from aipod.client import Event
from aipod.methods import MAX_TEXT, describe, describe_method, misfit
from aipod.models import Context, LoadError, load_class
from tests.conftest import Serve, run
from tests.stranger import ask
from tests.test_cli import aipod as aipod_command

SIZE = 1 << 30


class Loud:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, threshold=1, **kwargs)

    return wrapper


class Scan(aipod.Model):
    """What `describe` is tried with; the methods that no call could fit are of `Unfit`."""

    def plain(self, context: Context, path: Path) -> None:
        """Takes nothing.

        Says more.
        """

    def some(
        self, context: Context, path: Path, top: int = 3, *, mode: str, maybe: float | None = None
    ) -> list[str]: ...  # type: ignore[empty-body]
    def rest(self, *args: Any, top: int = 3, **kwargs: Any) -> None: ...
    def bare(self, context, path, top, loud=Loud(), long="x" * 1000): ...  # type: ignore[no-untyped-def]  # noqa: B008
    def hidden(self, context: Context, path: Path, x: int = 1, /, top: int = 2) -> None: ...
    @wrapped
    def decorated(self, context: Context, path: Path, *, threshold: int) -> None: ...


class Unfit:
    """The class body of each is served."""

    class Short:
        def predict(self, context: Context) -> None: ...

    class Versioned:
        def predict(self, context: Context, path: Path, *, version: str) -> None: ...

    class Nameless:
        def predict(self, context: Context, path: Path, top: int, /) -> None: ...


def told(name: str) -> dict[str, Any]:
    method: dict[str, Any] = describe(Scan)["methods"][name]
    return method


def parameters(name: str) -> list[tuple[str, str, str | None]]:
    return [(one["name"], one["annotation"], one["default"]) for one in told(name)["parameters"]]


def test_a_method_is_described_as_its_caller_sees_it() -> None:
    """self, context and path are not the caller's, wherever they go; text, so that JSON can hold it."""
    assert json.loads(json.dumps(describe(Scan))) == describe(Scan)
    assert told("plain")["doc"] == "Takes nothing.\n\nSays more."
    assert (told("plain")["signature"], parameters("plain"), told("plain")["open"]) == ("() -> None", [], False)
    assert told("some")["signature"] == "(*, top: int = 3, mode: str, maybe: float | None = None) -> list[str]"
    assert parameters("some") == [("top", "int", "3"), ("mode", "str", None), ("maybe", "float | None", "None")]
    assert told("rest")["signature"] == "(*, top: int = 3, **kwargs: Any) -> None"
    assert (parameters("rest"), told("rest")["open"]) == ([("top", "int", "3")], True)
    assert parameters("hidden") == [("top", "int", "2")]
    assert (parameters("decorated"), told("decorated")["open"]) == ([], True)
    long = repr("x" * 1000)[: MAX_TEXT - 3] + "..."
    assert parameters("bare") == [("top", "", None), ("loud", "", "[no text: RuntimeError]"), ("long", "", long)]


@pytest.mark.parametrize(
    ("name", "given", "parameter", "text"),
    [
        ("plain", ["top"], "top", "plain has no parameter 'top'; it has none"),
        ("some", ["mode", "tops"], "tops", "some has no parameter 'tops'; did you mean 'top'?"),
        ("some", ["mode", "x" * 10_000], "x" * 10_000, f"some has no parameter {'x' * 80!r}; it has: top, mode, maybe"),
        ("some", ["top"], "mode", "some needs the keyword argument 'mode' (str)"),
        ("bare", [], "top", "bare needs the keyword argument 'top'"),
        ("rest", ["self"], "self", "rest's argument 'self' is not the caller's"),
        ("some", ["mode", "path"], "path", "some's argument 'path' is not the caller's"),
        ("hidden", ["x"], "x", "hidden has no parameter 'x'; it has: top"),
        *((name, given, None, None) for name, given in (
            ("plain", []), ("some", ["mode"]), ("some", ["mode", "top", "maybe"]), ("rest", ["anything", "top"]),
            ("rest", []), ("bare", ["top"]), ("decorated", ["anything"]),
        )),
    ],
)  # fmt: skip
def test_keyword_arguments_fit_or_the_text_names_the_parameter(
    name: str, given: list[str], parameter: str | None, text: str | None
) -> None:
    wrong = misfit(name, told(name), given)
    assert wrong == (None if parameter is None else (parameter, text))


def test_a_plain_function_has_two_arguments_of_its_own() -> None:
    """As in `FakeRunner`."""
    method = describe_method(lambda context, path, top=1: None, own=2)
    assert [one["name"] for one in method["parameters"]] == ["top"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "Short",
            r"predict takes \(self, context: .*it is called with context and path:  def predict\(self, context, ",
        ),
        ("Versioned", "parameter 'version' never comes; context.version has it"),
        ("Nameless", "parameter 'top' has no name for its callers; take the / away"),
    ],
)
def test_a_class_whose_method_no_call_could_fit_is_not_served(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), name, getattr(Unfit, name))
    with pytest.raises(LoadError, match=text):
        load_class(f"{__name__}:{name}")


@pytest.mark.parametrize("runner", ["process", "thread", "loop"])
def test_callers_hear_of_methods_and_of_what_does_not_fit(serve: Serve, tmp_path: Path, runner: str) -> None:
    """Before the payload is sent."""
    served = serve("tests.models_methods:Described", "--runner", runner)
    payload = tmp_path / "payload"
    with payload.open("wb") as file:
        file.truncate(SIZE)

    async def main() -> None:
        sent: list[Event] = []
        async with aipod.Client(served.address) as client:
            offer = await client.chaos(metadata=[("x-func-name", "aipod.methods")])
            assert (offer["class"], offer["async"]) == ("Described", runner == "loop")
            assert offer["methods"]["predict"] == {
                **{
                    "restartable": True,
                    "timeout": 60,
                    "flavor": "trio",
                    "doc": "The top ones.",
                    "own": ["self", "context", "path"],
                },
                "open": False,
                "signature": "(*, top: int, mode: str = 'fast') -> dict[str, typing.Any]",
                "parameters": [
                    {"name": "top", "annotation": "int", "default": None},
                    {"name": "mode", "annotation": "str", "default": "'fast'"},
                ],
            }
            for kwargs, parameter in (({}, "top"), ({"top": 1, "mood": "x"}, "mood")):
                with pytest.raises(aipod.Refused) as caught:
                    await client.predict(payload, on_event=sent.append, **kwargs)
                assert (caught.value.reason, caught.value.metadata["parameter"]) == ("BAD_KWARGS", parameter)
            assert max(event.sent for event in sent) < SIZE
            assert await client.predict(b"x", top=1) == {"top": 1, "mode": "fast"}

    run(main)
    reply = ask(served.address, "predict", {"top": 1, "mood": "x"})
    assert (reply.code.value[0], reply.info.reason) == (3, "BAD_KWARGS")
    assert reply.details == "predict has no parameter 'mood'; did you mean 'mode'?"


def test_the_command_lists_them(serve: Serve) -> None:
    served = serve("tests.models_methods:Described")
    done = aipod_command("methods", "--to", served.address)
    assert (done.status, done.err) == (0, "")
    assert done.out.decode().splitlines() == [
        "predict(*, top: int, mode: str = 'fast') -> dict[str, typing.Any]",
        "    The top ones.",
        "    Ends after 60 s at the latest.",
        "    Is run once more where its server was killed.",
    ]
    listed = [json.loads(line) for line in aipod_command("methods", "--json", "--to", served.address).out.splitlines()]
    assert [(one["name"], one["restartable"], one["parameters"][0]["name"]) for one in listed] == [
        ("predict", True, "top")
    ]
