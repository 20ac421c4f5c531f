"""The worker's end of the socket to its server: read by the main thread, looked at during runs."""

from __future__ import annotations

import concurrent.futures
import socket
import time
from collections.abc import Iterator

import pytest

from aipod.worker import ASK_EVERY, Link, pack
from tests.calls import calls


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Link]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, Link(theirs)


def look(link: Link, run: int = 0) -> bool:
    time.sleep(ASK_EVERY)
    return link.is_cancelled(run)


def test_a_look_hears_of_a_cancel_once_and_keeps_all_else(ends: tuple[socket.socket, Link]) -> None:
    """Mutants seen: what comes with a cancel, or in pieces, is lost; a cancel that came too late hits the next run."""
    server, link = ends
    assert not look(link)
    run = pack({"op": "run"}, b"kwargs")
    server.sendall(pack({"op": "cancel"}) + run + run[:5])
    assert look(link)
    assert not look(link)
    server.sendall(run[5:])
    assert link.receive() == ({"op": "run"}, b"kwargs")
    assert link.receive() == ({"op": "run"}, b"kwargs")
    server.sendall(pack({"op": "cancel"}))
    assert link.receive() == ({"op": "cancel"}, b"")
    assert not look(link)


def test_a_thread_that_a_run_has_left_behind_takes_nothing_of_the_next(ends: tuple[socket.socket, Link]) -> None:
    """Neither its task nor its cancel. Mutants seen: the thread of any run reads; a look under way is not waited for; a
    cancel that was read together with the task is never seen."""
    server, link = ends
    run, cancel = pack({"op": "run"}, b"kwargs"), pack({"op": "cancel"})
    assert not look(link)
    with calls() as threads:
        with link._looking:  # whoever looks this moment is waited for
            ending = threads.submit(link.end_run)
            assert concurrent.futures.wait([ending], timeout=0.2).not_done
            assert not look(link)
        ending.result()
        server.sendall(run + cancel)
        assert threads.submit(look, link).result()
        assert link.receive() == ({"op": "run"}, b"kwargs")
        assert threads.submit(look, link).result()
        assert look(link, 1)


def test_looks_in_a_loop_ask_the_system_seldom(ends: tuple[socket.socket, Link]) -> None:
    server, link = ends
    link.is_cancelled(0)
    server.sendall(pack({"op": "cancel"}))
    began, looks = time.monotonic(), 1
    while not link.is_cancelled(0):
        looks += 1
    assert time.monotonic() - began < 10
    assert looks > 1


def test_a_server_that_is_gone_wants_no_result(ends: tuple[socket.socket, Link]) -> None:
    server, link = ends
    server.close()
    assert look(link)
    assert link.receive() is None
