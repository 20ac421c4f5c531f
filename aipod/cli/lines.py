"""--json: what a call does, for scripts: one JSON object a line on stdout.

{"type": "event", ...}   every field of `aipod.client.Event`; a phase that begins, and log lines, at once; else a few a
                         second
{"type": "submitted", "job_id", "ticket_file"}                    the last line of submit
{"type": "answer", "answer": ...}                                 the last line: a JSON answer
{"type": "answer", "file", "size", "content_type"}                the last line, with -o
{"type": "error", "reason", "message", "status"}                  the last line: `status` is the exit status
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from aipod.client.event import Event

# Seconds between two events of one phase: there are hundreds a second, one for each chunk.
EVERY = 0.25


class Lines:
    """Writes them. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase, self._told_at = "", float("-inf")

    def event(self, event: Event) -> None:
        now = self._clock()
        if event.phase == self._phase and not event.log and now - self._told_at < EVERY:
            return
        self._phase, self._told_at = event.phase, now
        _write("event", dataclasses.asdict(event))

    def answer(self, answer: Any) -> None:
        _write("answer", {"answer": answer})

    def saved(self, file: Path, content_type: str, size: int) -> None:
        _write("answer", {"file": str(file), "size": size, "content_type": content_type})

    def submitted(self, job_id: str, ticket_file: Path) -> None:
        _write("submitted", {"job_id": job_id, "ticket_file": str(ticket_file)})

    def error(self, reason: str, message: str, status: int) -> None:
        _write("error", {"reason": reason, "message": message, "status": status})


def _begin(context: click.Context, _: click.Parameter, value: bool) -> bool:
    if value:
        context.obj.lines = Lines()
    return value


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_begin,
    help="Events and the answer as JSON, an object a line (for scripts).",
)


def _write(kind: str, told: dict[str, Any]) -> None:
    click.echo(in_json({"type": kind, **told}))


def in_json(told: Any) -> str:
    """JSON of what others have said, for stdout: readable, and no more to a terminal than text.

    What a terminal would act on is escaped, and what stdout's encoding has not: an answer must not be lost by that.
    """
    text = json.dumps(told, ensure_ascii=False)
    return text.translate({ord(letter): _escape(letter) for letter in set(text) if not _is_shown(letter)})


def _is_shown(letter: str) -> bool:
    try:
        letter.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return False
    return letter.isprintable() or unicodedata.category(letter) == "Zs"  # spaces of other scripts


def _escape(letter: str) -> str:
    return json.dumps(letter)[1:-1] if ord(letter) > 0x7F else f"\\u{ord(letter):04x}"
