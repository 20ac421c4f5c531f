"""`python -m bench faults`: which jobs may say that they were interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.faults.model import Counted
from bench.faults.run import Totals
from bench.faults.runs import STORE, read_runs

KILLS = {10: 100.0, 20: 200.0}  # servers 10 and 20 were killed, 30 was not


@pytest.mark.parametrize(
    ("name", "lines", "right"),
    [
        ("work-1", ["start work-1 10 99"], True),
        ("work-1", ["start work-1 10 99", "end work-1 10 99.5"], True),  # its answer was being stored
        ("work-1", ["start work-1 10 50", f"end work-1 10 {99.9 - STORE}"], False),  # long over
        ("work-1", ["start work-1 10 102"], False),  # another server with its number
        ("work-1", ["start work-1 30 99"], False),
        ("work-1", [], True),  # killed before its first line
        ("work-2", ["start work-1 10 99"], False),  # of another job; its own time is between the kills
        ("again-1", ["start again-1 10 99", "start again-1 20 199"], True),
        ("again-1", ["start again-1 10 99", "start again-1 30 199"], False),
        ("again-1", ["start again-1 10 99"], True),  # the second one before its first line
        ("again-2", ["start again-2 20 199"], False),  # but there was no second kill in its time
        ("again-1", ["start again-1 30 99"], False),
    ],
)
def test_interrupted_is_right_only_with_a_server_that_was_killed(name: str, lines: list[str], right: bool) -> None:
    """Jobs -1 have lived through both kills, work-2 through none, again-2 through the second."""
    totals = Totals(kills=dict(KILLS))
    totals.end(name, "interrupted")
    totals.interrupted[name] = {"work-2": (101.0, 199.0), "again-2": (150.0, 300.0)}.get(name, (90.0, 300.0))
    totals.check_interrupted(read_runs("\n".join(lines)))
    assert totals.ends == {"interrupted": int(right), **({} if right else {"wrong": 1})}
    assert totals.ends.total() == 1
    told = [] if right else [f"{name}: interrupted, though its server was not killed while it ran"]
    assert totals.problems == told


def test_the_model_writes_what_is_read(tmp_path: Path) -> None:
    model = Counted.__new__(Counted)
    model.load()
    path = str(tmp_path / "runs")
    model._note(path, "start", "work-1")
    model._note(path, "start", "work-2")
    model._note(path, "end", "work-1")
    one, two = read_runs((tmp_path / "runs").read_text())
    assert (one.name, two.name, one.server, two.end) == ("work-1", "work-2", model._server, None)
    assert one.end is not None
    assert one.begin <= two.begin <= one.end
