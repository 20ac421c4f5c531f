"""A limit that several modules keep to is defined in one of them."""

from __future__ import annotations

import ast
import collections
from pathlib import Path

from aipod.config import GIB, KIB, MIB
from tests.test_tree import PACKAGE, modules

UNITS = {"KIB": KIB, "MIB": MIB, "GIB": GIB}


def constants(path: Path) -> dict[str, object]:
    """The names in capitals that a module gives a value that can be read off."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                values = node.value.elts if isinstance(node.value, ast.Tuple) and len(names) > 1 else [node.value]
                for name, value in zip(names, values, strict=True):
                    if isinstance(name, ast.Name) and name.id.isupper() and is_plain(value):
                        code = compile(ast.Expression(value), str(path), "eval")
                        found[name.id] = eval(code, {"__builtins__": {}}, dict(UNITS))
    return found


def is_plain(value: ast.expr) -> bool:
    kinds = (ast.Constant, ast.BinOp, ast.operator, ast.Load, ast.Tuple)
    return all(isinstance(node, kinds) or (isinstance(node, ast.Name) and node.id in UNITS) for node in ast.walk(value))


def test_no_name_has_one_value_in_two_places() -> None:
    """Else one is changed and the other forgotten. Mutant seen: TICKET_MAX = 64 in the client as well."""
    homes: dict[tuple[str, object], list[str]] = collections.defaultdict(list)
    for path in modules():
        for name, value in constants(path).items():
            homes[name, value].append(str(path.relative_to(PACKAGE)))
    assert len(homes) > 100, "they are found"
    assert {name: where for (name, _), where in homes.items() if len(where) > 1} == {}
