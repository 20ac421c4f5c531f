"""Removal of what a model may have made: trees of any depth, read-only directories, a file where a directory should be.

`shutil.rmtree` recurses: a thousand directories inside one another end it with RecursionError. Here every directory is
moved up into the root of its tree before it is emptied, which keeps the tree flat: two descriptors are open at a time,
and no path is longer than a name.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger("aipod.trash")

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def remove(path: Path) -> None:
    """Remove what is at `path`, if anything; links are not followed. Blocks.

    Never raises: no job is worth a server. What cannot be removed stays, and is logged.
    """
    try:
        if stat.S_ISDIR(path.lstat().st_mode):
            _remove_tree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        pass
    except OSError as exc:
        logger.warning("%s could not be removed: %s", path, exc)


def remove_at_once(path: Path, likely: str, trash: Path) -> None:
    """Have no directory at `path` any more: quick where file `likely` is all that it has, else it is renamed first.

    To a name that begins with `trash`. Blocks. Raises `OSError` where it cannot even be renamed.
    """
    try:
        os.unlink(f"{path}/{likely}")
        os.rmdir(path)
    except OSError:
        renamed = trash.with_name(trash.name + secrets.token_hex(8))
        with contextlib.suppress(FileNotFoundError):
            path.rename(renamed)
            remove(renamed)


def _remove_tree(path: Path) -> None:
    path.chmod(0o700)
    tree = _Tree(os.open(path, _DIRECTORY))
    try:
        tree.empty(tree.root)
        while tree.todo:
            tree.remove(tree.todo.pop())
    finally:
        os.close(tree.root)
    try:
        path.rmdir()
    except OSError as exc:
        raise (tree.error or exc) from None


class _Tree:
    """A tree that is being removed. What cannot be removed is passed over: the rest gives its space back."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.todo: list[str] = []  # directories in the root that are to be removed
        self.error: OSError | None = None  # the first
        self._fresh = map(f".{secrets.token_hex(8)}-{{}}".format, itertools.count())

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            self.error = self.error or exc

    def remove(self, name: str) -> None:
        """Remove a directory in the root."""
        with self._going_on():
            directory = os.open(name, _DIRECTORY, dir_fd=self.root)
            try:
                self.empty(directory)
            finally:
                os.close(directory)
            os.rmdir(name, dir_fd=self.root)

    def empty(self, directory: int) -> None:
        """Remove the files in `directory` and move the directories in it to the root."""
        with os.scandir(directory) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for name, is_directory in found:
            with self._going_on():
                if not is_directory:
                    os.unlink(name, dir_fd=directory)
                    continue
                # A directory that is read-only cannot be moved, for that changes its "..", nor emptied.
                os.chmod(name, 0o700, dir_fd=directory)
                fresh = next(self._fresh)
                os.rename(name, fresh, src_dir_fd=directory, dst_dir_fd=self.root)
                self.todo.append(fresh)
