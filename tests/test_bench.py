"""`python -m bench wire`: each peer moves what it was given, and the harness compares and prints.

`python -m bench faults`: jobs survive a short run, and what must not be is told.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.faults.run import Totals
from bench.faults.runs import check_starts
from bench.peers import common
from bench.wire import NEEDS, ROWS
from tests.conftest import ROOT, missing

LONG = int(os.environ.get("AIPOD_TEST_LONG", "1"))

MIB = 1 << 20


def wire(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "wire", "--quick", "--pairs", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def require_peers(*rows: str) -> None:
    for row in rows:
        for comparison in ROWS[row]:
            module = NEEDS.get(comparison.peer.client)
            if module is not None and importlib.util.find_spec(module) is None:
                missing(f"{module} is not installed: pip install -e '.[bench]'")


@pytest.mark.slow
@pytest.mark.parametrize("row", ["up", "down", "small", *(["stock"] if LONG > 1 else [])])
def test_each_row_is_measured(row: str, tmp_path: Path) -> None:
    require_peers(row)
    out = tmp_path / "wire.json"
    # More than the 16 blocks and one whole 64th message, and a last message that is not full.
    done = wire("--rows", row, "--size", str(65 * MIB + 7), "--calls", "20", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "how many times better ours is" in done.stdout
    result = json.loads(out.read_text())
    assert result["commit"]
    assert {"grpclib", "h2", "trio"} <= result["versions"].keys()
    assert len(result["comparisons"]) == len(ROWS[row])
    for comparison in result["comparisons"]:
        assert comparison["row"] == row
        assert len(comparison["runs"]) == 1
        for values in comparison["figures"].values():
            assert values["ratio_min"] == values["ratio"] == values["ratio_max"] > 0


def test_ours_needs_no_extra() -> None:
    assert not {"ours", "raw", "grpclib_stock"} & NEEDS.keys()


def test_an_unknown_row_is_refused() -> None:
    done = wire("--rows", "sideways")
    assert done.returncode == 2
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
