"""The command line for scripts and shells: --json, completion; and the arithmetic of what a person is shown."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aipod.cli.amounts import seconds, size, sizes
from aipod.cli.help import COMMANDS
from aipod.cli.lines import EVERY, Lines
from aipod.cli.tally import Tally, detail
from aipod.client import Event
from tests.conftest import FIRST, Serve, Served, free_port, left_in, require
from tests.terminal import CLEAN, ROOT
from tests.test_cli import Done, aipod, start

MODEL = "tests.models_cli:Person"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(MODEL, tmp_path_factory.mktemp("server"), ("--tick", "0.1"), "127.0.0.1:0")
    yield served
    assert served.stop() == 0, served.log_text()
    assert left_in(served.spool) == []


@pytest.fixture
def call(served: Served, tmp_path: Path) -> Callable[..., Done]:
    (tmp_path / "payload").write_bytes(b"12345")
    environ = {"AIPOD_TO": served.address}
    return lambda *arguments: aipod(*arguments, environ=environ, forked=True)


def told(done: Done) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.out.splitlines()]


# --- --json


def test_json_has_events_and_the_answer(call: Callable[..., Done], tmp_path: Path) -> None:
    """Mutants seen: the log is left out of an event that comes soon after another; the answer is printed as it is."""
    done = call("call", "predict", str(tmp_path / "payload"), "--json")
    assert (done.status, done.err) == (0, "")
    *events, answer = told(done)
    assert answer == {"type": "answer", "answer": {"size": 5}}
    assert {event["type"] for event in events} == {"event"}
    fields = {
        "phase",
        "sent",
        "payload_size",
        "received",
        "answer_size",
        "place",
        "progress",
        "message",
        "log",
        "ratio",
    }
    assert fields <= set(events[0])
    phases = list(dict.fromkeys(event["phase"] for event in events))
    assert [phases[0], phases[-1]] == ["CONNECTING", "DONE"]
    assert "".join(event["log"] for event in events).startswith("first line 漢字\n")


def test_an_answer_is_neither_lost_nor_obeyed_by_a_terminal(serve: Serve) -> None:
    """What stdout's encoding has not is escaped, and so is what a terminal acts on. Mutants seen: either is not."""
    served = serve("tests.models_faces:Faces")
    said = "\x7f \x9b31m \ud800 \u202e \u00e9 \u6f22\u3000\U000e0041"
    arguments = ["call", "predict", "-k", f"said={json.dumps(said)}", "--json", "--to", served.address]
    for encoding, shown in (("latin-1", "\u00e9 \\u6f22\\u3000"), ("utf-8", "\u00e9 \u6f22\u3000")):
        done = aipod(*arguments, environ={"PYTHONIOENCODING": encoding})
        assert (done.status, done.err) == (0, "")
        *_, line = done.out.decode(encoding).splitlines()
        assert json.loads(line)["answer"] == {"size": 0, "kwargs": {"said": said}}
        assert f'"\\u007f \\u009b31m \\ud800 \\u202e {shown}\\udb40\\udc41"' in line


