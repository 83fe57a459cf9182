"""Every name that the trainer shares with the world around it, and who writes it.

The operator has the same names in `kubetune_operator.names`; neither package imports the other, and a test compares.
"""

from enum import IntEnum
from typing import Final


class ExitCode(IntEnum):
    """How a trainer process ended; Kubernetes reads it off the container."""

    DONE = 0
    CRASHED = 1
    CONFIG = 64
    DATA = 65
    DOES_NOT_FIT = 66
    STORAGE = 69
    OUT_OF_MEMORY = 71
    PREEMPTED = 75
    HANG = 76
    NON_FINITE_LOSS = 77
    PEER_LOST = 78
    """This rank ended because another one did; it never explains a failure."""


# Environment variables, written by the operator into the pod (or by `kubetune run` into the process).
ENV_SECRETS_DIR: Final = "KUBETUNE_SECRETS_DIR"
ENV_CONFIGMAPS_DIR: Final = "KUBETUNE_CONFIGMAPS_DIR"
ENV_PVC_DIR: Final = "KUBETUNE_PVC_DIR"
ENV_SCRATCH: Final = "KUBETUNE_SCRATCH"
ENV_ATTEMPT: Final = "KUBETUNE_ATTEMPT"
ENV_CPUS: Final = "KUBETUNE_CPUS"
ENV_METRICS_PORT: Final = "KUBETUNE_METRICS_PORT"
ENV_TERMINATION_LOG: Final = "KUBETUNE_TERMINATION_LOG"
ENV_HANG_SECONDS: Final = "KUBETUNE_HANG_SECONDS"
ENV_IMAGE: Final = "KUBETUNE_IMAGE"

# Written by the launcher into each rank.
ENV_HEARTBEAT: Final = "KUBETUNE_HEARTBEAT"

# Where those stand in a pod when the variable is not set.
DEFAULT_SECRETS_DIR: Final = "/var/run/kubetune/secrets"
DEFAULT_CONFIGMAPS_DIR: Final = "/var/run/kubetune/configmaps"
DEFAULT_PVC_DIR: Final = "/var/run/kubetune/pvc"
DEFAULT_TERMINATION_LOG: Final = "/dev/termination-log"
TERMINATION_MESSAGE_BYTES: Final = 4096

# The workspace, written by the trainer.
PREPARED_FILE: Final = "prepared.json"
CHECKPOINTS_DIR: Final = "checkpoints"
OUTPUTS_DIR: Final = "outputs"
LOGS_DIR: Final = "logs"
PROFILE_DIR: Final = "profile"
REPORT_FILE: Final = "report.html"
LINEAGE_FILE: Final = "lineage.json"
CARD_FILE: Final = "README.md"
ABOUT_FILES: Final = (LINEAGE_FILE, CARD_FILE)
"""What tells about a model folder: no part of the model, nor of its digest."""
COMPLETE_MARKER: Final = "COMPLETE"
"""Written last into a checkpoint or a cache entry; without it the folder does not exist."""

IGNORE_LABEL: Final = -100
"""The label of a position that is not trained; the value that torch's and transformers' losses use."""
PADDING_DOCUMENT: Final = -1
"""The document id of padding in a packed row."""
