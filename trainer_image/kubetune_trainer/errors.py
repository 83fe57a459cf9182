"""The trainer's errors. Each knows the exit code and the constant reason that reach the job's status.

TrainerError
├── ConfigError         64  the config file asks for something impossible
├── DataError           65  a model folder, a dataset or a template is not what it should be
├── DoesNotFitError     66  the run needs a larger disk or another device
├── StorageError        69  the object store did not answer after retries
├── OutOfMemoryError    71  the device, or the process, has no more memory to give
├── PreemptedError      75  asked to stop; a checkpoint was written
├── HangError           76  training made no progress; only the launcher can tell
├── NonFiniteLossError  77  a loss or a weight became NaN or infinite
└── PeerLostError       78  another rank went away
"""

import errno
import re
from collections.abc import Sequence
from typing import ClassVar, Final

from kubetune_trainer.names import ExitCode

_OUT_OF_MEMORY: Final = re.compile(
    r"out of memory|can(no|')t allocate memory|CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc", re.IGNORECASE
)
"""What torch says on the CPU, CUDA, cuBLAS, NCCL, C++ and the kernel; those of a GPU were not run by us."""


def listed(items: Sequence[object], *, most: int) -> str:
    """Return the first of some items for a message, and how many there are beyond."""
    shown = ", ".join(str(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short: for some of it torch has an error of its own, for the rest there are only words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


class TrainerError(Exception):
    """Base of all errors that the trainer raises on purpose.

    Args:
        message: Names the object, the field, the rule and the value.
        hint: What a person can do about it, one sentence; shown in the job's status.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.CRASHED
    reason: ClassVar[str] = "Crashed"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(TrainerError):
    """The config file, or what it points to, cannot be used as written."""

    exit_code = ExitCode.CONFIG
    reason = "ConfigInvalid"


class DataError(TrainerError):
    """A model folder, a dataset or a chat template is not what it should be."""

    exit_code = ExitCode.DATA
    reason = "DataInvalid"


class DoesNotFitError(TrainerError):
    """The run needs more of a disk, or a better device, than it has."""

    exit_code = ExitCode.DOES_NOT_FIT
    reason = "DoesNotFit"


class StorageError(TrainerError):
    """The object store did not answer after bounded retries; a later attempt may succeed."""

    exit_code = ExitCode.STORAGE
    reason = "StorageUnavailable"


class OutOfMemoryError(TrainerError):
    """Memory was asked for that the device, or the process, does not have; fewer rows at a time may do with less."""

    exit_code = ExitCode.OUT_OF_MEMORY
    reason = "OutOfMemory"


class PreemptedError(TrainerError):
    """The run was asked to stop and has written a checkpoint."""

    exit_code = ExitCode.PREEMPTED
    reason = "Preempted"


class HangError(TrainerError):
    """A rank gave no sign of life for longer than it may. The rank cannot tell; its launcher does."""

    exit_code = ExitCode.HANG
    reason = "Hang"


class NonFiniteLossError(TrainerError):
    """A loss, the gradient norm or a trained weight is NaN or infinite."""

    exit_code = ExitCode.NON_FINITE_LOSS
    reason = "NonFiniteLoss"


class PeerLostError(TrainerError):
    """A collective failed because another rank went away."""

    exit_code = ExitCode.PEER_LOST
    reason = "PeerLost"