def test_json_of_bytes_names_the_file(call: Callable[..., Done], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("call", "echo", str(tmp_path / "payload"), "--json", "-o", str(out))
    wanted = {"type": "answer", "file": str(out), "size": 5, "content_type": "application/octet-stream"}
    assert (done.status, told(done)[-1], out.read_bytes()) == (0, wanted, b"12345")
    for name in ("-", "/dev/stdout"):
        done = call("call", "echo", str(tmp_path / "payload"), "--json", "-o", name)
        assert (done.status, told(done)[-1]["reason"]) == (2, "USAGE")
        assert done.last.startswith("aipod: USAGE: with --json stdout has the events: give -o FILE")


def test_json_of_bytes_that_have_no_file_are_kept(served: Served, tmp_path: Path) -> None:
    """Mutant seen: the job is released, as of one whose answer was had."""
    (tmp_path / "payload").write_bytes(b"12345")
    command = ("call", "echo", "payload", "--json", "--to", served.address)
    with start(*command, cwd=tmp_path) as process:
        out, err = process.communicate(timeout=60)
    done = Done(process.returncode, out, err)
    (ticket,) = tmp_path.glob("*.ticket")
    error = told(done)[-1]
    assert (done.status, error["type"], error["reason"], error["status"]) == (1, "error", "NOT_SHOWN", 1)
    assert f"`aipod attach {ticket.name} --to {served.address} -o FILE`" in error["message"]
    done = aipod("attach", str(ticket), "--to", served.address, forked=True)
    assert (done.status, done.out) == (0, b"12345")
    assert aipod("cancel", "--release", str(ticket), "--to", served.address, forked=True).status == 0


def test_json_of_a_failure_is_the_last_line_and_on_stderr_as_ever(call: Callable[..., Done]) -> None:
    done = call("call", "fail", "--json")
    error = told(done)[-1]
    assert (done.status, error["type"], error["reason"], error["status"]) == (1, "error", "MODEL_ERROR", 1)
    assert error["message"].startswith("ValueError: no way out")
    assert done.err == f"aipod: MODEL_ERROR: {error['message']}\n"
    done = call("call", "predict", "--json", "--to", f"127.0.0.1:{free_port()}", "--attempts", "1")
    assert (done.status, told(done)[-1]["reason"], told(done)[-1]["status"]) == (3, "UNREACHABLE", 3)


def test_json_of_submit_and_attach(call: Callable[..., Done], tmp_path: Path) -> None:
    ticket = tmp_path / "ticket"
    done = call("submit", "predict", str(tmp_path / "payload"), "--ticket", str(ticket), "--json")
    submitted = told(done)[-1]
    assert (done.status, submitted["type"], submitted["ticket_file"]) == (0, "submitted", str(ticket))
    assert submitted["job_id"] == told(done)[0]["job_id"]
    assert "".join(event["log"] for event in told(done)[:-1]) == ""
    done = call("attach", str(ticket), "--json")
    assert (done.status, told(done)[-1]) == (0, {"type": "answer", "answer": {"size": 5}})
    assert "first line" in "".join(event.get("log", "") for event in told(done))


def test_events_of_one_phase_come_a_few_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    """But what is new at once."""
    now = 0.0
    lines = Lines(lambda: now)
    for _ in range(8):
        lines.event(Event("RECEIVING", sent=int(now * 1000)))
        now += EVERY / 4
    lines.event(Event("RUNNING"))
    lines.event(Event("RUNNING", log="line\n"))
    lines.event(Event("RUNNING"))
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["phase"], one["sent"], one["log"]) for one in shown] == [
        ("RECEIVING", 0, ""),
        ("RECEIVING", int(EVERY * 1000), ""),
        ("RUNNING", 0, ""),
        ("RUNNING", 0, "line\n"),
    ]


# --- completion


def completed(line: str, environ: dict[str, str] | None = None) -> Done:
    """What bash would be told, with the cursor at the end of `line`."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1), "_AIPOD_COMPLETE": "bash_complete"}
    command = [sys.executable, "-c", "import sys; from aipod.cli import run; sys.exit(run(sys.argv[1:]))"]
    done = subprocess.run(command, cwd=ROOT, env={**CLEAN, **words, **(environ or {})}, capture_output=True, timeout=60)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.skipif(not FIRST, reason="done by the first Python")
@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("aipod ", [f"plain,{name}" for name in COMMANDS]),
        ("aipod he", ["plain,health"]),
        ("aipod call --ti", ["plain,--timeout", "plain,--ticket"]),
        ("aipod call predict pay", ["file,pay"]),
        ("aipod attach ", ["file,"]),
        ("aipod completion z", ["plain,zsh"]),
        ("aipod call no", []),
    ],
)
def test_completion(line: str, wanted: list[str]) -> None:
    done = completed(line, {"AIPOD_TO": f"127.0.0.1:{free_port()}"})
    assert (done.status, done.out.decode().split(), done.err) == (0, wanted, "")


def test_completion_of_methods_asks_the_server_of_the_command_line(served: Served, tmp_path: Path) -> None:
    """Or of the environment, or of the file. Mutant seen: the default server is asked."""
    file = tmp_path / "aipod.toml"
    file.write_text(f'[aipod]\nto = "{served.address}"')
    for words, environ in (
        (f"--to {served.address}", {}),
        (f"--config {file}", {}),
        ("", {"AIPOD_TO": served.address}),
    ):
        done = completed(f"aipod call {words} ".replace("  ", " "), environ)
        assert sorted(done.out.decode().split()) == ["plain,echo", "plain,fail", "plain,predict"]
    done = completed("aipod submit pre", {"AIPOD_TO": served.address})
    assert done.out.decode().split() == ["plain,predict"]


@pytest.mark.parametrize(
    "broken", [{"AIPOD_TIMEOUT": "soon"}, {"AIPOD_TO": "nowhere"}, {"AIPOD_CONFIG": "/no/such/file"}], ids=str
)
def test_completion_says_nothing_where_something_is_wrong(broken: dict[str, str]) -> None:
    done = completed("aipod call ", broken)
    assert (done.status, done.out.decode().strip(), done.err) == (0, "", "")


def test_completion_does_not_wait_for_a_server_that_is_silent() -> None:
    """It takes what connects, and says nothing. Mutant seen: it is asked with the patience of a call (15 s)."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        forever = {"AIPOD_SILENCE": "3600", "AIPOD_CONNECT_TIMEOUT": "3600"}
        environ = {"AIPOD_TO": f"127.0.0.1:{silent.getsockname()[1]}", **forever}
        done = completed("aipod call ", environ)
    assert (done.status, done.out.decode().strip(), done.err) == (0, "", "")


