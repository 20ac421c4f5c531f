"""What models print, log and report: in their own job's log, whole and in order, and in the server's, within bounds."""

from __future__ import annotations

import contextvars
import functools
import logging
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trio

import aipod
from aipod.client import Event
from aipod.runner.capture import Capture, captured
from aipod.runner.output import LINE, LINES, Excerpt, Lines, ServerLog
from aipod.spool import MAX_LOG
from tests.calls import calls, own
from tests.conftest import FIRST, Serve, Served, peak_memory, wait_until
from tests.models_output import BOTH, SAID

BOLD = "\x1b[1mbold ü"


def called(served: Served, method: str, **kwargs: Any) -> tuple[Any, list[str], list[Event]]:
    """The answer, or the error; the lines of the job's log, and all events."""
    events: list[Event] = []
    try:
        answer = own(served.address, method, on_event=events.append, **kwargs)
    except aipod.AipodError as exc:
        answer = exc
    return answer, "".join(event.log for event in events).splitlines(), events


def test_text_is_cut_into_lines() -> None:
    """Mutants seen: an endless line is kept whole; the rest of a line that was cut is lost."""
    lines = Lines()
    assert lines.feed("a\nb") == ["a"]
    assert lines.feed("c\r\n\n\rd\r") == ["bc", "d"]
    assert lines.feed("\n") == []
    assert lines.feed("x" * (LINE - 1)) == []
    assert lines.feed("yz") == ["x" * (LINE - 1) + "y", "z"]
    assert lines.feed("é" * (2 * LINE) + "\nend") == ["é" * LINE, "é" * LINE]
    assert lines.end() == ["end"]
    assert lines.end() == []


def test_of_what_waits_to_be_written_beginning_and_end_are_kept() -> None:
    """Mutants seen: one of them is dropped; one text that is too long drops itself; a text that begins in the tail is
    followed by one in the head."""
    excerpt = Excerpt(100)
    assert (bool(excerpt), excerpt.take()) == (False, "")
    for n in range(10):
        excerpt.add(f"line {n}" + "\n" * (n % 2))
    assert bool(excerpt)
    assert excerpt.take() == "".join(f"line {n}\n" for n in range(10))
    assert excerpt.take() == ""
    for n in range(1000):
        excerpt.add(f"number {n:03}")
    head, mark, tail = (range(4), "[lines were dropped]\n", range(996, 1000))
    texts = ["".join(f"number {n:03}\n" for n in part) for part in (head, tail)]
    assert excerpt.take() == mark.join(texts)
    excerpt.add("x" * 40)
    excerpt.add("y" * 40)
    excerpt.add("z")
    assert excerpt.take() == "x" * 40 + "\n" + "y" * 40 + "\nz\n"
    excerpt.add("ü" * 1000)
    assert excerpt.take() == "ü" * 50 + "\n"


def test_the_server_s_log_takes_so_many_lines_a_second_and_nothing_that_moves_a_cursor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    server_log = ServerLog("v1")
    server_log.write(["tab\there \x1b[2J\x9b1m\x00"], "")
    server_log.write(["line"] * (LINES + 50), "id")
    server_log.end("id")
    server_log.end("id")
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0] == "version v1: tab\there ?[2J?1m?"
    assert texts[1:-1] == ["job id: line"] * (LINES - 1)
    assert re.fullmatch(r"job id: 51 lines are not shown.*", texts[-1])


@pytest.mark.parametrize(
    ("model", "method", "more"),
    [
        ("Worker", "predict", ["by a child"]),
        ("Loop", "predict", []),
        ("Loop", "with_asyncio", []),
        ("Loop", "in_thread", []),
    ],
)
def test_what_a_method_prints_and_logs_is_in_its_job_s_log(
    serve: Serve, model: str, method: str, more: list[str]
) -> None:
    """Mutants seen: of the loop's, what is printed in a thread goes to the server's own stdout; a last line without
    its end is lost, or is the next job's."""
    served = serve(f"tests.models_output:{model}")
    for _ in range(2):  # with a cold instance, and with a warm one
        answer, lines, _ = called(served, method)
        assert (answer, lines) == (None, [*SAID, *more, BOLD])
    text = served.log_text()
    assert re.search(r"aipod\.model: version default: loading", text)
    assert len(re.findall(r"aipod\.model: job [0-9a-f]{32}: printed", text)) == 2
    assert "\x1b" not in text
    assert text.count("logged 1") == 2


def test_a_crash_leaves_its_last_words_in_the_log(serve: Serve) -> None:
    """Also what it has told its job. Mutant seen: that is sent a moment later, from a thread."""
    served = serve("tests.models_output:Worker")
    answer, lines, _ = called(served, "crash")
    assert isinstance(answer, aipod.Interrupted)
    assert lines[:3] == ["last words", "and what is about to happen", "Fatal Python error: Segmentation fault"]
    assert any("models_output.py" in line for line in lines)


