"""Strangers' clients: stock grpcio as the first version configured it, and Node's grpc-js."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import queue
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.conftest import FIRST, ROOT, Serve, Served, first_only, free_port, missing, require, run, wait_until
from tests.stranger import (
    OPTIONS,
    RPCS,
    SHAPES,
    Mark,
    Raw,
    Reply,
    StreamInput,
    ask,
    compressed,
    first_message,
    more_messages,
    open_channel,
    reply_of,
    served_for_the_module,
    shaped,
    start,
)

Code = grpc.StatusCode
CODES = {code.value[0]: code for code in Code}
# grpcio's core is one for both.
BOTH = pytest.mark.parametrize("face", ["sync", *(["aio"] if FIRST else [])])
of_node = first_only("Node calls, and speaks as grpcio does")
# Half of it compresses, half does not; an odd length.
DATA = random.Random(1).randbytes(1_500_001) + b"0123456789abcdef" * 100_000
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served_for_the_module("Stranger", tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def loop_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served_for_the_module("Loop", tmp_path_factory.mktemp("loop"))


def jobs_in(served: Served) -> list[str]:
    """What jobs have in the spool of a living server: each a lock, and an entry or what is left of one."""
    return sorted(set(os.listdir(served.spool)) - {"app", "spool-id", "workers", ".probe"})


def count_jobs(served: Served) -> int:
    return sum(name.endswith(".lock") for name in jobs_in(served))


# ---- grpcio: payloads

CALLS = [(rpc, shape, "sync") for rpc in RPCS for shape in SHAPES]
if FIRST:
    CALLS += [(rpc, "stream", "aio") for rpc in RPCS]


@pytest.mark.parametrize(("rpc", "shape", "face"), CALLS)
def test_a_payload_of_any_shape_reaches_each_method(server: Served, rpc: str, shape: str, face: str) -> None:
    pieces = shaped(DATA, shape)
    reply = ask(server.address, rpc, {"_aipod_bin_size": len(DATA), "top": 5}, pieces, face=face)
    answer = reply.json()
    assert answer["sha256"] == SHA256
    assert answer["method"] == rpc
    assert answer["kwargs"] == {"top": 5}
    assert reply.pongs >= 1


@BOTH
def test_no_payload_is_an_empty_file_and_no_kwargs_are_none(server: Served, face: str) -> None:
    for rpc in RPCS:
        reply = ask(server.address, rpc, b"", face=face)
        assert reply.json()["sha256"] == hashlib.sha256(b"").hexdigest()
        assert reply.json()["kwargs"] == {}


def test_each_message_may_carry_kwargs_and_only_the_first_ones_count(server: Served) -> None:
    """The first version's client filled in all fields of every StreamInput, payload included."""
    pieces = shaped(DATA[:200_000], "stream")
    requests = [
        StreamInput(kwargs_json=compressed({"n": n}), version="one" if n == 0 else "other", raw=Raw(data=piece))
        for n, piece in enumerate(pieces)
    ]
    with open_channel(server.address) as channel:
        answer = reply_of(start(channel, "train", iter(requests))).json()
    assert answer["kwargs"] == {"n": 0}
    assert answer["version"] == "one"
    assert answer["sha256"] == hashlib.sha256(DATA[:200_000]).hexdigest()


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 0])
def test_a_size_that_is_not_the_payloads_is_refused(server: Served, size: int) -> None:
    """I15. Mutant seen: the size is not looked at."""
    reply = ask(server.address, "predict", {"_aipod_bin_size": size}, shaped(DATA, "stream"))
    assert (reply.code, reply.info.reason) == (Code.INVALID_ARGUMENT, "SIZE_MISMATCH")
    assert str(size) in reply.details
    wait_until(lambda: not jobs_in(server))


