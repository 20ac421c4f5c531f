"""`python -m bench wire`: each peer moves what it was given, and the harness compares and prints.

`python -m bench faults`: jobs survive a short run, and what must not be is told.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import machine, wire
from bench.faults.run import Totals
from bench.faults.runs import check_starts
from bench.options import Options
from bench.peers import common
from tests.conftest import ROOT, missing

LONG = int(os.environ.get("AIPOD_TEST_LONG", "1"))

MIB = 1 << 20


def bench(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments, "--quick", "--pairs", "1", "--directory", str(directory)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def require_peers() -> None:
    for peer, module in machine.absent().items():
        missing(f"{peer}: {module} is not installed: pip install -e '.[bench]'")


def measured(directory: Path, *arguments: str) -> dict[str, Any]:
    """Run a benchmark, and read what it has written."""
    require_peers()
    out = directory / "out.json"
    done = bench(*arguments, "--json", str(out), directory=directory)
    assert done.returncode == 0, done.stderr
    assert "how many times better ours is" in done.stdout
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["commit"]
    assert {"grpclib", "h2", "trio", "grpcio"} <= result["versions"].keys()
    for comparison in result["comparisons"]:
        names = [way["name"] for way in comparison["ways"]]
        assert [sorted(each) for each in comparison["rounds"]] == [sorted(names)]
        assert list(comparison["versus"]) == names[1:]
        for figures in comparison["versus"].values():
            for values in figures.values():
                assert values["ratio_min"] == values["ratio"] == values["ratio_max"] > 0
    return result


@pytest.mark.slow
def test_the_wire_is_measured(tmp_path: Path) -> None:
    rows = "up,down,stock 16 KiB,calls" + (",up16,down16,stock,stock sync" if LONG > 1 else "")
    # More than the 16 blocks and one whole 64th message, and a last message that is not full.
    result = measured(tmp_path, "wire", "--rows", rows, "--size", str(65 * MIB + 7), "--jobs", "20")
    assert [each["row"] for each in result["comparisons"]] == [
        each.row for each in wire.comparisons(Options(tmp_path, tmp_path)) if each.row in rows.split(",")
    ]


@pytest.mark.slow
def test_small_jobs_are_measured(tmp_path: Path) -> None:
    result = measured(tmp_path, "small", "--rows", "8 at once,worker", "--jobs", "20")
    assert [run["jobs"] for each in result["comparisons"] for run in each["rounds"][0].values()] == [20] * 6


def test_ours_needs_no_extra() -> None:
    assert not {"ours", "product", "raw", "grpclib_stock"} & machine.NEEDS.keys()


def test_an_unknown_row_is_refused(tmp_path: Path) -> None:
    done = bench("wire", "--rows", "sideways", directory=tmp_path)
    assert done.returncode == 1
    assert "choose from up, down" in done.stderr


def receipt(messages: list[bytes]) -> bytes:
    made = common.Receipt()
    for message in messages:
        made.add(message)
    return made.seal()


def test_a_receipt_tells_what_was_lost_or_changed() -> None:
    size = 65 * 1000 + 7
    sent = [data for data, _ in common.messages(size, 1000)]
    assert [last for _, last in common.messages(size, 1000)] == [False] * 65 + [True]
    assert len(sent[-1]) == 7
    common.check(receipt(sent), size, 1000)
    flipped = bytes([sent[64][0] ^ 1]) + sent[64][1:]
    for wrong in (sent[:-1], sent[1:], [*sent, b""], [*sent[:64], flipped, sent[65]]):
        with pytest.raises(common.WrongData):
            common.check(receipt(wrong), size, 1000)


@pytest.mark.slow
def test_jobs_survive_random_faults() -> None:
    command = [sys.executable, "-m", "bench", "faults", "--seconds", "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed, 0 wrong, 0 hangs" in done.stdout
    assert int(done.stdout.split("kills: ")[1].split()[0]) > 0


def test_what_must_not_be_in_a_run_of_faults_is_told() -> None:
    totals = Totals()
    for name, how in (("work-1", "right"), ("work-2", "left"), ("again-3", "interrupted"), ("work-4", "right")):
        totals.end(name, how)
    lines = ["work-1", "work-2", "again-3", "again-3", "work-4"]
    counts = check_starts(lines, totals.right, totals.problems)
    assert counts == {"work": {1: 3}, "again": {2: 1}}
    assert totals.problems == []
    totals.end("work-5", "wrong")
    totals.end("work-6", "JOB_LOST: it may have run")
    totals.end("work-7", "right")
    check_starts([*lines, "work-1", "again-3"], totals.right, totals.problems)
    assert totals.problems == [
        "work-5: wrong",
        "work-6: JOB_LOST: it may have run",
        "work-1: 2 starts",
        "again-3: 3 starts",
        "work-7: an answer without a start",
    ]
    assert totals.ends == {"right": 3, "left": 1, "interrupted": 1, "wrong": 1, "failed": 1}
