"""`python -m bench`: peers do the same work, and the harness compares, judges and prints.

`python -m bench faults`: jobs survive a short run, and what must not be is told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import data, file, levels, machine
from bench.__main__ import BENCHMARKS, main, status
from bench.compare import Bed, Comparison, Figure, Measured, _rests, measure, same
from bench.faults.run import Totals
from bench.faults.runs import check_starts
from bench.options import Options
from bench.peers import common
from bench.processes import Failed, Server, run_client
from bench.report import verdict
from bench.required import EVERY, FIXED, REQUIRED, Bound, Required, judge
from tests.conftest import ROOT, alive, children, first_only, missing, wait_until

LONG = int(os.environ.get("AIPOD_TEST_LONG", "1"))

MIB = 1 << 20
# One row of each kind, and all where there is time: each command of each peer, directly and through each hop.
ROWS = {
    "small": ("worker",),
    "wire": ("up", "stock 16 KiB", "calls"),
    "file": ("random", "nginx tar", "fair copy"),
    "result": ("nginx random",),
    "links": ("50 ms",),
    "levels": ("json unshaped",),
    "levels-down": (),
    "jobs": ("1000 at once",),
    "memory": ("result",),
}
SIZE = 70_000
TRANSFERS = ["result", "links", "levels", *(["levels-down"] if LONG > 1 else [])]
# Of the harness one benchmark on every Python; what a server lives through, other tests tell.
harness = first_only("the harness's own ways")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all that is measured here has its data: made once."""
    return tmp_path_factory.mktemp("bench")


