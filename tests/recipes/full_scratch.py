"""A run whose checkpoints find no room in the scratch folder; see `Gang.start(before=…)`."""

import errno
import os
from typing import Any, NoReturn

from torch.distributed.checkpoint.filesystem import FileSystemWriter


def before() -> None:
    """DCP makes an error of its own of it, which is no Exception."""

    def write_data(self: FileSystemWriter, plan: Any, planner: Any) -> NoReturn:  # noqa: ARG001 (as the class has it)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    FileSystemWriter.write_data = write_data
