"""The command line as real processes: what goes to stdout, what to stderr, and with which status a command ends."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyte
import pytest

from aipod.cli.progress import Progress
from aipod.client import Event
from tests.conftest import ROOT, Serve, Served, alive, children, free_port, left_in, wait_until
from tests.starter import Started, starter

MODEL = "tests.models_faults:Counted"
# Nothing of the machine's own settings may leak in.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("AIPOD_")}


def start(
    *arguments: str, environ: dict[str, str] | None = None, forked: bool = False, **options: Any
) -> subprocess.Popen[bytes] | Started:
    """The real command or, `forked`, a child of a starter, which says what differs; never that on a terminal."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = {**CLEAN, **(environ or {})}
    ends = (options[name] for name in ("stdin", "stdout", "stderr"))
    on_terminal = any(not isinstance(end, int) and end.isatty() for end in ends)
    kind = "server" if arguments[:1] == ("serve",) else "client"
    if forked and not on_terminal and (ready := starter(kind, environment)) is not None:
        return ready.open(["aipod", *arguments], environment, **options)
    options = {"cwd": ROOT, **options}
    environment.setdefault("PYTHONPATH", str(ROOT))
    return subprocess.Popen([sys.executable, "-m", "aipod", *arguments], env=environment, **options)


class Done:
    """How a command ended."""

    def __init__(self, status: int, out: bytes, err: bytes) -> None:
        self.status, self.out, self.err = status, out, err.decode()

    @property
    def last(self) -> str:
        return self.err.splitlines()[-1]

    @property
    def answer(self) -> Any:
        """stdout, which must be one line of JSON; nothing may be on stderr."""
        assert (self.status, self.err) == (0, "")
        assert self.out.count(b"\n") == 1
        assert self.out.endswith(b"\n")
        return json.loads(self.out)


def aipod(
    *arguments: str, stdin: bytes | None = None, environ: dict[str, str] | None = None, forked: bool = False
) -> Done:
    ends = subprocess.DEVNULL if stdin is None else subprocess.PIPE
    with start(*arguments, environ=environ, forked=forked, stdin=ends) as process:
        out, err = process.communicate(stdin, timeout=60)
    return Done(process.returncode, out, err)


class Terminal:
    """A pseudo-terminal; `text` is everything that was written to it."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self.end: IO[bytes] = os.fdopen(slave, "r+b", buffering=0)
        self.text = ""

    def read(self, seconds: float) -> bool:
        """Take what is there or comes within `seconds`; whether there was anything."""
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        self.text += os.read(self._master, 65536).decode(errors="replace")
        return True

    def read_until_closed(self, process: subprocess.Popen[bytes] | Started) -> str:
        """Read until the process has ended."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            ended = process.poll() is not None
            if not self.read(0 if ended else 0.1) and ended:
                break
        return self.text

    def close(self) -> None:
        self.end.close()
        os.close(self._master)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(MODEL, tmp_path_factory.mktemp("server"), (), "127.0.0.1:0")
    yield served
    assert served.stop() == 0, served.log_text()
    assert left_in(served.spool) == []


@pytest.fixture
def to(served: Served) -> tuple[str, str]:
    return "--to", served.address


# --- serve


def serve_once(*arguments: str, environ: dict[str, str] | None = None, wait: int = 1) -> Done:
    """Start a server, read `wait` lines of its stdout, stop it; all of both streams."""
    with start("serve", *arguments, environ=environ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(wait)]
        process.terminate()
        out, err = process.communicate(timeout=30)
    return Done(process.returncode, b"".join(lines) + out, err)


def test_serve_writes_a_line_per_address_and_nothing_else(tmp_path: Path) -> None:
    bind = ("--bind", "127.0.0.1:0", "--bind", f"unix:{tmp_path}/s")
    done = serve_once(MODEL, "--spool", "tmp", "--data", str(tmp_path), *bind, wait=2)
    assert done.status == 0, done.err
    first, second = done.out.decode().splitlines()
    assert first.startswith("aipod listening on 127.0.0.1:")
    assert second == f"aipod listening on unix:{tmp_path}/s"
    assert "draining" in done.err


