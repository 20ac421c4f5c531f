"""What no honest caller or author sends, against real servers, from plain clients and from aipod's own kind.

After every refusal the server still serves, and nothing is left in its spool.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import re
import resource
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import zstandard
from google.rpc.error_details_pb2 import ErrorInfo
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from h2.exceptions import StreamClosedError

import aipod
from aipod.codec import digest
from aipod.config import KIB, MIB, Config
from aipod.transport.channel import Channel, read_status, reset
from aipod.wire.ai import Op, Open, Phase, Raw, State, StreamInput
from tests.calls import calls
from tests.conftest import Served, children, free_port, left_in, peak_memory, run, wait_until
from tests.test_cli import start
from tests.test_codec import bomb, frame

INVALID, UNIMPLEMENTED, INTERNAL = Status.INVALID_ARGUMENT, Status.UNIMPLEMENTED, Status.INTERNAL
# Above what a call costs at rest: windows, one message, one piece of output. A bomb would be a thousand.
FLAT = 64


class Bytes(bytes):
    """A message that is sent as it is."""

    def SerializeToString(self) -> bytes:
        return bytes(self)


@dataclasses.dataclass
class Answer:
    """All that a server said to one call."""

    status: Status = Status.OK
    message: str = ""
    reason: str = ""
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    messages: list[Raw] = dataclasses.field(default_factory=list)

    @property
    def refusal(self) -> tuple[Status, str]:
        return self.status, self.reason

    @property
    def state(self) -> State:
        """The terminal one."""
        return next(m.state for m in self.messages if m.state is not None and m.state.phase >= Phase.DONE)

    @property
    def data(self) -> bytes:
        return b"".join(m.data for m in self.messages if m.data != b"PONG")

    @property
    def json(self) -> Any:
        return json.loads(zstandard.ZstdDecompressor().decompressobj().decompress(self.data))


def talk(
    address: str, rpc: str, messages: Sequence[Any], headers: dict[str, str] | None = None, *, end: bool = True
) -> Answer:
    """One call: all `messages`, a half-close with `end`, and whatever comes back."""

    async def main() -> Answer:
        answer = Answer()
        channel = Channel(address, Config())
        kind = Raw if rpc == "chaos" else StreamInput
        try:
            async with channel.request(
                f"/ai.AI/{rpc}", Cardinality.STREAM_STREAM, kind, Raw, metadata=headers or {}
            ) as stream:
                await stream.send_request()
                try:
                    for message in messages:
                        await stream.send_message(message)
                    if end:
                        await stream.end()
                except (StreamTerminatedError, StreamClosedError):
                    pass  # the server has seen enough; it says why
                while (message := await stream.recv_message()) is not None:
                    answer.messages.append(message)
                await read_status(stream)
        except GRPCError as exc:
            answer.status, answer.message = exc.status, exc.message or ""
            for detail in exc.details if isinstance(exc.details, list) else []:
                if isinstance(detail, ErrorInfo):
                    assert detail.domain == "aipod"
                    answer.reason, answer.metadata = detail.reason, dict(detail.metadata)
        finally:
            await channel.aclose()
        return answer

    return run(main, timeout=60)


def packed(kwargs: Any) -> bytes:
    return zstandard.compress(json.dumps(kwargs).encode())


def plain(
    address: str, payload: Sequence[bytes] = (), kwargs: Any = None, *, name: str = "", rpc: str = "chaos"
) -> Answer:
    """A call as the first version's client made it. `kwargs`: sent as they are where they are bytes."""
    data = kwargs if isinstance(kwargs, bytes) else packed(kwargs or {})
    messages: list[Any]
    if rpc == "chaos":
        messages = [Raw(data=data), *(Raw(data=piece) for piece in payload)]
    else:
        messages = [StreamInput(kwargs_json=data), *(StreamInput(raw=Raw(data=piece)) for piece in payload)]
    return talk(address, rpc, messages, {"x-func-name": name} if name else {})


def own(
    address: str,
    chunks: Sequence[Any] = (),
    kwargs: Any = None,
    *,
    name: str = "",
    rpc: str = "chaos",
    job_id: str | None = None,
    **fields: Any,
) -> Answer:
    """A call of aipod's own kind; `chunks` are the messages behind the first one."""
    data = kwargs if isinstance(kwargs, bytes) else packed(kwargs or {})
    open_ = Open(**{"ticket": os.urandom(16), "epoch": 1, **fields})
    headers = (
        {}
        if job_id == ""
        else {"x-job-id": hashlib.sha256(open_.ticket).hexdigest()[:32] if job_id is None else job_id}
    )
    if name:
        headers["x-func-name"] = name
    first: Any = Raw(data=data, open=open_, last=not chunks)
    if rpc != "chaos":
        first = StreamInput(kwargs_json=data, raw=Raw(open=open_, last=not chunks))
        chunks = [StreamInput(raw=chunk) if isinstance(chunk, Raw) else chunk for chunk in chunks]
    return talk(address, rpc, [first, *chunks], headers)


