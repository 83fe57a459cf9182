"""Remove from the cache what an earlier state of the checkout made: other versions of programs and images."""

import shutil

from tests.cluster import binaries, images, locks
from tests.cluster.paths import BIN
from tests.cluster.progress import note


def prune() -> None:
    """Keep what the checkout needs as it is, and remove the rest of programs and images."""
    kept = {binaries.folder(group).name for group in binaries.GROUPS}
    for path in BIN.iterdir() if BIN.exists() else ():
        if path.is_dir() and path.name not in kept:
            note(f"removing {path}")
            shutil.rmtree(path)
    with locks.held(images.DIRECTORY / "lock"):
        images.prune()
