"""The config file of a run: the spec in the trainer's words, complete, with what only the cluster knows filled in."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from kubetune_operator.api.dataset import Samples
from kubetune_operator.api.finetunejob import (
    BLOCKS,
    Checkpoint,
    Dpo,
    FineTuneJob,
    Kto,
    Lora,
    Orpo,
    Simpo,
    learns_from_examples,
)
from kubetune_operator.api.jobs import Job
from kubetune_operator.api.quantizejob import QuantizeJob
from kubetune_operator.names import GROUP_VERSION

Json = dict[str, Any]

CLUSTER_ONLY: Final = {"suspend", "compute", "lifecycle", "after", "queue"}
"""Blocks of the spec that say how a job runs on Kubernetes; the trainer never sees them."""

NUMBERS: Final = (
    ("dataset", "sources", "weight"),
    ("dataset", "validation", "fraction"),
    ("dataset", "validation", "sources", "weight"),
    ("dpo", "beta"),
    ("dpo", "label_smoothing"),
    ("orpo", "beta"),
    ("simpo", "beta"),
    ("simpo", "gamma"),
    ("kto", "beta"),
    ("kto", "desirable_weight"),
    ("kto", "undesirable_weight"),
    ("distillation", "temperature"),
    ("distillation", "weight"),
    ("lora", "dropout"),
    ("lora", "learning_rate_ratio"),
    ("training", "learning_rate"),
    ("training", "weight_decay"),
    ("training", "max_grad_norm"),
    ("training", "early_stopping", "min_delta"),
    ("gates", "at_least"),
    ("gates", "at_most"),
    ("gates", "compared_to", "max_drop"),
    ("gates", "compared_to", "max_increase"),
    ("gates", "max_perplexity_increase_percent"),
    ("calibration", "dataset", "sources", "weight"),
    ("verify", "dataset", "sources", "weight"),
)
"""Fields of all kinds that are patterned strings in the custom resource and numbers in the config."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What the spec leaves open and the cluster knows.

    Attributes:
        processes_per_node: Ranks on each node.
        models: Blocks in the trainer's words that stand for models with a jobRef, by field: model, dpo.reference.
        resume_from: The folder of checkpoints behind `checkpoint.resumeFrom.jobRef`, None if the spec has none.
        compared: Run directories of the EvalJobs that gates compare with, by name.
        parents: The jobs whose results are used, for the lineage: kind, name, uid, and output where one is used.
    """

    processes_per_node: int
    models: Mapping[str, Json] = field(default_factory=dict)
    resume_from: str | None = None
    compared: Mapping[str, str] = field(default_factory=dict)
    parents: tuple[Json, ...] = ()


def run_directory(job: Job) -> str:
    """URI of the folder that belongs to this run alone."""
    metadata = job.metadata
    return f"{job.spec.workspace.uri.rstrip('/')}/{metadata.namespace}/{metadata.name}-{metadata.uid[:8] or 'local'}"


def cache_directory(job: Job) -> str:
    """URI of the folder that all runs of the namespace share."""
    return f"{job.spec.workspace.uri.rstrip('/')}/{job.metadata.namespace}/cache"


def render_config(job: Job, *, resolved: Resolved) -> Json:
    """Build the config of a run, the same for prepare and for every attempt."""
    spec = _filled(job).model_dump(mode="json", exclude_none=True)
    config = {key: value for key, value in spec.items() if key not in CLUSTER_ONLY}
    for path in NUMBERS:
        _to_number(config, path=path)
    for model_field, model in resolved.models.items():
        block, _, name = model_field.rpartition(".")
        (config[block] if block else config)[name] = model
    if resolved.resume_from is not None:
        config["checkpoint"]["resume_from"] = {"uri": resolved.resume_from}
    for gate in config.get("gates") or []:
        if other := gate.get("compared_to"):
            other["directory"] = resolved.compared[other["name"]]
    return {"api_version": GROUP_VERSION, "kind": job.kind, "run": _render_run(job, resolved=resolved), **config}


class _Dumper(yaml.SafeDumper):
    """Quotes a string like 2e-4, or the commit 81e4567: YAML 1.1 reads it back as one, the trainer as a number."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def dump_config(config: Json) -> str:
    """Write a config as YAML, always in the same way. YAML 1.1 reads `None` as a string, and so does the trainer."""
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _render_run(job: Job, *, resolved: Resolved) -> Json:
    compute = job.spec.compute
    run: Json = {
        "namespace": job.metadata.namespace,
        "name": job.metadata.name,
        "uid": job.metadata.uid or "local",
        "directory": run_directory(job),
        "cache": cache_directory(job),
        "num_nodes": compute.nodes if compute is not None else 1,
        "processes_per_node": resolved.processes_per_node,
    }
    return run | ({"parents": list(resolved.parents)} if resolved.parents else {})


def _filled(job: Job) -> Any:
    """Fill in the optional blocks whose fields have defaults, so that the config says everything."""
    filled: Json = {}
    if isinstance(job, QuantizeJob):
        for name in ("calibration", "verify"):
            if (block := getattr(job.spec, name)) is not None:
                filled[name] = block.model_copy(update={"dataset": _packed(block.dataset, default="BestFit")})
    if not isinstance(job, FineTuneJob):
        return job.spec.model_copy(update=filled)
    if job.spec.tuning != "Full" and job.spec.lora is None:
        filled["lora"] = Lora()
    if block := BLOCKS.get(job.spec.recipe):
        filled[block] = getattr(job.spec, block) or {"dpo": Dpo, "orpo": Orpo, "simpo": Simpo, "kto": Kto}[block]()
    filled["dataset"] = _packed(job.spec.dataset, default="BestFit" if learns_from_examples(job.spec) else "None")
    training = job.spec.training
    if training.max_grad_norm is None and not training.optimizer_in_backward:
        filled["training"] = training.model_copy(update={"max_grad_norm": "1.0"})
    if job.spec.checkpoint is None:
        filled["checkpoint"] = Checkpoint()
    return job.spec.model_copy(update=filled)


def _packed(dataset: Samples, *, default: str) -> Samples:
    return dataset if dataset.packing is not None else dataset.model_copy(update={"packing": default})


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
