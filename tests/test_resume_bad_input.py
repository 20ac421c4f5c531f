"""What is not right changes nothing, seen from the wire: after each, the honest client finishes the same job."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import zstandard

from aipod.codec import digest, job_id
from aipod.config import MIB
from aipod.wire.ai import Op, Phase, Raw
from tests.conftest import run
from tests.models_resume import LONG, answer_to
from tests.pairs import (
    PAYLOAD,
    Pair,
    Work,
    begun,
    entries,
    opened,
    refused,
    two_servers,
    work_in,
)
from tests.wire import Client, Lost, attach, call

pair = pytest.fixture(scope="module")(two_servers)
work = pytest.fixture(work_in)

# What never was, and what lives elsewhere


def test_resume_of_what_never_was_has_it_that_nothing_can_start(pair: Pair, work: Work) -> None:
    """I2, I13. Mutants seen: RESUME creates; RESUME leaves no tombstone."""

    async def main() -> None:
        client = work.client(size=10)
        client.committed = True
        for address in pair.of("abab"):
            refusal = await refused(client.visit, address)
            assert refusal.reason == "NOT_STARTED"
            assert refusal.metadata["spool"].partition("-")[0] == (pair.spool / "spool-id").read_text()
        client.committed = False
        for address in pair.of("ab"):
            assert (await client.visit(address)).phase == Phase.RELEASED
        assert work.lines == []

    run(main)


def test_another_spool_creates_nothing(pair: Pair, work: Work) -> None:
    """I13. Mutant seen: the spool is looked at only where the job exists."""

    async def main() -> None:
        before = entries(pair.spool)
        client = work.client()
        client.spool = "0123456789abcdef-" + "0" * 32
        for committed in (False, True):
            client.committed = committed
            refusal = await refused(client.visit, pair.a.address)
            assert refusal.reason == "WRONG_SPOOL"
            assert refusal.metadata["spool"].partition("-")[0] == (pair.spool / "spool-id").read_text()
        assert entries(pair.spool) == before
        # The name of this spool after another boot is still its own.
        client.committed, client.spool = False, (pair.spool / "spool-id").read_text() + "-" + "0" * 32
        assert (await client.visit(pair.a.address)).phase == Phase.DONE

    run(main)


OTHERS: list[tuple[str, Callable[[Client], None]]] = [
    ("kwargs", lambda client: client.kwargs.update(size=11)),
    ("method", lambda client: setattr(client, "name", "again")),
    ("size", lambda client: setattr(client, "payload", PAYLOAD[:-1])),
    ("version", lambda client: client.kwargs.update(version="7")),
]


@pytest.mark.parametrize("change", [change for _, change in OTHERS], ids=[name for name, _ in OTHERS])
def test_another_request_under_the_same_ticket(pair: Pair, work: Work, change: Callable[[Client], None]) -> None:
    """I9. Mutant seen: the fingerprint is compared while RECEIVING only."""

    async def main() -> None:
        client = work.client(size=10)
        await begun(client, pair.a.address)
        other = work.client(size=10)
        other.ticket, other.epoch = client.ticket, 5
        change(other)
        for committed in (False, True):
            other.committed = committed
            assert (await refused(other.visit, pair.b.address)).reason == "OTHER_REQUEST"
        outcome = await client.visit(pair.a.address)
        assert outcome.data == answer_to(PAYLOAD, 10)
        assert (await refused(other.visit, pair.b.address)).reason == "OTHER_REQUEST"
        assert await attach(pair.b.address, client.ticket) == outcome
        assert work.lines == ["start"]

    run(main)


def test_another_source_under_the_same_ticket(pair: Pair, work: Work) -> None:
    """I9. Mutant seen: the source is no part of the fingerprint."""

    async def main() -> None:
        client = work.client()
        await begun(client, pair.a.address)
        async with call(
            pair.a.address,
            client.ticket,
            Op.RUN,
            client.name,
            client.kwargs,
            **client.fields | {"source": b"other", "epoch": 9},
        ) as one:
            assert (await refused(one.outcome)).reason == "OTHER_REQUEST"
        assert (await client.visit(pair.b.address)).data == answer_to(PAYLOAD, LONG)
        assert client.sent[0] == 1000
        assert work.lines == ["start"]

    run(main)


# Bad input


GOOD = zstandard.ZstdCompressor(write_checksum=True).compress(PAYLOAD[1000:2000])


def flipped(place: int) -> bytes:
    return GOOD[:place] + bytes([GOOD[place] ^ 16]) + GOOD[place + 1 :]


def bomb(**options: bool) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(bytes(64 * MIB))


def lying_bomb() -> bytes:
    """It states the size of a chunk."""
    frame = bytearray(bomb())
    assert frame[4] >> 6 == 2, "the size is stated in 4 bytes"
    at = 5 if frame[4] & 32 else 6
    assert int.from_bytes(frame[at : at + 4], "little") == 64 * MIB
    frame[at : at + 4] = (1000).to_bytes(4, "little")
    return bytes(frame)


BAD: list[tuple[str, list[Raw], str]] = [
    ("a gap", [Raw(data=GOOD, offset=1001)], "OFFSET_MISMATCH"),
    ("far away", [Raw(data=GOOD, offset=(1 << 64) - 1)], "OFFSET_MISMATCH"),
    ("truncated", [Raw(data=GOOD[:-3], offset=1000)], "BAD_CHUNK"),
    ("a flipped bit", [Raw(data=flipped(len(GOOD) // 2), offset=1000)], "BAD_CHUNK"),
    ("a flipped checksum", [Raw(data=flipped(len(GOOD) - 1), offset=1000)], "BAD_CHUNK"),
    ("two frames", [Raw(data=GOOD + GOOD, offset=1000)], "BAD_CHUNK"),
    ("no frame", [Raw(data=b"payload", offset=1000)], "BAD_CHUNK"),
    ("an empty frame", [Raw(data=zstandard.compress(b""), offset=1000)], "BAD_CHUNK"),
    ("a bomb", [Raw(data=bomb(), offset=1000)], "BAD_CHUNK"),
    ("a bomb of no stated size", [Raw(data=bomb(write_content_size=False), offset=1000)], "BAD_CHUNK"),
    ("a bomb of another size", [Raw(data=lying_bomb(), offset=1000)], "BAD_CHUNK"),
    ("garbage behind a frame", [Raw(data=GOOD + b"x", offset=1000)], "BAD_CHUNK"),
    ("too much", [Raw(data=zstandard.compress(bytes(5000)), offset=1000)], "SIZE_MISMATCH"),
    ("last too early", [Raw(offset=1000, last=True, digest=digest(PAYLOAD[:1000]))], "SIZE_MISMATCH"),
    ("last of more", [Raw(offset=len(PAYLOAD), last=True, digest=digest(PAYLOAD))], "SIZE_MISMATCH"),
    ("last behind a gap", [Raw(data=GOOD, offset=2500, last=True)], "OFFSET_MISMATCH"),
    ("a digest that is none", [Raw(digest=b"12345", offset=1000)], "BAD_MESSAGE"),
]


@pytest.mark.parametrize(("messages", "reason"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_changes_nothing(pair: Pair, work: Work, messages: list[Raw], reason: str) -> None:
    """I9: the honest client finishes the same job.

    Mutants seen: a gap is not looked for; `last` is believed; a chunk of any size is taken; what is behind its frame is
    not looked at; a chunk is written before it is checked.
    """

    async def main() -> None:
        client = work.client(size=10)
        await begun(client, pair.a.address)
        async with opened(client, pair.a.address) as bad:
            with contextlib.suppress(Lost):
                for message in messages:
                    await bad.send(message)
            assert (await refused(bad.outcome)).reason == reason
        outcome = await client.visit(pair.b.address)
        assert client.sent[0] == 1000
        assert outcome.data == answer_to(PAYLOAD, 10)
        assert work.lines == ["start"]

    run(main)


@pytest.mark.parametrize("second", [digest(PAYLOAD), digest(b"another")], ids=["the same", "another"])
def test_an_overlap_is_skipped_and_a_second_last_is_not_read(pair: Pair, work: Work, second: bytes) -> None:
    """I9. Mutants seen: what overlaps is written again; the last `last` counts."""

    async def main() -> None:
        client = work.client(size=10)
        await begun(client, pair.a.address)
        async with opened(client, pair.b.address) as one:
            for start, end in ((0, 700), (300, 1300), (0, 1300), (1300, 1400), (200, len(PAYLOAD))):
                await one.chunk(PAYLOAD[start:end], start)
            for check in (digest(PAYLOAD), second):
                with contextlib.suppress(Lost):
                    await one.send(Raw(offset=len(PAYLOAD), last=True, digest=check))
            outcome = await one.outcome()
        assert outcome.data == answer_to(PAYLOAD, 10)
        assert work.lines == ["start"]

    run(main)


def test_an_upload_that_ends_without_last_is_no_whole_one(pair: Pair, work: Work) -> None:
    """I9. What has come is kept. Mutant seen: the half-close is taken for `last`."""

    async def main() -> None:
        client = work.client(size=10)
        client.sized = False
        await begun(client, pair.a.address)
        async with opened(client, pair.a.address) as bad:
            await bad.chunk(PAYLOAD[1000:2000], 1000, end=True)
            assert (await refused(bad.outcome)).reason == "TRUNCATED"
        assert (await client.visit(pair.b.address)).data == answer_to(PAYLOAD, 10)
        assert client.sent[0] == 2000
        assert work.lines == ["start"]

    run(main)


def test_a_digest_that_is_another_stops_the_job_before_it_starts(pair: Pair, work: Work) -> None:
    """I9. Also after a resume, where the server must read what it has. Mutant seen: no digest of a resumed upload."""

    async def main() -> None:
        client = work.client()
        await begun(client, pair.a.address)
        for address in pair.of("ab"):
            async with opened(client, address) as one:
                have = one.states[-1].offset
                await one.chunk(PAYLOAD[have:], have)
                await one.send(Raw(offset=len(PAYLOAD), last=True, digest=digest(b"another")), end=True)
                assert (await refused(one.outcome)).reason == "DIGEST_MISMATCH"
            client.begins_anew()
        assert work.lines == []
        assert (await client.visit(pair.a.address)).phase == Phase.DONE

    run(main)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(bytes(len(PAYLOAD)), "DIGEST_MISMATCH"), (PAYLOAD + b"more", "SIZE_MISMATCH")],
    ids=["other bytes", "more bytes"],
)
def test_an_upload_of_other_bytes_can_be_begun_anew(pair: Pair, work: Work, wrong: bytes, reason: str) -> None:
    """I9. They were durable, and told to be: the honest client is told that nothing is. Mutant seen: they are kept."""

    async def main() -> None:
        client = work.client()
        client.sized = False
        async with opened(client, pair.a.address) as one:
            await one.chunk(wrong, 0, sync=True)
            await one.until(lambda state: state.offset == len(wrong))
        async with opened(client, pair.b.address) as one:
            assert one.states[-1].offset == len(wrong)
            await one.last(PAYLOAD)
            assert (await refused(one.outcome)).reason == reason
        client.begins_anew()
        async with opened(client, pair.a.address) as one:
            assert one.states[-1].offset == 0
        assert work.lines == []
        assert (await client.visit(pair.b.address)).phase == Phase.DONE

    run(main)


TICKETS: list[tuple[str, dict[str, Any]]] = [
    ("another ticket under this id", {"ticket": b"another ticket!!"}),
    ("a short one", {"ticket": b"short"}),
    ("a long one", {"ticket": b"x" * 65}),
    ("a short one and its id", {"ticket": b"short", "job": job_id(b"short")}),
    ("a long one and its id", {"ticket": b"x" * 65, "job": job_id(b"x" * 65)}),
    ("none", {"ticket": b""}),
    ("an id that is a path", {"job": "../" * 8 + "etc/passwd"}),
    ("an id with more", {"job": "x" + "0" * 32}),
    ("another id", {"job": "0" * 32}),
    ("a ticket that is a path", {"ticket": b"../../../etc/passwd"}),
    ("no id", {"job": ""}),
]


@pytest.mark.parametrize("op", [Op.RUN, Op.RESUME, Op.ATTACH, Op.CANCEL, Op.RELEASE])
@pytest.mark.parametrize("wrong", [row[1] for row in TICKETS], ids=[row[0] for row in TICKETS])
def test_who_has_not_the_ticket_has_nothing(pair: Pair, work: Work, wrong: dict[str, Any], op: Op) -> None:
    """I9. Mutants seen: the id is taken from the header; a ticket of any length is one."""

    async def main() -> None:
        client = work.client(size=10)
        await begun(client, pair.a.address)
        before = entries(pair.spool)
        given = {"ticket": client.ticket, "job": job_id(client.ticket)} | wrong
        ticket = given.pop("ticket")
        async with call(pair.a.address, ticket, op, client.name, client.kwargs, epoch=99, **given) as one:
            assert (await refused(one.outcome)).reason == "BAD_TICKET"
        assert entries(pair.spool) == before
        assert (await client.visit(pair.a.address)).data == answer_to(PAYLOAD, 10)

    run(main)


UP = "../" * 8 + "etc/passwd"
PATHS: list[tuple[str, dict[str, Any], str]] = [
    ("version", {"kwargs": {"version": UP}}, "BAD_VERSION"),
    ("keyword argument", {"kwargs": {UP: UP}}, "OTHER_REQUEST"),
    ("method", {"name": UP}, "UNKNOWN_METHOD"),
    ("spool", {"spool": UP}, "WRONG_SPOOL"),
    ("source", {"source": UP.encode()}, "OTHER_REQUEST"),
    ("released ticket", {"released": [UP.encode()], "source": b""}, "OTHER_REQUEST"),
]


@pytest.mark.parametrize("op", [Op.RUN, Op.RESUME])
@pytest.mark.parametrize(("wrong", "reason"), [row[1:] for row in PATHS], ids=[row[0] for row in PATHS])
def test_names_that_are_paths(pair: Pair, work: Work, wrong: dict[str, Any], reason: str, op: Op) -> None:
    """I9. Wherever a client says a name. Mutant seen: any version is taken."""

    async def main() -> None:
        client = work.client(size=10)
        await begun(client, pair.a.address)
        before = entries(pair.spool), sorted(pair.directory.iterdir())
        given = client.fields | {"epoch": 99, "name": client.name} | wrong
        given["kwargs"] = client.kwargs | wrong.get("kwargs", {})
        unfit = op == Op.RUN and UP in wrong.get("kwargs", {})  # looked at before the job is
        async with call(pair.b.address, client.ticket, op, **given) as one:
            assert (await refused(one.outcome)).reason == ("BAD_KWARGS" if unfit else reason)
        assert (entries(pair.spool), sorted(pair.directory.iterdir())) == before
        assert (await client.visit(pair.b.address)).data == answer_to(PAYLOAD, 10)
        assert client.sent[0] == 1000
        assert work.lines == ["start"]

    run(main)
