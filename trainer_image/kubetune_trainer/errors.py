"""The trainer's errors. Each knows the exit code and the constant reason that reach the job's status.

TrainerError
├── ConfigError         64  the config file asks for something impossible
├── DataError           65  a model folder, a dataset or a template is not what it should be
├── DoesNotFitError     66  the run needs a larger disk or another device
├── StorageError        69  the object store did not answer after retries
├── OutOfMemoryError    71  the device, or the process, has no more memory to give
├── PreemptedError      75  asked to stop; a checkpoint was written
├── NonFiniteLossError  77  the loss became NaN or infinite
└── PeerLostError       78  another rank went away
"""

from collections.abc import Sequence
from typing import ClassVar

from kubetune_trainer.names import ExitCode


def listed(items: Sequence[object], *, most: int) -> str:
    """Return the first of some items for a message, and how many there are beyond."""
    shown = ", ".join(str(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


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


class NonFiniteLossError(TrainerError):
    """The loss or the gradient norm is NaN or infinite."""

    exit_code = ExitCode.NON_FINITE_LOSS
    reason = "NonFiniteLoss"


class PeerLostError(TrainerError):
    """A collective failed because another rank went away."""

    exit_code = ExitCode.PEER_LOST
    reason = "PeerLost"