def test_bash_takes_what_completion_prints() -> None:
    """The script is read by bash, and its function asks the command."""
    bash = require("bash")
    shim = f'aipod() {{ "{sys.executable}" -m aipod "$@"; }}; export -f aipod'
    script = aipod("completion", "bash").out.decode().replace("$1)", f"{sys.executable} -m aipod)")
    ask = 'COMP_WORDS=(aipod can) COMP_CWORD=1; _aipod_completion aipod; echo "${COMPREPLY[@]}"; complete -p aipod'
    done = subprocess.run(
        [bash, "-c", f"{shim}\n{script}\n{ask}"], cwd=ROOT, env=CLEAN, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("cancel\ncomplete -o nosort -F _aipod_completion aipod\n", "")
    for shell in ("zsh", "fish"):
        assert "_AIPOD_COMPLETE" in aipod("completion", shell, forked=True).out.decode()


# --- what a person is shown


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (999.6, "1.0 kB"), (12_345, "12.3 kB"), (99_949, "99.9 kB"), (99_951, "100 kB"),
        (999_499, "999 kB"), (999_501, "1.0 MB"), (2_500_000, "2.5 MB"), (5e9, "5.0 GB"), (1e12, "1.0 TB"),
        (1e18, "1000 PB"),
    ],
)  # fmt: skip
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_sizes_of_a_whole() -> None:
    assert sizes(2_500_000, 5_000_000) == "2.5/5.0 MB"
    assert sizes(300, 5e9) == "300 B/5.0 GB"
    assert (sizes(300, None), sizes(300, 0)) == ("300 B", "300 B")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3599.7, "1 h"),
        (7800, "2 h 10 min"), (90_000, "1 d 1 h"),
    ],
)  # fmt: skip
def test_times(count: float, text: str) -> None:
    assert seconds(count) == text


def test_a_transfer_has_a_rate_and_a_time_to_go_and_all_of_it_a_summary() -> None:
    """Mutant seen: what an earlier process has sent counts as sent now."""
    now = 0.0
    tally = Tally(lambda: now)
    tally.see(Event("CONNECTING"))
    now = 1.0
    event = Event("RECEIVING", sent=50_000_000, payload_size=200_000_000)  # an earlier process has sent that
    assert tally.see(event)
    assert detail(event) == ""
    now = 11.0
    event = Event("RECEIVING", sent=105_000_000, payload_size=200_000_000, ratio=1.5, rate=1e6)
    assert not tally.see(event)
    assert detail(event) == "1.5:1  1.0 MB/s  1 min 35 s left"
    tally.see(Event("QUEUED"))
    now = 13.0
    tally.see(Event("RUNNING"))
    now = 23.0
    tally.see(Event("DONE", answer_size=4))
    tally.see(Event("DONE", answer_size=4, received=4))
    up = "105 MB up in 10 s (5.5 MB/s, 1.5:1)"
    assert tally.summary() == f"done in 23 s: {up}, waited 2.0 s, ran 10 s, 4 B down"
