"""The command line as a person at a terminal sees it: real processes, a real terminal, what is on its screen."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aipod.cli.help import COMMANDS
from tests.conftest import FIRST, Served, left_in, run, wait_until
from tests.marks import say
from tests.proxy import Fault, open_proxy
from tests.terminal import CLEAN, ROOT, Session
from tests.test_cli import aipod

MODEL = "tests.models_cli:Person"
LIVE = re.compile(r"^(connect|retry|upload|queue|run|download) .* \d+:\d\d:\d\d$", re.MULTILINE)
QUESTION = "(l) leave it running, (c) or Ctrl-C cancel it, Enter go on:"
only_first = pytest.mark.skipif(not FIRST, reason="done by the first Python")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = ("--tick", "0.1", "--instances", "4")
    served = Served(MODEL, tmp_path_factory.mktemp("server"), options, "127.0.0.1:0")
    yield served
    assert served.stop() == 0, served.log_text()
    assert left_in(served.spool) == []


class Work:
    """One gated request, begun in a directory of its own."""

    def __init__(self, directory: Path, address: str) -> None:
        self.directory, self.address = directory, address
        self.mark, self.gate, self.payload = directory / "mark", directory / "gate", directory / "payload"
        self.payload.write_bytes(b"12345")
        self.arguments = ["predict", "payload", "-k", f"mark={self.mark}", "-k", f"gate={self.gate}"]

    def session(self, *arguments: str, to: str = "", **options: object) -> Session:
        environ = {"AIPOD_TO": to or self.address, **dict(options.pop("environ", {}))}  # type: ignore[call-overload]
        return Session(*arguments, directory=self.directory, environ=environ, **options)  # type: ignore[arg-type]

    def call(self, *more: str, **options: object) -> Session:
        return self.session("call", *self.arguments, *more, **options)

    @property
    def runs(self) -> int:
        return self.mark.read_text().count("run") if self.mark.exists() else 0

    @property
    def was_cancelled(self) -> bool:
        return Path(f"{self.mark}.cancelled").exists()

    @property
    def tickets(self) -> list[Path]:
        return list(self.directory.glob("aipod-*.ticket"))


@pytest.fixture
def work(tmp_path: Path, served: Served) -> Iterator[Work]:
    work = Work(tmp_path, served.address)
    yield work
    work.gate.touch()  # what a test that has failed has left


def logs(served: Served) -> list[Path]:
    """Of the jobs that are under way."""
    return list(served.spool.glob("*/log"))


def lives(session: Session) -> list[str]:
    """The live lines that are on the screen, without what is below them."""
    return [line for line in session.text.splitlines() if LIVE.match(line)]


# --- what a call shows


def test_a_call_is_one_calm_line_with_the_log_above_and_its_sum_in_the_end(work: Work) -> None:
    """Mutants seen: two lines live at once, as a detail is not cut; no summary; the model's escapes on the screen."""
    with work.call() as session:
        session.until("25% epoch 3 表示")
        assert re.search(r"^run +━.* 25% epoch 3 表示 of many more.*… 0:00:\d\d$", session.text, re.MULTILINE)
        work.gate.touch()
        assert session.end() == 0
    assert all(len(LIVE.findall(picture)) <= 1 for picture in session.seen)
    first, red, done, answer = session.text.splitlines()
    assert (first, red, answer) == ("first line 漢字", "red", '{"size": 5}')
    assert re.fullmatch(r"done in \d+\.\d s: 5 B up, (waited .*, )?ran \d+\.\d s, 11 B down", done)
    assert session.screen.title == ""


@only_first
def test_what_the_demo_says_stands_in_lines_of_its_own(tmp_path: Path) -> None:
    """Mutant seen: it goes behind the live line, which stays on the screen."""
    session = Session("demo", "--size", "2", directory=tmp_path, environ={"TMPDIR": str(tmp_path)}, columns=120)
    with session:
        assert session.end() == 0
    assert lives(session) == []
    said = [line.split()[0] for line in session.text.splitlines()[-9:]]
    assert said == ["held", "train", "predict", "log", "echo", "identical,", "heartbeats", "peak", "the"]