BOTH = pytest.mark.parametrize("call", [plain, own])


@pytest.fixture(scope="module", params=["InProcess", "OnLoop"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Servers of the same methods, in a worker process and on the loop."""
    yield from _serve(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server for what does not depend on the runner."""
    yield from _serve("InProcess", tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from _serve("InProcess", tmp_path_factory.mktemp("limited"), "--max-payload", "1MiB", "--max-message", "4MiB")


def _serve(model: str, path: Path, *options: str) -> Iterator[Served]:
    served = Served(f"tests.models_bad:{model}", path, options, "127.0.0.1:0")
    yield served
    assert served.stop() == 0
    assert left_in(served.spool, uploads=False) == []
    assert "a bug of aipod" not in served.log_text()


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Behind each test: the servers that it used serve an honest call, and their spools hold what may be
    asked for again and nothing else."""
    yield
    for name in {"either", "one", "limited"} & set(request.fixturenames):
        served = request.getfixturevalue(name)
        assert honest(served) == {"size": 3, "kwargs": {"top": 5}, "version": "default"}
        wait_until(
            lambda served=served: all(path.startswith("workers/") for path in left_in(served.spool, uploads=False))
        )
        assert [path.name for path in served.data.iterdir()] == []


def honest(served: Served) -> Any:
    async def main() -> Any:
        async with aipod.Client(served.address) as client:
            return await client.chaos(b"abc", top=5)

    return run(main)


# Methods


@BOTH
@pytest.mark.parametrize(
    "name",
    ["nope", "_private", "__init__", "__class__", "inherited", "load", "warm_up", "close", "version", "data_dir",
     "helper", "Chaos", "predict.chaos", "x" * 5000],
)  # fmt: skip
def test_what_cannot_be_called_is_unimplemented_and_named(either: Served, call: Any, name: str) -> None:
    answer = call(either.address, name=name)
    assert answer.refusal == (UNIMPLEMENTED, "UNKNOWN_METHOD")
    assert name.strip()[:80] in answer.message
    assert "has no method" in answer.message
    assert answer.message.split()[0] in ("InProcess", "OnLoop")
    assert "predict" in answer.message.partition("it has:")[2]
    assert "_private" not in answer.message.partition("it has:")[2]


@BOTH
def test_an_rpc_whose_method_the_class_does_not_have(one: Served, call: Any) -> None:
    answer = call(one.address, rpc="log")
    assert answer.refusal == (UNIMPLEMENTED, "UNKNOWN_METHOD")
    assert answer.message.startswith("InProcess has no method 'log'")


@BOTH
def test_a_name_with_a_dot_is_the_server_s_own(one: Served, call: Any) -> None:
    answer = call(one.address, name="aipod.nope")
    assert answer.refusal == (UNIMPLEMENTED, "UNKNOWN_METHOD")
    assert answer.message == "the server has no method 'aipod.nope'; it has: aipod.jobs, aipod.methods, aipod.probe"


def test_an_rpc_that_there_is_not(one: Served) -> None:
    assert talk(one.address, "nope", [StreamInput()]).status is UNIMPLEMENTED


# Keyword arguments


@BOTH
@pytest.mark.parametrize("rpc", ["chaos", "predict"])
@pytest.mark.parametrize(
    "kwargs",
    [
        b"{}",
        b"\0" * 100,
        frame(b"{}")[:-1],
        frame(b"{}") + b"x",
        frame(b"{}") + frame(b"{}"),
        frame(b"no JSON"),
        frame(b""),
        frame(b"[1]"),
        frame(b'"text"'),
        frame(b"[" * 200_000),
        frame(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        frame(b'{"a": "\xff"}'),
    ],
    ids=["no zstd", "zeros", "cut", "garbage behind", "two", "no JSON", "empty", "list", "text", "open", "deep", "utf"],
)
def test_kwargs_that_are_none(one: Served, call: Any, rpc: str, kwargs: bytes) -> None:
    assert call(one.address, kwargs=kwargs, rpc=rpc).refusal == (INVALID, "BAD_KWARGS")


@BOTH
@pytest.mark.parametrize("sized", [True, False])
def test_kwargs_of_a_gigabyte(one: Served, call: Any, sized: bool) -> None:
    honest(one)
    before = peak_memory(one.process.pid)
    answer = call(one.address, kwargs=bomb(sized=sized))
    assert answer.refusal == (INVALID, "BAD_KWARGS")
    assert str(16 * MIB) in answer.message
    assert peak_memory(one.process.pid) - before < FLAT


@BOTH
@pytest.mark.parametrize("depth", [100, 400])
def test_nested_kwargs_within_reason_arrive(one: Served, call: Any, depth: int) -> None:
    assert call(one.address, kwargs=frame(b'{"a":' + b"[" * depth + b"]" * depth + b"}")).status is Status.OK


@BOTH
@pytest.mark.parametrize("version", ["../x", "..", "a/b", "x" * 65, ".hidden", "a b", 1.5, True, ["1"], {"a": 1}])
def test_versions_that_are_none(one: Served, call: Any, version: Any) -> None:
    assert call(one.address, kwargs={"version": version}).refusal == (INVALID, "BAD_VERSION")


def test_a_version_in_the_message_that_is_none_or_another(one: Served) -> None:
    for version, kwargs in (("../x", {}), ("7", {"version": "8"})):
        message = StreamInput(kwargs_json=packed(kwargs), version=version)
        assert talk(one.address, "predict", [message]).refusal == (INVALID, "BAD_VERSION")


def test_a_version_may_be_a_whole_number(one: Served) -> None:
    assert plain(one.address, kwargs={"version": 7}).json["version"] == "7"


# Payloads of plain clients


def test_honest_plain_payloads(one: Served) -> None:
    whole = frame(b"abc", sized=False) + frame(b"def")
    for pieces in ([whole], [whole[n : n + 1] for n in range(len(whole))], [b"", whole, b""]):
        assert plain(one.address, pieces, {"_aipod_bin_size": 6}).json["size"] == 6
    assert plain(one.address, [], {"_aipod_bin_size": 0}).json["size"] == 0


RANDOM = os.urandom(300_000)


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ([b"no zstd at all"], "BAD_CHUNK"),
        ([frame(RANDOM)[:-1]], "TRUNCATED"),
        ([frame(RANDOM)[:150_000]], "TRUNCATED"),
        ([frame(RANDOM), frame(RANDOM)[:3]], "TRUNCATED"),
        ([frame(RANDOM, checksum=False)[:-100]], "TRUNCATED"),
        ([frame(RANDOM), b"garbage"], "BAD_CHUNK"),
        ([frame(RANDOM) + b"\0\0\0\0"], "BAD_CHUNK"),
        ([flipped(frame(RANDOM))], "BAD_CHUNK"),
        ([frame(RANDOM)[:1000], b"\0", frame(RANDOM)[1000:]], "BAD_CHUNK"),
    ],
    ids=["garbage", "cut 1", "cut half", "cut header", "no checksum", "behind", "zeros", "flipped", "byte more"],
)
def test_bad_plain_payloads(one: Served, payload: list[bytes], reason: str, declared: bool) -> None:
    """I15. Mutant seen: the end of the stream is not looked at, so that a cut one counts as whole."""
    answer = plain(one.address, payload, {"_aipod_bin_size": len(RANDOM)} if declared else {})
    assert answer.refusal == (INVALID, reason)


@pytest.mark.parametrize("size", [len(RANDOM) - 1, len(RANDOM) + 1, 0, len(RANDOM) * 2])
def test_a_plain_payload_of_another_size_than_declared(one: Served, size: int) -> None:
    answer = plain(one.address, [frame(RANDOM)], {"_aipod_bin_size": size})
    assert answer.refusal == (INVALID, "SIZE_MISMATCH")
    assert str(size) in answer.message


@pytest.mark.parametrize("size", ["5", 1.5, -1, True, [5], 1 << 63])
def test_a_declared_size_that_is_none(one: Served, size: Any) -> None:
    assert plain(one.address, [frame(RANDOM)], {"_aipod_bin_size": size}).refusal == (INVALID, "BAD_KWARGS")


def test_a_declared_size_that_no_disk_has(one: Served) -> None:
    answer = plain(one.address, [frame(RANDOM)], {"_aipod_bin_size": 1 << 62})
    assert answer.refusal == (Status.RESOURCE_EXHAUSTED, "SPOOL_FULL")


def test_32_kib_that_become_a_gigabyte_cost_disk_but_no_memory(one: Served) -> None:
    honest(one)
    before = peak_memory(one.process.pid)
    data = bomb()
    assert len(data) < 33 * KIB
    assert plain(one.address, [data]).json["size"] == 1 << 30
    assert peak_memory(one.process.pid) - before < FLAT


def test_32_kib_that_become_more_than_was_declared(one: Served) -> None:
    honest(one)
    before = peak_memory(one.process.pid)
    for data in (bomb(), bomb(sized=True)):
        assert plain(one.address, [data], {"_aipod_bin_size": len(data)}).refusal == (INVALID, "SIZE_MISMATCH")
    assert peak_memory(one.process.pid) - before < FLAT


def test_a_window_that_would_cost_the_server_its_memory(one: Served) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    assert plain(one.address, [compressor.compress(b"x") + compressor.flush()]).refusal == (INVALID, "BAD_CHUNK")


def test_max_payload(limited: Served) -> None:
    assert plain(limited.address, [frame(bytes(MIB))]).json["size"] == MIB
    for answer in (
        plain(limited.address, [frame(bytes(MIB + 1))]),
        plain(limited.address, [bomb()]),
        plain(limited.address, [], {"_aipod_bin_size": MIB + 1}),
        own(limited.address, chunks(b"x" * MIB, b"y")),
        own(limited.address, chunks(b"x"), size=MIB + 1),
    ):
        assert answer.refusal == (Status.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE")
        assert "--max-payload" in answer.message


@BOTH
def test_max_message(limited: Served, call: Any) -> None:
    huge = os.urandom(4 * MIB + 1)
    answer = plain(limited.address, [huge]) if call is plain else own(limited.address, [Raw(data=huge, last=True)])
    assert answer.refusal == (Status.RESOURCE_EXHAUSTED, "BAD_MESSAGE")


# Payloads of aipod's own clients


def chunks(*parts: bytes, check: bytes | None = None) -> list[Raw]:
    """An honest upload of `parts`; the last message carries the digest of all, or `check`."""
    messages, offset = [], 0
    for part in parts:
        messages.append(Raw(data=frame(part), offset=offset))
        offset += len(part)
    messages[-1].last = True
    messages[-1].digest = digest(*parts) if check is None else check
    return messages


def answer_of(answer: Answer) -> Any:
    """The JSON of an own client's answer, checked."""
    assert answer.state.phase is Phase.DONE
    data = zstandard.decompress(answer.data)
    assert (answer.state.size, answer.state.digest) == (len(data), digest(data))
    return json.loads(data)


def test_honest_own_payloads(one: Served) -> None:
    assert answer_of(own(one.address, chunks(b"abc", b"d" * MIB)))["size"] == MIB + 3
    assert answer_of(own(one.address, [Raw(data=frame(b"abc")), Raw(offset=3, last=True)]))["size"] == 3
    assert answer_of(own(one.address))["size"] == 0
    assert answer_of(own(one.address, chunks(b"abc"), size=3))["size"] == 3


X, Y = frame(b"x" * 100), frame(b"y" * 100)
OF_BOTH = digest(b"x" * 100, b"y" * 100)
BAD_UPLOADS: dict[str, tuple[list[Any], dict[str, Any], Status, str]] = {
    "wrong digest": (chunks(b"abc", check=digest(b"abd")), {}, Status.DATA_LOSS, "DIGEST_MISMATCH"),
    "short digest": (chunks(b"abc", check=b"x"), {}, INVALID, "BAD_MESSAGE"),
    "offset not 0": ([Raw(data=X, offset=1, last=True)], {}, Status.OUT_OF_RANGE, "OFFSET_MISMATCH"),
    "offset huge": ([Raw(data=X, offset=(1 << 64) - 1, last=True)], {}, Status.OUT_OF_RANGE, "OFFSET_MISMATCH"),
    "gap": ([Raw(data=X), Raw(data=Y, offset=101, last=True)], {}, Status.OUT_OF_RANGE, "OFFSET_MISMATCH"),
    # What is there already is skipped, so what was meant as 200 bytes is shorter.
    "overlap": (
        [Raw(data=X), Raw(data=Y, offset=99, last=True, digest=OF_BOTH)],
        {},
        Status.DATA_LOSS,
        "DIGEST_MISMATCH",
    ),
    "twice": ([Raw(data=X), Raw(data=X, last=True, digest=OF_BOTH)], {}, Status.DATA_LOSS, "DIGEST_MISMATCH"),
    "no zstd": ([Raw(data=b"no zstd", last=True)], {}, INVALID, "BAD_CHUNK"),
    "bomb": ([Raw(data=bomb(), last=True)], {}, INVALID, "BAD_CHUNK"),
    "sized bomb": ([Raw(data=bomb(sized=True), last=True)], {}, INVALID, "BAD_CHUNK"),
    "bit flip": ([Raw(data=flipped(frame(RANDOM)), last=True)], {}, INVALID, "BAD_CHUNK"),
    "truncated frame": ([Raw(data=X[:-1], last=True)], {}, INVALID, "BAD_CHUNK"),
    "two frames": ([Raw(data=X + Y, last=True)], {}, INVALID, "BAD_CHUNK"),
    "garbage behind": ([Raw(data=X + b"x", last=True)], {}, INVALID, "BAD_CHUNK"),
    "no stated size": ([Raw(data=frame(b"abc", sized=False), last=True)], {}, INVALID, "BAD_CHUNK"),
    "empty chunk": ([Raw(data=frame(b""), last=True)], {}, INVALID, "BAD_CHUNK"),
    "over 1 MiB": ([Raw(data=frame(bytes(MIB + 1)), last=True)], {}, INVALID, "BAD_CHUNK"),
    "last too early": ([Raw(data=X, last=True), Raw(data=Y, offset=100)], {"size": 200}, INVALID, "SIZE_MISMATCH"),
    "last at another end": ([Raw(data=X), Raw(offset=99, last=True)], {}, INVALID, "SIZE_MISMATCH"),
    "declared short": (chunks(b"abc"), {"size": 2}, INVALID, "SIZE_MISMATCH"),
    "declared long": (chunks(b"abc"), {"size": 4}, INVALID, "SIZE_MISMATCH"),
    "declared none": (chunks(b"abc"), {"size": 0}, INVALID, "SIZE_MISMATCH"),
    "declared huge": (chunks(b"abc"), {"size": (1 << 64) - 1}, Status.RESOURCE_EXHAUSTED, "SPOOL_FULL"),
    "no last": ([Raw(data=X)], {}, INVALID, "TRUNCATED"),
    "short ticket": (chunks(b"abc"), {"ticket": b"x" * 15}, INVALID, "BAD_TICKET"),
    "long ticket": (chunks(b"abc"), {"ticket": b"x" * 65}, INVALID, "BAD_TICKET"),
    "no ticket": (chunks(b"abc"), {"ticket": b""}, INVALID, "BAD_TICKET"),
    "id of another": (chunks(b"abc"), {"job_id": "0" * 32}, INVALID, "BAD_TICKET"),
    "id is a path": (chunks(b"abc"), {"job_id": "../../etc/passwd"}, INVALID, "BAD_TICKET"),
    "no id": (chunks(b"abc"), {"job_id": ""}, INVALID, "BAD_TICKET"),
    "another spool": (chunks(b"abc"), {"spool": "elsewhere"}, Status.FAILED_PRECONDITION, "WRONG_SPOOL"),
    "resume of nothing": (chunks(b"abc"), {"op": Op.RESUME}, Status.NOT_FOUND, "NOT_STARTED"),
    **{
        f"{op.name} of nothing": (chunks(b"abc"), {"op": op}, Status.NOT_FOUND, "NOT_FOUND")
        for op in (Op.ATTACH, Op.CANCEL, Op.RELEASE)
    },
    "op 99": (chunks(b"abc"), {"op": Op(99)}, INVALID, "BAD_MESSAGE"),
    "no protobuf": ([Bytes(b"\xff\xff")], {}, INVALID, "BAD_MESSAGE"),
    "data is a number": ([Bytes(b"\x08\x05")], {}, INVALID, "BAD_MESSAGE"),
    "unknown fields": ([Bytes(b"\x78\x01" * 500_000)], {}, INVALID, "BAD_MESSAGE"),
}


@pytest.mark.parametrize("rpc", ["chaos", "predict"])
@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_bad_own_uploads(one: Served, rpc: str, name: str) -> None:
    messages, fields, status, reason = BAD_UPLOADS[name]
    if name == "data is a number" and rpc == "predict":
        messages = [Bytes(b"\x18\x05")]
    answer = own(one.address, messages, rpc=rpc, **fields)
    assert answer.refusal == (status, reason)
    assert not any(m.state is not None and m.state.phase >= Phase.QUEUED for m in answer.messages)


def test_a_refusal_for_the_wrong_spool_tells_the_right_one(one: Served) -> None:
    right = own(one.address, chunks(b"abc")).state.spool
    answer = own(one.address, chunks(b"abc"), spool="elsewhere")
    assert answer.metadata == {"spool": right}
    assert answer_of(own(one.address, chunks(b"abc"), spool=right))["size"] == 3


@pytest.mark.parametrize("more", [Raw(data=Y, offset=100), Raw(offset=100, last=True), Bytes(b"\xff")])
def test_what_follows_last_is_not_looked_at(one: Served, more: Any) -> None:
    assert answer_of(own(one.address, [Raw(data=X, last=True, digest=digest(b"x" * 100)), more]))["size"] == 100


def test_a_ticket_is_good_for_one_job_and_a_slower_connection_does_not_take_it_over(one: Served) -> None:
    ticket = os.urandom(16)
    name = hashlib.sha256(ticket).hexdigest()[:32]

    async def main() -> None:
        channel = Channel(one.address, Config())
        stream = channel.request("/ai.AI/chaos", Cardinality.STREAM_STREAM, Raw, Raw, metadata={"x-job-id": name})
        async with stream:
            await stream.send_request()
            await stream.send_message(Raw(data=packed({}), open=Open(ticket=ticket, epoch=2)))
            while (message := await stream.recv_message()) is not None and message.state is None:
                pass
            second = await asyncio.to_thread(own, one.address, chunks(b"abc"), ticket=ticket, epoch=1)
            assert second.refusal == (Status.ABORTED, "SUPERSEDED")
            await stream.send_message(Raw(data=X, last=True), end=True)
            states = [m.state async for m in stream if m.state is not None]
            assert states[-1].phase is Phase.DONE
        await channel.aclose()

    run(main)


@pytest.mark.parametrize("rpc", ["chaos", "predict"])
def test_no_message_at_all(one: Served, rpc: str) -> None:
    assert talk(one.address, rpc, []).refusal == (INVALID, "BAD_MESSAGE")


def test_a_first_message_that_is_no_protobuf(one: Served) -> None:
    for attack in (b"\xff", b"\x08\x05", b"\x78\x01" * 500_000, b"\x7a\x80\x80\x08" + bytes(1 << 17), b"\x12\x01\xff"):
        assert talk(one.address, "chaos", [Bytes(attack)]).refusal == (INVALID, "BAD_MESSAGE")


def test_open_behind_the_first_message_of_a_plain_call(one: Served) -> None:
    messages = [Raw(data=packed({})), Raw(data=X, open=Open(ticket=os.urandom(16)))]
    assert talk(one.address, "chaos", messages).refusal == (INVALID, "BAD_MESSAGE")


def test_a_caller_that_claims_to_have_more_than_there_is(one: Served) -> None:
    answer = own(one.address, chunks(b"abc"), have=(1 << 64) - 1, log_have=(1 << 64) - 1)
    assert answer.state.phase is Phase.DONE
    assert answer.data == b""


def test_callers_that_leave_in_the_middle(one: Served) -> None:
    async def main() -> None:
        channel = Channel(one.address, Config())
        for n in range(20):
            stream = channel.request("/ai.AI/chaos", Cardinality.STREAM_STREAM, Raw, Raw, metadata={})
            await stream.__aenter__()
            await stream.send_request()
            if n % 3:
                await stream.send_message(Raw(data=packed({})))
            if n % 3 == 2:
                await stream.send_message(Raw(data=frame(RANDOM)[:1000]))
            if n % 2:
                reset(stream)
        await channel.aclose()

    run(main)


# Models


@pytest.mark.parametrize(
    "text", ["the secret is 42", "", "é" * 5000, "two\nlines\r\n", "x" * 100_000, "100 %41", "\udcff"]
)
def test_a_model_that_raises(either: Served, text: str) -> None:
    shown = text.encode("utf-8", "backslashreplace").decode()
    answer = plain(either.address, [X], {"text": text}, name="boom")
    assert answer.refusal == (INTERNAL, "MODEL_ERROR")
    assert answer.metadata == {"type": "LookupError"}
    begins, _, rest = answer.message.partition(": ")
    assert begins == "LookupError"
    assert shown.startswith(rest)
    assert len(rest) >= min(len(shown), 300)
    state = own(either.address, chunks(b"abc"), {"text": text}, name="boom").state
    assert state.phase is Phase.FAILED
    assert state.error is not None
    assert (state.error.type, state.error.reason, state.error.trace) == ("LookupError", "MODEL_ERROR", "")
    assert shown.startswith(state.error.message)


@pytest.mark.parametrize("text", ["x" * 100_000, "é%" * 10_000, "\n" * 10_000, "😀" * 10_000])
def test_a_stock_client_gets_the_status_however_long_the_model_s_text_is(one: Served, text: str) -> None:
    """gRPC's C core refuses trailers above 8 KiB, with the status that they carry."""
    message = bytes(Raw(data=packed({"text": text})))
    with grpc.insecure_channel(one.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream("/ai.AI/chaos")(iter([message]), metadata=[("x-func-name", "boom")]))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    told = caught.value.details().removeprefix("LookupError: ")
    assert text.startswith(told)
    assert len(told) > 100


def test_its_traceback_is_in_the_server_s_log_and_nowhere_else(either: Served) -> None:
    mark = os.urandom(8).hex()
    for answer in (
        plain(either.address, kwargs={"text": mark}, name="boom"),
        own(either.address, kwargs={"text": mark}, name="boom"),
    ):
        assert "Traceback" not in repr(answer)
        assert "models_bad.py" not in repr(answer)
    log = either.log_text()
    assert log.count(f"LookupError: {mark}") >= 2
    assert "Traceback (most recent call last)" in log
    assert "raise LookupError(text)" in log


def test_a_version_half_trained_is_gone(either: Served) -> None:
    answer = plain(either.address, rpc="train")
    assert answer.refusal == (INTERNAL, "MODEL_ERROR")
    assert answer.message == "ValueError: half trained"
    assert list(either.data.iterdir()) == []


@BOTH
def test_a_model_that_exits(either: Served, call: Any) -> None:
    for name in sorted({"leave", "leave_asyncio", "leave_thread"} & exported(either)):
        answer = call(either.address, name=name)
        if call is plain:
            assert answer.refusal == (INTERNAL, "MODEL_ERROR")
            assert answer.message == "SystemExit: 3"
        else:
            assert answer.state.error is not None
            assert (answer.state.error.type, answer.state.error.reason) == ("SystemExit", "MODEL_ERROR")


def exported(served: Served) -> set[str]:
    return set(plain(served.address, name="?").message.partition("it has: ")[2].split(", "))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("not_json", "RESULT_NOT_JSON"), ("not_a_number", "RESULT_NOT_JSON"), ("no_file", "RESULT_NO_FILE")],
)
def test_results_that_cannot_be_sent(either: Served, name: str, reason: str) -> None:
    assert plain(either.address, name=name).refusal == (INTERNAL, reason)
    state = own(either.address, name=name).state
    assert (state.phase, state.error.reason if state.error else "") == (Phase.FAILED, reason)


def test_bytes_that_are_no_text_reach_own_clients_only(either: Served) -> None:
    assert plain(either.address, name="no_text").refusal == (INTERNAL, "RESULT_NOT_TEXT")
    assert zstandard.decompress(own(either.address, name="no_text").data) == b"\xff"


@BOTH
@pytest.mark.parametrize("kwargs", [{"path": "/etc/passwd"}, {"context": 1}, {"self": 1}, {"nope": 1}])
def test_kwargs_that_the_method_does_not_take(either: Served, call: Any, kwargs: dict[str, Any]) -> None:
    answer = call(either.address, kwargs=kwargs, name="boom")
    (name,) = kwargs
    assert (answer.status, answer.reason, answer.metadata) == (INVALID, "BAD_KWARGS", {"parameter": name})
    assert name in answer.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to anything")
def test_the_payload_is_read_only(one: Served) -> None:
    assert plain(one.address, [X], name="vandal").message.startswith("PermissionError")


@pytest.mark.parametrize(
    ("model", "text"),
    [("LoadFails", "OSError: while it loaded: no weights"), ("LoadExits", "SystemExit: while it loaded: no lic")],
)
def test_a_class_that_does_not_load(tmp_path: Path, model: str, text: str) -> None:
    served = Served(f"tests.models_bad:{model}", tmp_path, (), "127.0.0.1:0")
    for _ in range(2):
        answer = plain(served.address)
        assert answer.refusal == (INTERNAL, "LOAD_FAILED")
        assert answer.message.startswith(text)
        error = own(served.address).state.error
        assert error is not None
        assert f"{error.type}: {error.message}".startswith(text)
    assert served.stop() == 0
    assert left_in(served.spool, uploads=False) == []


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="this system cannot limit another process")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """No file of the server and its worker may be longer than 100 kB, which they see as a full disk."""
    served = Served("tests.models_bad:InProcess", tmp_path, (), "127.0.0.1:0")
    before = honest(served)
    for pid in (served.process.pid, *children(served.process.pid)):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    full = (Status.RESOURCE_EXHAUSTED, "SPOOL_FULL")
    assert plain(served.address, [frame(RANDOM)]).refusal == full
    assert own(served.address, chunks(RANDOM)).refusal == full
    assert plain(served.address, kwargs={"a": RANDOM.hex()}).refusal == full
    for length in (60_000, 200_000):  # in the journal, and in a file
        assert plain(served.address, kwargs={"length": length}, name="random").refusal == (
            INTERNAL,
            "RESULT_NOT_STORED",
        )
    error = own(served.address, kwargs={"length": 200_000}, name="random").state.error
    assert error is not None
    assert error.reason == "RESULT_NOT_STORED"
    os.truncate(served.log, 0)  # it is as long as it may be, too
    with calls() as threads:
        waits = threads.submit(own, served.address, kwargs={"length": 60_000, "log": 0}, name="random")
        wait_until(lambda: "its outcome could not be stored" in served.log_text())
        assert not waits.done()
        resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert waits.result().state.phase == Phase.DONE
    assert honest(served) == before
    wait_until(lambda: all(path.startswith("workers/") for path in left_in(served.spool, uploads=False)))
    assert served.stop() == 0
    assert left_in(served.spool, uploads=False) == []
    assert "a bug of aipod" not in served.log_text()


