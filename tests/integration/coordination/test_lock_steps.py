"""The server's clock steps: no lock, marker or crash counter lasts longer than its own length because of that.

A real server sets the keys while its clock is wrong, and is asked for them when it is right again.
"""

import pytest

from dispatcher.coordination.locks import ChainLocks
from tests.integration.coordination.conftest import DAY, STEPS, Server

pytestmark = pytest.mark.integration


@STEPS
def test_a_lock_lasts_no_longer_than_its_length(server: Server, locks: ChainLocks, step: float) -> None:
    server.move(step)
    locks.acquire([1])
    assert locks.locked([1]) == {1}
    server.move(0)

    stays = abs(step) < DAY  # a small correction of the clock ends no lock
    assert locks.locked([1, 2]) == ({1} if stays else set())
    held = locks.acquire([1, 2])
    assert held.held == ((2,) if stays else (1, 2))
    if not stays:
        assert locks.locked([1]) == {1} and server.client.pttl("test:lock:1") <= 30_000
        locks.release(held)
        assert locks.locked([1]) == set()


def test_a_lock_that_was_taken_over_is_not_released_by_its_first_holder(server: Server, locks: ChainLocks) -> None:
    server.move(2 * DAY)
    first = locks.acquire([1])
    server.move(0)
    second = locks.acquire([1])
    locks.release(first)
    assert locks.locked([1]) == {1}
    locks.release(second)
    assert server.client.keys() == []


def test_a_longer_lock_of_another_configuration_is_not_taken_over(server: Server, locks: ChainLocks) -> None:
    patient = ChainLocks(server.url, prefix="test", lock_seconds=600, connect_seconds=2)
    patient.acquire([1])
    patient.mark_queued([2], seconds=600)
    assert locks.acquire([1]).locked == locks.locked([1]) == {1}
    assert locks.mark_queued([2], seconds=30) == []
    patient.close()


@STEPS
def test_a_marker_lasts_no_longer_than_its_length(server: Server, locks: ChainLocks, step: float) -> None:
    server.move(step)
    assert locks.mark_queued([1], seconds=60) == [1]
    server.move(0)

    assert locks.mark_queued([1, 2], seconds=60) == ([2] if abs(step) < DAY else [1, 2])
    if abs(step) > DAY:
        assert server.client.pttl("test:queued:1") <= 60_000
        assert locks.mark_queued([1], seconds=60) == []


@STEPS
def test_a_crash_is_remembered_for_a_day(server: Server, locks: ChainLocks, step: float) -> None:
    server.move(step)
    for _ in range(3):
        locks.acquire([1])
        server.client.delete("test:lock:1")
    server.move(0)

    assert locks.acquire([1]).crashes == ({1: 3} if abs(step) < DAY else {})
    assert server.client.pttl("test:crash:1") <= DAY * 1000
