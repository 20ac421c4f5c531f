"""Removal of what a model may have left."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from aipod.trash import remove
from tests.conftest import ROOT
from tests.models_hostile import dig

DEPTH = 3000  # more than Python recurses, and more than a path may be long


def test_files_links_and_what_is_not_there(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(kept)
    os.mkfifo(tmp_path / "fifo")
    for name in ("file", "link", "fifo", "nothing"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").exists()


def test_a_tree_with_links_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    for name in ("tree/a/b", "tree/a/c", "tree/d"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
        (tmp_path / name / "link").symlink_to(tmp_path / "kept")
    remove(tmp_path / "tree")
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "file"]


def test_a_tree_of_any_depth(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    dig(tmp_path / "tree", DEPTH)
    remove(tmp_path / "tree")
    assert list(tmp_path.iterdir()) == []


READ_ONLY = """
import os
from pathlib import Path
from aipod.trash import remove

if os.geteuid() == 0:  # root may remove anything
    os.chown(".", 65534, 65534)
    os.setresuid(65534, 65534, 65534)
Path("tree/a/b/c").mkdir(parents=True)
for name in ("tree", "tree/a", "tree/a/b", "tree/a/b/c"):
    Path(name, "file").touch()
for name, mode in (("tree/a/b/c", 0), ("tree/a/b", 0o555), ("tree/a", 0o500), ("tree", 0o111)):
    os.chmod(name, mode)
remove(Path("tree"))
assert os.listdir() == [], os.listdir()
"""


def test_read_only_directories(tmp_path: Path) -> None:
    command = [sys.executable, "-c", READ_ONLY]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_cannot_be_removed_is_logged_and_nothing_is_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tree").mkdir()
    remove(tmp_path / "file" / "below")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        remove(tmp_path / "tree")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [record.message.partition(" could not be removed: ")[2] for record in caplog.records] == [
        "[Errno 20] Not a directory: " + repr(str(tmp_path / "file" / "below")),
        "[Errno 24] Too many open files: " + repr(str(tmp_path / "tree")),
    ]
    remove(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
