"""What a served class offers, as told by whoever has imported it, and which keyword arguments fit its methods.

Standard library only: worker processes import it.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from aipod.models import exported, is_async

# Of a default's or an annotation's text: a method may have an array as its default.
MAX_TEXT = 200


class _Text:
    """Stands in a signature for what shall be shown as this text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def describe(cls: type) -> dict[str, Any]:
    """What the server needs to know of a class that it never imports; JSON can hold it."""
    methods = {
        name: {**dataclasses.asdict(options), **describe_method(getattr(cls, name), own=3)}
        for name, options in exported(cls).items()
    }
    return {"class": cls.__name__, "async": is_async(cls), "methods": methods}


def describe_method(function: Callable[..., Any], *, own: int) -> dict[str, Any]:
    """Docstring, signature as its caller sees it, and the parameters: of each its name, annotation and default as text.

    The first `own` arguments are not the caller's: self, context, path; those of their names that no caller can use are
    in `own`. `open`: it takes other names as well. A parameter is required where its default is None; one that has the
    default `None` says "None".
    """
    signature = inspect.signature(function, follow_wrapped=False)  # what is really called; a wrapper may take more
    shown, taken, left, is_open = [], [], own, False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            is_open = True
        elif parameter.kind is parameter.VAR_POSITIONAL:
            left = 0
            continue
        elif parameter.kind is not parameter.KEYWORD_ONLY and left > 0:
            left -= 1
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                taken.append(parameter.name)
            continue
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            continue  # it has a default, and no name
        kind = parameter.VAR_KEYWORD if parameter.kind is parameter.VAR_KEYWORD else parameter.KEYWORD_ONLY
        default, annotation = parameter.default, parameter.annotation
        shown.append(
            parameter.replace(
                kind=kind,
                default=default if default is parameter.empty else _Text(_told(repr, default)),
                annotation=annotation if annotation is parameter.empty else _annotation(annotation),
            )
        )
    returned = signature.return_annotation
    shown_signature = signature.replace(
        parameters=shown,
        return_annotation=returned if returned is signature.empty else _annotation(returned),
    )
    return {
        "doc": inspect.getdoc(function) or "",
        "signature": str(shown_signature),
        "own": taken,
        "open": is_open,
        "parameters": [
            {
                "name": parameter.name,
                "annotation": "" if parameter.annotation is parameter.empty else repr(parameter.annotation),
                "default": None if parameter.default is parameter.empty else repr(parameter.default),
            }
            for parameter in shown
            if parameter.kind is not parameter.VAR_KEYWORD
        ],
    }


def _annotation(annotation: Any) -> _Text:
    # One that is text already (`from __future__ import annotations`) would be shown in quotes.
    return _Text(annotation[:MAX_TEXT] if isinstance(annotation, str) else _told(inspect.formatannotation, annotation))


def _told(function: Callable[[Any], str], value: Any) -> str:
    """What `function` says of it, cut; a `__repr__` is code of the model's, and may raise whatever it likes."""
    try:
        text = function(value)
    except Exception as exc:
        text = f"[no text: {type(exc).__name__}]"
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


def misfit(name: str, method: Mapping[str, Any], given: Collection[str]) -> tuple[str, str] | None:
    """Why the method cannot be called with these keyword arguments: the parameter, and a text for its caller.

    `method`: what `describe_method` says of it. None: it can.
    """
    known = {parameter["name"]: parameter for parameter in method["parameters"]}
    for key in given:
        if key in method["own"]:
            return key, f"{name}'s argument {key!r} is not the caller's"
        if key not in known and not method["open"]:
            near = difflib.get_close_matches(key[:MAX_TEXT], known, n=1)
            has = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known)}" if known else "it has none"
            return key, f"{name} has no parameter {key[:80]!r}; {has}"
    for key, parameter in known.items():
        if parameter["default"] is None and key not in given:
            of = f" ({parameter['annotation']})" if parameter["annotation"] else ""
            return key, f"{name} needs the keyword argument {key!r}{of}"
    return None