@only_first
def test_a_narrow_terminal_and_one_that_is_resized_have_one_line(work: Work) -> None:
    """Mutant seen: a width that is taken once."""
    columns = 36
    with work.call(columns=columns) as session:
        session.until(lambda: "25%" in session.text and LIVE.search(session.text))
        assert len(LIVE.findall(session.text)[0]) <= columns
        for width in (120, columns):
            session.resize(width)
            session.until(lambda width=width: [width - 8 < len(line) <= width for line in lives(session)] == [True])
        work.gate.touch()
        assert session.end() == 0
    assert "run  " not in session.text
    assert session.text.endswith('{"size": 5}')


def test_an_upload_has_a_rate_a_ratio_and_an_end(work: Work) -> None:
    """Behind a proxy that stops in the middle of it."""
    pieces = (os.urandom(500_000) + bytes(500_000) for _ in range(80))  # more than windows and sockets hold
    work.payload.write_bytes(b"".join(pieces))

    async def main() -> None:
        async with open_proxy(int(work.address.rpartition(":")[2]), Fault(stall_up=5_000_000)) as proxy:

            def look() -> None:
                with work.call(to=proxy.address) as session:
                    session.until(
                        lambda: re.search(r"^upload +━.* [\d.]+/80\.0 MB  \d\.\d:1  .* MB/s  .* left", session.text)
                    )
                    session.type("\x03")
                    session.until("(l) keep the upload for later, (c) or Ctrl-C cancel it, Enter go on:")
                    session.type("l\n")
                    assert session.end() == 130
                said = " ".join("".join(session.text.splitlines()).split())
                (ticket,) = work.tickets
                same = f"the same command with --ticket {ticket.name}"
                assert f"STOPPED: by Ctrl-C; the server keeps what has arrived: {same}" in said

            await asyncio.to_thread(look)

    run(main)
    work.gate.touch()
    with work.call("--ticket", work.tickets[0].name) as session:
        assert session.end() == 0
    assert session.text.endswith('{"size": 80000000}')
    assert (work.runs, work.tickets) == (1, [])


@only_first
@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": ""}], ids=str)
def test_no_colors_and_no_bar_where_they_are_not_wanted(work: Work, environ: dict[str, str]) -> None:
    """Mutants seen: TERM=dumb is not looked at; the log is left out with the bar."""
    work.gate.touch()
    with work.call(environ=environ) as session:
        assert session.end() == 0
    assert not re.search(rb"\x1b\[[0-9;]*(3|4)[0-9;]*m", session.raw)
    assert ("NO_COLOR" in environ) == (b"\x1b" in session.raw)
    assert ["first line" in session.text, "done in" in session.text, '{"size": 5}' in session.text] == [True] * 3


def test_where_stderr_is_no_terminal_nothing_is_said(work: Work, tmp_path: Path) -> None:
    work.gate.touch()
    done = aipod("call", *work.arguments[:1], str(work.payload), environ={"AIPOD_TO": work.address})
    assert (done.out, done.err) == (b'{"size": 5}\n', "")


# --- Ctrl-C


def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back(work: Work) -> None:
    """Mutants seen: the ticket is not written; the job is cancelled whatever was answered; it is run once more."""
    with work.call() as session:
        session.until("25%")
        session.type("\x03")
        assert not LIVE.search(session.until(QUESTION)), "the line has gone meanwhile"
        session.type("what?\n")
        session.until(lambda: session.text.count(QUESTION) == 2)
        session.type("l\n")
        assert session.end() == 130
    assert "Traceback" not in session.text
    (ticket,) = work.tickets
    assert ticket.stat().st_mode & 0o777 == 0o600
    said = "".join(session.text.splitlines())
    assert f"`aipod attach {ticket.name}` comes back to it, `aipod cancel {ticket.name}` stops it" in said
    with work.session("attach", ticket.name) as session:
        session.until("25%")
        work.gate.touch()
        assert session.end() == 0
    assert session.text.splitlines()[0] == "first line 漢字", "all of the log"
    assert session.text.endswith('{"size": 5}')
    assert work.runs == 1
    with work.session("cancel", "--release", ticket.name) as session:
        assert (session.end(), session.text) == (0, "RELEASED")
    assert work.tickets == []


