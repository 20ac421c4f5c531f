"""A payload that comes slowly goes out as it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aipod.client.reader import SLOW, grouped
from aipod.config import CHUNK, KIB
from aipod.packing import BATCH
from tests.conftest import run


def test_what_comes_slowly_does_not_wait_for_a_whole_batch() -> None:
    """Else a server that hears nothing for a minute gives the upload up, again and again. Mutant seen: it waits."""
    now = 0.0
    # Seconds before each piece, its length.
    come = [(0.0, 10), (SLOW / 2, 10), (SLOW / 2, 10), (9.0, CHUNK + 5), (0.1, 1), (SLOW, 2), (0.0, BATCH * CHUNK + 3)]
    come += [(0.6 * SLOW, BATCH * CHUNK), (0.6 * SLOW, 1), (0.1 * SLOW, 1)]

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal now
        for seconds, size in come:
            now += seconds
            yield bytes(size)

    async def main() -> list[tuple[float, list[int]]]:
        return [(now, [len(chunk) for chunk in group]) async for group in grouped(pieces(), lambda: now)]

    told = run(main)
    first, second = SLOW, 2 * SLOW + 9.1
    assert [(round(at, 3), sizes) for at, sizes in told] == [
        (first, [30]),
        (second, [CHUNK, 8]),
        (second, [CHUNK] * BATCH),
        (second + 0.6 * SLOW, [CHUNK] * BATCH),
        (second + 1.3 * SLOW, [5]),
    ]


def test_what_comes_fast_goes_in_whole_batches() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(2 * BATCH * 1024 + 1):
            yield bytes(KIB)

    async def main() -> list[list[int]]:
        return [[len(chunk) for chunk in group] async for group in grouped(pieces(), lambda: 0.0)]

    assert run(main) == [[CHUNK] * BATCH, [CHUNK] * BATCH, [KIB]]