@pytest.mark.parametrize("size", ["12", 1.5, -1, True, [1], 1 << 64])
def test_a_size_that_is_no_number_is_refused(server: Served, size: Any) -> None:
    reply = ask(server.address, "chaos", {"_aipod_bin_size": size}, shaped(b"abc", "frame"))
    assert (reply.code, reply.info.reason) == (Code.INVALID_ARGUMENT, "BAD_KWARGS")
    assert "_aipod_bin_size" in reply.details


def test_unknown_keys_of_ours_are_dropped(server: Served) -> None:
    assert ask(server.address, "chaos", {"_aipod_new": 1, "_own": 2}).json()["kwargs"] == {"_own": 2}


# ---- grpcio: names


@BOTH
def test_the_version_may_come_either_way_but_not_two_ways(server: Served, face: str) -> None:
    def version(method: str, kwargs: Any, version: str = "") -> Any:
        answer = ask(server.address, method, kwargs, face=face, version=version).json()
        assert answer["kwargs"] == {}
        return answer["version"]

    assert version("predict", {}) == "default"
    assert version("predict", {}, "v1") == "v1"
    assert version("predict", {"version": "v1"}) == "v1"
    assert version("predict", {"version": "v1"}, "v1") == "v1"
    assert version("chaos", {"version": "v1"}) == "v1"
    reply = ask(server.address, "log", {"version": "v1"}, face=face, version="v2")
    assert (reply.code, reply.info.reason) == (Code.INVALID_ARGUMENT, "BAD_VERSION")
    assert "v1" in reply.details
    assert "v2" in reply.details


def test_a_header_names_the_method_on_chaos_only(server: Served) -> None:
    assert ask(server.address, "as_bytes", {}, shaped(b"abc", "frame")).json() == "abc"
    assert ask(server.address, "log", {}, metadata=[("x-func-name", "none")]).json()["method"] == "log"
    answer = ask(server.address, "chaos", {}, metadata=[("x-custom", "yes"), ("authorization", "secret")]).json()
    assert answer["method"] == "chaos"
    assert answer["metadata"]["x-custom"] == "yes"
    assert "authorization" not in answer["metadata"]


@BOTH
def test_an_unknown_method_is_unimplemented_and_named(server: Served, loop_server: Served, face: str) -> None:
    # grpcio's asyncio face may lose the status of a call that ends while it still sends: "Internal error from Core",
    # from grpcio's own server as often as from ours (grpc/grpc#36066). So that one sends no payload here.
    pieces = shaped(DATA, "stream") if face == "sync" else []
    for served, method in ((server, "nope"), (server, "load"), (loop_server, "log")):
        model = "Stranger" if served is server else "Loop"
        reply = ask(served.address, method, {}, pieces, face=face)
        assert (reply.code, reply.info.reason) == (Code.UNIMPLEMENTED, "UNKNOWN_METHOD")
        assert f"'{method}'" in reply.details
        assert model in reply.details


@pytest.mark.parametrize("which", ["server", "loop_server"])
def test_keyword_arguments_may_have_any_name(request: pytest.FixtureRequest, which: str) -> None:
    kwargs = {name: 1 for name in ("name", "args", "kwargs", "func", "method", "async_fn", "flavor", "task", "report")}
    assert ask(request.getfixturevalue(which).address, "predict", kwargs).json()["kwargs"] == kwargs


# ---- grpcio: answers


@BOTH
def test_heartbeats_come_at_once_and_every_second_until_the_answer(server: Served, face: str) -> None:
    reply = ask(server.address, "sleep", {"seconds": 3}, face=face)
    assert reply.json() == "slept"
    assert 3 <= reply.pongs <= 5