# Starting a server


def fails(tmp_path: Path, *arguments: str, status: int = 1) -> str:
    """The last line of stderr of a `serve` that does not start."""
    command = ["serve", "--data", str(tmp_path / "data"), *arguments]
    if "--spool" not in arguments:
        command += ["--spool", str(tmp_path / "spool")]
    with start(*command, environ=dict(os.environ), forked=True) as process:
        out, err = process.communicate(timeout=60)
    text = err.decode()
    assert process.returncode == status, text
    assert out == b""
    assert "Traceback" not in text
    if (tmp_path / "spool").exists():
        assert left_in(tmp_path / "spool") == []
    return str(text.splitlines()[-1])


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("no_such_module:Model", "aipod: LOAD_FAILED: there is no module 'no_such_module'"),
        ("tests.models_bad:NoSuchClass", "aipod: LOAD_FAILED: module tests.models_bad has no class 'NoSuchClass'"),
        ("tests.models_bad:NothingToCall", "aipod: LOAD_FAILED: .* has no public method to call; define one"),
        ("broken_module:Model", "aipod: LOAD_FAILED: importing broken_module failed: OSError: no licence"),
        ("needy_module:Model", "aipod: LOAD_FAILED: importing needy_module failed: .*no_such_library.*install"),
        ("leaving_module:Model", "aipod: [A-Z_]+: .*SystemExit"),
    ],
)
def test_a_class_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, text: str) -> None:
    (tmp_path / "broken_module.py").write_text("raise OSError('no licence')")
    (tmp_path / "needy_module.py").write_text("import no_such_library")
    (tmp_path / "leaving_module.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert re.match(text, fails(tmp_path, model, "--bind", "127.0.0.1:0"))
    # Mutant seen: each name that was mistyped has a spool and a data directory for good.
    assert not {"spool", "data"} & {path.name for path in tmp_path.iterdir()}


SERVED = "tests.models_bad:InProcess"


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        line = fails(tmp_path, SERVED, "--bind", address)
    assert line.startswith(f"aipod: BIND_FAILED: cannot listen on {address}: ")
    assert line.endswith("choose another with --bind")


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000", "unix:"])
def test_an_address_that_is_none(tmp_path: Path, address: str) -> None:
    line = fails(tmp_path, SERVED, "--bind", address, status=1 if address == "unix:" else 2)
    assert line.startswith(f"aipod: BIND_FAILED: cannot listen on {address}: ")


@pytest.mark.parametrize("host", ["0.0.0.0", "", "[::]"])
def test_the_world_needs_a_word(tmp_path: Path, host: str) -> None:
    line = fails(tmp_path, SERVED, "--bind", f"{host}:{free_port()}", status=2)
    assert line.startswith("aipod: BIND_FAILED: ")
    assert "--insecure" in line


def test_a_spool_of_another_app(tmp_path: Path, one: Served) -> None:
    line = fails(tmp_path, "tests.models_bad:OnLoop", "--bind", "127.0.0.1:0", "--spool", str(one.spool))
    assert line.startswith(f"aipod: SPOOL_UNUSABLE: spool {one.spool} belongs to tests.models_bad.InProcess, not to ")
    assert "--spool" in line


def test_a_spool_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    line = fails(tmp_path, SERVED, "--bind", "127.0.0.1:0", "--spool", str(tmp_path / "file"))
    assert line.startswith("aipod: SPOOL_UNUSABLE: ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tick", "0"], "tick"),
        (["--tick", "soon"], "'soon' is not a time"),
        (["--max-payload", "much"], "'much' is not a size"),
        (["--instances", "0"], "instances"),
        (["--runner", "threads"], "runner"),
        (["--nonsense"], "nonsense"),
        (["--config", "no-such-file"], "no-such-file"),
    ],
)
def test_options_that_are_none(tmp_path: Path, arguments: list[str], text: str) -> None:
    line = fails(tmp_path, SERVED, *arguments, status=2)
    assert line.startswith("aipod: USAGE: ")
    assert text in line


