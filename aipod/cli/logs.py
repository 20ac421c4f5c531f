"""What a server's log looks like: text for people, or one JSON object a line for programs.

Nobody but the server can make lines: what comes from callers and models is escaped, and cut where it is long. Only
`aipod serve` sets this up; a server that is embedded logs where its application says.
"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from aipod.runner.capture import current_job

# Bytes of a line. Docker and CRI cut what is longer than 16 KiB, and a cut object is none.
MAX_LINE = 16 * 1024 - 1
MAX_FIELDS = 100
CUT = " [cut]"

# What every record has. The rest of a record is what its line tells besides.
_COMMON = {*vars(logging.LogRecord("", 0, "", 0, "", (), None)), "message", "asctime", "taskName"}
# What a terminal would act on, and what ends a line somewhere: C0, C1, and Unicode's line and paragraph separators and
# its marks that turn the direction of text.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

_COLORS = {
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[31m",
    logging.DEBUG: "\x1b[2m",
}
_NO_COLOR = "\x1b[0m"


def set_up_logging(log_format: str, *, debug: bool) -> None:
    """Have this process log to stderr, in a format of `config.LOG_FORMATS`."""
    handler = logging.StreamHandler(sys.stderr)
    terminal = sys.stderr.isatty()
    is_json = log_format == "json" or (log_format == "auto" and not terminal)
    handler.setFormatter(JsonLines() if is_json else TextLines(terminal=terminal))
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    # grpclib logs every ended call of every stranger; what matters of it we log ourselves.
    logging.getLogger("grpclib").setLevel(logging.DEBUG if debug else logging.CRITICAL)
    # It logs every header that comes, tokens and cookies too.
    logging.getLogger("hpack").setLevel(logging.INFO)


class JsonLines(logging.Formatter):
    """`time` (RFC 3339, UTC), `level`, `logger`, `message`, `job` where there is one, and what else the line tells."""

    def format(self, record: logging.LogRecord) -> str:
        message, trace = _parts(record)
        told: dict[str, Any] = {
            "time": _utc(record.created).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": message,
            "job": _job(record),
            "trace": trace,
        }
        for name, value in vars(record).items():
            if name not in _COMMON and name not in told:
                told[name] = _plain(value)
        return bounded({name: value for name, value in told.items() if value not in ("", None)})


class TextLines(logging.Formatter):
    """Time, level, logger and message on one line; a traceback below it, indented."""

    def __init__(self, *, terminal: bool) -> None:
        """`terminal`: the time is short, and levels that matter have a color, unless NO_COLOR is set."""
        super().__init__()
        self._terminal = terminal
        self._colors = _COLORS if terminal and not os.environ.get("NO_COLOR") else {}

    def format(self, record: logging.LogRecord) -> str:
        message, trace = _parts(record)
        when = _utc(record.created).astimezone()
        shown = f"{when:%H:%M:%S}" if self._terminal else when.isoformat(" ", "milliseconds")
        job = _job(record)
        about = f"job {job}: " if job and job not in message else ""
        color = self._colors.get(record.levelno, "")
        level = f"{color}{record.levelname:<7}{_NO_COLOR if color else ''}"
        first = f"{shown} {level} {_escaped(f'{record.name}: {about}{message}')}"
        return "\n".join([first, *(f"  | {_escaped(line)}" for line in trace.splitlines())])


def _utc(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def _parts(record: logging.LogRecord) -> tuple[str, str]:
    """The message, and the traceback that belongs to it."""
    try:
        message = record.getMessage()
    except Exception as exc:  # of a model in this process, whose mistake it is
        message = f"{record.msg!r} with {record.args!r}: {exc}"
    trace = str(getattr(record, "trace", ""))
    if trace:
        message = message.removesuffix(f"\n{trace}")
    elif record.exc_info:
        trace = logging.Formatter().formatException(record.exc_info)
    return message, trace


def _job(record: logging.LogRecord) -> str:
    return str(getattr(record, "job", "")) or current_job()


def _plain(value: object) -> Any:
    """As JSON has it."""
    if value is None or isinstance(value, (str, int)):  # first: to ask for a Mapping takes ten times as long
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return {str(name): _plain(one) for name, one in value.items()} if isinstance(value, Mapping) else str(value)


def _escaped(line: str) -> str:
    cut = line if len(line) <= MAX_LINE else line[:MAX_LINE] + CUT
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), cut)


def bounded(told: dict[str, Any]) -> str:
    """`told` as JSON on one line of at most `MAX_LINE` bytes: its longest values are cut for that."""
    if len(told) > MAX_FIELDS:
        told = dict(itertools.islice(told.items(), MAX_FIELDS))
    line = json.dumps(told)  # ASCII, so a terminal does nothing with it either
    while len(line) > MAX_LINE:
        size, name = max((len(json.dumps(value)), name) for name, value in told.items())
        value = told[name] if isinstance(told[name], str) else json.dumps(told[name])
        # As much as must be, but no more than half of it: then another one may be the longest.
        left = min(max(size - (len(line) - MAX_LINE), size // 2), MAX_LINE) * len(value) // size - 2 * len(CUT)
        if left <= 0:
            del told[name]  # there are very many
        elif name == "trace":  # what was raised is at its end
            told[name] = CUT + value[-left:]
        else:
            told[name] = value[:left] + CUT
        line = json.dumps(told)
    return line
