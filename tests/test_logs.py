"""The server's log: one JSON object a line, or text; nobody else makes lines, and nothing secret is in any."""

from __future__ import annotations

import datetime
import json
import logging
import os
import pty
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import aipod
from aipod.cli.logs import CUT, MAX_LINE, JsonLines, TextLines, bounded
from aipod.config import Config, ConfigError
from tests import stranger
from tests.conftest import ROOT, Serve, Served, run, wait_until
from tests.models_observed import FORGED
from tests.test_identity import (
    Tokens,
    tokens,  # noqa: F401 - a fixture
)

JSON = ("--log-format", "json")
WORKER, LOOP = "tests.models_observed:Worker", "tests.models_observed:Loop"


def lines(served: Served) -> list[dict[str, Any]]:
    """All that the server has written to stderr; every line must be an object, and fit."""
    found = []
    for line in served.log.read_bytes().split(b"\n")[:-1]:
        assert len(line) <= MAX_LINE
        assert line.isascii()
        told = json.loads(line)
        assert set(told) >= {"time", "level", "logger", "message"}, told
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told["time"])
        found.append(told)
    return found


def ends(served: Served, count: int = 1) -> list[dict[str, Any]]:
    """The lines that tell of the ends of jobs."""

    def look() -> list[dict[str, Any]] | None:
        found = [told for told in lines(served) if "outcome" in told]
        return found if len(found) >= count else None

    found: list[dict[str, Any]] = wait_until(look, seconds=20)
    assert len(found) == count, "one line a job"
    return found


# --- one line a job


def test_the_line_of_a_job(serve: Serve, tmp_path: Path) -> None:
    """Mutants seen: no line; two; what is in it, each."""
    served = serve(WORKER, *JSON)
    file = tmp_path / "payload"
    file.write_bytes(b"x" * 1_000_000)

    async def main() -> tuple[Any, ...]:
        async with aipod.Client(served.address) as client:
            done = await client.submit("size", file, version="7")
            assert await done.wait() == 1_000_000
            failed = await client.submit("fail", b"12")
            with pytest.raises(aipod.ModelError):
                await failed.wait()
            stopped = await client.submit("wait", b"")
            await stopped.cancel()
            with pytest.raises(aipod.JobCancelled):
                await stopped.wait()
            return done, failed, stopped

    ids = [job.id for job in run(main)]
    found = ends(served, 3)
    assert [told["job"] for told in found] == ids
    assert [told["outcome"] for told in found] == ["done", "failed", "cancelled"]
    assert [told["level"] for told in found] == ["INFO", "WARNING", "INFO"]
    assert [told.get("reason") for told in found] == [None, "MODEL_ERROR", "CANCELLED"]
    assert [(told["method"], told["version"]) for told in found] == [
        ("size", "7"),
        ("fail", "default"),
        ("wait", "default"),
    ]
    first, second, third = found
    assert first.items() >= {"payload_bytes": 1_000_000, "answer_bytes": 7, "attempts": 1}.items()
    assert 20 < first["wire_bytes"] < 10_000
    assert first["ratio"] == round(1_000_000 / first["wire_bytes"], 2)
    assert re.fullmatch(rf"{served.process.pid}-[0-9a-f]{{8}}-0", first["worker"]), "its lock's name in the spool"
    assert first["seconds"] >= first["upload_seconds"] + first["queue_seconds"] + first["run_seconds"] - 0.002
    assert re.fullmatch(
        rf"job {ids[0]} size@7 done in \d+\.\d{{3}} s "
        r"\(upload \d+\.\d{3} s, queue \d+\.\d{3} s, run \d+\.\d{3} s; 1000000 bytes up, 7 down\)",
        first["message"],
    )
    assert second["type"] == "ValueError"
    assert second["trace"].startswith("Traceback (most recent call last):\n")
    assert "raise ValueError(FORGED)" in second["trace"]
    assert "Traceback" not in second["message"]
    assert second["message"].endswith(f": MODEL_ERROR: ValueError: {FORGED}")
    assert third["attempts"] in (0, 1), "it may have been in line still"