@pytest.mark.parametrize("text", ["[aipod]\ntick =", "aipod = 3", "[aipod]\ntikc = 1", "[aipod]\ntick = -1"])
def test_a_file_of_settings_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "aipod.toml").write_text(text)
    assert fails(tmp_path, SERVED, "--config", str(tmp_path / "aipod.toml"), status=2).startswith("aipod: USAGE: ")


def test_a_runner_that_the_class_cannot_have(tmp_path: Path) -> None:
    arguments = ("tests.models_bad:OnLoop", "--runner", "process", "--bind", "127.0.0.1:0")
    assert fails(tmp_path, *arguments).startswith("aipod: BAD_RUNNER: ")


@pytest.mark.parametrize("model", ["tests.models_bad", "../../up:Model", "models bad:Model", ":Model"])
def test_what_is_no_module_and_class(tmp_path: Path, model: str) -> None:
    """It is also the name of the directory where the model's state lives."""
    line = fails(tmp_path, model, status=2)
    assert re.match(r"aipod: USAGE: model = .* is not MODULE:CLASS, for example", line)
    assert list(tmp_path.iterdir()) == []


def test_a_unix_address_that_is_a_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep")
    line = fails(tmp_path, SERVED, "--bind", f"unix:{tmp_path}/precious")
    assert line.startswith("aipod: BIND_FAILED: ")
    assert (tmp_path / "precious").read_text() == "keep"


def test_a_data_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("keep")
    assert fails(tmp_path, SERVED, "--bind", "127.0.0.1:0").startswith("aipod: DATA_UNUSABLE: ")