def test_the_first_heartbeat_needs_no_request(server: Served) -> None:
    """Metadata and a PONG come before anything was sent, and PONGs come while the payload is on its way."""
    requests: queue.Queue[Any] = queue.Queue()
    with open_channel(server.address) as channel:
        call = start(channel, "predict", iter(requests.get, None), timeout=60)
        call.initial_metadata()
        assert next(call).data == b"PONG"
        requests.put(first_message("predict", {}))
        for message in more_messages("predict", shaped(b"abc" * 10, "stream")):
            assert next(call).data == b"PONG"
            requests.put(message)
        requests.put(None)
        assert reply_of(call).json()["sha256"] == hashlib.sha256(b"abc" * 10).hexdigest()


def test_frequent_pings_of_a_client_are_welcome(server: Served) -> None:
    """grpcio may ping without data and without calls; a server that counts would end the connection at the third."""
    options = list({**dict(OPTIONS), "grpc.keepalive_time_ms": 50}.items())
    states: list[grpc.ChannelConnectivity] = []
    with grpc.insecure_channel(server.address, options=options) as channel:
        channel.subscribe(states.append)
        for _ in range(2):
            requests = iter([first_message("chaos", {"seconds": 1})])
            call = start(channel, "chaos", requests, metadata=[("x-func-name", "sleep")])
            assert reply_of(call).json() == "slept"
    assert states.count(grpc.ChannelConnectivity.READY) == 1
    assert grpc.ChannelConnectivity.TRANSIENT_FAILURE not in states


@BOTH
def test_a_json_answer_is_one_message_however_long(server: Served, face: str) -> None:
    assert ask(server.address, "none", face=face).json() is None
    reply = ask(server.address, "text", {"length": 12_000_000}, face=face)
    assert len(reply.json()) == 12_000_000
    assert len(reply.answer[0]) > 5_000_000


@BOTH
def test_bytes_become_json_of_their_text(server: Served, face: str) -> None:
    text = 'aé–"\n' * 200_000  # no piece of it ends where a character does
    assert ask(server.address, "as_bytes", {}, shaped(text.encode(), "stream"), face=face).json() == text
    reply = ask(server.address, "as_bytes", {}, shaped(b"abc\xff", "frame"), face=face)
    assert (reply.code, reply.info.reason) == (Code.INTERNAL, "RESULT_NOT_TEXT")
    assert reply.answer == []


@BOTH
def test_a_file_comes_in_several_messages(server: Served, face: str) -> None:
    reply = ask(server.address, "as_file", {}, shaped(DATA, "stream"), face=face)
    assert reply.code is Code.OK
    assert reply.decompressed() == DATA
    assert len(reply.answer) > 2
    assert reply.trailers["x-content-type"] == "application/octet-stream"
    for data in (b"", b"PONG", os.urandom(4)):
        assert ask(server.address, "as_file", {}, shaped(data, "frame"), face=face).decompressed() == data


def test_json_above_the_message_limit_comes_in_several_messages(serve: Serve) -> None:
    """I15. No heartbeat is among them, though its time comes. Mutant seen: heartbeats go on during the answer."""
    served = serve("tests.models_strangers:Stranger", "--max-message", str(2 << 20), "--tick", "0.01")
    reply = ask(served.address, "text", {"length": 12_000_000})
    assert len(json.loads(reply.decompressed())) == 12_000_000
    assert len(reply.answer) > 2
    assert max(map(len, reply.answer)) < 2 << 20


# ---- grpcio: failures


@BOTH
def test_a_model_error_tells_type_and_message_and_is_not_retried(server: Served, tmp_path: Path, face: str) -> None:
    """INTERNAL is in the first version's list of what to retry: the metadata that came first forbids it."""
    mark = tmp_path / "starts"
    reply = ask(server.address, "boom", {"mark": str(mark)}, shaped(b"abc", "frame"), face=face)
    assert reply.code is Code.INTERNAL
    assert reply.details == "ValueError: the lever is at 42 – too far"
    assert (reply.info.reason, reply.info.domain) == ("MODEL_ERROR", "aipod")
    assert reply.info.metadata["type"] == "ValueError"
    assert reply.answer == []
    told = repr(reply)
    assert "Traceback" not in told
    assert "models_strangers" not in told
    assert "models_strangers.py" in server.log_text()
    assert mark.read_text() == "started\n"


