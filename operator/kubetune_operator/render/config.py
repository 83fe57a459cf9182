"""The config file of a run: the spec in the trainer's words, complete, with what only the cluster knows filled in."""

from dataclasses import dataclass
from typing import Any, Final

import yaml

from kubetune_operator.api.common import S3
from kubetune_operator.api.finetunejob import Checkpoint, FineTuneJob, Lora
from kubetune_operator.names import GROUP_VERSION, KIND_FINETUNEJOB

Json = dict[str, Any]

CLUSTER_ONLY: Final = {"suspend", "compute", "lifecycle", "queue"}
"""Blocks of the spec that say how a job runs on Kubernetes; the trainer never sees them."""

NUMBERS: Final = (
    ("dataset", "sources", "weight"),
    ("dataset", "validation", "fraction"),
    ("dataset", "validation", "sources", "weight"),
    ("lora", "dropout"),
    ("training", "learning_rate"),
    ("training", "weight_decay"),
    ("training", "max_grad_norm"),
)
"""Fields that are patterned strings in the custom resource and numbers in the config."""


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """The folder that a jobRef stands for.

    Attributes:
        location: URI of the output.
        s3: Access to it, where it differs from the job's own storage.
    """

    location: str
    s3: S3 | None = None


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What the spec leaves open and the cluster knows.

    Attributes:
        processes_per_node: Ranks on each node.
        model: The folder behind `model.jobRef`, None if the spec has none.
        resume_from: The checkpoint behind `checkpoint.resumeFrom.jobRef`, None if the spec has none.
    """

    processes_per_node: int
    model: ResolvedModel | None = None
    resume_from: str | None = None


def run_directory(job: FineTuneJob) -> str:
    """URI of the folder that belongs to this run alone."""
    metadata = job.metadata
    return f"{job.spec.workspace.uri.rstrip('/')}/{metadata.namespace}/{metadata.name}-{metadata.uid[:8] or 'local'}"


def cache_directory(job: FineTuneJob) -> str:
    """URI of the folder that all runs of the namespace share."""
    return f"{job.spec.workspace.uri.rstrip('/')}/{job.metadata.namespace}/cache"


def render_config(job: FineTuneJob, *, resolved: Resolved) -> Json:
    """Build the config of a run, the same for prepare and for every attempt."""
    spec = _filled(job).model_dump(mode="json", exclude_none=True)
    config = {key: value for key, value in spec.items() if key not in CLUSTER_ONLY}
    for path in NUMBERS:
        _to_number(config, path=path)
    if resolved.model is not None:
        uri: Json = {"location": resolved.model.location}
        if resolved.model.s3 is not None:
            uri["s3"] = resolved.model.s3.model_dump(mode="json", exclude_none=True)
        config["model"] = {"uri": uri}
    if resolved.resume_from is not None:
        config["checkpoint"]["resume_from"] = {"uri": resolved.resume_from}
    return {
        "api_version": GROUP_VERSION,
        "kind": KIND_FINETUNEJOB,
        "run": _render_run(job, processes_per_node=resolved.processes_per_node),
        **config,
    }


def dump_config(config: Json) -> str:
    """Write a config as YAML, always in the same way. YAML 1.1 reads `None` as a string, and so does the trainer."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)


def _render_run(job: FineTuneJob, *, processes_per_node: int) -> Json:
    compute = job.spec.compute
    return {
        "namespace": job.metadata.namespace,
        "name": job.metadata.name,
        "uid": job.metadata.uid or "local",
        "directory": run_directory(job),
        "cache": cache_directory(job),
        "num_nodes": compute.nodes if compute is not None else 1,
        "processes_per_node": processes_per_node,
    }


def _filled(job: FineTuneJob) -> Any:
    """Fill in the optional blocks whose fields have defaults, so that the config says everything."""
    spec = job.spec
    filled: Json = {}
    if spec.tuning == "LoRA" and spec.lora is None:
        filled["lora"] = Lora()
    if spec.checkpoint is None:
        filled["checkpoint"] = Checkpoint()
    return spec.model_copy(update=filled)


def _to_number(node: Any, *, path: tuple[str, ...]) -> None:
    """Replace the string at a path by the number that it spells; lists on the way are walked."""
    if isinstance(node, list):
        for item in node:
            _to_number(item, path=path)
    elif isinstance(node, dict) and path[0] in node:
        if len(path) == 1:
            node[path[0]] = float(node[path[0]])
        else:
            _to_number(node[path[0]], path=path[1:])
