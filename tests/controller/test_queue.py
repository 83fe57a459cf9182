"""The queue of keys: at most once waiting, at most once in flight, back after a delay that grows."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from kubetune_operator.keyed_queue import MAX_DELAY_SECONDS, KeyedQueue


@pytest.fixture
async def queue() -> AsyncIterator[KeyedQueue[str]]:
    made: KeyedQueue[str] = KeyedQueue()
    yield made
    made.close()


async def test_a_key_that_is_added_twice_is_handed_out_once(queue: KeyedQueue[str]) -> None:
    queue.add("a")
    queue.add("a")
    queue.add("b")
    assert [await queue.get(), await queue.get()] == ["a", "b"]
    assert len(queue) == 0


async def test_a_key_in_flight_is_handed_out_again_only_after_it_is_done(queue: KeyedQueue[str]) -> None:
    queue.add("a")
    key = await queue.get()
    queue.add("a")
    queue.add("a")
    assert len(queue) == 0
    queue.done(key)
    assert await queue.get() == "a"
    queue.done("a")
    assert len(queue) == 0


async def test_of_several_delays_the_earliest_counts(queue: KeyedQueue[str]) -> None:
    queue.add_after("a", seconds=30)
    queue.add_after("a", seconds=0.01)
    queue.add_after("a", seconds=60)
    assert await asyncio.wait_for(queue.get(), timeout=1) == "a"


async def test_a_waiting_reader_is_woken_up(queue: KeyedQueue[str]) -> None:
    reader = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add("a")
    assert await asyncio.wait_for(reader, timeout=1) == "a"


async def test_the_delay_of_a_failing_key_doubles_up_to_a_limit_and_success_resets_it(queue: KeyedQueue[str]) -> None:
    delays = [queue.retry("a") for _ in range(40)]
    assert delays[:4] == [0.25, 0.5, 1.0, 2.0]
    assert delays[-1] == MAX_DELAY_SECONDS
    assert queue.retry("b", at_least=7.0) == 7.0
    queue.forget("a")
    assert queue.retry("a") == 0.25