def test_kwargs_that_the_method_does_not_take_are_refused(server: Served) -> None:
    reply = ask(server.address, "none", {"surplus": 1})
    assert (reply.code, reply.info.metadata["parameter"]) == (Code.INVALID_ARGUMENT, "surplus")
    assert "surplus" in reply.details


def test_a_client_that_comes_before_its_server_is_served(serve: Serve) -> None:
    """The first version's retries: no connection is UNAVAILABLE, tried again after 1 s, 2 s, 4 s and 8 s."""
    port = free_port()
    with open_channel(f"127.0.0.1:{port}", ("grpc.initial_reconnect_backoff_ms", 100)) as channel:
        refused = threading.Event()

        def see(state: grpc.ChannelConnectivity) -> None:
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                refused.set()

        channel.subscribe(see)
        call = start(channel, "predict", iter([first_message("predict", {"n": 1})]), timeout=60)
        assert refused.wait(10)
        serve("tests.models_strangers:Stranger", bind=f"127.0.0.1:{port}")
        assert reply_of(call).json()["kwargs"] == {"n": 1}


# ---- grpcio: leaving

WATCHES = pytest.mark.parametrize(
    ("which", "method"),
    [("server", "watch"), ("loop_server", "watch"), ("loop_server", "watch_asyncio"), ("loop_server", "watch_thread")],
)


@pytest.fixture
def watched(request: pytest.FixtureRequest, which: str) -> Served:
    served: Served = request.getfixturevalue(which)
    return served


@pytest.fixture
def mark(tmp_path: Path) -> Mark:
    return Mark(tmp_path / "mark")


def still_serves(served: Served) -> None:
    """The instance takes the next job, and nothing is left of the one before."""
    assert ask(served.address, "predict").json()["method"] == "predict"
    wait_until(lambda: not jobs_in(served))


@WATCHES
def test_a_cancelled_call_cancels_its_job(watched: Served, method: str, mark: Mark) -> None:
    with open_channel(watched.address) as channel:
        call = start(channel, "chaos", iter([first_message("chaos", mark.kwargs)]), metadata=[("x-func-name", method)])
        mark.wait("started")
        call.cancel()
        mark.wait("cancelled")
        assert call.code() is Code.CANCELLED
        # The connection goes on.
        assert reply_of(start(channel, "predict", iter([first_message("predict", {})]))).json()["method"] == "predict"
    still_serves(watched)


def test_a_cancelled_asyncio_call_cancels_its_job(server: Served, mark: Mark) -> None:
    async def main() -> None:
        async with grpc.aio.insecure_channel(server.address, options=OPTIONS) as channel:
            requests = [first_message("chaos", mark.kwargs)]
            call = start(channel, "chaos", requests, metadata=[("x-func-name", "watch")])
            assert (await call.read()).data == b"PONG"
            await asyncio.to_thread(mark.wait, "started")
            call.cancel()
            await asyncio.to_thread(mark.wait, "cancelled")
            assert await call.code() is Code.CANCELLED

    run(main)
    still_serves(server)


@WATCHES
def test_a_deadline_ends_the_call_and_its_job(watched: Served, method: str, mark: Mark) -> None:
    reply = ask(watched.address, method, mark.kwargs, timeout=1)
    assert reply.code is Code.DEADLINE_EXCEEDED
    mark.wait("cancelled")
    still_serves(watched)