@pytest.mark.parametrize("keys", ["c\n", "\x03", "\x04"], ids=["c", "Ctrl-C", "Ctrl-D"])
def test_ctrl_c_cancels_the_job_where_that_is_answered_or_it_is_pressed_twice(work: Work, keys: str) -> None:
    """Mutants seen: the second one is another question; Ctrl-D is taken for Enter."""
    with work.call() as session:
        session.until("25%")
        session.type("\x03")
        session.until(QUESTION)
        session.type(keys)
        assert session.end() == 130
    assert session.text.splitlines()[-1] == "aipod: STOPPED: by Ctrl-C; the job was asked to stop"
    assert "Traceback" not in session.text
    wait_until(lambda: work.was_cancelled)
    assert work.tickets == []


@only_first
def test_what_has_arrived_of_a_cancelled_jobs_answer_goes(work: Work) -> None:
    """Mutant seen: it stays beside -o, where nobody has a use for it."""
    work.payload.write_bytes(os.urandom(40_000_000))

    async def main() -> None:
        faults = Fault(cut_down=5_000_000), *[Fault(cut_down=1)] * 1000
        async with open_proxy(int(work.address.rpartition(":")[2]), *faults) as proxy:

            def look() -> None:
                with work.session("call", "echo", "payload", "-o", "out", to=proxy.address) as session:
                    session.until(lambda: re.search(r"^retry ", session.text, re.MULTILINE) and proxy.connections > 2)
                    assert list(work.directory.glob(".out.*.part")) != []
                    session.type("\x03")
                    session.until(QUESTION)
                    session.type("c\n")
                    assert session.end() == 130

            await asyncio.to_thread(look)

    run(main)
    assert sorted(path.name for path in work.directory.iterdir()) == ["payload"]


def test_ctrl_c_and_enter_go_on(served: Served, work: Work) -> None:
    """Mutant seen: what comes while the question is there is shown over it, or lost."""
    with work.call() as session:
        session.until("25%")
        for number in range(2):
            session.type("\x03")
            session.until(lambda: session.text.endswith(QUESTION))
            say(f"{work.gate}.say", f"said {number}")
            wait_until(lambda number=number: any(f"said {number}" in log.read_text() for log in logs(served)))
            session.rest(0.5)  # some ticks
            assert session.text.endswith(QUESTION), "what comes meanwhile waits"
            session.type("\n")
            session.until(f"said {number}")
            session.until(lambda: LIVE.search(session.text.splitlines()[-1]))
            assert session.text.rindex(f"said {number}") > session.text.rindex(QUESTION)
        work.gate.touch()
        assert session.end() == 0
    assert session.text.count(QUESTION) == 2
    assert session.text.endswith('{"size": 5}')
    assert work.runs == 1


def test_a_job_that_ends_while_the_question_is_there_has_its_answer_shown(work: Work) -> None:
    with work.call() as session:
        session.until("25%")
        session.type("\x03")
        session.until(QUESTION)
        work.gate.touch()
        assert session.end() == 0
    *lines, done, answer = session.text.splitlines()
    assert (QUESTION in lines, answer) == (True, '{"size": 5}')
    assert done.startswith("done in ")


@pytest.mark.parametrize(
    ("number", "asked"), [(signal.SIGTERM, True), (signal.SIGHUP, False)], ids=["TERM, asked", "HUP"]
)
def test_term_and_hup_never_ask(work: Work, number: signal.Signals, asked: bool) -> None:
    with work.call() as session:
        session.until("25%")
        if asked:
            session.type("\x03")
            session.until(QUESTION)
        session.process.send_signal(number)
        assert session.end() == 130
    assert session.text.splitlines()[-1] == f"aipod: STOPPED: by {number.name}; the job was asked to stop"
    wait_until(lambda: work.was_cancelled)
    assert session.text.count(QUESTION) == asked


