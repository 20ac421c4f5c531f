"""What the spool costs a small job: `python -m bench disk [--ended N]`.

No network, no model: the steps on disk that a small ticketed job takes, one after the other in one thread, on the file
system of TMPDIR. Beside them, pair by pair, the least that could be done for the same files: a directory, three files
in it, and their removal. Then the same with N ended jobs in the spool, and what a sweep over them takes.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from aipod.spool import Spool, Sweeper
from bench.options import count

JOBS = 200  # for each figure
PAIRS = 5
FIELDS = {"ticketed": True, "print": "0" * 32, "method": "predict", "version": "default", "epoch": 1, "size": 1024}
PAYLOAD = os.urandom(1024)
DONE = {"phase": "DONE", "kind": "json", "answer": 20, "digest": "0" * 32, "inline": '{"n": 1}'}


def small_job(spool: Spool) -> str:
    """What a small job's life writes before its answer is sent; the look for an older job under its id is left out."""
    job_id = secrets.token_hex(16)
    entry = spool.claim(job_id, FIELDS, b'{"top": 5}', size=len(PAYLOAD), payload=PAYLOAD)
    assert entry is not None
    entry.record({"phase": "RUNNING", "worker": "0", "attempt": 1})
    entry.store(DONE)
    entry.let_go()
    return job_id


def forget(spool: Spool, job_id: str) -> None:
    """What follows when its client has said that it has the answer, and a minute later."""
    entry = spool.hold(job_id)
    assert entry is not None
    entry.release_short()
    entry.let_go()
    entry = spool.hold(job_id)
    assert entry is not None
    entry.destroy()


def least(directory: Path) -> None:
    """The same number of files, by the shortest way."""
    place = directory / secrets.token_hex(16)
    place.mkdir()
    for name in ("lock", "in", "state"):
        (place / name).write_bytes(PAYLOAD)
    shutil.rmtree(place)


def timed(fn: Callable[[], object]) -> float:
    """Milliseconds for one `fn`, the mean of `JOBS`."""
    began = time.perf_counter()
    for _ in range(JOBS):
        fn()
    return (time.perf_counter() - began) * 1000 / JOBS


def measure(name: str, spool: Spool, beside: Path) -> None:
    """Print one row: medians of `PAIRS` pairs and the spread of their ratio."""
    rows = []
    for _ in range(PAIRS):
        made: list[str] = []
        job = timed(lambda made=made: made.append(small_job(spool)))  # type: ignore[misc]
        waiting = iter(made)
        gone = timed(lambda waiting=waiting: forget(spool, next(waiting)))  # type: ignore[misc]
        rows.append((job, gone, timed(lambda: least(beside))))
    job, gone, files = (statistics.median(column) for column in zip(*rows, strict=True))
    ratios = sorted((one + two) / three for one, two, three in rows)
    print(
        f"{name:<22}job {job:.3f} ms  forget {gone:.3f} ms  three files {files:.3f} ms  "
        f"ratio {statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})"
    )


def main(argv: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench disk", description=__doc__)
    parser.add_argument("--ended", type=count, default=100_000, help="ended jobs in the spool (default %(default)s)")
    ended = parser.parse_args(argv).ended
    with tempfile.TemporaryDirectory(prefix="aipod-bench-") as directory:
        spool, beside = Spool.open(Path(directory) / "spool", "bench", reserve=0), Path(directory) / "beside"
        beside.mkdir()
        measure("empty spool", spool, beside)
        for _ in range(ended):
            small_job(spool)
        measure(f"{ended} ended jobs", spool, beside)
        sweeper = Sweeper(spool, upload_ttl=3600, ttl=86400)
        for name in ("first sweep", "next sweep"):
            steps = []
            began = time.perf_counter()
            for _ in sweeper.sweep():
                steps.append(time.perf_counter() - began)
                began = time.perf_counter()
            print(f"{name:<22}{sum(steps):.2f} s in {len(steps)} steps, the longest {max(steps) * 1000:.0f} ms")
        began = time.perf_counter()
        newest = spool.newest(1000)
        print(f"{'newest 1000':<22}{(time.perf_counter() - began) * 1000:.0f} ms ({len(newest)} jobs)")
