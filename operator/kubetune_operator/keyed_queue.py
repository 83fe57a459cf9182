"""A queue of keys: what has to be looked at, never why.

kopf neither orders nor retries events across resources. Here a key waits at most once, is in at most one pair of hands,
and comes back after a delay that grows while it keeps failing.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

BASE_DELAY_SECONDS = 0.25
MAX_DELAY_SECONDS = 60.0


class KeyedQueue(Generic[K]):
    """Keys to reconcile, each in flight at most once.

    A key that is added while it is in flight is handed out once more after `done`, however often it was added.
    """

    def __init__(self) -> None:
        self._ready: deque[K] = deque()
        self._waiting: set[K] = set()
        self._in_flight: set[K] = set()
        self._again: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._wakeup = asyncio.Event()

    def __len__(self) -> int:
        """Count the keys that are ready to be handed out."""
        return len(self._ready)

    def add(self, key: K) -> None:
        """Hand the key out as soon as possible."""
        if key in self._in_flight:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.append(key)
            self._wakeup.set()

    def add_after(self, key: K, *, seconds: float) -> None:
        """Hand the key out after a delay; of several delays for a key the earliest counts."""
        if seconds <= 0:
            self.add(key)
            return
        loop = asyncio.get_running_loop()
        when = loop.time() + seconds
        pending = self._timers.get(key)
        if pending is not None:
            if pending.when() <= when:
                return
            pending.cancel()
        self._timers[key] = loop.call_at(when, self._fire, key)

    def _fire(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key)

    async def get(self) -> K:
        """Wait for a key and take it; `done` gives it back."""
        while not self._ready:
            self._wakeup.clear()
            await self._wakeup.wait()
        key = self._ready.popleft()
        self._waiting.discard(key)
        self._in_flight.add(key)
        return key

    def done(self, key: K) -> None:
        """Give a key back; if it was added meanwhile, it is ready again."""
        self._in_flight.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def forget(self, key: K) -> None:
        """Reset the back-off of a key that succeeded."""
        self._failures.pop(key, None)

    def retry(self, key: K, *, at_least: float = 0.0) -> float:
        """Hand a failed key out again, later each time.

        Returns:
            The delay in seconds.
        """
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = max(at_least, min(MAX_DELAY_SECONDS, BASE_DELAY_SECONDS * 2.0 ** min(failures, 20)))
        self.add_after(key, seconds=delay)
        return delay

    def close(self) -> None:
        """Cancel what waits for its time."""
        for timer in self._timers.values():
            with contextlib.suppress(RuntimeError):
                timer.cancel()
        self._timers.clear()