def bench(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments, "--quick", "--pairs", "1", "--directory", str(directory)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def data_in(directory: Path) -> Path:
    return directory / f"aipod-bench-data-{os.getuid()}"


def require_peers() -> None:
    for peer, why in machine.absent().items():
        missing(f"{peer}: {why}")


def measured(name: str, directory: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run one benchmark; what it has written, and printed."""
    require_peers()
    out = directory / "out.json"
    chosen = () if LONG > 1 else ("--rows", ",".join(ROWS[name]))
    done = bench(name, *chosen, *arguments, "--json", str(out), directory=directory)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["commit"]
    assert {"grpclib", "h2", "trio", "grpcio", "uvicorn"} <= result["versions"].keys()
    assert {"system", "processor", "cores", "load"} <= result["machine"].keys()
    assert [each["name"] for each in result["required"]] == [each.name for each in REQUIRED]
    rows = [each.row for each in BENCHMARKS[name](Options(directory, data_in(directory), size=SIZE))]
    assert [each["row"] for each in result["comparisons"]] == [row for row in rows if LONG > 1 or row in ROWS[name]]
    for comparison in result["comparisons"]:
        names = [way["name"] for way in comparison["ways"]]
        assert [sorted(each) for each in comparison["rounds"]] == [sorted(names)]
        assert list(comparison["versus"]) == names[1:]
        for figures in comparison["versus"].values():
            for values in figures.values():
                assert values["ratio_min"] == values["ratio"] == values["ratio_max"] > 0
        for way in comparison["ways"]:
            run = comparison["rounds"][0][way["name"]]
            assert {"client_user", "client_sys", "client_peak_mb", "server_user", "server_peak_mb"} <= run.keys()
            assert ("hop_cpu" in run) == (way["hop"] is not None)
    # Rich wraps lines: words only.
    assert "how many times better ours is" in done.stdout
    return result, done.stdout


def runs(result: dict[str, Any], row: str) -> dict[str, Any]:
    """By way, of a row that was measured once."""
    (found,) = [each["rounds"][0] for each in result["comparisons"] if each["row"] == row]
    assert isinstance(found, dict)
    return found


@harness
@pytest.mark.slow
def test_the_wire_is_measured(place: Path) -> None:
    # More than the 16 blocks and one whole 64th message, and a last message that is not full.
    size = 65 * MIB + 7
    result, _ = measured("wire", place, "--size", str(size), "--jobs", "20")
    for run in runs(result, "up").values():
        assert run["bytes"] == size


@pytest.mark.slow
def test_small_jobs_are_measured(place: Path) -> None:
    result, _ = measured("small", place, "--jobs", "20")
    assert [run["jobs"] for run in runs(result, "worker").values()] == [20] * 3
    assert runs(result, "worker")["worker"]["server_worker_peak_mb"] > 0


@harness
@pytest.mark.slow
def test_files_are_measured_and_drawn(place: Path) -> None:
    """The first version's design waits a second for whatever it is given: no small file makes it a fair copy."""
    pytest.importorskip("matplotlib")
    result, printed = measured("file", place, "--size", str(SIZE), "--plots", str(place / "plots"))
    answers = [run["answer"] for run in runs(result, "random").values()]
    assert len(answers) == 3
    assert answers == [answers[0]] * 3
    assert answers[0]["size"] == SIZE
    assert runs(result, "random")["first version"]["seconds"] >= 1
    judged = {each["name"]: each["reached"] for each in result["required"]}
    assert judged["fair copy"] is False
    assert judged["levels"] is None
    assert "missed" in next(line for line in printed.splitlines() if "fair copy: at least 0.15 x" in line)
    assert sorted(path.name for path in (place / "plots").iterdir()) == ["ratios.png", "ratios.svg"]
    assert "first version" in (place / "plots" / "ratios.svg").read_text()


@harness
@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFERS)
def test_transfers_are_measured(name: str, place: Path) -> None:
    result, _ = measured(name, place, "--size", str(SIZE))
    for comparison in result["comparisons"]:
        for run in comparison["rounds"][0].values():
            assert run["bytes"] == SIZE
    if name.startswith("levels"):
        assert [list(each["versus"]) for each in result["comparisons"]] == [["-5", "1", "3", "6", "9"]] * (
            12 if LONG > 1 else 1
        )


@harness
@pytest.mark.slow
def test_many_jobs_are_measured(place: Path) -> None:
    result, _ = measured("jobs", place, "--jobs", "20", "--seconds", "2.5")
    run = runs(result, "1000 at once")["aipod"]
    assert run["jobs"] == 20
    assert run["gaps"] >= 20  # one each at least, in 2.5 s
    assert 0 <= run["gaps_in_time"] <= 1


def test_what_keeps_a_large_job_from_running_is_told() -> None:
    """In a line. Mutant seen: a traceback."""
    command = [sys.executable, "-m", "bench", "large", "--to", "nonsense", "--size", "1000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch(r"python -m bench large: .*nonsense.*\n", done.stderr)


@harness
@pytest.mark.slow
def test_memory_is_measured(place: Path) -> None:
    result, _ = measured("memory", place, "--size", str(SIZE))
    assert result["comparisons"][0]["ours"]["server peak MB"]["median"] > 10


def test_ours_needs_no_extra() -> None:
    assert not {"ours", "product", "raw", "link", "grpclib_stock"} & machine.NEEDS.keys()


def test_an_unknown_row_is_refused(place: Path) -> None:
    done = bench("wire", "--rows", "sideways", directory=place)
    assert done.returncode == 1
    assert "choose from up, down" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--size", "0"), "at least one byte"),
        (("--jobs", "-4"), "--jobs: '-4'"),
        (("--pairs", "0"), "--pairs: '0'"),
        (("--seconds", "nan"), "--seconds: 'nan'"),
        (("--json", "{dir}"), "{dir} cannot be written"),
        (("--json", "{dir}/none/x.json"), "x.json cannot be written"),
        (("--lock", "{dir}/none/x"), "x cannot be written"),
        (("--directory", "{dir}/file"), "--directory: "),
        (("--plots", "{dir}/file"), "--plots: "),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(
    arguments: tuple[str, str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An hour is lost else. Mutants seen: no check of places; 0 and less are let in."""
    if "--plots" in arguments:
        pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["small", "--rows", "none", *(each.replace("{dir}", str(tmp_path)) for each in arguments)])
    assert told.replace("{dir}", str(tmp_path)) in capsys.readouterr().err


def test_what_was_measured_is_kept_when_it_is_stopped(tmp_path: Path) -> None:
    """Mutants seen: no table and no JSON then; and status 0."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "bench", "small", "--rows", "1 at once,worker", "--jobs", "5", "--pairs", "2"]
    command += ["--directory", str(tmp_path), "--json", str(out)]
    harness = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    try:
        assert harness.stderr is not None
        for line in harness.stderr:
            if line.startswith("small worker:"):
                break
        os.killpg(harness.pid, signal.SIGINT)  # as Ctrl-C of a terminal
        printed, errors = harness.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(harness.pid, signal.SIGKILL)
        harness.wait()
    assert harness.returncode == 130
    assert "stopped" in errors
    assert "small 1 at once" in printed
    result = json.loads(out.read_text())
    assert not result["whole"]
    assert [each["row"] for each in result["comparisons"]] == ["1 at once"]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]  # nothing of the servers


def test_what_is_not_installed_is_named_and_left_out(tmp_path: Path) -> None:
    """Mutants seen: numpy is imported all the same; tables without a row, and status 0."""
    code = """if True:
        import sys
        sys.modules["numpy"] = sys.modules["httpx"] = None
        from bench.__main__ import BENCHMARKS, main, machine
        from bench.options import Options
        from pathlib import Path
        place = Path(sys.argv[1])
        rows = [each.row for each in BENCHMARKS["levels"](Options(place, place / "data", size=10))]
        assert rows.count("weights unshaped") == 0 and rows.count("json unshaped") == 1, rows
        sys.exit(main(["result", "--rows", "random,tar", "--size", "10", "--directory", sys.argv[1]]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "weights is left out: numpy is not installed: pip install -e '.[bench]'" in done.stdout
    assert "web is left out: httpx is not installed" in done.stdout
    assert "how many times" not in done.stdout
    assert "result random: left out, with all its peers" in done.stderr
    assert "nothing was measured" in done.stderr


# Figures and verdicts

MORE, LESS = Figure("MB/s", lambda run: run["a"]), Figure("p50 ms", lambda run: run["b"], more_is_better=False)


def summary(*rounds: tuple[float, float, float]) -> dict[str, Any]:
    """Of a comparison of ours with x and y, by what each had in each round, of both figures."""
    ways = [same(name, "raw") for name in ("ours", "x", "y")]
    made = Measured("small", Comparison("row", "calls", (), ways[0], tuple(ways[1:]), (MORE, LESS)))
    for values in rounds:
        made.rounds.append({way.name: {"a": value, "b": value} for way, value in zip(ways, values, strict=True)})
    return made.summary()


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    versus = summary((8, 4, 1), (2, 4, 1), (12, 4, 1))["versus"]
    assert versus["x"]["MB/s"] == {
        "ours": 8, "peer": 4, "ratio": 2.0, "ratio_min": 0.5, "ratio_max": 3.0, "difference": 4
    }  # fmt: skip
    less = versus["x"]["p50 ms"]
    assert (less["ratio"], less["ratio_min"], less["ratio_max"]) == (0.5, 4 / 12, 2.0)


@pytest.mark.parametrize(
    ("bound", "reached"),
    [
        (Bound("small", "row", "x", "MB/s", at_least=2.0), True),
        (Bound("small", "row", "x", "MB/s", at_least=2.01), False),
        (Bound("small", "row", "x", "p50 ms", at_least=0.5), True),
        (Bound("small", "row", "x", "p50 ms", at_least=0.51), False),
        (Bound("small", "row", "x", "p50 ms", at_most=4, of="difference"), True),
        (Bound("small", "row", "x", "p50 ms", at_most=3.9, of="difference"), False),
        (Bound("small", "row", "", "MB/s", at_most=8, of="median"), True),
        (Bound("small", "row", "", "MB/s", at_most=7.9, of="median"), False),
        (Bound("small", "row", EVERY, "MB/s", at_least=0.8), True),
        (Bound("small", "row", EVERY, "MB/s", at_least=0.81), False),
        (Bound("small", "other", "x", "MB/s", at_least=1), None),
        (Bound("wire", "row", "x", "MB/s", at_least=1), None),
        (Bound("small", "row", "z", "MB/s", at_least=1), None),
    ],
)
def test_a_figure_is_reached_or_missed(bound: Bound, reached: bool | None) -> None:
    (judged,) = judge([summary((8, 4, 10))], [Required("a", "", (bound,))])
    assert judged["reached"] is reached
    assert verdict(judged["reached"]) == {True: "reached", False: "missed", None: "not measured"}[reached]
    assert status([judged], require=False) == 0
    assert status([judged], require=True) == (1 if reached is False else 0)


def test_of_some_bounds_enough_must_hold() -> None:
    held = Bound("small", "row", "x", "MB/s", at_least=1)
    missed = Bound("small", "row", "x", "MB/s", at_least=99)
    unknown = Bound("small", "other", "x", "MB/s", at_least=1)
    verdicts = {
        (held, missed): (1, True), (missed, missed): (1, False), (held, missed, held): (0, False),
        (held, unknown): (1, True), (missed, unknown): (1, None), (missed, unknown, held): (3, False),
    }  # fmt: skip
    for bounds, (enough, reached) in verdicts.items():
        (judged,) = judge([summary((8, 4, 10))], [Required("a", "", bounds, enough)])
        assert judged["reached"] is reached, bounds


def test_every_required_figure_names_what_is_measured(place: Path) -> None:
    """Else it would never be judged."""
    options = Options(place, data_in(place), size=SIZE)
    known: dict[tuple[str, str], Comparison] = {
        (name, each.row): each for name, comparisons in BENCHMARKS.items() for each in comparisons(options)
    }
    for bound in (bound for each in REQUIRED for bound in each.bounds):
        comparison = known[bound.benchmark, bound.row]
        assert bound.figure in {figure.name for figure in comparison.figures}
        assert bound.peer in {"", EVERY, *(way.name for way in comparison.peers)}
        assert (bound.of == "median") == (bound.peer == "")


# Peers


@harness
@pytest.mark.slow
def test_a_wrong_answer_is_no_measurement(tmp_path: Path) -> None:
    require_peers()
    path = data.make("json", 5000, tmp_path / "data")
    right = file.send("row", path, file.WEB)
    (made,) = measure("file", [right], 1, tmp_path)
    assert made.rounds[0]["HTTP"]["answer"] == data.described(path)
    wrong = dataclasses.replace(right, answers=({**data.described(path), "size": 4999},))
    with pytest.raises(Failed, match="the answer is"):
        list(measure("file", [wrong], 1, tmp_path))


@harness
@pytest.mark.slow
def test_what_hangs_or_fails_is_ended_and_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        with pytest.raises(Failed, match=r"longer than 1 s: .*bench.peers.raw send"):
            run_client("raw", ["send", port, "1000", "1000"], seconds=1)
    with pytest.raises(Failed, match=r"(?s)link does not start.*missing 1 required positional argument: 'to'"):
        Server("link", [])
    with pytest.raises(Failed, match=r"(?s)status 1.*ConnectionRefusedError"):
        run_client("raw", ["send", port, "1000", "1000"])


@harness
@pytest.mark.slow
def test_a_level_is_told_to_client_and_server(tmp_path: Path) -> None:
    """By what both say of one that cannot be meant. Mutants seen: the harness passes no options on, of either; a client
    that does not heed it.
    """
    options = Options(tmp_path, tmp_path / "data", size=5000)
    for number, level in enumerate(FIXED, 1):
        (up, *_), (down, *_) = levels.comparisons(options), levels.comparisons(options, down=True)
        assert f"--level={level}" in up.ways[number].client_options
        assert f"--level={level}" in down.ways[number].server_options
    path, wrong = data.make("json", 5000, tmp_path / "data"), ("--level=99",)
    to_client = dataclasses.replace(file.PRODUCT, client_options=wrong)
    to_server = dataclasses.replace(file.PRODUCT, server_options=(*file.PRODUCT.server_options, *wrong))
    with pytest.raises(Failed, match="level = 99 is not auto"):
        list(measure("levels", [file.send("up", path, to_client)], 1, tmp_path))
    with pytest.raises(Failed, match=r"(?s)product does not start.*level = 99 is not auto"):
        list(measure("levels", [file.send("down", path, to_server)], 1, tmp_path))


@harness
@pytest.mark.slow
def test_no_peer_outlives_a_harness_that_is_killed(tmp_path: Path) -> None:
    require_peers()
    command = [sys.executable, "-m", "bench", "file", "--rows", "nginx random", "--size", str(MIB)]
    command += ["--pairs", "1000", "--directory", str(tmp_path)]
    harness = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def started() -> list[int]:
        found = children(harness.pid)
        lines = {pid: command_line(pid) for pid in found}
        nginx = sum("worker process" in line for line in lines.values())
        return found if nginx == 2 and any("aipod.worker" in line for line in lines.values()) else []

    below: list[int] = []
    try:
        below = wait_until(started, seconds=60)
        harness.kill()
        wait_until(lambda: not [pid for pid in below if alive(pid)])
    finally:
        for pid in (harness.pid, *(pid for pid in below if alive(pid))):
            os.kill(pid, signal.SIGKILL)
        harness.wait()


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


# Data


@pytest.mark.parametrize("kind", data.KINDS)
def test_data_has_its_size_and_is_made_once(kind: str, tmp_path: Path) -> None:
    path = data.make(kind, 3 * MIB + 7, tmp_path / "data")
    assert path.stat().st_size == 3 * MIB + 7
    assert data.described(path)["size"] == 3 * MIB + 7
    assert data.make(kind, 3 * MIB + 7, tmp_path / "data") == path
    assert [each.name for each in (tmp_path / "data").iterdir()] == [path.name]
    again = data.make(kind, 3 * MIB + 7, tmp_path / "again")
    assert (path.read_bytes() == again.read_bytes()) == (kind != "random")


def test_data_is_not_taken_from_others(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(SystemExit, match="others may write to it"):
        data.make("random", 10, shared)


# The slow link: everything is a lower bound of time or an upper bound of bytes, which no slow machine breaks.


@contextlib.contextmanager
def link(*options: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection through the proxy."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = Server("link", [f"--to={listener.getsockname()[1]}", *options])
        try:
            with socket.create_connection(("127.0.0.1", int(proxy.port)), timeout=60) as near:
                listener.settimeout(60)
                far, _ = listener.accept()
                with far:
                    far.settimeout(60)
                    yield near, far
        finally:
            proxy.stop()


def drain(sock: socket.socket) -> bytes:
    """All that comes, until the end."""
    got = bytearray()
    while piece := sock.recv(1 << 16):
        got += piece
    return bytes(got)


@harness
@pytest.mark.slow
def test_a_link_delays_both_ways_and_passes_the_end_on() -> None:
    with link("--rtt=0.5") as (near, far):
        began = time.monotonic()
        near.sendall(b"ping")
        near.shutdown(socket.SHUT_WR)
        assert drain(far) == b"ping"
        there = time.monotonic() - began
        far.sendall(b"pong")
        far.close()
        assert drain(near) == b"pong"
        assert there >= 0.25
        assert time.monotonic() - began >= 0.5


@harness
@pytest.mark.slow
def test_a_link_limits_the_rate_of_each_direction() -> None:
    size = 2 * MIB
    sent = os.urandom(size)
    with link("--rate=16000000") as (near, far):  # 2 MB a second
        began = time.monotonic()
        got: dict[str, bytes] = {}
        threads = [
            threading.Thread(target=give, args=(near, sent)),
            threading.Thread(target=give, args=(far, sent)),
            threading.Thread(target=lambda: got.update(near=drain(near))),
            threading.Thread(target=lambda: got.update(far=drain(far))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began >= size / 2e6
    assert got == {"near": sent, "far": sent}


def give(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


@harness
@pytest.mark.slow
def test_a_link_holds_what_is_under_way_and_no_more() -> None:
    """Nobody reads at the far end: the line has its 1 MB, the four buffers of sockets what they may."""
    with link("--rate=80000000", "--rtt=0.1") as (near, far):
        near.settimeout(3)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 64 * MIB:
                sent += near.send(bytes(1 << 16))
        assert MIB < sent < 16 * MIB
        assert far.recv(1) == b"\0"


# What is counted


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


@harness
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


@pytest.mark.parametrize(
    ("free", "cpu", "rests"),
    [(0, 0.0, True), (256, 1 / 64, True), (257, 0.0, False), (0, 1 / 32, False), (-10_000, 0.0, True)],
    ids=["nothing", "little", "room is given back", "a server works", "somebody writes"],
)
def test_a_run_begins_when_the_one_before_has_left_nothing(free: int, cpu: float, rests: bool) -> None:
    """Mutants seen: without a look at the disk; at the servers; at all but the first of them."""
    assert _rests((1000, [1.0, 2.0]), (1000 + free, [1.0, 2.0 + cpu])) is rests
    assert _rests((1000, [1.0, 2.0]), (1000 + free, [1.0 + cpu, 2.0])) is rests


class Restless(Server):
    """Works for the first looks at it, and notes how often it was looked at. No process."""

    port, pid = "0", 0

    def __init__(self) -> None:
        self.looks = 0

    def times(self) -> dict[str, float]:
        self.looks += 1
        return {"user": float(min(self.looks, 4))}


@pytest.mark.parametrize(("writes", "fewest"), [(0, 0), (1, 5)])
def test_a_run_that_writes_waits_for_that(tmp_path: Path, writes: int, fewest: int) -> None:
    """A look behind the last that tells of work, and none where nothing is written. Mutants seen: nobody waits; one
    look will do; a run that writes nothing waits too.
    """
    way = same("nobody", "nobody")
    with Bed(tmp_path) as bed:
        server = bed._servers[way.server, way.server_options, ""] = Restless()
        with pytest.raises(Failed, match="nobody"):
            bed.run(Comparison("row", "command", (), way, (), writes=writes), way)
    before_the_run = 2  # it is both ends
    assert server.looks == before_the_run or writes
    assert server.looks >= before_the_run + fewest


@first_only("one Python is enough for what only records")
def test_traces_are_recorded_as_the_tests_of_levels_replay_them(tmp_path: Path) -> None:
    """All bytes of each upload, at the level that was asked for; a file that is there is added to.

    Mutants seen: the level is the client's own; what was recorded before is lost; the client does not tell what waits.
    """
    file = tmp_path / "traces.json"
    what = ["--kinds", "json", "--links", "1 Gbit/s", "--size", "16MiB", "--directory", str(tmp_path)]
    for asked in ("3,stored", "auto"):
        command = [sys.executable, "-m", "bench.traces", str(file), *what, "--levels", asked]
        subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    traces = json.loads(file.read_text())
    assert list(traces) == ["json 1 Gbit/s"]
    traces = traces["json 1 Gbit/s"]
    used = {name: {row[0] for row in rows} for name, rows in traces.items()}
    assert (used["3"], used["stored"], traces["auto"][0][0]) == ({3}, {None}, 1)
    assert all(sum(row[1] for row in rows) == 16 * MIB for rows in traces.values())
    assert {len(row) for rows in traces.values() for row in rows} == {7}
    assert max(row[6] for row in traces["stored"]) > MIB // 8, "a client tells what waits on its machine"
