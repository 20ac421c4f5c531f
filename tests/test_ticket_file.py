"""Ticket files where a file system, or whoever else is there, does what is not expected."""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aipod.client.ticket import TicketFile
from tests.conftest import ROOT

# The system calls link and linkat.
LINKS = {"x86_64": (86, 265), "aarch64": (37,)}.get(platform.machine(), ())
# Prints the ticket that each of the files has, which it creates where there is none.
CREATE = """
import ctypes, struct, sys, time
from aipod.client.ticket import Saved, TicketFile
from aipod.errors import UsageError

def without_links(numbers):
    \"\"\"As on vfat: the kernel answers both calls with EPERM from now on.\"\"\"
    step = struct.Struct("HBBI").pack
    code = step(0x20, 0, 0, 0)
    for left, number in enumerate(numbers):
        code += step(0x15, len(numbers) - left, 0, number)
    code += step(0x06, 0, 0, 0x7FFF0000) + step(0x06, 0, 0, 0x00050001)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0

without_links([int(number) for number in sys.argv[1].split(",")])
name, paths = sys.argv[2].encode(), sys.argv[3:]
print("ready", flush=True)
start = float(sys.stdin.readline())
for number, path in enumerate(paths):
    time.sleep(max(0, start + number * 0.02 - time.monotonic()))
    try:
        print(TicketFile(path).create(Saved(name * 16, 1, "", None, "a")).ticket.hex())
    except UsageError as exc:
        print(exc)
"""


def callers(count: int, *paths: Path) -> Iterator[subprocess.Popen[str]]:
    for number in range(count):
        command = [sys.executable, "-c", CREATE, ",".join(map(str, LINKS)), chr(ord("a") + number), *map(str, paths)]
        yield subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def said(processes: list[subprocess.Popen[str]]) -> list[list[str]]:
    """What each prints, once all have been told to begin at the same moment."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    start = f"{time.monotonic() + 0.2}\n"
    return [process.communicate(start, timeout=60)[0].splitlines() for process in processes]


@pytest.mark.skipif(not LINKS or sys.platform != "linux", reason="it is not known how to forbid links here")
class TestWithoutHardLinks:
    def test_callers_who_begin_with_one_file_at_once_have_one_ticket(self, tmp_path: Path) -> None:
        """Mutant seen: no other way than a link."""
        paths = [tmp_path / f"ticket{number}" for number in range(50)]
        tickets = said(list(callers(4, *paths)))
        assert all(one == tickets[0] for one in tickets)
        saved = [TicketFile(path).load() for path in paths]
        assert [one.ticket.hex() for one in saved if one is not None] == tickets[0]
        assert sorted(tmp_path.iterdir()) == sorted(paths)

    def test_a_directory_that_another_has_locked_is_told(self, tmp_path: Path) -> None:
        """Mutant seen: they do not take turns."""
        directory = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            ((text,),) = said(list(callers(1, tmp_path / "ticket")))
        finally:
            os.close(directory)
        assert "has no hard links" in text
        assert text.endswith("name one on another disk")
        assert list(tmp_path.iterdir()) == []
