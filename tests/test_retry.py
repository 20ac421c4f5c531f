"""How soon a request is tried again."""

from __future__ import annotations

import random

import pytest

from aipod.retry import delays


class Top(random.Random):
    """Always the highest delay that is allowed."""

    def uniform(self, a: float, b: float) -> float:
        assert a == 0
        return b


def test_delays_double_up_to_the_limit() -> None:
    assert list(delays(9, rng=Top())) == [1, 2, 4, 8, 16, 30, 30, 30]
    assert list(delays(4, first=0.5, limit=1.5, rng=Top())) == [0.5, 1, 1.5]


@pytest.mark.parametrize("attempts", [1, 2, 5, 100])
def test_there_is_one_less_than_attempts_and_each_is_jittered(attempts: int) -> None:
    got = list(delays(attempts, rng=random.Random(1)))
    assert len(got) == attempts - 1
    assert all(0 <= delay <= 30 for delay in got)
    assert len(set(got)) == len(got)