@only_first
def test_a_job_with_a_ticket_file_is_left_by_ctrl_c_twice_and_cancelled_when_that_is_answered(work: Work) -> None:
    """`call --ticket`, `attach`. Mutant seen: twice cancels whatever has a file."""
    question = "(l) or Ctrl-C leave it running, (c) cancel it, Enter go on:"
    ticket = work.directory / "job.ticket"
    for command in (["call", *work.arguments, "--ticket", "job.ticket"], ["attach", "job.ticket"]):
        with work.session(*command) as session:
            session.until("25%")
            session.type("\x03")
            session.until(question)
            session.type("\x03")
            assert session.end() == 130
        assert "the server goes on with the job" in session.text
        assert ticket.exists()
    with work.session("attach", "job.ticket") as session:
        session.until("25%")
        session.type("\x03")
        session.until(question)
        session.type("c\n")
        assert session.end() == 130
    wait_until(lambda: work.was_cancelled)
    assert (ticket.exists(), work.runs) == (False, 1)


def test_ctrl_c_while_nobody_answers_asks_nothing(work: Work) -> None:
    with work.call("--attempts", "100", to="127.0.0.1:1") as session:
        session.until("connection 2 of 100")
        session.type("\x03")
        assert session.end() == 130
    assert session.text == "aipod: STOPPED: by Ctrl-C"


# --- what is no text


def test_bytes_on_a_terminal_are_not_lost(work: Work) -> None:
    """Mutant seen: no ticket is written."""
    with work.session("call", "echo", "payload") as session:
        assert session.end() == 1
    (ticket,) = work.tickets
    said = "".join(session.text.splitlines())
    keep = f"it is kept: `aipod attach {ticket.name} -o FILE` writes it to a file"
    assert said == f"aipod: NOT_SHOWN: the answer is binary (5 B), nothing for a terminal; {keep}"
    with work.session("attach", ticket.name, "-o", "out") as session:
        assert session.end() == 0
    assert session.text.endswith("wrote out")
    assert (work.directory / "out").read_bytes() == b"12345"


def test_a_failure_is_one_line_that_says_what_to_do(work: Work) -> None:
    """Mutant seen: the model's escapes reach the terminal."""
    with work.session("call", "fail") as session:
        assert session.end() == 1
    said = "ValueError: no way out (the method has raised this; the server's log has the traceback)"
    assert "".join(session.text.splitlines()) == f"aipod: MODEL_ERROR: {said}"


# --- the other commands


@only_first
def test_submit_jobs_methods_health_for_a_person(work: Work) -> None:
    with work.session("submit", *work.arguments, "--ticket", "job.ticket") as session:
        assert session.end() == 0
    done, how, job_id = session.text.splitlines()
    assert done.startswith("done in ")
    assert how == "the server has it: `aipod attach job.ticket` watches it and gives its answer"
    wait_until(work.mark.exists)
    with work.session("jobs", columns=100) as session:
        session.end()
    heading, *rows = session.text.splitlines()
    row = next(row for row in rows if row.startswith(job_id))
    assert row.split()[:5] == [job_id, "predict", "default", "RUNNING", "25%"]
    assert heading.index("MESSAGE") == row.index("epoch 3 表示")
    assert len(session.text.splitlines()) == len(set(session.text.splitlines())), "a line for each job, none is broken"
    with work.session("methods") as session:
        session.end()
    assert "predict(*, mark: str = '', gate: str = '')" in session.text
    assert "\n    Count bytes, until the file `gate` is there." in session.text
    with work.session("health", "--all") as session:
        assert session.end() == 0
    assert "SERVING      (the whole server)" in session.text.splitlines()
    with work.session("cancel", "job.ticket") as session:
        assert (session.end(), session.text) == (0, "CANCELLED")


