"""`python -m tests.walk DOCUMENT DIRECTORY`: do what a document says, fence by fence, in a fresh directory.

To be run in a network namespace of its own, so that addresses are those of the document. The documents' conventions:

- A fence whose first line is `# NAME.EXT` (or `// NAME.EXT`) is the file of that name, as it stands.
- `sh` is run. What serves (`SERVES`) runs in a terminal of its own, until the end or until another one with the same
  `--bind` is begun.
- `text` right behind `sh` is what that prints to stdout; `…` stands for anything.
- A fence whose first line is `# not tested: REASON` is not run. `COVERED` is not either: the lines that install and
  test aipod, which are how this very test came to run.
- A fence without a language is a picture.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SERVES = re.compile(r"(python -m )?aipod serve |uvicorn ")
READY = re.compile(r"aipod listening on |Uvicorn running on ")
INSTALL = r"^python3 -m venv \.venv && \.venv/bin/pip install -q -e \S+"
COVERED = re.compile(rf"{INSTALL}( && \S+ -m pytest -q$| && |$)", re.MULTILINE)
NAMED = re.compile(r"(?:#|//) ([\w./-]+\.\w+)\n")
NOT_TESTED = re.compile(r"(?:#|//) not tested: \S")
FENCE = re.compile(r"^( *)```([\w-]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SECONDS = 60  # for one command
ALL = 180  # for a document, on a busy machine


@dataclasses.dataclass(frozen=True)
class Fence:
    document: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """Of the file that it is."""
        found = NAMED.match(self.text)
        return found[1] if found else ""

    @property
    def tested(self) -> bool:
        return NOT_TESTED.match(self.text) is None

    @property
    def commands(self) -> list[str]:
        """The lines of a shell fence, continued ones joined, without what is covered."""
        text = COVERED.sub("", self.text.replace("\\\n", " "))
        return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def fences(path: Path) -> list[Fence]:
    text = path.read_text()
    found = []
    for match in FENCE.finditer(text):
        body = re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE)
        found.append(Fence(path.name, text.count("\n", 0, match.start()) + 1, match[2], body))
    return found


class Failed(Exception):
    pass


class Walk:
    """One reader: the terminals with servers in them, and the directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.servers: dict[str, subprocess.Popen[bytes]] = {}
        home = directory / "home"
        home.mkdir()
        known = {name: value for name, value in os.environ.items() if not name.startswith(("AIPOD_", "XDG_"))}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environ = known | {"HOME": str(home), "PATH": path, "COLUMNS": "120"}
        (directory / ".venv").symlink_to(sys.prefix)

    def run(self, fence: Fence) -> str:
        """The fence's stdout. Raises `Failed`."""
        out = ""
        pending: list[str] = []
        for command in [*fence.commands, ""]:
            if command and not SERVES.match(command):
                pending.append(command)
                continue
            if pending:
                out += self._shell(fence, "\n".join(pending))
                pending = []
            if command:
                self._serve(fence, command)
        return out

    def _shell(self, fence: Fence, script: str) -> str:
        done = subprocess.run(
            ["bash", "-ec", script],
            cwd=self.directory,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise Failed(f"{where(fence)}: exit status {done.returncode}\n{script}\n{done.stdout}{done.stderr}")
        return done.stdout

    def _serve(self, fence: Fence, command: str) -> None:
        words = shlex.split(command, comments=True)
        key = words[words.index("--bind") + 1] if "--bind" in words else words[0]
        if key in self.servers:
            self._stop(key)
        log = self.directory / f"terminal-{len(list(self.directory.glob('terminal-*')))}"
        with log.open("wb") as output:
            self.servers[key] = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=self.directory, env=self.environ, stdout=output, stderr=output
            )
        until = time.monotonic() + SECONDS
        while not READY.search(log.read_text()):
            if self.servers[key].poll() is not None or time.monotonic() > until:
                raise Failed(f"{where(fence)}: does not serve\n{command}\n{log.read_text()}")
            time.sleep(0.05)

    def _stop(self, key: str) -> None:
        process = self.servers.pop(key)
        process.terminate()
        if process.wait(SECONDS) not in (0, -signal.SIGTERM):
            raise Failed(f"{key} has ended with exit status {process.returncode}")

    def end(self) -> None:
        for key in list(self.servers):
            self._stop(key)


def where(fence: Fence) -> str:
    return f"{fence.document}, line {fence.line}"


def like(pattern: str, text: str) -> bool:
    """Whether `text` is what a `text` fence shows."""
    parts = [re.escape(part) for part in pattern.strip().split("…")]
    return re.fullmatch(".*?".join(parts), text.strip(), re.DOTALL) is not None


@contextlib.contextmanager
def nobody_left() -> Iterator[None]:
    """What a document leaves behind in the background (nginx, say) becomes our child, and ends with us."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    try:
        yield
    finally:
        while pids := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            for pid in map(int, pids):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def too_long(*_: object) -> None:
    raise Failed(f"not done within {ALL} s")


def walk(document: Path, directory: Path) -> None:
    """Raises `Failed`."""
    me = Walk(directory)
    printed: str | None = None
    with nobody_left():
        for fence in fences(document):
            before, printed = printed, None
            if not fence.tested:
                continue
            if fence.name:
                (directory / fence.name).parent.mkdir(parents=True, exist_ok=True)
                (directory / fence.name).write_text(fence.text)
            elif fence.language == "sh":
                printed = me.run(fence)
            elif fence.language == "text" and before is not None and not like(fence.text, before):
                raise Failed(f"{where(fence)}: it is not this that was printed, but\n{before}")
        me.end()


if __name__ == "__main__":
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(ALL)
    try:
        walk(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
    except Failed as failed:
        sys.exit(str(failed))
