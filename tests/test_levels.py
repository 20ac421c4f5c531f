"""Which level is chosen: on pipelines in virtual time, and on what real ones have told."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aipod.config import MIB
from aipod.levels import LADDER, START, Batch, Levels

# Nanoseconds to pack a byte, and bytes that it becomes, by level: measured with chunks of 1 MiB.
Data = dict[int | None, tuple[float, float]]
TAR: Data = {
    None: (0.05, 1.0), -5: (1.31, 0.456), 1: (1.84, 0.314), 3: (2.54, 0.284), 6: (7.2, 0.265), 9: (12.3, 0.262),
}  # fmt: skip
JSON: Data = {
    None: (0.05, 1.0), -5: (1.78, 0.388), 1: (2.17, 0.265), 3: (3.0, 0.269), 6: (9.9, 0.257), 9: (16.6, 0.25),
}  # fmt: skip
FLOATS: Data = {
    None: (0.05, 1.0), -5: (0.16, 1.0), 1: (0.83, 0.926), 3: (1.1, 0.926), 6: (1.15, 0.926), 9: (1.44, 0.926),
}  # fmt: skip
RANDOM: Data = dict.fromkeys(LADDER, (0.14, 1.0))

# Nanoseconds for a byte on the wire.
LOOPBACK, GBIT, MBIT_500, MBIT_100, MBIT_10 = 0.35, 8.0, 16.0, 80.0, 800.0


class Always:
    """One level for all."""

    is_settled = True

    def __init__(self, level: int | None) -> None:
        self.level = level

    def sent(self, batch: Batch) -> None: ...


@dataclasses.dataclass
class Machine:
    """A sender and its receiver. What takes time takes nanoseconds for a byte; `now` is the byte of payload."""

    data: Callable[[int], Data]
    wire: Callable[[int], float]
    receiving: float = 0.5  # of payload, whatever it was on the wire
    reading: float = 0.1
    starved: float = 1.0  # how many times longer packing takes than it should
    shared: float = 0.0  # of packing, which sending and receiving wait for: there are not cores enough
    noise: float = 0.0
    varies: float = 0.0  # how well data shrinks
    pauses: tuple[int, ...] = ()  # batches behind which everything stands still for 50 ms
    buffer: int = MIB // 4  # bytes on the wire that nobody waits for
    unseen: int = 0  # bytes of that which the peer's system has acknowledged

    def send(self, levels: Levels | Always, size: int) -> tuple[float, list[int | None]]:
        """Nanoseconds for a byte of all that was sent, and the level of each batch.

        One batch is packed while one is ready and one is sent, as in `client.call` and `job.reply`.
        """
        dice = random.Random(size)
        packed = sent = arrived = 0.0  # when each stage is free
        taken = [0.0]  # when the sender has begun with each batch
        told: list[tuple[float, Batch]] = []
        chosen: list[int | None] = []
        under_way: list[tuple[float, float, int]] = []  # batches: when they leave, have arrived, bytes
        at, held = 0, 0
        while at < size:
            length = min((4 if levels.is_settled else 1) * MIB, size - at)
            while told and told[0][0] <= packed:
                levels.sent(told.pop(0)[1])
            level = levels.level
            chosen.append(level)
            packing, ratio = self.data(at)[level]
            packing *= self.starved * length * self._noise(dice)
            packed = max(packed + packing + self.reading * length, taken[-1])
            arrived += packing * self.shared
            waited, began = max(0.0, packed - sent), max(packed, sent)
            taken.append(began)
            wire, speed = (
                int(length * min(1.0, ratio * self._noise(dice, self.varies))),
                self.wire(at) * self._noise(dice),
            )
            leaves = max(arrived, began)
            arrived = max(leaves + wire * speed, arrived + self.receiving * length)
            arrived += 50e6 * (len(chosen) in self.pauses)
            under_way.append((leaves, arrived, wire))
            sent = max(began + 0.1 * length, arrived - self.buffer * speed)
            before, held = held, max(0, int(sum(_left(sent, *each) for each in under_way)) - self.unseen)
            under_way = [each for each in under_way if each[1] > sent]
            took = packing * 1e-9, (sent - began) * 1e-9, waited * 1e-9
            told.append((sent, Batch(level, length, wire, *took, held - before)))
            at += length
        return arrived / size, chosen

    def _noise(self, dice: random.Random, noise: float | None = None) -> float:
        return 1 + (self.noise if noise is None else noise) * (2 * dice.random() - 1)


def _left(now: float, leaves: float, arrived: float, wire: int) -> float:
    """Bytes of a batch that are still to come."""
    return wire * min(1.0, max(0.0, (arrived - now) / (arrived - leaves)))


def machine(data: Data, wire: float, **others: Any) -> Machine:
    return Machine(lambda _: data, lambda _: wire, **others)


def changes(chosen: list[int | None]) -> int:
    return sum(one != other for one, other in itertools.pairwise(chosen))


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("wire", [LOOPBACK, GBIT, MBIT_500, MBIT_100, MBIT_10])
@pytest.mark.parametrize("data", [TAR, JSON, FLOATS, RANDOM], ids=["tar", "json", "floats", "random"])
def test_it_is_nearly_as_fast_as_the_best_level(data: Data, wire: float, noise: float) -> None:
    """Of 128 MiB, what was spent on finding out included. Mutant seen: it begins with level 9."""
    sender = machine(data, wire, noise=noise)
    best = min(sender.send(Always(level), 128 * MIB)[0] for level in (-5, 1, 3, 6, 9))
    assert sender.send(Levels(), 128 * MIB)[0] < 1.16 * best


@pytest.mark.parametrize(
    ("data", "wire", "level"),
    [
        (TAR, LOOPBACK, {None}),
        (JSON, LOOPBACK, {None}),
        (TAR, GBIT, {1, 3}),
        (TAR, MBIT_100, {6, 9}),
        (JSON, MBIT_10, {9}),
        (FLOATS, MBIT_100, {1}),  # more brings nothing
    ],
    ids=["tar at once", "json at once", "tar 1 Gbit/s", "tar 100 Mbit/s", "json 10 Mbit/s", "floats 100 Mbit/s"],
)
def test_what_it_comes_to(data: Data, wire: float, level: set[int | None]) -> None:
    _, chosen = machine(data, wire).send(Levels(), 512 * MIB)
    assert set(chosen[len(chosen) // 2 :]) <= level


@pytest.mark.parametrize("wire", [LOOPBACK, 3.2, GBIT, MBIT_500, MBIT_100, MBIT_10])
@pytest.mark.parametrize("data", [TAR, JSON, FLOATS, RANDOM], ids=["tar", "json", "floats", "random"])
def test_it_does_not_go_to_and_fro(data: Data, wire: float) -> None:
    """2 GiB are some 500 batches, on a machine with some noise. Mutant seen: what was said once is done at once."""
    _, chosen = machine(data, wire, noise=0.2, varies=0.3).send(Levels(), 2048 * MIB)
    assert changes(chosen) <= len(chosen) / 20


@pytest.mark.parametrize(
    ("before", "after"), [(MBIT_100, LOOPBACK), (LOOPBACK, MBIT_100), (GBIT, MBIT_10), (2.5, MBIT_500)]
)
def test_a_wire_that_becomes_another_one(before: float, after: float) -> None:
    """From the middle on it does as well as one that has never known another wire.

    Mutants seen: level -5 is thought to save as much as 1; nothing above is tried.
    """
    size = 1024 * MIB
    changed = Machine(lambda _: TAR, lambda now: before if now < size // 2 else after)
    _, chosen = changed.send(Levels(), size)
    _, wanted = machine(TAR, after).send(Levels(), size)
    assert chosen[-1] == wanted[-1]


@pytest.mark.parametrize("wire", [LOOPBACK, GBIT])
def test_data_that_becomes_other_data(wire: float) -> None:
    size = 512 * MIB
    for first, second in ((RANDOM, TAR), (TAR, RANDOM), (FLOATS, JSON)):
        mixed = Machine(lambda now, first=first, second=second: first if now < size // 2 else second, lambda _: wire)  # type: ignore[misc]
        best = min(mixed.send(Always(level), size)[0] for level in (-5, 1, 3, 6, 9))
        assert mixed.send(Levels(), size)[0] < 1.15 * best


def test_a_machine_without_time_packs_less() -> None:
    """At 1 Gbit/s level 1 keeps up, unless packing takes four times as long."""
    busy = machine(TAR, GBIT, starved=4.0)
    took, chosen = busy.send(Levels(), 256 * MIB)
    assert took < 1.15 * min(busy.send(Always(level), 256 * MIB)[0] for level in LADDER)
    assert set(chosen[len(chosen) // 2 :]) <= {None, -5}


@pytest.mark.parametrize(
    ("data", "wire", "shared", "level"), [(TAR, 1.2, 0.5, None), (TAR, 5.0, 1.0, 1), (JSON, GBIT, 1.0, 1)]
)
def test_cores_that_both_stages_want(data: Data, wire: float, shared: float, level: int | None) -> None:
    """The next level would be worth it if it took nothing from the rest. It is tried, left, and left alone for a while.

    Mutants seen: nothing is a surprise; nothing is left again.
    """
    busy = machine(data, wire, shared=shared, noise=0.1)
    took, chosen = busy.send(Levels(), 512 * MIB)
    assert took < 1.08 * min(busy.send(Always(level), 512 * MIB)[0] for level in LADDER)
    assert chosen[-1] == level
    assert changes(chosen) <= 12


def test_a_slow_source_is_no_reason_to_pack_less() -> None:
    """Others may want the wire. Mutant seen: stored, though packing waits too."""
    _, chosen = machine(TAR, LOOPBACK, reading=20.0).send(Levels(), 256 * MIB)
    assert set(chosen) == {START}


def test_the_first_batches_of_a_level_say_nothing() -> None:
    """They have waited for those before them, or for the call to begin. Mutants seen: all of them count, or two: they
    make a slow wire.
    """
    levels, used = Levels(), []
    for sending in (10.0, 10.0, 10.0, *[0.005] * 10):
        levels.sent(Batch(levels.level, MIB, MIB // 4, 0.002, sending, 0.0))
        used.append(levels.level)
    assert set(used) <= {1, 3}


@pytest.mark.parametrize("wire", [GBIT, MBIT_500, MBIT_100, MBIT_10])
@pytest.mark.parametrize("data", [TAR, JSON], ids=["tar", "json"])
def test_deep_buffers_do_not_deceive_it(data: Data, wire: float) -> None:
    """They take 4 MiB as fast as they come, and the receiver's system half a MiB more. What waits in them is known.

    Mutants seen: it is not looked at, and 20 MiB are stored before it shows; what leaves them is taken for more than a
    quarter of what came.
    """
    sender = machine(data, wire, noise=0.2, varies=0.3, buffer=4 * MIB + MIB // 2, unseen=MIB // 2)
    best = min(sender.send(Always(level), 128 * MIB)[0] for level in (-5, 1, 3, 6, 9))
    took, chosen = sender.send(Levels(), 128 * MIB)
    assert took < 1.16 * best
    assert None not in chosen


@pytest.mark.parametrize("wire", [MBIT_100, MBIT_10])
def test_the_first_trial_knows_the_wire(wire: float) -> None:
    """Though a megabyte has gone into buffers of which nobody tells, and 4 more into those here.

    Mutants seen: the first chunks count; what waits here counts as sent.
    """
    sender = machine(TAR, wire, noise=0.2, buffer=5 * MIB, unseen=MIB)
    for size in range(128, 134):
        best = min(sender.send(Always(level), size * MIB)[0] for level in (-5, 1, 3, 6, 9))
        assert sender.send(Levels(), size * MIB)[0] < 1.1 * best


@pytest.mark.parametrize("receiving", [5.0, 20.0, 80.0])
@pytest.mark.parametrize("varies", [0.0, 0.5])
def test_a_slow_receiver_is_no_reason_to_pack_more(receiving: float, varies: float) -> None:
    """A disk with 50 MB/s: the wire seems slow, but fewer bytes on it are no faster. That is seen after 9 chunks, and
    tried more and more seldom.

    Mutants seen: what took less is better, however data shrank; a level that lost is tried again at once.
    """
    busy = machine(TAR, LOOPBACK, receiving=receiving, noise=0.1, varies=varies)
    _, chosen = busy.send(Levels(), 4096 * MIB)
    assert chosen.count(START) > 0.6 * len(chosen)
    latest = chosen[len(chosen) // 2 :]
    assert latest.count(START) > 0.8 * len(latest)


def test_batches_are_large_but_on_trial() -> None:
    """Mutants seen: after one that is lost they are small until the next look; on a second trial they are large."""
    levels, used = Levels(), []
    for _ in range(40):
        used.append((levels.level, levels.is_settled))
        # 50 MB/s, whatever it is on the wire: 9 promises more, and does not keep it.
        wire = MIB // 4 if levels.level == START else MIB // 5
        levels.sent(Batch(levels.level, MIB, wire, 0.002, 0.02, 0.0))
    first = [next(group) for _, group in itertools.groupby(used, key=lambda use: use[0])][:4]
    assert first == [(START, False), (9, False), (START, True), (9, False)]


def test_what_was_on_its_way_has_no_say() -> None:
    """Mutant seen: it is taken for what the level on trial brings."""
    levels = Levels()
    while levels.level == START:
        levels.sent(Batch(START, MIB, MIB // 4, 0.002, 0.02, 0.0))
    trial = levels.level
    for _ in range(10):
        levels.sent(Batch(START, MIB, MIB // 4, 0.002, 0.02, 0.0))
    assert levels.level == trial == 9
    for _ in range(10):
        levels.sent(Batch(9, MIB, MIB // 5, 0.014, 0.016, 0.0))
    assert levels.level == 9


def test_a_level_that_helps_little_is_on_the_way_to_one_that_helps() -> None:
    """Level -5 packs a tar nearly as long as 1 where cores are few. Mutant seen: it must help, or lose."""
    slow: Data = TAR | {-5: (1.86, 0.456)}
    _, chosen = machine(slow, LOOPBACK, noise=0.1).send(Levels(), 256 * MIB)
    assert chosen[-1] is None


def test_what_lost_is_tried_again_soon() -> None:
    """The machine has stood still when 9 was on trial. Mutant seen: it is left alone for 16 looks."""
    sender = machine(TAR, MBIT_100, pauses=tuple(range(11, 19)))
    took, chosen = sender.send(Levels(), 256 * MIB)
    assert (chosen[15], chosen[25], chosen[36]) == (9, START, 9)
    assert took < 1.08 * min(sender.send(Always(level), 256 * MIB)[0] for level in LADDER)


def test_what_lost_often_is_tried_again_some_day() -> None:
    """Within a GiB, of each level, after 12 GiB for a slow receiver. Mutant seen: the time doubles for ever."""
    levels, at = Levels(), 0
    while at < 13 * 1024 * MIB + 128 * MIB:
        size = (4 if levels.is_settled else 1) * MIB
        packing, ratio = TAR[levels.level]
        sending = 20.0 if at < 12 * 1024 * MIB else ratio * MBIT_100
        levels.sent(Batch(levels.level, size, int(size * ratio), packing * size * 1e-9, sending * size * 1e-9, 0.0))
        at += size
    assert levels.level in (6, 9)


def test_less_is_not_tried_where_the_wire_is_slower_than_packing() -> None:
    """Though sending takes no time at first: all of it waits here. Mutant seen: it must take 80 % of the time."""
    _, chosen = machine(JSON, MBIT_500, buffer=8 * MIB).send(Levels(), 512 * MIB)
    assert not {None, -5} & set(chosen)


def test_a_slow_reader_does_not_hide_that_packing_is_slow() -> None:
    """Packing takes 60 % of the time. Mutant seen: it must take 80 %."""
    _, chosen = machine(TAR, LOOPBACK, reading=1.0).send(Levels(), 256 * MIB)
    assert chosen[-1] is None


def test_one_pause_changes_nothing() -> None:
    """Mutant seen: it is done at once what was said once."""
    quiet = machine(JSON, LOOPBACK)
    quiet.pauses = (40, 60, 80)
    _, chosen = quiet.send(Levels(), 512 * MIB)
    assert set(chosen[30:]) == {None}


# What real transfers have told, for each level that was used all the time: `bench.traces`.
TRACES = json.loads((Path(__file__).parent / "levels_traces.json").read_text())


def batches(rows: list[list[Any]]) -> Iterator[Batch]:
    """Those of one trace, again and again."""
    for level, data, wire, *microseconds, held in itertools.cycle(rows):
        packing, sending, waiting = (each * 1e-6 for each in microseconds)
        yield Batch(level, data, wire, packing, sending, waiting, held)


def replay(name: str, levels: Levels | Always, size: int) -> tuple[float, list[int | None]]:
    """Nanoseconds for a byte, and the level of each batch: the next one of whichever level is chosen."""
    traces = {level: batches(TRACES[name]["stored" if level is None else str(level)]) for level in LADDER}
    seconds, at, chosen = 0.0, 0, []
    while at < size:
        batch = next(traces[levels.level])
        chosen.append(batch.level)
        levels.sent(batch)
        seconds += batch.sending + batch.waiting
        at += batch.data
    return seconds / at * 1e9, chosen


@pytest.mark.parametrize("name", sorted(TRACES))
def test_what_real_transfers_have_told(name: str) -> None:
    """Recorded on two cores, which both ends and the link had to share."""
    size = 1024 * MIB
    best = min(replay(name, Always(level), size)[0] for level in (-5, 1, 3, 6, 9))
    took, chosen = replay(name, Levels(), size)
    assert took < 1.15 * best
    assert changes(chosen) <= len(chosen) / 10
