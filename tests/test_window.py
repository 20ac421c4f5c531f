"""Receive windows: what a peer may send, how they grow, and what they can make a process hold."""

from __future__ import annotations

import random

import pytest

from aipod.transport.window import Budget, ReceiveWindow

KIB = 1024
FIRST, MOST = 64 * KIB, 1024 * KIB


class Peer:
    """The sending end of one stream, which sends as much as it may."""

    def __init__(self, growth: Budget, messages: Budget) -> None:
        self.may_send = FIRST
        self.window = ReceiveWindow(FIRST, MOST, growth, messages, self._credited)
        self.held = 0
        self.messages = 0

    def _credited(self, size: int) -> None:
        assert size > 0
        self.may_send += size

    def send(self, size: int, *, hungry: bool = True) -> None:
        assert size <= self.may_send
        self.may_send -= size
        self.held += size
        self.window.arrived(size, hungry=hungry)

    def take(self, size: int) -> None:
        self.held -= size
        self.window.taken(size, hungry=self.held == 0)

    def send_message(self, size: int, *, piece: int = 16 * KIB) -> bool:
        """Send a message of `size` bytes as far as the window lets it; whether it is complete."""
        self.messages += 1
        self.window.expect(self.messages, size)
        left = size
        while left and (part := min(piece, left, self.may_send)):
            self.send(part)
            left -= part
        return left == 0

    def take_message(self, size: int) -> None:
        self.window.done(self.messages)
        self.take(size)


@pytest.fixture
def pools() -> tuple[Budget, Budget]:
    return Budget(4 * MOST), Budget(2 * MOST)


def test_a_window_that_is_used_up_in_a_round_trip_grows_to_its_most(pools: tuple[Budget, Budget]) -> None:
    peer = Peer(*pools)
    sizes = []
    for _ in range(10):
        for _ in range(3):  # most of the window, as WINDOW_UPDATEs let it
            size = peer.may_send
            peer.send(size)
            peer.take(size)
        peer.window.sample()
        sizes.append(peer.window.size)
    assert sizes[:4] == [2 * FIRST, 4 * FIRST, 8 * FIRST, MOST]
    assert sizes[-1] == MOST


def test_a_window_does_not_grow_where_the_application_is_slow_or_the_peer_is(pools: tuple[Budget, Budget]) -> None:
    slow = Peer(*pools)
    slow.send(slow.may_send)
    slow.window.sample()  # the first window comes at once, whatever the application does
    grown = slow.window.size
    for _ in range(20):
        slow.take(4 * KIB)
        if size := min(slow.may_send, 8 * KIB):
            slow.send(size, hungry=False)
        assert not slow.window.sample()
    assert slow.window.size == grown
    trickle = Peer(*pools)
    for _ in range(100):
        trickle.send(1 * KIB)
        trickle.take(1 * KIB)
        assert not trickle.window.sample()


def test_room_is_given_back_in_large_pieces(pools: tuple[Budget, Budget]) -> None:
    peer = Peer(*pools)
    credits = []
    peer.window._credit = credits.append
    for _ in range(64):
        peer.window.arrived(512, hungry=True)
        peer.window.taken(512, hungry=True)
    assert credits == [FIRST // 4, FIRST // 4]


@pytest.mark.parametrize("size", [FIRST - 5, FIRST, FIRST + 1, 10 * FIRST, 2 * MOST])
def test_a_message_of_any_length_fits(pools: tuple[Budget, Budget], size: int) -> None:
    peer = Peer(*pools)
    for _ in range(5):
        assert peer.send_message(size)
        peer.take_message(size)


def test_a_long_message_whose_beginning_used_up_the_window_gets_its_room_at_once(pools: tuple[Budget, Budget]) -> None:
    peer = Peer(*pools)
    peer.send(FIRST)
    assert peer.may_send == 0
    peer.window.expect(1, 10 * FIRST)
    assert peer.may_send == 10 * FIRST


@pytest.mark.parametrize("size", [100 * KIB, MOST, 5 * MOST])
def test_an_application_that_is_slow_has_a_few_long_messages_in_memory_and_gets_them_all(size: int) -> None:
    """Mutant seen: each message has its room as soon as it begins; as many come as the pool has room for."""
    peer = Peer(Budget(0), Budget(64 * MOST))
    begun = taken = left = 0
    while taken < 50:
        while begun < 50 or left:
            if not left:
                begun, left = begun + 1, size
                peer.window.expect(begun, size)
            if not (part := min(16 * KIB, left, peer.may_send)):
                break
            peer.send(part, hungry=begun == taken + 1)
            left -= part
        assert peer.held + peer.may_send <= FIRST + max(8 * MOST, size)
        assert begun > taken + 1 or begun == 50 or 2 * size > 8 * MOST
        taken += 1
        peer.window.done(taken)
        peer.take(size)
    assert peer.held == 0


def test_long_messages_wait_for_one_another_and_all_come_through() -> None:
    growth, messages = Budget(0), Budget(MOST)
    peers = [Peer(growth, messages) for _ in range(5)]
    done = [peer.send_message(600 * KIB) for peer in peers]
    assert done == [True, False, False, False, False]  # 600 KiB twice are more than the pool has
    for peer, following in zip(peers, [*peers[1:], None], strict=True):
        assert peer.held <= FIRST + 600 * KIB
        missing = 600 * KIB - peer.held
        peer.send(missing)
        peer.take_message(600 * KIB)
        if following is not None:
            assert following.may_send >= 600 * KIB - following.held


def test_a_stream_that_ends_gives_back_what_it_had(pools: tuple[Budget, Budget]) -> None:
    growth, messages = pools
    waiting = Peer(growth, messages)
    first = Peer(growth, messages)
    for _ in range(10):
        size = first.may_send
        first.send(size)
        first.take(size)
        first.window.sample()
    assert not growth.take(4 * MOST)
    assert first.send_message(2 * MOST)
    assert not waiting.send_message(2 * MOST)
    first.window.close()
    assert waiting.may_send >= 2 * MOST - waiting.held
    waiting.window.close()
    assert growth.take(4 * MOST)
    assert messages.take(2 * MOST)


@pytest.mark.parametrize("seed", range(10))
def test_no_order_of_events_makes_a_connection_hold_more_than_its_bounds(seed: int) -> None:
    rng = random.Random(seed)
    growth, messages = Budget(2 * MOST), Budget(2 * MOST)
    peers: list[Peer] = []
    bound = 30 * FIRST + 2 * MOST + 2 * MOST
    for _ in range(3000):
        if len(peers) < 30 and rng.random() < 0.1:
            peers.append(Peer(growth, messages))
        if not peers:
            continue
        peer = rng.choice(peers)
        action = rng.randrange(4)
        if action == 0 and peer.may_send:
            peer.send(rng.randint(1, peer.may_send), hungry=rng.random() < 0.5)
        elif action == 1 and peer.held:
            peer.take(rng.randint(1, peer.held))
        elif action == 2 and not peer.messages:
            peer.messages = 1
            peer.window.expect(1, rng.randint(1, 2 * MOST))
        elif action == 3 and rng.random() < 0.1:
            peer.window.close()
            peers.remove(peer)
        assert sum(peer.held + peer.may_send for peer in peers) <= bound
    for peer in peers:
        peer.window.close()
    assert growth.take(2 * MOST)
    assert messages.take(2 * MOST)
