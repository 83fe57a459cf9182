"""Signs of life of a rank in training, by which its launcher tells one that hangs from one that works.

A rank that hangs raises nothing and ends nothing: its peers wait for it in a collective until that gives up, and one
that is alone waits for ever. So each rank touches a file of its own with every micro batch. The file's times are the
last sign and the moment by which the next one has to come; the launcher looks at them, and no lock or kernel in which a
rank is stuck holds up the launcher. Before the first sign and outside of training there is no file, and none is
expected: downloads and uploads have limits of their own.
"""

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kubetune_trainer.names import ENV_HANG_SECONDS, ENV_HEARTBEAT

DUMP_SIGNAL: Final = signal.SIGUSR1
"""Makes a rank that is watched write the stacks of all its threads to stderr, whatever holds it up."""
TIMES_SLOWEST: Final = 3.0
"""No sign is late before this many times the longest pause that there was between two of them."""
_NEVER_SECONDS: Final = 1e9


@dataclass
class _Watch:
    path: Path
    limit: float
    patience: float
    heard: float | None = None
    slowest: float = 0.0
    is_paused: bool = False

    def sign(self) -> None:
        now = time.monotonic()  # a clock that the processes of a machine share, and that nobody sets
        if self.heard is not None:
            self.slowest = max(self.slowest, now - self.heard)
        self.heard = now
        times = (now, now + (_NEVER_SECONDS if self.is_paused else self.patience))
        with suppress(OSError):  # without its file nothing is watched, and training matters more
            self.path.touch()
            os.utime(self.path, times)


_watch: list[_Watch] = []
"""What watches this process, if anything does."""


@contextmanager
def watched(*, first_seconds: float) -> Iterator[None]:
    """From the first sign in the block to its end, signs are expected, if the environment says how often and where.

    Args:
        first_seconds: The least that a sign may take in the first step, in which ranks connect and kernels are made.
    """
    path, limit = os.environ.get(ENV_HEARTBEAT), float(os.environ.get(ENV_HANG_SECONDS) or 0)
    if not path or not limit:
        yield
        return
    faulthandler.register(DUMP_SIGNAL, file=sys.stderr, all_threads=True)
    watch = _Watch(Path(path), limit=limit, patience=max(limit, first_seconds))
    _watch.append(watch)
    try:
        yield
    finally:
        _watch.clear()
        watch.path.unlink(missing_ok=True)


def sign_of_life() -> None:
    """Says that training has come a bit further: before each micro batch, and in whatever else takes long."""
    for watch in _watch:
        watch.sign()


def sign_of_step() -> None:
    """Says that a step is done. After the first of which the beginning was told too, the environment's limit holds."""
    for watch in _watch:
        is_first = watch.heard is None
        watch.sign()
        if is_first:  # how long micro batches take is not known yet
            continue
        watch.patience = max(watch.limit, TIMES_SLOWEST * watch.slowest)
        watch.sign()


@contextmanager
def unwatched() -> Iterator[None]:
    """While the block runs, no sign is expected: it waits for something that has limits of its own."""
    paused = [watch for watch in _watch if watch.heard is not None and not watch.is_paused]
    for watch in paused:
        watch.is_paused = True
        watch.sign()
    try:
        yield
    finally:
        for watch in paused:
            watch.is_paused, watch.heard = False, None  # how long it waited says nothing of training
            watch.sign()
