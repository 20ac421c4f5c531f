"""The main job over real TCP: a served class, aipod's own client, its answer."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

import aipod
from aipod.client import Event
from aipod.spool.entry import SLOW
from tests.calls import calls, marked
from tests.conftest import Serve, alive, left_in, run, wait_until


def call(address: str, method: str, *args: Any, **kwargs: Any) -> Any:
    async def main() -> Any:
        async with aipod.Client(address) as client:
            if method in ("train", "predict", "log"):
                return await getattr(client, method)(*args, **kwargs)
            return await client.chaos(*args, metadata=[("x-func-name", method)], **kwargs)

    return run(main)


def test_all_four_methods_and_a_named_one(serve: Serve, tmp_path: Path) -> None:
    served = serve("Plain")
    file = tmp_path / "payload"
    file.write_bytes(os.urandom(3_000_000))

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            answer = await client.chaos(file, top=5, metadata=[("X-Custom", "yes"), ("authorization", "secret")])
            assert answer["size"] == 3_000_000
            assert answer["kwargs"] == {"top": 5}
            assert answer["metadata"]["x-custom"] == "yes"
            assert answer["metadata"]["x-job-id"] == answer["job_id"]
            assert "authorization" not in answer["metadata"]
            assert (await client.predict(b"abc"))["sha256"].startswith("ba7816bf")
            assert await client.train(b"weights", version="7") == "trained"
            assert await client.log(version="7") == b"weights"
            assert await client.chaos(metadata=[("x-func-name", "hello")], name="you") == "hello you"
            assert (await client.chaos(version="7"))["version"] == "7"
            assert (await client.chaos(kwargs={"version": "7", "timeout": 3}))["kwargs"] == {"timeout": 3}

    run(main)
    assert (served.data / "7" / "data").read_bytes() == b"weights"


@pytest.mark.parametrize("kind", ["path", "bytes", "file", "iterable", "async iterable"])
def test_every_kind_of_payload_comes_back_bit_for_bit(serve: Serve, tmp_path: Path, kind: str) -> None:
    served = serve("Plain")
    path = tmp_path / "payload"

    async def pieces(data: bytes) -> Any:
        for start in range(0, len(data), 700_001):
            yield data[start : start + 700_001]

    async def echo(client: aipod.Client, size: int) -> None:
        data = os.urandom(size)
        path.write_bytes(data)
        with path.open("rb") as file:
            payload = {
                "path": path,
                "bytes": data,
                "file": file,
                "iterable": iter([data[:10], data[10:]]),
                "async iterable": pieces(data),
            }[kind]
            with pytest.warns() if kind == "bytes" and size > 32768 else contextlib.nullcontext():
                saved = await client.chaos(payload, metadata=[("x-func-name", "echo")], save_to=tmp_path / "back")
        assert saved == tmp_path / "back"
        assert saved.read_bytes() == data

    async def main() -> None:
        async with aipod.Client(served.address) as client:
            for size in (0, 1, 1 << 20, (1 << 20) + 1, 9_999_999):
                await echo(client, size)

    run(main)
    assert sorted(path.name for path in tmp_path.iterdir() if "back" in path.name) == ["back"]
    # The answer is here before its entry is released: what is left then are the journals.
    wait_until(lambda: not list(served.spool.glob("*/res")))
    assert all(name.startswith("workers/") for name in left_in(served.spool))


def test_answers_of_every_kind(serve: Serve, tmp_path: Path) -> None:
    served = serve("Plain")
    assert call(served.address, "echo_bytes", b"\xff\x00") == b"\xff\x00"
    assert call(served.address, "echo", b"abc") == b"abc"
    assert call(served.address, "outside").startswith(b'"""Models that tests serve')
    assert len(call(served.address, "text", length=200_000)) == 200_000
    saved = call(served.address, "file", length=5_000_001, save_to=tmp_path / "result")
    assert saved.stat().st_size == 5_000_001
    with pytest.raises(aipod.AipodError, match="save_to") as caught:
        call(served.address, "file", length=65 << 20)
    assert caught.value.reason == "RESULT_TOO_LARGE"


