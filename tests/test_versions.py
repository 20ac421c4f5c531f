"""The data of versions on disk: published, replaced, discarded, and what a killed server left."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from aipod.errors import Refused
from aipod.versions import Versions, check_version, exchange

A, B = "a" * 32, "b" * 32


@pytest.fixture(params=[exchange, lambda one, other: False], ids=["exchange", "two renames"])
def versions(request: pytest.FixtureRequest, tmp_path: Path) -> Versions:
    versions = Versions(tmp_path / "data", "", request.param)
    versions.sweep(lambda job_id: False)
    return versions


def write(versions: Versions, job_id: str, text: str) -> None:
    versions.fresh(job_id).mkdir()
    (versions.fresh(job_id) / "data").write_text(text)


def names(versions: Versions) -> list[str]:
    return sorted(path.name for path in versions.path.iterdir())


@pytest.mark.parametrize("version", ["1", "default", "a.b_c-D", "x" * 64])
def test_a_version_is_a_name(version: str) -> None:
    assert check_version(version) == version


def test_no_version_is_the_default() -> None:
    assert check_version("") == "default"


@pytest.mark.parametrize("version", ["../x", "..", ".", "a/b", "/a", ".new-x", "-a", "_a", "a\n", "x" * 65, "ä", "a\0"])
def test_what_is_no_version(version: str) -> None:
    with pytest.raises(Refused) as caught:
        check_version(version)
    assert caught.value.reason == "BAD_VERSION"


def test_a_job_that_wrote_nothing_publishes_nothing(versions: Versions) -> None:
    assert not versions.publish(A, "v")
    assert names(versions) == []


def test_published_data_replaces_the_former(versions: Versions) -> None:
    for text in ("one", "two"):
        write(versions, A, text)
        assert versions.publish(A, "v")
        assert (versions.data_dir("v") / "data").read_text() == text
        assert names(versions) == ["v"]


def test_data_is_told_from_what_replaced_it(versions: Versions) -> None:
    """Also where its number was free for another directory. Mutant: no descriptor is kept."""
    absent = versions.present("v")
    assert not absent.replaced
    for text in ("one", "two", "three"):
        before = versions.present("v")
        write(versions, A, text)
        assert not before.replaced
        versions.publish(A, "v")
        assert before.replaced
        assert absent.replaced
        present = versions.present("v")
        (versions.data_dir("v") / "more").write_text("the model's own")
        assert not present.replaced
        before.close()
        present.close()
        present.close()
    first = versions.present("v")
    for text in ("four", "five", "six"):
        write(versions, A, text)
        versions.publish(A, "v")
        assert first.replaced
    first.close()
    absent.close()


def test_discarded_data_is_gone(versions: Versions) -> None:
    write(versions, A, "one")
    versions.discard(A)
    versions.discard(A)
    assert names(versions) == []


def test_many_jobs_may_publish_one_version_at_once(versions: Versions) -> None:
    jobs = [f"{n:032x}" for n in range(40)]
    for job in jobs:
        write(versions, job, job)
    errors: list[Exception] = []
    start = threading.Barrier(len(jobs))

    def publish(job: str) -> None:
        start.wait()
        try:
            versions.publish(job, "v")
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=publish, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names(versions) == ["v"]
    assert (versions.data_dir("v") / "data").read_text() in jobs


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_at_every_moment_the_version_has_data(tmp_path: Path) -> None:
    """Mutant seen: two renames, between which there is none."""
    versions = Versions(tmp_path)
    write(versions, A, "0")
    versions.publish(A, "v")
    over, missing = threading.Event(), 0

    def look() -> None:
        nonlocal missing
        while not over.is_set():
            missing += not (versions.data_dir("v") / "data").exists()

    thread = threading.Thread(target=look)
    thread.start()
    for n in range(60):
        write(versions, A, str(n))
        assert versions.publish(A, "v")
    over.set()
    thread.join()
    assert missing == 0
    assert names(versions) == ["v"]


def test_a_sweep_removes_the_former_data_of_a_killed_server(versions: Versions) -> None:
    """Killed after the exchange, before the former data, which has the job's name then, was removed."""
    write(versions, A, "one")
    versions.publish(A, "v")
    write(versions, B, "two")
    if exchange(versions.fresh(B), versions.data_dir("v")):
        versions.sweep(lambda job_id: False)
        assert names(versions) == ["v"]
        assert (versions.data_dir("v") / "data").read_text() == "two"


def test_a_sweep_removes_what_was_half_written_and_brings_back_what_was_being_replaced(versions: Versions) -> None:
    write(versions, A, "new")
    (versions.path / f".old-{A}-v-1").mkdir()
    (versions.path / f".old-{A}-v-1" / "data").write_text("old")
    versions.sweep(lambda job_id: False)
    assert names(versions) == ["v-1"]
    assert (versions.data_dir("v-1") / "data").read_text() == "old"


def test_a_sweep_removes_the_former_data_where_the_new_is_there(versions: Versions) -> None:
    write(versions, A, "new")
    versions.publish(A, "v")
    (versions.path / f".old-{A}-v").mkdir()
    versions.sweep(lambda job_id: False)
    assert names(versions) == ["v"]


def test_a_sweep_leaves_jobs_of_living_servers_alone(versions: Versions) -> None:
    write(versions, A, "new")
    write(versions, B, "new")
    (versions.path / f".old-{A}-v").mkdir()
    versions.sweep(lambda job_id: job_id == A)
    assert names(versions) == [f".new-{A}", f".old-{A}-v"]


def test_servers_with_other_spools_leave_each_others_versions_alone(tmp_path: Path) -> None:
    """A server that starts on the same data directory knows only the jobs of its own spool."""
    one, other = Versions(tmp_path, "one."), Versions(tmp_path, "other.")
    one.fresh("a" * 32).mkdir()
    (one.fresh("a" * 32) / "data").write_text("new")
    other.sweep(lambda job_id: False)
    assert one.publish("a" * 32, "v")
    assert (tmp_path / "v" / "data").read_text() == "new"


def test_a_publish_that_fails_keeps_the_former_data(tmp_path: Path) -> None:
    versions = Versions(tmp_path, exchange=lambda one, other: False)
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "data").write_text("old")

    class Unmovable(type(tmp_path)):  # type: ignore[misc]
        def rename(self, target: Path) -> Path:
            raise OSError(28, "No space left on device")

    versions.fresh("a" * 32).mkdir()
    versions.fresh = lambda job_id: Unmovable(tmp_path / f".new-{job_id}")  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space"):
        versions.publish("a" * 32, "v")
    assert (tmp_path / "v" / "data").read_text() == "old"
