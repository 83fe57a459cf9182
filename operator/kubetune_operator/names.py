"""Every name that the operator writes or reads: labels, environment variables, paths, ports, exit codes.

What the trainer shares stands again in `kubetune_trainer.names`; a test holds the two equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

API_GROUP: Final = "kubetune.dev"
API_VERSION: Final = "v1alpha1"
GROUP_VERSION: Final = f"{API_GROUP}/{API_VERSION}"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is called how for a kind of job.

    Attributes:
        plural: The kind in URLs.
        component: Its work, in labels and in names of Jobs.
        recipe: What the trainer runs for it.
        doing: Its work as it goes on, the reason of the Running condition.
        preparing: What its prepare Job does.
        less: How to need less memory.
        suffix: What names of its ConfigMap and prepare Job end in, so that jobs of two kinds may have one name.
    """

    plural: str
    component: str
    recipe: str
    doing: str
    preparing: str
    less: str
    suffix: str = ""


KIND_FINETUNEJOB: Final = "FineTuneJob"
KIND_EVALJOB: Final = "EvalJob"
KIND_QUANTIZEJOB: Final = "QuantizeJob"
KINDS: Final[Mapping[str, Kind]] = {
    KIND_FINETUNEJOB: Kind(
        plural="finetunejobs",
        component="train",
        recipe="finetune",
        doing="Training",
        preparing="the model is fetched and the data is tokenized",
        less=(
            "a smaller training.microBatchSize or dataset.maxSequenceLength, "
            "training.activationCheckpointing: Full, or more nodes"
        ),
    ),
    KIND_EVALJOB: Kind(
        plural="evaljobs",
        component="eval",
        recipe="eval_model",
        doing="Evaluating",
        preparing="the model and the tasks are fetched",
        less="a smaller batchSize or maxSequenceLength",
        suffix="-eval",
    ),
    KIND_QUANTIZEJOB: Kind(
        plural="quantizejobs",
        component="quantize",
        recipe="quantize",
        doing="Quantizing",
        preparing="the model is fetched and the data is tokenized",
        less="a smaller maxSequenceLength in calibration.dataset and verify.dataset",
        suffix="-quantize",
    ),
}


def recipe_of(kind: str, *, recipe: str | None) -> str:
    """The script that the trainer runs for a job.

    Args:
        kind: Kind of the job.
        recipe: Its spec's recipe, where it has one.
    """
    return {"DPO": "dpo", "ORPO": "dpo", "SimPO": "dpo", "KTO": "kto", "Distillation": "distill"}.get(
        recipe or ""
    ) or KINDS[kind].recipe


class ExitCode(IntEnum):
    """How a trainer container ended."""

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


PERMANENT_EXIT_CODES: Final = (
    ExitCode.CONFIG,
    ExitCode.DATA,
    ExitCode.DOES_NOT_FIT,
    ExitCode.OUT_OF_MEMORY,
    ExitCode.NON_FINITE_LOSS,
)
"""Codes that the same Job would only repeat; it fails at once on them. After OUT_OF_MEMORY another Job may do less."""

# Labels, written by the operator on everything it creates.
LABEL_JOB_NAME: Final = f"{API_GROUP}/job-name"
LABEL_JOB_KIND: Final = f"{API_GROUP}/job-kind"
LABEL_COMPONENT: Final = f"{API_GROUP}/component"
LABEL_ATTEMPT: Final = f"{API_GROUP}/attempt"
COMPONENT_PREPARE: Final = "prepare"

# Written by `kubetune sweep` on the jobs that it makes.
LABEL_SWEEP: Final = f"{API_GROUP}/sweep"
ANNOTATION_SWEEP_VALUES: Final = f"{API_GROUP}/sweep-values"
ANNOTATION_SWEEP_DIGEST: Final = f"{API_GROUP}/sweep-digest"

LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGED_BY: Final = "kubetune"

# Kueue's. The operator writes the first on the Job that stands in a queue, Kueue the second on its Workload.
LABEL_QUEUE_NAME: Final = "kueue.x-k8s.io/queue-name"
LABEL_WORKLOAD_JOB_UID: Final = "kueue.x-k8s.io/job-uid"
COMPONENT_QUEUE: Final = "queue"
QUEUE_JOB_MANAGER: Final = f"{API_GROUP}/operator"
"""`spec.managedBy` of the Job that stands in a queue: the Job controller leaves it alone."""

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
ENV_IMAGE: Final = "KUBETUNE_IMAGE"
ENV_CPUS: Final = "KUBETUNE_CPUS"
ENV_METRICS_PORT: Final = "KUBETUNE_METRICS_PORT"
ENV_TERMINATION_LOG: Final = "KUBETUNE_TERMINATION_LOG"
ENV_HANG_SECONDS: Final = "KUBETUNE_HANG_SECONDS"

# The workspace, written by the trainer.
CHECKPOINTS_DIR: Final = "checkpoints"

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


def config_name(kind: str, name: str) -> str:
    """Name of the ConfigMap that carries the rendered config of a job."""
    return f"{name}-config{KINDS[kind].suffix}"


def prepare_name(kind: str, name: str) -> str:
    """Name of the Job that resolves the model and fetches the data of a job."""
    return f"{name}-prepare{KINDS[kind].suffix}"


def queue_job_name(kind: str, name: str) -> str:
    """Name of the Job that stands in Kueue's queue for a job, through all of its attempts."""
    return f"{name}-queue{KINDS[kind].suffix}"


def work_name(kind: str, name: str, *, attempt: int) -> str:
    """Name of the Job of an attempt, and of its headless Service."""
    return f"{name}-{KINDS[kind].component}-{attempt}"
