"""One lock per thing that two processes must not make at once; the kernel lets go of it when its owner ends."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.progress import note


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, waiting for another process that has it; says so on the terminal when it has to wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"waiting for another process: {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
