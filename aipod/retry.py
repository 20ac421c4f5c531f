"""When and how soon a request is tried again. No I/O, no clock: the caller sleeps."""

from __future__ import annotations

import random
from collections.abc import Iterator


def delays(
    attempts: int, *, first: float = 1.0, limit: float = 30.0, rng: random.Random | None = None
) -> Iterator[float]:
    """Seconds to wait before each of the `attempts - 1` tries after the first one.

    Doubling from `first` to `limit` with full jitter, so that clients cut off together do not come back together
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
    """
    rng = rng or random.Random()  # noqa: S311 - jitter is no secret
    for n in range(attempts - 1):
        yield rng.uniform(0, min(limit, first * 2**n))
