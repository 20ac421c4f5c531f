"""Who writes next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from aipod.transport.turns import Turns
from aipod.transport.wakes import Wakes


def run(main: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(main())  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_senders_take_turns_a_frame_each() -> None:
    async def main() -> None:
        turns, written = Turns(), list[str]()
        turns.pause()

        async def sender(name: str) -> None:
            for _ in range(3):
                await turns.wait(object())
                written.append(name)
                turns.pause()  # each frame fills the socket
                turns.next()

        async with asyncio.TaskGroup() as group:
            for name in "abc":
                group.create_task(sender(name))
            for count in range(1, 10):
                await settle()
                turns.resume()
                await settle()
                assert len(written) == count
        assert "".join(written) == "abcabcabc"
        assert not turns.free
        turns.resume()
        assert turns.free

    run(main)


@pytest.mark.parametrize("called", [False, True], ids=["while it waits", "when it was its turn"])
def test_a_sender_that_is_cancelled_holds_nobody_up(called: bool) -> None:
    async def main() -> None:
        turns = Turns()
        turns.pause()
        first, second = asyncio.create_task(turns.wait(object())), asyncio.create_task(turns.wait(object()))
        await settle()
        if called:
            turns.resume()
        first.cancel()
        if not called:
            await settle()
            turns.resume()
        await asyncio.wait_for(second, 5)
        assert first.cancelled()

    run(main)


@pytest.mark.parametrize("then", ["resume", "end"])
def test_a_sender_that_is_cancelled_and_has_not_run_since_is_passed_over(then: str) -> None:
    async def main() -> None:
        turns = Turns()
        turns.pause()
        first, second = asyncio.create_task(turns.wait(object())), asyncio.create_task(turns.wait(object()))
        await settle()
        first.cancel()
        turns.resume() if then == "resume" else turns.end(Wakes())
        await asyncio.wait_for(second, 5)
        await settle()
        assert first.cancelled()
        assert turns.free

    run(main)


def test_one_whose_turn_came_when_the_socket_was_full_again_stays_first() -> None:
    async def main() -> None:
        turns = Turns()
        turns.pause()
        order = []

        async def sender(name: str) -> None:
            await turns.wait(object())
            order.append(name)
            turns.next()

        async with asyncio.TaskGroup() as group:
            group.create_task(sender("a"))
            group.create_task(sender("b"))
            await settle()
            turns.resume()
            turns.pause()  # before "a" could run
            await settle()
            assert order == []
            turns.resume()
        assert order == ["a", "b"]

    run(main)


def test_the_end_of_the_connection_wakes_all() -> None:
    async def main() -> None:
        turns = Turns()
        turns.pause()
        waiting = [asyncio.create_task(turns.wait(object())) for _ in range(3)]
        await settle()
        turns.end(Wakes())
        await asyncio.wait_for(asyncio.gather(*waiting), 5)
        assert turns.free

    run(main)


def test_small_ones_go_first_and_nobody_goes_without_credit() -> None:
    async def main() -> None:
        turns, written = Turns(), list[str]()
        turns.starve()

        async def sender(name: str, *, small: bool) -> None:
            for _ in range(2):
                await turns.wait(name, small=small)
                written.append(name)
                turns.starve()  # each frame takes all the credit
                turns.next()

        async with asyncio.TaskGroup() as group:
            for name in ("long", "other", "beat"):
                group.create_task(sender(name, small=name == "beat"))
            await settle()
            turns.pause()
            turns.feed()
            await settle()
            assert written == [], "the socket takes nothing"
            turns.starve()
            turns.resume()
            for count in range(1, 7):
                await settle()
                assert len(written) == count - 1
                turns.feed()
                await settle()
        assert written == ["beat", "beat", "long", "other", "long", "other"]
        assert not turns.awaited

    run(main)


def test_one_that_has_nothing_to_write_any_more_leaves_the_line() -> None:
    async def main() -> None:
        turns = Turns()
        turns.starve()
        waiting = {
            name: asyncio.create_task(turns.wait(name, small=name == "small")) for name in ("small", "long", "x")
        }
        await settle()
        for name in ("small", "long", "nobody", "long"):
            turns.skip(name)
        await asyncio.wait_for(asyncio.gather(waiting["small"], waiting["long"]), 5)
        assert turns.awaited
        turns.feed()
        await asyncio.wait_for(waiting["x"], 5)
        assert turns.free

    run(main)
