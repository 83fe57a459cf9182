"""Every name that the operator writes or reads: labels, environment variables, paths, ports, exit codes.

What the trainer shares stands again in `kubetune_trainer.names`; a test holds the two equal.
"""

from enum import IntEnum
from typing import Final

API_GROUP: Final = "kubetune.dev"
API_VERSION: Final = "v1alpha1"
GROUP_VERSION: Final = f"{API_GROUP}/{API_VERSION}"


KIND_FINETUNEJOB: Final = "FineTuneJob"
PLURAL_FINETUNEJOB: Final = "finetunejobs"


class ExitCode(IntEnum):
    """How a trainer container ended."""

    DONE = 0
    CRASHED = 1
    CONFIG = 64
    DATA = 65
    DOES_NOT_FIT = 66
    STORAGE = 69
    PREEMPTED = 75
    NON_FINITE_LOSS = 77
    PEER_LOST = 78


PERMANENT_EXIT_CODES: Final = (ExitCode.CONFIG, ExitCode.DATA, ExitCode.DOES_NOT_FIT, ExitCode.NON_FINITE_LOSS)
"""Codes that another attempt would only repeat; the Job fails at once on them."""

# Labels, written by the operator on everything it creates.
LABEL_JOB_NAME: Final = f"{API_GROUP}/job-name"
LABEL_JOB_KIND: Final = f"{API_GROUP}/job-kind"
LABEL_COMPONENT: Final = f"{API_GROUP}/component"
LABEL_ATTEMPT: Final = f"{API_GROUP}/attempt"
COMPONENT_PREPARE: Final = "prepare"
COMPONENT_TRAIN: Final = "train"

LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGED_BY: Final = "kubetune"

# Written by the Job controller on the pods of an Indexed Job.
LABEL_BATCH_JOB_NAME: Final = "batch.kubernetes.io/job-name"
ANNOTATION_COMPLETION_INDEX: Final = "batch.kubernetes.io/job-completion-index"

# Node labels, written by NVIDIA's GPU feature discovery (the value is in MiB).
LABEL_NODE_GPU_MEMORY: Final = "nvidia.com/gpu.memory"

# The trainer's container and what is mounted into it.
TRAINER_CONTAINER: Final = "trainer"
CONFIG_DIR: Final = "/etc/kubetune"
CONFIG_FILE: Final = "config.yaml"
SECRETS_DIR: Final = "/var/run/kubetune/secrets"
CONFIGMAPS_DIR: Final = "/var/run/kubetune/configmaps"
PVC_DIR: Final = "/var/run/kubetune/pvc"
SCRATCH_DIR: Final = "/scratch"
RENDEZVOUS_PORT: Final = 29500
METRICS_PORT: Final = 9464

# Environment variables, written by the operator into the trainer's container.
ENV_SECRETS_DIR: Final = "KUBETUNE_SECRETS_DIR"
ENV_CONFIGMAPS_DIR: Final = "KUBETUNE_CONFIGMAPS_DIR"
ENV_PVC_DIR: Final = "KUBETUNE_PVC_DIR"
ENV_SCRATCH: Final = "KUBETUNE_SCRATCH"
ENV_ATTEMPT: Final = "KUBETUNE_ATTEMPT"
ENV_CPUS: Final = "KUBETUNE_CPUS"
ENV_METRICS_PORT: Final = "KUBETUNE_METRICS_PORT"
ENV_TERMINATION_LOG: Final = "KUBETUNE_TERMINATION_LOG"

# torch's own variables of the rendezvous.
ENV_NUM_NODES: Final = "PET_NNODES"
ENV_PROCESSES_PER_NODE: Final = "PET_NPROC_PER_NODE"
ENV_NODE_RANK: Final = "PET_NODE_RANK"
ENV_MASTER_ADDRESS: Final = "PET_MASTER_ADDR"
ENV_MASTER_PORT: Final = "PET_MASTER_PORT"

# The keys of an S3 credentials Secret.
S3_ACCESS_KEY: Final = "AWS_ACCESS_KEY_ID"
S3_SECRET_KEY: Final = "AWS_SECRET_ACCESS_KEY"  # noqa: S105 (the name of a key, not a secret)
S3_SESSION_TOKEN: Final = "AWS_SESSION_TOKEN"  # noqa: S105 (the name of a key, not a secret)


def config_name(job: str) -> str:
    """Name of the ConfigMap that carries the rendered config."""
    return f"{job}-config"


def prepare_name(job: str) -> str:
    """Name of the Job that resolves the model and tokenizes the data."""
    return f"{job}-prepare"


def train_name(job: str, *, attempt: int) -> str:
    """Name of the training Job of an attempt, and of its headless Service."""
    return f"{job}-train-{attempt}"