@pytest.mark.parametrize("given", ["command line", "environment", "file", "default"])
def test_command_line_then_environment_then_file_then_default(tmp_path: Path, given: str) -> None:
    """The drain's length is in the log; each source has its own value, and the ones before it are left out."""
    file = tmp_path / "aipod.toml"
    lines = [f'model = "{MODEL}"', f'spool = "{tmp_path}/spool"', f'data = "{tmp_path}/data"', 'bind = "127.0.0.1:0"']
    file.write_text("\n".join(["[aipod]", *lines, 'drain = "1.5min"' if given != "default" else "", 'to = "x:1"']))
    arguments = ["--config", str(file)]
    environ = {}
    if given == "command line":
        arguments += ["--drain", "70"]
    if given in ("command line", "environment"):
        environ["AIPOD_DRAIN"] = "80s"
    done = serve_once(*arguments, environ=environ)
    assert done.status == 0, done.err
    wanted = {"command line": "70", "environment": "80", "file": "90", "default": "30"}[given]
    assert f"at most {wanted} s" in done.err
    assert (tmp_path / "spool" / "app").exists()


def test_flags_and_lists_come_from_the_environment_and_the_file(tmp_path: Path) -> None:
    common = ("--spool", "tmp", "--data", str(tmp_path))
    unix = f"unix:{tmp_path}/a unix:{tmp_path}/b"
    done = serve_once(*common, environ={"AIPOD_MODEL": MODEL, "AIPOD_BIND": unix}, wait=2)
    assert done.out.decode().splitlines() == [f"aipod listening on {address}" for address in unix.split()]
    file = tmp_path / "aipod.toml"
    file.write_text(f'[aipod]\ninsecure = true\nbind = ["0.0.0.0:0"]\nmodel = "{MODEL}"')
    done = serve_once(*common, environ={"AIPOD_CONFIG": str(file)})
    assert done.out.startswith(b"aipod listening on 0.0.0.0:")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((), 2, "USAGE: Missing argument 'MODULE:CLASS'"),
        ((MODEL, "--drain", "soon"), 2, "USAGE: Invalid value for '--drain': 'soon' is not a time; write 90"),
        ((MODEL, "--max-message", "big"), 2, "USAGE: Invalid value for '--max-message': 'big' is not a size"),
        ((MODEL, "--preload", "a", "--preload", "b", "--max-instances", "1"), 2, "USAGE: preload = a, b takes 2 "),
        ((MODEL, "--instances", "0"), 2, "USAGE: instances = 0 is too small; it must be at least 1"),
        ((MODEL, "--no-such-option"), 2, "USAGE: No such option '--no-such-option'"),
        ((MODEL, "--config", "/no/such/file"), 2, "USAGE: Invalid value for '--config'"),
        ((MODEL, "--bind", "0.0.0.0:0"), 2, "BIND_FAILED: cannot listen on 0.0.0.0:0: .* add --insecure"),
        ((MODEL, "--bind", "0.0.0.0:0", "--tls-cert", "own.pem"), 2, "BIND_FAILED: .* ask for tokens .*--tls-ca"),
        ((MODEL, "--bind", "nowhere"), 2, "BIND_FAILED: cannot listen on nowhere: .*--bind"),
        (("tests.no_such_module:Model",), 1, "LOAD_FAILED: .*no_such_module"),
        (("tests.models_faults:NoSuchClass",), 1, "LOAD_FAILED: .*NoSuchClass"),
    ],
)
def test_serve_that_cannot_start_says_why_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    environ = {"AIPOD_SPOOL": "tmp", "AIPOD_DATA": str(tmp_path), "AIPOD_BIND": "127.0.0.1:0"}
    done = aipod("serve", *arguments, environ=environ, forked=True)
    assert (done.status, done.out) == (status, b"")
    assert re.match(f"aipod: {said}", done.last), done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[aipod\n", "is no TOML file"),
        ("[aipod]\ndrian = 3", "unknown setting 'drian'"),
        ("aipod = 3", r"write \[aipod\]"),
        ("[aipod]\ndrain = true", "drain is true or false, which it cannot be"),
        ("[aipod]\ninstances = true", "instances is true or false, which it cannot be"),
        ("[aipod]\ninstances = 'x'", "is not a valid integer"),
    ],
)
def test_a_wrong_file_is_a_usage_error(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "aipod.toml"
    file.write_text(text)
    done = aipod("serve", MODEL, "--config", str(file), forked=True)
    assert done.status == 2
    assert re.search(said, done.last), done.err


def test_a_second_server_on_the_same_port_says_so(served: Served, tmp_path: Path) -> None:
    done = aipod("serve", MODEL, "--bind", served.address, "--spool", "tmp", "--data", str(tmp_path))
    assert done.status == 1
    why = "Address already in use; choose another with --bind"
    assert done.last == f"aipod: BIND_FAILED: cannot listen on {served.address}: {why}"


# --- call


def test_call_prints_a_json_answer_as_one_line(served: Served, to: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert aipod("call", *to, "chaos", str(file)).answer["size"] == 5
    assert aipod("call", *to, "chaos", "-", stdin=b"123").answer["size"] == 3
    assert aipod("call", "chaos", environ={"AIPOD_TO": served.address}).answer["size"] == 0
    assert json.loads(aipod("call", *to, "text").out) == "grüße"


def test_call_hands_on_keyword_arguments_version_and_metadata(to: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "aipod.toml"
    pairs = ["a=1", "b=text", 'c={"d": [1, 2]}', "e=null", 'f="3"', "g=", "h=x=y", "timeout=5"]
    arguments = [part for pair in pairs for part in ("-k", pair)]
    answer = aipod("call", *to, "kwargs", "--version", "v7", *arguments).answer
    assert answer["version"] == "v7"
    wanted = {"a": 1, "b": "text", "c": {"d": [1, 2]}, "e": None, "f": "3", "g": "", "h": "x=y", "timeout": 5}
    assert answer["kwargs"] == wanted
    metadata = aipod("call", *to, "metadata", "--upstream", "blue", "--meta", "x-one=1", "--meta", "x-two=a=b").answer
    assert (metadata["x-upstream"], metadata["x-one"], metadata["x-two"]) == ("blue", "1", "a=b")
    assert metadata["x-func-name"] == "metadata"
    file.write_text(f'[aipod]\nto = "{to[1]}"\nversion = "v8"\nmeta = "x-three=3"\ndrain = 5')
    assert aipod("call", "--config", str(file), "kwargs").answer["version"] == "v8"
    assert aipod("call", "--config", str(file), "metadata").answer["x-three"] == "3"


@pytest.mark.parametrize("method", ["train", "predict", "log"])
def test_train_predict_and_log_use_their_own_rpc(to: tuple[str, str], method: str) -> None:
    done = aipod("call", *to, method, forked=True)
    assert done.status == 1
    assert done.last.startswith("aipod: UNKNOWN_METHOD: Counted has no method '" + method)


def test_bytes_go_to_a_file_or_a_pipe(to: tuple[str, str], tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    done = aipod("call", *to, "echo", "-", stdin=data)
    assert (done.status, done.out, done.err) == (0, data, "")
    done = aipod("call", *to, "echo", "-", "-o", str(tmp_path / "out"), stdin=data)
    assert (done.status, done.out, done.err) == (0, b"", "")
    assert (tmp_path / "out").read_bytes() == data
    done = aipod("call", *to, "text", "-o", str(tmp_path / "json"))
    assert json.loads((tmp_path / "json").read_text()) == "grüße"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["json", "out"]


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_stdout_by_name_is_the_one_that_the_shell_has_opened(to: tuple[str, str], tmp_path: Path, name: str) -> None:
    done = aipod("call", *to, "echo", "-", "-o", name, stdin=b"12345")
    assert (done.status, done.out, done.err) == (0, b"12345", "")
    assert aipod("call", *to, "chaos", "-o", name).answer["size"] == 0
    with (tmp_path / "out").open("wb") as out:
        out.write(b"before ")
        out.flush()
        with start("call", *to, "echo", "-", "-o", name, stdin=subprocess.PIPE, stdout=out) as process:
            process.communicate(b"12345", timeout=60)
        out.write(b" after")
    assert (tmp_path / "out").read_bytes() == b"before 12345 after"
    assert not (ROOT / "-").exists()


def test_a_fifo_as_output(to: tuple[str, str], tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with start("call", *to, "random", "-k", "length=3000000", "-o", str(fifo)) as process:
        assert len(fifo.read_bytes()) == 3_000_000
        assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 0
    assert fifo.is_fifo()


def test_stdin_that_is_not_sent_is_mentioned(to: tuple[str, str], tmp_path: Path) -> None:
    note = "aipod: note: what is on stdin is not sent; give - as FILE to send it\n"
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    for content in (b"12345", b""):
        file.write_bytes(content)
        reader, writer = os.pipe()
        os.write(writer, content)
        os.close(writer)
        with open(reader, "rb") as pipe, file.open("rb") as regular:
            for stdin in (pipe, regular):
                with start("call", *to, "chaos", stdin=stdin) as process:
                    out, err = process.communicate(timeout=60)
                assert (process.returncode, json.loads(out)["size"]) == (0, 0)
                assert err.decode() == (note if content else "")


def test_a_reader_that_goes_away_is_no_noise(to: tuple[str, str]) -> None:
    with start("call", *to, "random", "-k", "length=5000000") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert len(process.stdout.read(10)) == 10
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("call",), 2, "USAGE: Missing argument 'METHOD'"),
        (("call", "chaos", "/no/such/file"), 2, "USAGE: '/no/such/file' does not exist"),
        (("call", "chaos", "-k", "novalue"), 2, "USAGE: -k 'novalue' is not NAME=VALUE"),
        (("call", "chaos", "-k", "_aipod_x=1"), 2, "USAGE: keyword argument '_aipod_x'"),
        (("call", "chaos", "--meta", "bad name=1"), 2, "USAGE: .*bad name"),
        (("call", "chaos", "--timeout", "soon"), 2, "USAGE: Invalid value for '--timeout'"),
        (("call", "chaos", "-o", "/no/such/directory/file"), 2, "USAGE: '/no/such/directory' is no directory"),
        (("call", "chaos", "--to", "nowhere"), 2, "USAGE: 'nowhere' is not HOST:PORT"),
        (("call", "nope"), 1, "UNKNOWN_METHOD: Counted has no method 'nope' to call; it has: .*chaos"),
        (("call", "chaos", "--version", "../x"), 1, "BAD_VERSION: "),
        (("call", "random", "-k", "length=x"), 1, "MODEL_ERROR: TypeError: "),
        (("call", "slow_echo", "-k", "seconds=60", "--timeout", "5"), 1, "DEADLINE_EXCEEDED: .*the job was asked to"),
        (("nothing",), 2, "USAGE: No such command 'nothing' .see"),
        (("atach", "x"), 2, "USAGE: No such command 'atach'; did you mean attach. .see aipod --help"),
        ((), 2, "USAGE: a command is missing"),
    ],
)
def test_failures_have_a_status_and_a_last_line(
    served: Served, arguments: tuple[str, ...], status: int, said: str
) -> None:
    done = aipod(*arguments, environ={"AIPOD_TO": served.address}, forked=True)
    assert (done.status, done.out) == (status, b"")
    assert re.match(f"aipod: {said}", done.last), done.err
    assert "Traceback" not in done.err
    assert len(done.err.splitlines()) == 1 or not arguments


def test_nobody_there_is_status_3(tmp_path: Path) -> None:
    for arguments in (("call", "chaos", "--attempts", "1"), ("health",), ("doctor",)):
        done = aipod(*arguments, "--to", f"127.0.0.1:{free_port()}", forked=True)
        assert done.status == 3
        assert re.match("aipod: UNREACHABLE: [^[]*: Connection refused ", done.last), done.last
    done = aipod("call", "chaos", "--attempts", "1", "--to", f"unix:{tmp_path}/nothing")
    assert done.status == 3
    for command in (("call", "chaos"), ("jobs",), ("submit", "chaos", "--ticket", f"{tmp_path}/ticket")):
        done = aipod(*command, "--timeout", "0.5", "--to", f"127.0.0.1:{free_port()}", forked=True)
        assert done.status == 3
        assert re.match("aipod: UNREACHABLE: no server answers at .* within --timeout: Connection refused ", done.last)


def test_a_server_that_is_killed_is_status_3(serve: Serve, tmp_path: Path) -> None:
    served = serve(MODEL)
    command = ("call", "--to", served.address, "patient", "-k", f"mark={tmp_path}/mark", "--reconnect", "0.5")
    with start(*command) as process:
        wait_until((tmp_path / "mark").exists)
        served.process.kill()
        served.process.communicate()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 3
    assert err.decode().splitlines()[-1].startswith("aipod: JOB_LOST: ")


def test_a_call_that_was_stopped_for_longer_than_its_silence_goes_on(to: tuple[str, str], tmp_path: Path) -> None:
    """Ctrl-Z, and `fg` later: it was not the server that was silent."""
    file = tmp_path / "file"
    file.write_bytes(b"answer")
    with start("call", *to, "slow_echo", str(file), "-k", "seconds=4", "--silence", "2") as process:
        time.sleep(1.5)
        process.send_signal(signal.SIGSTOP)
        time.sleep(3.5)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=30) == (b"answer", b"")
        assert process.returncode == 0


@pytest.mark.parametrize("where", ["running", "stdin"])
def test_ctrl_c_is_status_130_and_cancels_the_job(
    served: Served, to: tuple[str, str], tmp_path: Path, where: str
) -> None:
    mark = tmp_path / "mark"
    file = ("-",) if where == "stdin" else ()
    with start("call", *to, "patient", *file, "-k", f"mark={mark}", "--json", stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        phase = "RUNNING" if where == "running" else "RECEIVING"
        while json.loads(process.stdout.readline())["phase"] != phase:
            pass
        if where == "running":
            wait_until(mark.exists)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr is not None
        assert process.stderr.read().strip() == b"aipod: STOPPED: by Ctrl-C; the job was asked to stop"
    if where == "running":
        wait_until(lambda: mark.read_text() == "cancelled")
    wait_until(lambda: [name for name in quietly(served) if not name.startswith("workers")] == [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("ignored", ["", "INT", "INT HUP"], ids=["nothing", "script &", "nohup &"])
def test_term_and_hup_cancel_the_job_wherever_the_command_was_started(
    served: Served, to: tuple[str, str], tmp_path: Path, ignored: str, number: signal.Signals
) -> None:
    """A shell ignores Ctrl-C in what a script starts with `&`, and nohup HUP; what is ignored says and does nothing.

    Mutants seen: TERM and HUP are passed on as Ctrl-C; their handlers are set, whatever was there.
    """
    mark = tmp_path / "mark"
    call = [sys.executable, "-m", "aipod", "call", *to, "patient", "-k", f"mark={mark}"]
    command = ["sh", "-c", f'trap "" {ignored or "USR2"}; exec "$@"', "sh", *call]
    with subprocess.Popen(command, cwd=ROOT, env=CLEAN, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            wait_until(mark.exists)
            for name in ignored.split():
                process.send_signal(signal.Signals[f"SIG{name}"])
            if number.name.removeprefix("SIG") in ignored.split():
                number = signal.SIGTERM
            process.send_signal(number)
            said = process.communicate(timeout=30)[1].decode().strip()
        finally:
            process.kill()
    assert (process.returncode, said) == (130, f"aipod: STOPPED: by {number.name}; the job was asked to stop")
    wait_until(lambda: mark.read_text() == "cancelled")
    wait_until(lambda: [name for name in quietly(served) if not name.startswith("workers")] == [])


@pytest.mark.parametrize("module", ["click", "aipod.cli.options", "grpclib.client", "aipod.cli.ticket"])
def test_ctrl_c_while_it_imports_is_status_130_without_a_traceback(module: str) -> None:
    """Mutant: KeyboardInterrupt goes through whatever is imported this moment."""
    command = [sys.executable, "-X", "importtime", "-m", "aipod", "call", "x", "--to", f"127.0.0.1:{free_port()}"]
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=CLEAN, **options) as process:
        assert process.stderr is not None
        while process.stderr.readline().rpartition("|")[2].strip() != module:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(20) == 130
    assert "Traceback" not in said
    assert said.rstrip().splitlines()[-1].startswith("aipod: STOPPED: by Ctrl-C")


def test_who_is_no_terminal_hears_once_that_it_is_tried_again() -> None:
    """And imports nothing for a bar. Mutants: nothing is said until patience ends; one line for each try."""
    code = "import sys; from aipod.cli import run; status = run(sys.argv[1:]); print('rich' in sys.modules, status)"
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen: nobody else does meanwhile
        arguments = ["call", "x", "--attempts", "3", "--to", f"127.0.0.1:{nobody.getsockname()[1]}"]
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=CLEAN, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    note, last = done.stderr.splitlines()
    assert note == "aipod: note: Connection refused; trying again"
    assert last.startswith("aipod: UNREACHABLE: ")
    assert done.stdout == "False 3\n"


def test_each_reason_for_which_it_is_tried_again_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Mutants seen: only the first one, so that who looks for a job for a minute has heard of a refused connection."""
    with Progress(io.StringIO()) as progress:
        for why in ("refused", "refused", "not there", "refused", "3 bytes", "4 bytes", "5 bytes", "6 bytes"):
            progress.show(Event("WAITING", message=why))
    told = ["refused", "not there", "3 bytes", "4 bytes", "5 bytes"]
    assert capsys.readouterr().err.splitlines() == [f"aipod: note: {why}; trying again" for why in told]


@pytest.mark.parametrize("command", [("call", "x", "--attempts", "1"), ("serve", MODEL, "--bind", "nowhere")])
def test_the_collector_leaves_out_what_was_imported(tmp_path: Path, command: tuple[str, ...]) -> None:
    """And looks at all that comes afterwards."""
    code = "import gc, sys; from aipod.cli import run; run(sys.argv[1:]); print(gc.isenabled(), gc.get_freeze_count())"
    environ = {"AIPOD_TO": f"127.0.0.1:{free_port()}", "AIPOD_SPOOL": "tmp", "AIPOD_DATA": str(tmp_path)}
    told = subprocess.check_output(
        [sys.executable, "-c", code, *command],
        cwd=ROOT,
        env=CLEAN | environ,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    ).split()
    assert told[0] == "True"
    assert int(told[1]) > (40_000 if command[0] == "serve" else 30_000)


def quietly(served: Served) -> list[str]:
    with contextlib.suppress(FileNotFoundError):  # an entry is being removed this moment
        return left_in(served.spool)
    return ["something"]


@pytest.mark.parametrize("before", [True, False])
def test_a_traceback_only_with_debug(before: bool) -> None:
    command = ["call", "chaos", "--attempts", "1", "--to", f"127.0.0.1:{free_port()}"]
    done = aipod(*(["--debug", *command] if before else [*command, "--debug"]))
    assert done.status == 3
    assert "Traceback" in done.err
    assert done.last.startswith("aipod: UNREACHABLE: ")
    # A value that looks like the option is none.
    refused = ("--attempts", "1", "--to", f"127.0.0.1:{free_port()}")
    done = aipod("call", "chaos", "-k", "a=--debug", *refused, forked=True)
    assert "Traceback" not in done.err


# --- on a terminal


def test_a_terminal_shows_phase_and_rate_and_stdout_only_the_answer(
    to: tuple[str, str], tmp_path: Path, terminal: Terminal
) -> None:
    command = ("call", *to, "slow_echo", "-", "-k", "seconds=0.5", "-o", str(tmp_path / "out"))
    with start(*command, stdin=subprocess.PIPE, stderr=terminal.end) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(200):
            process.stdin.write(bytes(1_000_000))
            terminal.read(0.05)
            if "MB/s" in terminal.text:
                break
        process.stdin.close()
        terminal.read_until_closed(process)
        assert process.stdout.read() == b""
    assert process.returncode == 0
    text = "".join(terminal.text.split())  # the line that names the file may be broken
    assert [word for word in ("upload", "MB/s", "run", f"wrote{tmp_path}/out") if word not in text] == []


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
@pytest.mark.parametrize(
    "event",
    [
        Event("WAITING", connection=2, connections=5, message="UNAVAILABLE: the server is shutting down; try again"),
        Event("RECEIVING", sent=1_234_500_000, payload_size=99_999_000_000),
        Event("RUNNING", progress=0.5, message="epoch 3\nof 表示 many more than anybody would like to wait for"),
        Event("DONE", received=5, answer_size=1_000_000_000),
    ],
    ids=lambda event: event.phase,
)
def test_progress_is_one_line_on_any_terminal(monkeypatch: pytest.MonkeyPatch, width: int, event: Event) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    with Progress(screen) as progress:
        progress.show(event)
        shown = drawn(screen, width)
    (line,) = [line for line in shown.display if line.strip()]
    assert line.split()[0] in ("retry", "upload", "run", "download")
    assert bool(re.search(r" 0:00:0\d$", line.rstrip())) == (width >= 40)
    assert ("━" in line) == (width >= 80 and event.phase != "WAITING")
    assert "".join(drawn(screen, width).display).strip() == "", "it has gone in the end"


def drawn(stream: io.StringIO, width: int) -> pyte.Screen:
    """What a terminal makes of it."""
    screen = pyte.Screen(width, 5)
    screen.set_mode(pyte.modes.LNM)  # as the kernel does it: \n begins a line
    pyte.Stream(screen).feed(stream.getvalue())
    return screen


def test_a_method_that_is_quiet_is_told_for_how_long() -> None:
    """Mutant seen: each that says nothing, at once."""
    progress = Progress(io.StringIO())

    def told(**what: Any) -> str:
        return progress._detail(Event("RUNNING", **what), 0, None)

    assert told(quiet=9) == ""
    assert told(quiet=40) == "quiet for 40 s"
    assert told(quiet=40, runs=2, progress=0.5, message="half") == "run 2 50% half quiet for 40 s"
    assert told(quiet=0, runs=2) == "run 2"


def test_a_terminal_shows_retries(terminal: Terminal) -> None:
    with start("call", "chaos", "--attempts", "2", "--to", f"127.0.0.1:{free_port()}", stderr=terminal.end) as process:
        terminal.read_until_closed(process)
    assert process.returncode == 3
    assert "connection 2 of 2: Connection refused" in terminal.text


def test_a_terminal_gets_json_but_no_bytes(
    served: Served, to: tuple[str, str], terminal: Terminal, tmp_path: Path
) -> None:
    with start("call", *to, "text", stdout=terminal.end) as process:
        assert terminal.read_until_closed(process).strip() == '"grüße"'
    assert process.returncode == 0
    terminal.text = ""
    with start("call", *to, "random", "-k", "length=90000000", stdout=terminal.end, cwd=tmp_path) as process:
        assert process.stderr is not None
        err = process.stderr.read().decode()
        assert terminal.read_until_closed(process) == ""
    assert process.returncode == 1
    (ticket,) = tmp_path.iterdir()
    assert err == (
        "aipod: NOT_SHOWN: the answer is binary (90.0 MB), nothing for a terminal; it is kept: "
        f"`aipod attach {ticket.name} --to {served.address} -o FILE` writes it to a file\n"
    )
    done = aipod("attach", *to, str(ticket), forked=True)
    assert (done.status, len(done.out)) == (0, 90_000_000)
    assert aipod("cancel", *to, "--release", str(ticket), forked=True).out == b"RELEASED\n"
    wait_until(lambda: [name for name in quietly(served) if not name.startswith("workers")] == [])


def test_colors_in_the_environment_do_not_reach_a_pipe(to: tuple[str, str]) -> None:
    assert aipod("call", *to, "chaos", environ={"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}).answer["size"] == 0


# --- health, help, demo


def test_health_prints_the_status(served: Served, to: tuple[str, str]) -> None:
    for service in ((), ("ai.AI",), ("liveness",), ("readiness",)):
        done = aipod("health", *to, *service, forked=True)
        assert (done.status, done.out, done.err) == (0, b"SERVING\n", "")
    assert aipod("health", environ={"AIPOD_TO": served.address}).status == 0
    done = aipod("health", *to, "nothing")
    assert (done.status, done.out) == (1, b"")
    assert done.last.startswith("aipod: NOT_FOUND: the server knows no service 'nothing'")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_health_that_is_not_told_ends_on_signals_as_any_command(number: signal.Signals) -> None:
    """Mutant seen: TERM and HUP kill it without a word (as they did)."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        with start("health", "--to", f"127.0.0.1:{silent.getsockname()[1]}", "--timeout", "60") as process:
            with silent.accept()[0]:
                process.send_signal(number)
                said = process.communicate(timeout=30)[1].decode().strip()
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert (process.returncode, said) == (130, f"aipod: STOPPED: by {name}")


def test_health_of_a_draining_server_is_status_1(serve: Serve, tmp_path: Path) -> None:
    served = serve(MODEL)
    with start("call", "--to", served.address, "patient", "-k", f"mark={tmp_path}/mark") as process:
        wait_until((tmp_path / "mark").exists)
        served.process.terminate()
        wait_until(lambda: "draining" in served.log_text())
        done = aipod("health", "--to", served.address)
        assert (done.status, done.out) == (1, b"NOT_SERVING\n")
        assert aipod("health", "--to", served.address, "liveness").status == 0
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    served.process.communicate(timeout=30)
    assert served.process.returncode == 0


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("serve",),
        ("call",),
        ("submit",),
        ("attach",),
        ("cancel",),
        ("jobs",),
        ("health",),
        ("methods",),
        ("doctor",),
        ("demo",),
    ],
)
def test_help_says_what_there_is(command: tuple[str, ...]) -> None:
    done = aipod(*command, "--help", forked=True)
    assert (done.status, done.err) == (0, "")
    text = done.out.decode()
    assert text.startswith("Usage: aipod")
    wanted = {
        (): ["serve", "call", "submit", "attach", "cancel", "jobs", "health", "demo", "AIPOD_<NAME>"],
        ("serve",): ["--bind", "--spool", "--data", "--drain", "[30s]", "--runner", "--instances", "--tls-cert"],
        ("call",): ["METHOD [FILE|-]", "--to", "-k NAME=JSON", "--version", "--upstream", "--json", "-o", "--ticket"],
        ("submit",): ["METHOD [FILE|-]", "--to", "-k NAME=JSON", "--ticket", "[required]"],
        ("attach",): ["TICKET-FILE|-", "--to", "--upstream", "-o", "as often as it is", "stdin"],
        ("cancel",): ["TICKET-FILE|-", "--to", "--release"],
        ("jobs",): ["--json", "--to", "--upstream"],
        ("health",): ["SERVICE", "--to"],
        ("methods",): ["--json", "--to"],
        ("doctor",): ["[HOST:PORT]", "--to", "--quick", "--wait"],
        ("demo",): ["--size"],
    }[command]
    assert [word for word in wanted if word not in text] == []
    if "--help-all" in text:
        text = aipod(*command, "--help-all", forked=True).out.decode()
    assert "--debug" in text
    if "--tls-cert" in text:  # to who serves it means something else
        words = " ".join(text.split())
        assert ("the server's certificate chain" in words, "says who calls" in words) == (
            command == ("serve",),
            command != ("serve",),
        )


def test_demo_works_and_leaves_nothing(tmp_path: Path) -> None:
    with start("demo", "--size", "8", environ={"TMPDIR": str(tmp_path)}) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, b"")
    text = out.decode()
    wanted = ["aipod listening on", "train ", "predict ", "log ", "8 MB up in", "identical, bit for bit", "heartbeats"]
    assert [part for part in [*wanted, "peak memory: server"] if part not in text] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_that_is_stopped_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with start("demo", "--size", "3000", environ={"TMPDIR": str(tmp_path)}) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith(b"aipod listening"):
            pass
        below = children(process.pid)
        assert below
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(30) == 130
    wait_until(lambda: not any(alive(pid) for pid in below))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's: PR_SET_PDEATHSIG")
def test_demo_that_is_killed_takes_its_server_along_and_the_next_one_its_directory(tmp_path: Path) -> None:
    """Neither another one's that runs, nor what is no directory.

    Mutants seen: the server lives on; directories are swept whether they are locked or not.
    """
    held, link, elsewhere = tmp_path / "aipod-demo-held", tmp_path / "aipod-demo-link", tmp_path / "elsewhere"
    held.mkdir()
    elsewhere.mkdir()
    link.symlink_to(elsewhere)
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with start("demo", "--size", "3000", environ={"TMPDIR": str(tmp_path)}) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith(b"aipod listening"):
            pass
        below = children(process.pid)
        assert below
        process.kill()
    wait_until(lambda: not any(alive(pid) for pid in below))
    assert len(list(tmp_path.iterdir())) == 4
    assert aipod("demo", "--size", "1", environ={"TMPDIR": str(tmp_path)}).status == 0
    assert sorted(tmp_path.iterdir()) == [held, link, elsewhere]
    os.close(lock)