def test_the_server_itself_keeps_the_deadline(server: Served) -> None:
    """grpcio passes on a timeout that it is not told of itself, and leaves the end of the call to the server."""
    reply = ask(server.address, "sleep", {"seconds": 1}, metadata=[("grpc-timeout", "200m")], timeout=None)
    assert (reply.code, reply.info.reason) == (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    still_serves(server)


@WATCHES
def test_a_lost_connection_cancels_the_job(watched: Served, method: str, mark: Mark) -> None:
    """I15. Mutant seen: a plain client's job goes on without it, as an own client's does."""
    command = [sys.executable, "-m", "tests.stranger", watched.address, method, json.dumps(mark.kwargs)]
    with subprocess.Popen(command, cwd=ROOT) as client:
        mark.wait("started")
        client.kill()
    mark.wait("cancelled")
    still_serves(watched)


def test_a_job_in_the_queue_is_cancelled_too(server: Served, mark: Mark, tmp_path: Path) -> None:
    never = Mark(tmp_path / "never")
    named = [("x-func-name", "watch")]
    with open_channel(server.address) as channel:
        running = start(channel, "chaos", iter([first_message("chaos", mark.kwargs)]), metadata=named)
        mark.wait("started")
        queued = start(channel, "chaos", iter([first_message("chaos", never.kwargs)]), metadata=named)
        wait_until(lambda: count_jobs(server) == 2)
        queued.cancel()
        wait_until(lambda: count_jobs(server) == 1)
        running.cancel()
    mark.wait("cancelled")
    still_serves(server)
    assert not never.path.exists()


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_an_upload_that_is_left_leaves_nothing(server: Served, how: str) -> None:
    """I15. Mutant seen: its entry is let go of, and goes with the next sweep."""
    requests: queue.Queue[Any] = queue.Queue()
    with open_channel(server.address) as channel:
        call = start(channel, "predict", iter(requests.get, None))
        requests.put(first_message("predict", {"_aipod_bin_size": len(DATA)}))
        for message in list(more_messages("predict", shaped(DATA, "stream")))[:20]:
            requests.put(message)
        wait_until(lambda: jobs_in(server))
        if how == "cancel":
            call.cancel()
        else:
            channel.close()
        wait_until(lambda: not jobs_in(server))
        requests.put(None)
    still_serves(server)
    assert "entries that nobody wants any more" not in server.log_text()


# ---- Node's grpc-js


class Node:
    """tests/node/client.js, as the first version's options have it."""

    def __init__(self, program: str, served: Served) -> None:
        self.command = [program, str(ROOT / "tests" / "node" / "client.js")]
        self.served = served

    def task(self, calls: Sequence[dict[str, Any]]) -> bytes:
        proto = str(ROOT / "schema" / "ai.proto")
        return json.dumps({"address": self.served.address, "proto": proto, "calls": calls}).encode()

    def ask(self, *calls: dict[str, Any]) -> list[Reply]:
        """Make the calls one after the other on one channel."""
        done = subprocess.run(self.command, input=self.task(calls), stdout=subprocess.PIPE, timeout=60, check=True)
        return [
            Reply(
                CODES[reply["code"]],
                reply["details"],
                reply["metadata"],
                {k: base64.b64decode(v) if k.endswith("-bin") else v for k, v in reply["trailers"].items()},
                [base64.b64decode(message) for message in reply["messages"]],
            )
            for reply in json.loads(done.stdout)
        ]


def named(method: str, **more: Any) -> dict[str, Any]:
    return {"rpc": "chaos", "metadata": {"x-func-name": method}, **more}


@pytest.fixture(scope="module")
def node(server: Served) -> Node:
    program = require("node")
    modules = [program, "-e", "require('@grpc/grpc-js'); require('@grpc/proto-loader')"]
    if subprocess.run(modules, stderr=subprocess.DEVNULL, check=False).returncode != 0:
        missing("Node's @grpc/grpc-js and @grpc/proto-loader are not installed (NODE_PATH)")
    return Node(program, server)


@pytest.fixture(scope="module")
def payload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("payload") / "payload"
    path.write_bytes(DATA)
    path.with_suffix(".zst").write_bytes(b"".join(shaped(DATA, "stream")))
    return path


@of_node
def test_node_calls_all_four_methods(node: Node, payload: Path) -> None:
    kwargs = {"_aipod_bin_size": len(DATA), "top": 5}
    sources = [{"payload": str(payload)}, {"packed": str(payload.with_suffix(".zst"))}]
    calls = [{"rpc": rpc, "kwargs": kwargs, **source} for rpc in RPCS for source in sources]
    replies = node.ask(*calls)
    assert len(replies) == 8
    for call, reply in zip(calls, replies, strict=True):
        answer = reply.json()
        assert (answer["method"], answer["sha256"], answer["kwargs"]) == (call["rpc"], SHA256, {"top": 5})
        assert reply.pongs >= 1


@of_node
def test_node_gets_answers_of_every_kind(node: Node, payload: Path) -> None:
    slow, large, text, file, empty = node.ask(
        named("sleep", kwargs={"seconds": 3}),
        named("text", kwargs={"length": 12_000_000}),
        named("as_bytes", payload=str(Path(__file__))),
        named("as_file", payload=str(payload)),
        {"rpc": "predict"},
    )
    assert slow.json() == "slept"
    assert 3 <= slow.pongs <= 5
    assert len(large.json()) == 12_000_000
    assert text.json() == Path(__file__).read_text()
    assert file.decompressed() == DATA
    assert len(file.answer) > 2
    assert file.trailers["x-content-type"] == "application/octet-stream"
    assert empty.json()["sha256"] == hashlib.sha256(b"").hexdigest()


@of_node
def test_node_is_told_what_went_wrong(node: Node, payload: Path, tmp_path: Path) -> None:
    mark = tmp_path / "starts"
    size = {"_aipod_bin_size": len(DATA) - 1}
    unknown, wrong_size, no_size, versions, same, boom = node.ask(
        named("nope", payload=str(payload)),
        {"rpc": "train", "kwargs": size, "payload": str(payload)},
        {"rpc": "chaos", "kwargs": {"_aipod_bin_size": "many"}},
        {"rpc": "log", "kwargs": {"version": "v1"}, "version": "v2"},
        {"rpc": "log", "kwargs": {"version": "v1"}, "version": "v1"},
        named("boom", kwargs={"mark": str(mark)}),
    )
    assert (unknown.code, unknown.info.reason) == (Code.UNIMPLEMENTED, "UNKNOWN_METHOD")
    assert "Stranger has no method 'nope'" in unknown.details
    assert (wrong_size.code, wrong_size.info.reason) == (Code.INVALID_ARGUMENT, "SIZE_MISMATCH")
    assert (no_size.code, no_size.info.reason) == (Code.INVALID_ARGUMENT, "BAD_KWARGS")
    assert (versions.code, versions.info.reason) == (Code.INVALID_ARGUMENT, "BAD_VERSION")
    assert same.json()["version"] == "v1"
    assert (boom.code, boom.info.reason) == (Code.INTERNAL, "MODEL_ERROR")
    assert boom.details == "ValueError: the lever is at 42 – too far"
    assert "Traceback" not in repr(boom)
    assert mark.read_text() == "started\n"


@of_node
def test_node_cancels_a_job_by_leaving_it(node: Node, tmp_path: Path) -> None:
    left, late, lost = (Mark(tmp_path / name) for name in ("left", "late", "lost"))
    cancelled, deadline = node.ask(
        named("watch", kwargs=left.kwargs, cancelOn=str(left.path)), named("watch", kwargs=late.kwargs, timeout=1)
    )
    left.wait("cancelled")
    late.wait("cancelled")
    assert cancelled.code is Code.CANCELLED
    assert deadline.code is Code.DEADLINE_EXCEEDED
    with subprocess.Popen(node.command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as client:
        assert client.stdin is not None
        client.stdin.write(node.task([named("watch", kwargs=lost.kwargs)]))
        client.stdin.close()
        lost.wait("started")
        client.kill()
    lost.wait("cancelled")
    still_serves(node.served)