def test_a_plain_client_s_job_whose_upload_fails_or_is_left(serve: Serve) -> None:
    served = serve(WORKER, *JSON)
    assert stranger.ask(served.address, "size", {}, [b"no zstd"]).info.reason == "BAD_CHUNK"
    before = set(served.spool.glob("*/state"))  # that job's may be there for a moment more
    with stranger.open_channel(served.address) as channel:
        call = stranger.start(channel, "chaos", iter_then_wait(), metadata=[("x-func-name", "size")])
        heartbeats = iter(call)
        assert next(heartbeats).data == b"PONG"
        wait_until(lambda: set(served.spool.glob("*/state")) - before, seconds=20)
        next(heartbeats)  # or it is cancelled while the entry is made, and there was no job
        call.cancel()
    bad, left = ends(served, 2)
    assert (bad["outcome"], bad["reason"], bad["level"]) == ("failed", "BAD_CHUNK", "INFO")
    assert (left["outcome"], left["reason"], left["level"]) == ("cancelled", "CANCELLED", "INFO")
    assert set(bad) & {"queue_seconds", "run_seconds"} == set()


def iter_then_wait() -> Iterator[Any]:
    import threading

    yield stranger.first_message("chaos", {})
    threading.Event().wait(5)


def test_whose_jobs_they_are(serve: Serve, tokens: Tokens) -> None:  # noqa: F811
    served = serve("aipod.examples.basics:Echo", *JSON, "--tokens", str(tokens.path))

    async def main() -> None:
        async with aipod.Client(served.address, config=Config(token=tokens.bob)) as bob:
            await bob.predict(b"x")

    run(main)
    assert ends(served)[0]["caller"] == "bob"


# --- one id through all lines


@pytest.mark.parametrize("model", [WORKER, LOOP])
@pytest.mark.parametrize("length", [0, 200_000])
def test_all_lines_of_a_job_have_its_id(serve: Serve, model: str, length: int) -> None:
    """What a method prints, logs, and tells, also in threads; on several lines where it is long.

    Mutants seen: no `job` for what is printed; `current_job` not asked; lines of one run with the id of another.
    """
    served = serve(model, *JSON, "--instances", "2")
    jobs = []

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            for job in [await client.submit("say", b"", length=length) for _ in range(2)]:
                assert await job.wait() == "said"
                jobs.append(job.id)

    run(main)
    ends(served, 2)
    told = lines(served)
    of_jobs = {job: [line for line in told if line.get("job") == job] for job in jobs}
    for found in of_jobs.values():
        text = "\n".join(line["message"] for line in found)
        assert "printed x" in text
        assert "logged x" in text
        assert text.count("y") - text.count("yt") >= length
        assert ("by a child" in text) == (model == WORKER)
        if model == LOOP:
            fields = next(line for line in found if line["message"] == "with fields")
            assert (fields["nan"], fields["s"]) == ("nan", FORGED)
            assert list(fields["of"]) == ["1"]
            assert any("%d of them" in line["message"] for line in found)
    assert len({job for line in told if (job := line.get("job"))}) == 2
    assert {line["level"] for line in told} <= {"INFO", "WARNING", "ERROR"}
    assert not [line for line in told if line["message"] == "forged"], "it is a part of a message, and none itself"


def test_what_nobody_s_thread_logs_has_no_id(serve: Serve) -> None:
    served = serve(LOOP, *JSON)
    assert stranger.ask(served.address, "warn").code is grpc.StatusCode.OK
    told = lines(served)
    thread = next(line for line in told if line["message"] == "of nobody's thread")
    assert "job" not in thread
    assert [line["logger"] for line in told if "UserWarning" in line["message"]] == ["py.warnings"]


# --- nothing secret


