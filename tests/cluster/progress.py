"""What the cluster is doing, one line per stage, with the seconds it took."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def note(text: str) -> None:
    """Print one line that belongs to the stage that runs."""
    print(f"   {text}", file=sys.stderr, flush=True)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Print `what` when it begins, and what it took (or that it failed) when it ends."""
    print(f"== {what}", file=sys.stderr, flush=True)
    begun = time.monotonic()
    try:
        yield
    except BaseException:
        note(f"failed after {time.monotonic() - begun:.1f} s: {what}")
        raise
    note(f"{time.monotonic() - begun:.1f} s: {what}")