@pytest.mark.parametrize(("model", "rest"), [("Worker", ["half", "two", "lines", " a line"]), ("Loop", None)])
def test_what_is_printed_and_what_is_told_to_the_job_are_in_their_order(
    serve: Serve, model: str, rest: list[str] | None
) -> None:
    """In a worker to the character. Mutant seen: they come in two ways, of which one is faster."""
    served = serve(f"tests.models_output:{model}")
    answer, lines, _ = called(served, "in_turn")
    assert answer is None
    assert lines[: len(BOTH)] == BOTH
    if rest is not None:
        assert lines[len(BOTH) :] == rest


def test_what_is_printed_between_two_jobs_is_in_neither_s_log(serve: Serve, tmp_path: Path) -> None:
    served = serve("tests.models_output:Worker")
    until = tmp_path / "until"
    assert called(served, "later", until=str(until))[:2] == (None, [])
    until.touch()
    wait_until(lambda: "version default: from a thread" in served.log_text())
    assert "from a thread" not in called(served, "predict")[1]


def test_two_methods_at_once_have_a_log_each(serve: Serve) -> None:
    served = serve("tests.models_output:Loop")
    with calls() as threads:
        ends = {name: threads.submit(called, served, "both_at_once", name=name) for name in "ab"}
        for name, end in ends.items():
            assert end.result()[1] == [f"first {name}", f"second {name}"]


def test_what_has_no_job_goes_to_stderr_never_to_stdout(serve: Serve) -> None:
    served = serve("tests.models_output:Loop")
    assert called(served, "by_itself")[:2] == (None, [])
    assert "\nfrom a thread\n" in served.log_text()
    served.process.send_signal(signal.SIGTERM)
    assert served.process.stdout is not None
    with served.process.stdout as stdout:
        assert stdout.read() == ""
    assert served.process.wait(30) == 0


async def test_what_the_collector_says_while_a_line_is_taken_waits_for_nothing() -> None:
    """It may run at any time, and a `__del__` print. Mutant seen: the thread waits for itself, and then the loop."""
    told: list[str | None] = []

    class Collected(Excerpt):
        def add(self, text: str) -> None:
            print("closed")
            logging.getLogger("model").warning("closed")
            super().add(text)

    with captured():
        capture = Capture(ServerLog("1"), "job", lambda progress, message, text: told.append(text))
        capture._log = Collected(1000)
        with capture:
            say = functools.partial(contextvars.copy_context().run, capture.report, None, None, "line")
            saying = threading.Thread(target=say, daemon=True)
            saying.start()
            await trio.to_thread.run_sync(saying.join, 10)
            assert not saying.is_alive()
    assert told[0] == "line\n"


@pytest.mark.parametrize("runner", ["loop", "thread"])
def test_garbage_that_prints_stops_nothing(serve: Serve, runner: str) -> None:
    """From Python 3.12 on the collector runs inside what reports a line: a mutant without `_held` never answers."""
    served = serve(f"tests.models_output:{runner.capitalize()}", "--runner", runner)
    assert called(served, "garbage")[0] == "done"


def test_a_model_that_prints_200_mb_gets_its_answer_and_costs_no_memory(serve: Serve) -> None:
    """Its log is cut in the middle, the server's where it comes too fast. Mutant seen: what it says last is dropped."""
    served = serve("tests.models_output:Worker")
    called(served, "flood", megabytes=2)
    before, lines_before = peak_memory(served.process.pid), served.log_text().count("\n")
    began = time.monotonic()
    answer, lines, _ = called(served, "flood", megabytes=200)
    assert answer == "done"
    assert (lines[0], lines[-1]) == ("x" * 99, "the end")
    assert sum(map(len, lines)) <= MAX_LOG + 1000
    assert any("dropped" in line for line in lines)
    shown = served.log_text().count("\n") - lines_before
    assert LINES <= shown <= (LINES + 10) * (time.monotonic() - began + 1)
    assert peak_memory(served.process.pid) - before < 40


@pytest.mark.parametrize(("model", "times"), [("Worker", 1_000_000 if FIRST else 200_000), ("Loop", 200_000)])
def test_many_reports_are_told_once_a_tick_in_order(serve: Serve, model: str, times: int) -> None:
    """The last one too. Mutant seen: what is pending at the end of a run is dropped."""
    served = serve(f"tests.models_output:{model}", "--tick", "0.1")
    called(served, "report", times=1)
    before = peak_memory(served.process.pid)
    answer, lines, events = called(served, "report", times=times)
    assert answer == "done"
    progress = [event.progress for event in events if event.phase == "RUNNING"]
    assert progress == sorted(progress)
    assert [(event.progress, event.message) for event in events][-1] == (1.0, f"step {times - 1}")
    assert lines == [f"line {n}" for n in range(0, times, 100)]
    assert len(events) < times / 1000
    assert peak_memory(served.process.pid) - before < 20
