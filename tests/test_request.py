"""What a first message asks for: methods, versions, sizes, tickets, and what is taken out of the kwargs."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import zstandard

from aipod.config import MIB
from aipod.errors import Refused
from aipod.job.request import (
    MAX_RELEASED,
    MAX_SOURCE,
    Request,
    check_method,
    has_large_kwargs,
    job_id,
    parse_attach,
    parse_request,
    stored_request,
)
from aipod.results import INLINE
from aipod.wire.ai import Op, Open, Raw, StreamInput

METHODS: dict[str, Any] = {name: {"parameters": [], "own": [], "open": True} for name in ("chaos", "predict", "hello")}
TICKET = b"0123456789abcdef"


def packed(kwargs: Any) -> bytes:
    return zstandard.compress(json.dumps(kwargs).encode())


def chaos(kwargs: Any = None, *, open_: Open | None = None, headers: dict[str, str] | None = None) -> Request:
    return parse_request("chaos", Raw(data=packed(kwargs or {}), open=open_), headers or {}, METHODS, "Scan", 1 << 20)


def predict(kwargs: Any = None, *, version: str = "", raw: Raw | None = None) -> Request:
    message = StreamInput(kwargs_json=packed(kwargs or {}), version=version, raw=raw)
    return parse_request("predict", message, {}, METHODS, "Scan", 1 << 20)


def own(open_: Open, *, name: str | None = None) -> Request:
    return chaos(open_=open_, headers={"x-job-id": job_id(open_.ticket) if name is None else name})


def refusal(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(Refused) as caught:
        function(*args, **kwargs)
    return f"{caught.value.reason}: {caught.value.message}"


def test_a_plain_request() -> None:
    request = predict({"top": 5, "_aipod_bin_size": 12, "_aipod_else": 1}, version="7", raw=Raw(data=b"chunk"))
    assert (request.method, request.version, request.size, request.plain) == ("predict", "7", 12, True)
    assert json.loads(request.kwargs) == {"top": 5}
    assert request.first == Raw(data=b"chunk")


def test_the_first_data_of_chaos_is_no_payload() -> None:
    request = chaos({"a": 1}, open_=Open(ticket=TICKET, size=3), headers={"x-job-id": job_id(TICKET)})
    assert request.first.data == b""
    assert (request.size, request.plain, request.job_id) == (3, False, job_id(TICKET))


def test_no_kwargs_at_all() -> None:
    request = parse_request("chaos", Raw(), {}, METHODS, "Scan", 1024)
    assert (request.kwargs, request.size, request.version, request.method) == (b"{}", None, "default", "chaos")


def test_plain_requests_have_ids_that_nobody_can_guess() -> None:
    assert len({chaos().job_id for _ in range(100)}) == 100


def test_credentials_do_not_reach_the_model() -> None:
    assert chaos(headers={"authorization": "secret", ":path": "/", "x-custom": "yes"}).metadata == {"x-custom": "yes"}


CREDENTIALS = ("authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key", "x_apikey", "x-auth-token")


@pytest.mark.parametrize("name", [*CREDENTIALS, "x-security-token-bin", "x-client-secret", "x-password"])
def test_no_header_that_tells_who_calls_is_kept(name: str) -> None:
    """Neither for the method nor for the spool."""
    assert chaos(headers={name: "abc", "x-custom": "yes"}).metadata == {"x-custom": "yes"}


def test_a_header_names_the_method_on_chaos_only() -> None:
    assert chaos(headers={"x-func-name": "hello"}).method == "hello"
    message = StreamInput()
    assert parse_request("predict", message, {"x-func-name": "hello"}, METHODS, "Scan", 1024).method == "predict"


@pytest.mark.parametrize("name", ["nope", "", "_private", "__init__", "load", "x" * 1000, "aipod.methods", "é"])
def test_an_unknown_method_is_refused_with_the_class_and_what_there_is(name: str) -> None:
    text = refusal(check_method, name, METHODS, "Scan")
    assert text.startswith(f"UNKNOWN_METHOD: Scan has no method {name[:80]!r} to call")
    assert text.endswith("chaos, hello, predict")


@pytest.mark.parametrize("size", ["12", 1.5, True, -1, 1 << 63, [], {}])
def test_a_size_that_is_none(size: Any) -> None:
    assert refusal(chaos, {"_aipod_bin_size": size}).startswith("BAD_KWARGS: _aipod_bin_size")


@pytest.mark.parametrize("size", [None, 0, (1 << 63) - 1])
def test_a_size_that_is_one(size: int | None) -> None:
    assert chaos({"_aipod_bin_size": size}).size == size


@pytest.mark.parametrize(
    ("named", "told", "version"),
    [("", None, "default"), ("7", None, "7"), ("", "7", "7"), ("", 7, "7"), ("7", "7", "7"), ("7", "", "7")],
)
def test_a_version_comes_from_either_place_and_is_taken_out(named: str, told: Any, version: str) -> None:
    request = predict({"version": told, "top": 1}, version=named)
    assert request.version == version
    assert json.loads(request.kwargs) == {"top": 1}


@pytest.mark.parametrize(
    "told", ["../x", "a/b", ".hidden", "-x", "x" * 65, "é", "a b", "a\n", "a\0", 1.5, True, [], {}]
)
def test_a_version_that_is_none(told: Any) -> None:
    assert refusal(chaos, {"version": told}).startswith("BAD_VERSION: ")
    if isinstance(told, str):
        assert refusal(predict, version=told).startswith("BAD_VERSION: ")


def test_two_versions_must_agree() -> None:
    assert refusal(predict, {"version": "8"}, version="7").startswith("BAD_VERSION: version is '7'")


@pytest.mark.parametrize("length", [16, 64])
def test_a_ticket(length: int) -> None:
    assert own(Open(ticket=bytes(length))).job_id == job_id(bytes(length))


@pytest.mark.parametrize("length", [0, 15, 65])
def test_a_ticket_of_the_wrong_length(length: int) -> None:
    assert refusal(own, Open(ticket=bytes(length))).startswith("BAD_TICKET: ")


@pytest.mark.parametrize("length", [0, 15, 65, 1 << 20])
def test_released_tickets_are_tickets(length: int) -> None:
    assert own(Open(ticket=TICKET, released=[TICKET, b"t" * 64])).open is not None
    assert refusal(own, Open(ticket=TICKET, released=[TICKET, bytes(length)])).startswith("BAD_TICKET")


def test_a_source_has_a_bound() -> None:
    assert own(Open(ticket=TICKET, source=bytes(MAX_SOURCE))).open is not None
    assert refusal(own, Open(ticket=TICKET, source=bytes(MAX_SOURCE + 1))).startswith("BAD_MESSAGE: open.source")


def test_what_the_first_message_carries_is_given_away() -> None:
    request = predict(raw=Raw(data=b"chunk"))
    assert request.take_first() == Raw(data=b"chunk")
    assert request.first == Raw()


@pytest.mark.parametrize("name", ["", "x", "0" * 32, job_id(TICKET).upper(), job_id(TICKET) + "0", "../../etc/passwd"])
def test_the_header_must_be_the_hash_of_the_ticket(name: str) -> None:
    assert refusal(own, Open(ticket=TICKET), name=name).startswith("BAD_TICKET: header x-job-id")


def test_an_op_that_nobody_knows() -> None:
    text = refusal(own, Open(ticket=TICKET, op=Op(99)))
    assert text.startswith("BAD_MESSAGE: open.op is 99; this server knows [0, 1")


def attach(message: Raw | StreamInput, headers: dict[str, str] | None = None) -> tuple[str, Open] | None:
    return parse_attach(message, {"x-job-id": job_id(TICKET)} if headers is None else headers)


@pytest.mark.parametrize("op", [Op.ATTACH, Op.CANCEL, Op.RELEASE])
@pytest.mark.parametrize("rpc", [Raw, StreamInput])
def test_a_ticket_is_all_that_these_need(op: Op, rpc: Any) -> None:
    open_ = Open(ticket=TICKET, op=op)
    message = Raw(open=open_) if rpc is Raw else StreamInput(raw=Raw(open=open_))
    assert attach(message) == (job_id(TICKET), open_)
    with pytest.raises(Refused, match="x-job-id"):
        attach(message, {})


def test_an_unknown_op_needs_no_request_to_be_refused() -> None:
    assert refusal(attach, Raw(open=Open(ticket=TICKET, op=Op(99)))).startswith("BAD_MESSAGE: open.op")


@pytest.mark.parametrize(
    "message",
    [
        *(Raw(), StreamInput(), StreamInput(raw=Raw())),
        *(Raw(open=Open(ticket=TICKET, op=op)) for op in (Op.RUN, Op.RESUME)),
    ],
    ids=range(5),
)
def test_what_brings_a_request_is_no_attach(message: Any) -> None:
    assert attach(message) is None


def told(**changes: Any) -> Request:
    """A request of an own client, with something changed."""
    given: dict[str, Any] = {"kwargs": {"a": 1}, "method": "hello", "size": 5, "source": b"s", "version": "v"} | changes
    open_ = Open(ticket=TICKET, epoch=changes.get("epoch", 7), size=given["size"], source=given["source"])
    headers = {"x-job-id": job_id(TICKET), "x-func-name": given["method"], "x-more": str(changes)}
    return chaos(given["kwargs"] | {"version": given["version"]}, open_=open_, headers=headers)


@pytest.mark.parametrize(
    "changes",
    [
        {"kwargs": {"a": 2}},
        {"kwargs": {}},
        {"method": "predict"},
        {"size": 6},
        {"size": None},
        {"source": b"t"},
        {"source": b""},
        {"version": "w"},
        {"version": ""},
    ],
    ids=str,
)
def test_another_request_has_another_fingerprint(changes: dict[str, Any]) -> None:
    assert told().fingerprint != told(**changes).fingerprint


def test_the_same_request_in_another_connection_has_the_same_fingerprint() -> None:
    assert told(epoch=8, more=1).fingerprint == told().fingerprint
    resumed = told()
    assert resumed.open is not None
    resumed.open.op = Op.RESUME
    assert resumed.fingerprint == told().fingerprint


@pytest.mark.parametrize("text", [r"\ud83d\ude00", "\N{GRINNING FACE}", r"\ud800", r"x\udc00\ud83d", "\x7f\u2028"])
def test_kwargs_take_no_more_bytes_than_on_the_wire(text: str) -> None:
    """Mutants seen: every character beyond ASCII is escaped; half a pair ends the call as a bug of the server."""
    sent = ('{"a": "' + text * 100 + '"}').encode()
    kept = parse_request("chaos", Raw(data=zstandard.compress(sent)), {}, METHODS, "Scan", 1 << 20).kwargs
    assert kept is not None
    assert len(kept) <= len(sent)
    assert json.loads(kept.decode()) == json.loads(sent)


def test_long_kwargs_are_left_to_the_entry() -> None:
    for size, stays in ((INLINE, True), (INLINE + 1, False)):
        request = chaos({"a": "x" * (size - len('{"a": ""}'))})
        assert request.kwargs is not None
        assert len(request.kwargs) == size
        request.drop_kwargs()
        assert (request.kwargs is not None) is stays


def test_which_kwargs_are_large() -> None:
    assert not has_large_kwargs(Raw(), 100)
    assert not has_large_kwargs(Raw(data=zstandard.compress(bytes(INLINE))), MIB)
    assert has_large_kwargs(Raw(data=zstandard.compress(bytes(INLINE + 1))), MIB)
    stream = zstandard.ZstdCompressor().compressobj()
    unstated = stream.compress(b"{}") + stream.flush()
    assert has_large_kwargs(StreamInput(kwargs_json=unstated), MIB)
    noise = os.urandom(MIB)
    assert has_large_kwargs(Raw(data=zstandard.compress(noise)), MIB)
    assert refusal(has_large_kwargs, Raw(data=zstandard.compress(noise)), MIB // 2).startswith("BAD_KWARGS")


def test_what_the_journal_has_is_enough_to_run_the_job_elsewhere() -> None:
    request = told()
    fields = json.loads(json.dumps(request.fields)) | {"attempt": 1}
    stored = stored_request(request.job_id, fields, request.kwargs)
    assert (stored.method, stored.version, stored.kwargs, stored.size) == ("hello", "v", b'{"a": 1}', 5)
    assert (stored.metadata, stored.attempt, stored.plain) == (request.metadata, 1, False)
    assert stored.open is not None
    assert stored.open.epoch == 7
    assert TICKET.hex() not in json.dumps(request.fields)  # who reads the spool cannot claim the job


def test_a_call_may_release_so_many_and_no_more() -> None:
    assert own(Open(ticket=TICKET, released=[TICKET] * MAX_RELEASED)).open is not None
    assert refusal(own, Open(ticket=TICKET, released=[TICKET] * (MAX_RELEASED + 1))).startswith("BAD_MESSAGE: open.rel")


@pytest.mark.parametrize("depth", [100, 900, 5_000, 200_000])
def test_nested_kwargs_are_taken_or_refused_but_never_break(depth: int) -> None:
    text = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    message = Raw(data=zstandard.compress(text))
    try:
        request = parse_request("chaos", message, {}, METHODS, "Scan", 1 << 20)
    except Refused as exc:
        assert depth > 500
        assert exc.reason == "BAD_KWARGS"  # noqa: PT017
    else:
        assert request.kwargs == text.replace(b":", b": ")