def test_events_tell_the_phases_progress_and_log(serve: Serve) -> None:
    served = serve("Plain")
    events: list[Event] = []
    assert call(served.address, "report", b"x", lines=50, on_event=events.append) == "reported"
    phases = list(dict.fromkeys(event.phase for event in events))
    assert phases == ["CONNECTING", "RECEIVING", "QUEUED", "RUNNING", "DONE"]
    assert "".join(event.log for event in events) == "".join(f"line {n}\n" for n in range(50))
    assert events[-1].message == "step 49"
    assert events[-1].progress == pytest.approx(0.98)


def test_a_train_is_visible_to_the_next_predict_and_a_failed_one_is_not(serve: Serve) -> None:
    served = serve("Plain")
    assert call(served.address, "train", b"one", version="v") == "trained"
    assert call(served.address, "log", version="v") == b"one"
    assert call(served.address, "train", b"two", version="v") == "trained"
    assert call(served.address, "log", version="v") == b"two"
    with pytest.raises(aipod.ModelError, match="training failed"):
        call(served.address, "train", b"three", version="v", fail=True)
    assert call(served.address, "log", version="v") == b"two"
    assert sorted(path.name for path in served.data.iterdir() if not path.name.startswith("closed")) == ["v"]


def test_while_a_train_runs_its_version_predicts_from_the_former_data(serve: Serve, tmp_path: Path) -> None:
    """With one instance per version. Mutant seen: what predicts waits in line until the train is over."""
    served = serve("tests.models_lifecycle:Taught", "--runner", "process", "--instances", "1")
    mark, until = tmp_path / "mark", tmp_path / "until"
    until.touch()
    call(served.address, "train", b"old", version="v", kwargs={"mark": str(mark), "until": str(until)})
    mark.unlink()
    until.unlink()
    with calls() as threads:
        kwargs = {"mark": str(mark), "until": str(until)}
        train = threads.submit(call, served.address, "train", b"new", version="v", kwargs=kwargs)
        trains = int(marked(mark))
        answers = [call(served.address, "predict", version="v") for _ in range(3)]
        assert [data for data, _ in answers] == ["old"] * 3
        assert trains not in {pid for _, pid in answers}
        assert len({pid for _, pid in answers}) == 1
        assert not train.done()
        until.touch()
        assert train.result() == trains
    assert call(served.address, "predict", version="v")[0] == "new"
    wait_until(lambda: not any(alive(pid) for pid in (trains, answers[0][1])))  # both had the former data


def test_close_hooks_run_at_the_end(serve: Serve) -> None:
    served = serve("Plain")
    pid = call(served.address, "chaos")["pid"]
    assert served.stop() == 0
    assert (served.data / f"closed-{pid}").exists()
    assert left_in(served.spool) == []


@pytest.mark.parametrize("method", ["predict", "chaos", "plain"])
def test_a_class_with_async_methods_runs_on_the_loop(serve: Serve, method: str) -> None:
    served = serve("Async")
    answer = call(served.address, method, b"12345")
    assert answer != "MainThread" if method == "plain" else answer["size"] == 5


def test_a_unix_socket_and_two_addresses(serve: Serve, tmp_path: Path) -> None:
    served = serve("Plain", "--bind", f"unix:{tmp_path}/s", "--bind", "127.0.0.1:0", bind="[::1]:0")
    assert served.process.stdout is not None
    addresses = [served.address, *(served.process.stdout.readline().split()[-1] for _ in range(2))]
    assert addresses[0].startswith("[::1]:")
    assert addresses[1] == f"unix:{tmp_path}/s"
    for address in addresses:
        assert call(address, "hello") == "hello world"
    assert served.stop() == 0
    assert not (tmp_path / "s").exists()


def test_the_room_of_a_long_payload_is_given_back_behind_its_answer(serve: Serve, tmp_path: Path) -> None:
    """Mutant seen: the server keeps the file that has no name any more."""
    served = serve("Plain")
    file = tmp_path / "payload"
    with file.open("wb") as out:
        out.truncate(SLOW)
    assert call(served.address, "predict", file)["kwargs"] == {}

    def kept() -> list[str]:
        files = []
        for path in Path(f"/proc/{served.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                files.append(os.readlink(path))
        return [name for name in files if name.endswith("/in (deleted)")]

    wait_until(lambda: not kept())
