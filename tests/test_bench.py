"""`python -m bench wire`: each peer moves what it was given, and the harness compares and prints."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