@only_first
def test_serve_token_nginx_conf_doctor_attach_completion_for_a_person(work: Work) -> None:
    """A server with a caller's token, from its start to Ctrl-C, and what a person does with it meanwhile."""
    token = ["alice", "--tokens", "tokens.toml", "--method", "predict", "-o", "alice.token"]
    with work.session("token", *token) as session:
        assert (session.end(), session.text) == (0, "")
    serve = ["aipod.examples.basics:Echo", "--bind", "127.0.0.1:0", "--tokens", "tokens.toml", "--spool", "tmp"]
    with work.session("serve", *serve, "--data", "data") as server:
        server.until(lambda: re.search(r"^aipod listening on \S+:\d+$", server.text, re.MULTILINE))
        address = server.text.split("aipod listening on ")[1].split()[0]
        with work.session("call", "predict", "payload", "--token-file", "alice.token", to=address) as session:
            assert session.end() == 0
        assert re.search(r"^done in .*: 5 B up, ", session.text, re.MULTILINE)
        with work.session("call", "predict", "payload", to=address) as session:
            assert session.end() == 1
        assert session.text.startswith("aipod: UNAUTHENTICATED: ")
        with work.session("doctor", address, "--quick", "--token-file", "alice.token") as session:
            assert session.end() == 0
        assert re.search(r"^ok +idle-request +a client that sends nothing", session.text, re.MULTILINE)
        with work.session("nginx-conf", "--upstream", f"a={address}", "-o", "nginx.conf") as session:
            assert session.end() == 0
        assert address in (work.directory / "nginx.conf").read_text()
        server.type("\x03")
        assert server.end() == 0
    assert "Traceback" not in server.text
    with work.session("submit", *work.arguments, "--ticket", "job.ticket") as session:
        assert session.end() == 0
    with work.session("attach", "job.ticket") as session:
        session.until("25% epoch 3 表示")
        work.gate.touch()
        assert session.end() == 0
    assert session.text.splitlines()[-1] == '{"size": 5}'
    with work.session("completion", "bash") as session:
        assert session.end() == 0
    assert "complete -o nosort -F _aipod_completion aipod" in session.text


def test_health_json(work: Work) -> None:
    done = aipod("health", "--json", "--all", environ={"AIPOD_TO": work.address}, forked=True)
    told = {one["service"]: one["status"] for one in map(json.loads, done.out.splitlines())}
    assert (told[""], told["ai.AI"], told["liveness"]) == ("SERVING",) * 3


# --- help


@only_first
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen_and_all_of_it_has_every_option(command: str) -> None:
    """Mutants seen: an option that neither shows; a help of 50 lines."""
    import importlib

    import click

    from aipod.cli import cli

    short, whole = [aipod(*command.split(), option, forked=True) for option in ("--help", "--help-all")]
    lines = short.out.decode().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80 or command == "nginx-conf", "its example is to be copied"
    module = importlib.import_module(f"aipod.cli.{command.replace('-', '_')}") if command else None
    parsed: click.Command = getattr(module, command.replace("-", "_")) if module else cli
    text = (whole if "--help-all" in short.out.decode() else short).out.decode()
    options = [param for param in parsed.params if isinstance(param, click.Option)]
    assert [one.name for one in options if not one.help] == []
    assert [one.name for one in options if not re.search(rf"{one.opts[-1]}[ /,\n]", text)] == []
    assert "--debug" in text


def test_help_and_version_import_no_command() -> None:
    """They start at once. Mutant seen: the list of commands imports each for its line."""
    code = "import sys; from aipod.cli import run; run(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    for option in ("--help", "--version"):
        command = [sys.executable, "-c", code, option]
        done = subprocess.run(command, cwd=ROOT, env=CLEAN, capture_output=True, text=True, check=True)
        loaded = set(done.stderr.split())
        assert not loaded & {"rich", "trio", "grpclib", "aipod.client", "aipod.server", "aipod.cli.call"}
