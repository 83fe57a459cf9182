"""What the cluster is doing, one line per stage, with the seconds it took."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Print `what` when it begins, and what it took (or that it failed) when it ends."""
    print(f"== {what}", file=sys.stderr, flush=True)
    begun = time.monotonic()
    try:
        yield
    except BaseException:
        print(f"   failed after {time.monotonic() - begun:.1f} s: {what}", file=sys.stderr, flush=True)
        raise
    print(f"   {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
