"""Guesses which package a piece of Python source comes from. Standard library only.

    python -m aipod serve aipod.examples.corpus:Corpus
    tar czf sources.tar.gz -C "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" asyncio email json
    python -m aipod call train sources.tar.gz --version 1
    python -m aipod call predict some_file.py --version 1 -k top=3
    python -m aipod call log --version 1 | cat

A naive Bayes classifier over identifiers: trained on a tar of sources, the first directory of a file's path is its
label, every tenth file is held out to measure the accuracy.
"""

from __future__ import annotations

import collections
import json
import math
import re
import tarfile
from pathlib import Path
from typing import IO, Any

from aipod.models import Context, Model

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{2,40}")
_HOLD_OUT = 10
# Words kept per label: more of them change little and would make a version's data large.
_KEEP = 5000
MODEL, LOG = "model.json", "train.log"


class Corpus(Model):
    """See the module."""

    def load(self) -> None:
        self._labels: dict[str, tuple[float, dict[str, int]]] = {}
        try:
            stored = json.loads((self.data_dir / MODEL).read_text())
        except FileNotFoundError:
            return  # not trained yet: `train` is how a version comes to be
        self._labels = {label: (sum(words.values()), words) for label, words in stored.items()}

    def train(self, context: Context, path: Path, *, min_files: int = 2) -> dict[str, Any]:
        """Train on a tar of sources and make the result the data of this version."""
        counts: dict[str, collections.Counter[str]] = {}
        files: collections.Counter[str] = collections.Counter()
        held_out: list[tuple[str, collections.Counter[str]]] = []
        size = path.stat().st_size
        with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as tar, _log_file(context) as log:
            for member in tar:
                label, slash, _ = member.name.removeprefix("./").partition("/")
                if context.cancelled:
                    raise RuntimeError("training was cancelled")
                if not slash or not member.isfile() or not member.name.endswith(".py"):
                    continue
                file = tar.extractfile(member)
                assert file is not None
                words = collections.Counter(_WORD.findall(file.read().decode("utf-8", "replace")))
                files[label] += 1
                if files[label] % _HOLD_OUT == 0:
                    held_out.append((label, words))
                else:
                    counts.setdefault(label, collections.Counter()).update(words)
                context.progress(0.9 * raw.tell() / size, member.name)
            if not counts:
                raise ValueError(
                    "the tar has no .py file inside a directory; the first directory of a path is the label"
                )
            kept = {
                label: dict(words.most_common(_KEEP)) for label, words in counts.items() if files[label] >= min_files
            }
            self._labels = {label: (sum(words.values()), words) for label, words in kept.items()}
            right = sum(self._rank(words)[0][0] == label for label, words in held_out if label in kept)
            total = sum(label in kept for label, _ in held_out)
            accuracy = right / total if total else 0.0
            for label in sorted(kept):
                _say(context, log, f"{label}: {files[label]} files, {len(kept[label])} words")
            _say(context, log, f"held out: {right} of {total} right")
        (context.new_version / MODEL).write_text(json.dumps(kept))
        context.progress(1.0, "done")
        return {"labels": len(kept), "files": sum(files.values()), "held_out": total, "accuracy": round(accuracy, 4)}

    def predict(self, context: Context, path: Path, *, top: int = 5) -> list[dict[str, Any]]:
        """The packages that the source in the payload most likely comes from."""
        if not self._labels:
            raise LookupError(f"version {self.version!r} is not trained; call train with this version first")
        words = collections.Counter(_WORD.findall(path.read_text("utf-8", "replace")))
        ranked = self._rank(words)
        best = ranked[0][1]
        return [{"label": label, "score": round(math.exp(score - best), 6)} for label, score in ranked[:top]]

    def log(self, context: Context, path: Path) -> bytes:
        """What the training of this version wrote into its log."""
        try:
            return (self.data_dir / LOG).read_bytes()
        except FileNotFoundError:
            raise LookupError(f"version {self.version!r} is not trained; call train with this version first") from None

    def echo(self, context: Context, path: Path) -> Path:
        """The payload itself."""
        return path

    def _rank(self, words: collections.Counter[str]) -> list[tuple[str, float]]:
        """Labels by log likelihood per word, the best one first."""
        total = max(1, sum(words.values()))
        scores = {
            label: sum(n * math.log((known.get(word, 0) + 0.1) / (size + 0.1 * _KEEP)) for word, n in words.items())
            / total
            for label, (size, known) in self._labels.items()
        }
        return sorted(scores.items(), key=lambda item: -item[1])


def _log_file(context: Context) -> IO[str]:
    return (context.new_version / LOG).open("w")


def _say(context: Context, log: IO[str], line: str) -> None:
    log.write(line + "\n")
    context.log(line)