def test_no_token_is_in_the_log_whatever_is_logged(serve: Serve, tokens: Tokens) -> None:  # noqa: F811
    """At DEBUG: call metadata is told, and what tells who calls is not; nor do libraries tell it.

    Mutants seen: hpack's log as it comes; all headers are told; none is.
    """
    served = serve("aipod.examples.basics:Echo", *JSON, "--debug", "--tokens", str(tokens.path))
    secrets = {
        "cookie": "session=Secret1",
        "x-auth-token": "Secret2",
        "x-api-key": "Secret3",
        "proxy-authorization": "Basic Secret4",
        "db-password": "Secret5",
        "client-secret": "Secret6",
    }
    shown = {"x-request-id": 'quoted " \\ {"level": "ERROR"}', "long": "z" * 5000, "percent": "%s %d %(x)s"}
    metadata = [("authorization", f"Bearer {tokens.bob}"), *secrets.items(), *shown.items()]
    assert stranger.ask(served.address, "predict", metadata=metadata).code is grpc.StatusCode.OK
    wrong = [("authorization", "Bearer Secret7"), *shown.items()]
    assert stranger.ask(served.address, "predict", metadata=wrong).code is grpc.StatusCode.UNAUTHENTICATED

    async def main() -> None:
        async with aipod.Client(served.address, config=Config(token=tokens.alice)) as client:
            await client.predict(b"", version="3", metadata=list(shown.items()))

    run(main)

    def calls() -> list[dict[str, Any]]:
        return [line for line in lines(served) if "rpc" in line]

    found = wait_until(lambda: calls() if len(calls()) >= 3 else None, seconds=20)
    text = served.log_text()
    for secret in (tokens.bob, tokens.alice, "Secret"):
        assert secret not in text
    for line in found:
        assert line["level"] == "DEBUG"
        assert not set(line["metadata"]) & (set(secrets) | {"authorization"})
    told = [{name: value for name, value in line["metadata"].items() if name in shown} for line in found]
    assert told.count(shown) >= 3, "one of the client's releases an answer, perhaps"
    by_caller = {(line.get("caller"), line["code"]) for line in found}
    assert by_caller >= {("bob", "OK"), (None, "UNAUTHENTICATED"), ("alice", "OK")}


def test_without_debug_calls_are_not_logged(serve: Serve) -> None:
    served = serve(WORKER, *JSON)
    assert stranger.ask(served.address, "size", metadata=[("marker", "sent by the caller")]).json() == 0
    ends(served)
    assert "sent by the caller" not in served.log_text()
    assert "rpc" not in served.log_text()


# --- text


@pytest.mark.parametrize("model", [WORKER, LOOP])
def test_text_has_one_line_for_each_thing_and_moves_no_cursor(serve: Serve, model: str) -> None:
    """Mutant seen: messages as they come."""
    served = serve(model, "--log-format", "text")
    assert stranger.ask(served.address, "say").json() == "said"
    assert stranger.ask(served.address, "fail").info.reason == "MODEL_ERROR"
    text = wait_until(lambda: served.log_text() if "raise ValueError(FORGED)" in served.log_text() else "", seconds=20)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]", text)
    for line in text.splitlines():
        assert re.match(
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d (INFO|WARNING|ERROR) +[\w.]+: |  \| ", line
        )
    assert "  | Traceback (most recent call last):" in text
    assert re.search(r"ended in .*: MODEL_ERROR: ValueError: x\\n\{", text)


def on_terminal(tmp_path: Path, *options: str, **environment: str) -> str:
    """What `aipod serve` writes to a terminal until it is ended."""
    master, slave = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "aipod",
        "serve",
        WORKER,
        "--bind",
        "127.0.0.1:0",
        "--spool",
        str(tmp_path),
        *options,
    ]
    env = {name: value for name, value in os.environ.items() if name not in ("AIPOD_LOG_FORMAT", "NO_COLOR")}
    with subprocess.Popen(
        [*command, "--reserve", str(1 << 60)], cwd=ROOT, env=env | environment, stdout=subprocess.PIPE, stderr=slave
    ) as process:
        os.close(slave)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"aipod listening")
        process.terminate()
        found = bytearray()
        try:
            while data := os.read(master, 65536):
                found += data
        except OSError:  # EIO: nobody has the other end any more
            pass
        assert process.wait(20) == 0
    os.close(master)
    return found.decode()


