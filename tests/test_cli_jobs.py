"""Jobs that outlive the command that began them: call --ticket, submit, attach, cancel, jobs, each a process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from aipod.client.ticket import TicketFile
from aipod.codec import job_id
from tests import stranger, test_cli, wire
from tests.conftest import Serve, Served, free_port, left_in, run, wait_until
from tests.proxy import Fault, Proxy, open_proxy
from tests.test_cli import MODEL, Done, Terminal

start = functools.partial(test_cli.start, forked=True)
aipod = functools.partial(test_cli.aipod, forked=True)
PAYLOAD = os.urandom(20_000_000)
SMALL = b"12345"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = ("--tick", "0.1", "--instances", "4")
    served = Served(MODEL, tmp_path_factory.mktemp("server"), options, "127.0.0.1:0")
    yield served
    assert served.stop() == 0, served.log_text()
    assert left_in(served.spool) == []


@pytest.fixture
def to(served: Served) -> tuple[str, str]:
    return "--to", served.address


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


class Work:
    """One request of a gated run, and the files that belong to it."""

    def __init__(self, directory: Path, payload: bytes = SMALL) -> None:
        self.directory, self.data = directory, payload
        self.payload, self.ticket, self.out = directory / "payload", directory / "ticket", directory / "out"
        self.mark, self.gate = directory / "mark", directory / "gate"
        self.payload.write_bytes(payload)

    def request(self, file: Path | str | None = None, *more: str) -> list[str]:
        """METHOD, FILE and options, with the ticket file."""
        words = ["gated_echo", str(file or self.payload), "-k", f"mark={self.mark}", "-k", f"gate={self.gate}"]
        return [*words, "--ticket", str(self.ticket), *more]

    @property
    def runs(self) -> int:
        return self.mark.read_text().count("run") if self.mark.exists() else 0

    @property
    def sent(self) -> bool:
        saved = TicketFile(self.ticket).load()
        assert saved is not None
        return saved.sent is not None

    @property
    def hex(self) -> str:
        return str(json.loads(self.ticket.read_text())["ticket"])


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def phases(to: tuple[str, str]) -> dict[str, str]:
    lines = aipod("jobs", "--json", *to).out.decode().splitlines()
    return {job["id"]: job["phase"] for job in map(json.loads, lines)}


def submitted(work: Work, to: tuple[str, str]) -> str:
    done = aipod("submit", *to, *work.request())
    assert (done.status, done.err) == (0, "")
    return done.out.decode().strip()


# --- call --ticket


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_the_same_command_continues_whatever_it_was_doing(
    served: Served, tmp_path: Path, number: signal.Signals
) -> None:
    """Ended in the upload, in the run and in the download; what is durable is not sent again.

    Mutant seen: a ticket file that is not read.
    """
    work = Work(tmp_path, PAYLOAD)

    async def end(proxy: Proxy, reached: Callable[[], Any]) -> Done:
        process = start("call", "--to", proxy.address, *work.request(None, "-o", str(work.out)))
        async with asyncio.timeout(30):
            while not reached():
                await asyncio.sleep(0.01)
        process.send_signal(number)
        out, err = await asyncio.to_thread(process.communicate)
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        return Done(process.returncode, out, err)

    async def main() -> None:
        async with open_proxy(served.port, *[Fault(cut_up=7_000_000)] * 2) as proxy:
            stopped = await end(proxy, lambda: proxy.cuts)
            assert (work.sent, work.runs) == (False, 0)
            sent = proxy.total_up
        where = f"{work.ticket} --to {proxy.address}`"
        if number == signal.SIGINT:
            assert stopped.last == (
                "aipod: STOPPED: by Ctrl-C; the server keeps what has arrived: the same command goes on "
                f"with the upload, `aipod cancel {where} gives it up"
            )
        async with open_proxy(served.port) as proxy:
            stopped = await end(proxy, work.mark.exists)
            assert work.sent
            assert sent + proxy.total_up < 2 * len(PAYLOAD)
        where = f"{work.ticket} --to {proxy.address}`"
        if number == signal.SIGINT:
            assert stopped.last == (
                "aipod: STOPPED: by Ctrl-C; the server goes on with the job for its grace time and keeps "
                f"the answer: the same command or `aipod attach {where} comes back to it, `aipod cancel {where} stops "
                "it"
            )
        work.gate.touch()
        async with open_proxy(served.port, *[Fault(cut_down=7_000_000)] * 2) as proxy:
            await end(proxy, lambda: proxy.cuts)
            assert work.ticket.exists()
            assert not work.out.exists()

    run(main)
    done = aipod("call", "--to", served.address, *work.request(None, "-o", str(work.out)))
    assert (done.status, done.out, done.err) == (0, b"", "")
    assert work.out.read_bytes() == PAYLOAD
    assert work.runs == 1
    assert not work.ticket.exists()


def test_a_pipe_that_breaks_loses_nothing(to: tuple[str, str], tmp_path: Path) -> None:
    """Mutant seen: a ticket file that goes when the answer has arrived, before it is written."""
    work = Work(tmp_path, PAYLOAD)
    work.gate.touch()
    with start("call", *to, *work.request()) as process:
        assert process.stdout is not None
        assert process.stdout.read(10) == PAYLOAD[:10]
        process.stdout.close()
        assert process.wait(30) == 1
    done = aipod("call", *to, *work.request())
    assert (done.status, done.out == PAYLOAD, done.err) == (0, True, "")
    assert (work.runs, work.ticket.exists()) == (1, False)


def test_after_a_timeout_the_same_command_continues(to: tuple[str, str], work: Work) -> None:
    done = aipod("call", *to, *work.request(), "--timeout", "1")
    assert (done.status, done.out) == (1, b"")
    assert done.last.startswith("aipod: DEADLINE_EXCEEDED: not done within --timeout; the server goes on with the job")
    work.gate.touch()
    done = aipod("call", *to, *work.request())
    assert (done.status, done.out, done.err) == (0, SMALL, "")
    assert work.runs == 1
    assert set(phases(to).values()) <= {"RELEASED", "DONE", "CANCELLED", "FAILED", "RECEIVING"}


def test_stdin_must_bring_the_same_bytes_until_the_upload_is_complete(to: tuple[str, str], tmp_path: Path) -> None:
    """A pipe has no name: only its bytes tell it from another one, and the server checks them all."""
    work = Work(tmp_path, PAYLOAD[:5_000_000])
    work.gate.touch()

    def begin() -> None:
        with start("call", *to, *work.request("-"), stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            process.stdin.write(work.data[:4_500_000])
            process.stdin.flush()
            wait_until(lambda: "RECEIVING" in phases(to).values())
            process.kill()

    begin()
    other = aipod("call", *to, *work.request("-"), stdin=PAYLOAD[-5_000_000:])
    assert other.status == 1
    assert re.match("aipod: DIGEST_MISMATCH: .* the same call begins anew", other.last)
    done = aipod("call", *to, *work.request("-"), stdin=work.data)
    assert (done.status, done.out == work.data, work.runs) == (0, True, 1)
    begin()
    done = aipod("call", *to, *work.request("-"), stdin=work.data)
    assert (done.status, done.out == work.data, done.err, work.runs) == (0, True, "", 2)


def test_stdin_is_not_needed_once_the_upload_is_complete(to: tuple[str, str], work: Work) -> None:
    with start("call", *to, *work.request("-"), stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(SMALL)
        process.stdin.close()
        wait_until(work.mark.exists)
        process.kill()
    work.gate.touch()
    done = aipod("call", *to, *work.request("-"))
    assert (done.status, done.out, work.runs) == (0, SMALL, 1)
    assert re.fullmatch(
        "aipod: note: the payload's end was sent before: .* not looked at if the server has all of it\n", done.err
    )


def test_a_job_that_failed_or_was_refused_leaves_no_ticket_file(to: tuple[str, str], work: Work) -> None:
    ticket = ("--ticket", str(work.ticket))
    for what, reason in (
        (("random", "-k", "length=x"), "MODEL_ERROR: TypeError"),
        (("random",), "BAD_KWARGS"),
        (("nothing",), "UNKNOWN_METHOD"),
    ):
        done = aipod("call", *to, *what, *ticket)
        assert (done.status, work.ticket.exists()) == (1, False)
        assert done.last.startswith(f"aipod: {reason}: ")


def test_a_terminal_does_not_lose_an_answer_that_it_cannot_show(
    to: tuple[str, str], work: Work, terminal: Terminal
) -> None:
    work.gate.touch()
    with start("call", *to, *work.request(), stdout=terminal.end) as process:
        assert process.stderr is not None
        err = process.stderr.read().decode()
    assert process.returncode == 1
    assert f"the answer is binary (5 B), nothing for a terminal; it is kept: `aipod attach {work.ticket} " in err
    assert aipod("call", *to, *work.request()).out == SMALL
    assert work.runs == 1


# --- submit, attach


def test_a_submitted_job_is_attached_to_as_often_as_one_likes(to: tuple[str, str], work: Work) -> None:
    job_id = submitted(work, to)
    assert re.fullmatch("[0-9a-f]{32}", job_id)
    assert work.ticket.stat().st_mode & 0o777 == 0o600
    assert submitted(work, to) == job_id, "the same command finds the same job"
    wait_until(work.mark.exists)
    assert phases(to)[job_id] == "RUNNING"
    with test_cli.start("attach", *to, str(work.ticket)) as process:
        wait_until(lambda: len(os.listdir(f"/proc/{process.pid}/fd")) > 6)  # it is connected
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command comes back to it" in err.decode()
    work.gate.touch()
    for ticket, stdin in ((str(work.ticket), None), ("-", f"{work.hex}\n".encode())):
        done = aipod("attach", *to, ticket, stdin=stdin)
        assert (done.status, done.out, done.err) == (0, SMALL, "")
    done = aipod("attach", *to, str(work.ticket), "-o", str(work.out))
    assert (done.status, done.out, work.out.read_bytes()) == (0, b"", SMALL)
    assert work.runs == 1
    done = aipod("cancel", *to, str(work.ticket))
    assert (done.status, done.out, work.ticket.exists()) == (0, b"DONE\n", True)
    assert done.last == "aipod: note: it had ended before; attach gives its answer, --release forgets it"
    secret = work.hex
    done = aipod("cancel", *to, "--release", str(work.ticket))
    assert (done.status, done.out, done.err, work.ticket.exists()) == (0, b"RELEASED\n", "", False)
    done = aipod("attach", *to, "-", stdin=secret.encode())
    assert (done.status, done.last) == (1, "aipod: RELEASED: its answer was released (call again: that is a new job)")


def test_a_failed_job_says_the_same_each_time(to: tuple[str, str], work: Work) -> None:
    assert aipod("submit", *to, "random", "-k", "length=x", "--ticket", str(work.ticket)).status == 0
    for _ in range(2):
        done = aipod("attach", *to, str(work.ticket))
        assert (done.status, done.out, work.ticket.exists()) == (1, b"", True)
        assert done.last.startswith("aipod: MODEL_ERROR: TypeError: ")
    done = aipod("cancel", *to, str(work.ticket))
    assert (done.status, done.out, work.ticket.exists()) == (0, b"FAILED\n", False)


def test_attach_shows_the_whole_log_and_the_phase_on_a_terminal(
    to: tuple[str, str], work: Work, terminal: Terminal
) -> None:
    assert aipod("submit", *to, *work.request(None, "-k", "lines=3")).status == 0
    with start("attach", *to, str(work.ticket), stderr=terminal.end) as process:
        assert process.stdout is not None
        while "line 2" not in terminal.text or "run  " not in terminal.text:
            assert terminal.read(20), terminal.text
        work.gate.touch()
        terminal.read_until_closed(process)
        assert process.stdout.read() == SMALL
    assert [terminal.text.count(f"line {number} grüße") for number in range(3)] == [1, 1, 1]


def test_a_server_that_is_started_again_while_one_is_attached(serve: Serve, work: Work) -> None:
    """The ticket is all that is needed, of a job that waits too. What ran is interrupted."""
    port = free_port()
    bind, to = f"127.0.0.1:{port}", ("--to", f"127.0.0.1:{port}")
    first = serve(MODEL, "--tick", "0.1", bind=bind)
    submitted(work, to)
    wait_until(work.mark.exists)
    with start("attach", *to, str(work.ticket)) as process:
        first.process.kill()
        first.process.communicate()
        serve(MODEL, "--tick", "0.1", bind=bind)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert (
        err.decode()
        .splitlines()[-1]
        .startswith("aipod: INTERRUPTED: the method was started, how it ended is not known: ")
    )
    assert "call again to run it once more" in err.decode()
    assert work.runs == 1


# --- cancel


def test_cancel_stops_a_run_and_the_same_command_begins_anew(to: tuple[str, str], work: Work) -> None:
    job_id = submitted(work, to)
    wait_until(work.mark.exists)
    done = aipod("cancel", *to, str(work.ticket))
    assert (done.status, done.out, done.err, work.ticket.exists()) == (0, b"CANCELLED\n", "", False)
    assert phases(to)[job_id] == "CANCELLED"
    work.gate.touch()
    done = aipod("call", *to, *work.request())
    assert (done.status, done.out, work.runs) == (0, SMALL, 2)


# --- jobs


def test_jobs_is_a_table_for_people_and_lines_of_json(serve: Serve, work: Work, terminal: Terminal) -> None:
    served = serve(MODEL, "--tick", "0.1", "--instances", "1")
    to = ("--to", served.address)
    for option in ((), ("--json",)):
        done = aipod("jobs", *to, *option)
        assert (done.status, done.out, done.err) == (0, b"", "aipod: note: the server has no jobs\n")
    first = submitted(work, to)
    wait_until(work.mark.exists)
    second = aipod("submit", *to, "text", "--ticket", str(work.out)).out.decode().strip()
    done = aipod("jobs", *to)
    assert (done.status, done.err) == (0, "")
    lines = done.out.decode().splitlines()
    assert lines[0].split() == ["ID", "METHOD", "VERSION", "PHASE", "PROGRESS", "MESSAGE"]
    assert [line.split() for line in lines[1:]] == [
        [second, "text", "default", "QUEUED"],
        [first, "gated_echo", "default", "RUNNING"],
    ]
    assert lines[0].index("PHASE") == lines[1].index("QUEUED") == lines[2].index("RUNNING")
    listed = [json.loads(line) for line in aipod("jobs", "--json", *to).out.splitlines()]
    assert [(job["id"], job["phase"]) for job in listed] == [(second, "QUEUED"), (first, "RUNNING")]
    assert work.hex not in str(listed)
    with start("jobs", *to, stdout=terminal.end, environ={"COLUMNS": "40"}) as process:
        shown = terminal.read_until_closed(process).splitlines()
    assert shown == [line[:40] for line in lines], "a line of its own for each job"
    for ticket in (work.out, work.ticket):
        assert aipod("cancel", *to, str(ticket)).out == b"CANCELLED\n"


def test_jobs_tells_how_much_of_an_upload_is_durable(serve: Serve) -> None:
    """With and without an announced size."""
    served = serve(MODEL, "--tick", "0.1")
    to = ("--to", served.address)
    sizes = {b"a" * 16: 5_000_000, b"b" * 16: None}

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for ticket, size in sizes.items():
                upload = wire.call(served.address, ticket, name="text", size=size, epoch=1)
                one = await stack.enter_async_context(upload)
                for offset in range(0, 2_500_000, 500_000):
                    await one.chunk(bytes(500_000), offset, sync=True)
                await one.until(lambda state: state.offset == 2_500_000)
            table, lines = [await asyncio.to_thread(aipod, "jobs", *to, *option) for option in ((), ("--json",))]
        rows = {line.split()[0]: line.split()[3:] for line in table.out.decode().splitlines()[1:]}
        assert rows == {
            job_id(b"a" * 16): ["RECEIVING", "2.5/5.0", "MB"],
            job_id(b"b" * 16): ["RECEIVING", "2.5", "MB"],
        }
        listed = {job["id"]: (job["received"], job["size"]) for job in map(json.loads, lines.out.splitlines())}
        assert listed == {job_id(ticket): (2_500_000, size) for ticket, size in sizes.items()}

    run(main)


def test_jobs_tells_how_much_of_a_plain_clients_upload_is_durable(serve: Serve) -> None:
    served = serve(MODEL, "--tick", "0.1")
    over = threading.Event()

    def messages() -> Iterator[Any]:
        yield stranger.first_message("chaos", {"_aipod_bin_size": 5_000_000})
        yield stranger.Raw(data=zstandard.compress(bytes(2_500_000)), sync=True)
        over.wait(60)

    with stranger.open_channel(served.address) as channel:
        call = stranger.start(channel, "chaos", messages())
        try:
            wait_until(lambda: b"RECEIVING  2.5/5.0 MB" in aipod("jobs", "--to", served.address).out)
        finally:
            over.set()
        assert stranger.reply_of(call).info.reason == "SIZE_MISMATCH"


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (
            ("attach", "0123456789abcdef" * 2),
            2,
            "USAGE: a ticket does not belong on a command line, .* with - as TICKET",
        ),
        (("cancel", "0123456789ABCDEF" * 4), 2, "USAGE: a ticket does not belong on a command line, .*"),
        (("attach", "/no/such/file"), 2, "USAGE: there is no ticket file '/no/such/file': "),
        (("attach", __file__), 2, "USAGE: .* is no ticket file; "),
        (("attach", "-"), 2, "USAGE: what is on stdin is no ticket; give 32 or more hexadecimal digits"),
        (("attach",), 2, "USAGE: Missing argument 'TICKET-FILE"),
        (("submit", "chaos"), 2, "USAGE: Missing option '--ticket'"),
        (("call", "chaos", "--ticket", "/no/directory/t"), 2, "USAGE: '/no/directory' is no directory that can be "),
        (("call", "chaos", "--ticket", __file__), 2, "USAGE: .* is no ticket file; "),
        (("call", "chaos", "-k"), 2, "USAGE: Option '-k' requires an argument .see aipod call --help.$"),
        (("jobs", "--meta", "x"), 2, "USAGE: --meta 'x' is not NAME=VALUE"),
        (("jobs", "--attempts", "1"), 3, "UNREACHABLE: no lasting connection to .*: Connection refused"),
    ],
)
def test_mistakes_have_a_status_and_a_last_line(arguments: tuple[str, ...], status: int, said: str) -> None:
    done = aipod(*arguments, environ={"AIPOD_TO": f"127.0.0.1:{free_port()}"})
    assert (done.status, done.out) == (status, b"")
    assert re.match(f"aipod: {said}", done.last), done.err
    assert "0123456789" not in done.err.lower(), "a secret is not repeated"


def test_a_ticket_of_no_job(to: tuple[str, str]) -> None:
    for command in ("attach", "cancel"):
        done = aipod(command, *to, "-", stdin=b"00" * 16)
        assert (done.status, done.out) == (1, b"")
        assert done.last.startswith("aipod: NOT_FOUND: there is no such job here")
