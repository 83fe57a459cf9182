"""Keeps what a run's workspace holds in the middle of each write: the state in which a kill would leave it there.

Imported by a rank before its recipe. Files are all that outlives a process, so a copy of them is what the next attempt
would find, with all earlier writes and half of the one that was going on.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kubetune_trainer import storage

ENV_WORKSPACE = "KUBETUNE_TEST_WORKSPACE"
ENV_SNAPSHOTS = "KUBETUNE_TEST_SNAPSHOTS"


def before() -> None:
    """Takes a snapshot at each write below the workspace from now on."""
    workspace, snapshots = Path(os.environ[ENV_WORKSPACE]), Path(os.environ[ENV_SNAPSHOTS])
    replacing, delete_tree = storage._replacing, storage.LocalStore.delete_tree

    def keep(what: str) -> None:
        number = len(list(snapshots.iterdir())) if snapshots.exists() else 0
        shutil.copytree(workspace, snapshots / f"{number:02}-{what}")

    @contextmanager
    def watched(path: Path, **how: Any) -> Iterator[Path]:
        with replacing(path, **how) as temporary:
            yield temporary
            if path.is_relative_to(workspace):
                whole = temporary.read_bytes()
                temporary.write_bytes(whole[: len(whole) // 2])
                keep(path.name)
                temporary.write_bytes(whole)

    def deleted(self: Any, prefix: str) -> None:
        if self.list(prefix):
            keep(f"delete-{prefix.replace('/', '-') or 'all'}")
        delete_tree(self, prefix)

    storage._replacing = watched
    storage.LocalStore.delete_tree = deleted