def test_a_person_s_terminal(tmp_path: Path) -> None:
    """Mutants seen: JSON; no color; color where nobody wants it."""
    text = on_terminal(tmp_path)
    assert re.search(r"^\d\d:\d\d:\d\d \x1b\[33mWARNING\x1b\[0m aipod\.server: spool .* bytes are free", text, re.M)
    assert re.search(r"^\d\d:\d\d:\d\d INFO    aipod\.server: SIGTERM: draining\r$", text, re.M)
    assert "\x1b" not in on_terminal(tmp_path, NO_COLOR="1")
    forced = on_terminal(tmp_path, *JSON)
    assert [json.loads(line)["level"] for line in forced.splitlines()].count("WARNING") == 1


def test_a_program_reads_json_without_asking(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "AIPOD_LOG_FORMAT"}
    command = [sys.executable, "-m", "aipod", "serve", WORKER, "--bind", "127.0.0.1:0", "--spool", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        _, errors = process.communicate(timeout=30)
    messages = [json.loads(line)["message"] for line in errors.splitlines()]
    assert "SIGTERM: draining" in messages


def test_a_format_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="log_format = 'xml' is not one of auto, text, json"):
        Config(log_format="xml")


# --- lines


def record(message: Any, *args: Any, **extra: Any) -> logging.LogRecord:
    return logging.getLogger("a").makeRecord("a", logging.INFO, "f", 1, message, args, None, extra=extra)


def test_a_line_is_never_too_long_and_says_what_it_can() -> None:
    """Mutants seen: the first part of a traceback is kept; the message is dropped; characters are counted as bytes."""
    dice = random.Random(1)
    for _ in range(300):
        told: dict[str, Any] = {"time": "t", "message": dice.choice('aü😀\n"') * dice.randrange(30_000)}
        told |= {f"k{n}": dice.choice("aü😀\0") * dice.randrange(6000) for n in range(dice.randrange(5))}
        told |= {"trace": dice.choice("aü\n") * dice.randrange(40_000) + "the end", "n": 10**18, "of": {"a": "b" * 999}}
        line = bounded(dict(told))
        assert len(line) <= MAX_LINE
        found = json.loads(line)
        assert (found["time"], found["n"]) == ("t", 10**18)
        for name, value in found.items():
            if isinstance(told[name], str) and value != told[name]:
                assert len(line) > MAX_LINE // 2, "no more is cut than must be"
                head, cut, tail = value.partition(CUT)
                assert cut
                assert told[name].startswith(head)
                assert told[name].endswith(tail)
        assert found["trace"].endswith("the end")
    many = bounded({"time": "t"} | {f"k{n}": n for n in range(10_000)})
    assert len(many) <= MAX_LINE
    assert json.loads(many)["time"] == "t"


def test_a_record_of_anybody_s() -> None:
    line = JsonLines().format(
        record("%s %s", 1, 2, job="", nothing=None, level="forged", deep={"a": {1: float("inf")}})
    )
    told = json.loads(line)
    when = datetime.datetime.fromisoformat(told.pop("time"))
    assert abs(when - datetime.datetime.now(datetime.UTC)) < datetime.timedelta(minutes=1)
    assert told == {"level": "INFO", "logger": "a", "message": "1 2", "deep": {"a": {"1": "inf"}}}
    assert len(TextLines(terminal=False).format(record("a" * 100_000))) < MAX_LINE + 100
    assert TextLines(terminal=False).format(record("a\nb\x1b", job="j")).endswith(r" a: job j: a\nb\x1b")
    assert json.loads(JsonLines().format(record("%d", "x")))["message"].startswith("'%d' with ('x',): ")
    try:
        raise ValueError("v")
    except ValueError:
        failed = logging.getLogger("a").makeRecord("a", logging.ERROR, "f", 1, "m", (), sys.exc_info())
    assert json.loads(JsonLines().format(failed))["trace"].endswith("ValueError: v")
    assert TextLines(terminal=True).format(failed).splitlines()[-1] == "  | ValueError: v"
