"""The jobs of the end-to-end tests. Their model and data are put into S3 by `tests/e2e/material.py`."""

import copy
from typing import Any

from tests.cluster import local

LONG_STEPS = 64
"""Optimizer steps of `long_job`."""

_BASE: dict[str, Any] = {
    "apiVersion": "kubetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "spec": {
        "model": {"uri": {"location": "s3://material/model"}},
        "dataset": {
            "sources": [{"name": "sums", "uri": {"location": "s3://material/sums.jsonl"}}],
            "validation": {"fraction": "0.1"},
            "maxSequenceLength": 128,
        },
        "lora": {"rank": 8, "alpha": 16},
        "training": {"maxSteps": 8, "globalBatchSize": 8, "microBatchSize": 2, "learningRate": "2e-3"},
        "compute": {
            "nodes": 2,
            "accelerator": {"perNode": 1},
            "resources": {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "3Gi"}},
        },
        "storage": {
            "s3": {
                "endpoint": local.S3_ENDPOINT,
                "region": local.S3_REGION,
                "credentialsSecret": {"name": "s3"},
            }
        },
        "workspace": {"uri": "s3://runs/e2e"},
        "outputs": [{"name": "merged", "type": "HuggingFace"}, {"name": "adapter", "type": "PEFT"}],
        "lifecycle": {"gracePeriodSeconds": 20},
    },
}


def small_job(name: str, **spec: Any) -> dict[str, Any]:
    """A job of two pods that is over in a few seconds of training; `spec` replaces whole blocks."""
    manifest = copy.deepcopy(_BASE)
    manifest["metadata"] = {"name": name}
    manifest["spec"] |= spec
    return manifest


def eval_job(name: str, **spec: Any) -> dict[str, Any]:
    """An EvalJob of one pod on the task `sums`; `spec` adds and replaces blocks."""
    own = {
        "tasks": [{"name": "sums", "limit": 40}],
        "taskFiles": [{"name": "own", "uri": {"location": "s3://material/tasks"}}],
        "batchSize": 16,
    }
    return _one_pod("EvalJob", name, own | spec)


def quantize_job(name: str, **spec: Any) -> dict[str, Any]:
    """A QuantizeJob; `spec` adds and replaces blocks."""
    source = {"name": "sums", "uri": {"location": "s3://material/sums.jsonl"}}
    own = {
        "outputs": [
            {"name": "int8", "type": "CompressedTensors", "scheme": "Int8WeightOnly"},
            {"name": "q8", "type": "GGUF", "gguf": {"type": "Q8_0"}},
        ],
        "verify": {"dataset": {"sources": [source], "maxSequenceLength": 128}, "samples": 16},
    }
    return _one_pod("QuantizeJob", name, own | spec)


def _one_pod(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    shared = {key: _BASE["spec"][key] for key in ("model", "storage", "workspace", "lifecycle")}
    compute = {**_BASE["spec"]["compute"], "nodes": 1}
    manifest = {"apiVersion": _BASE["apiVersion"], "kind": kind, "metadata": {"name": name}}
    return copy.deepcopy({**manifest, "spec": {**shared, "compute": compute, **spec}})


def long_job(name: str) -> dict[str, Any]:
    """A job of LONG_STEPS steps with everything that could make a resumed run differ from one in peace."""
    manifest = small_job(name)
    spec = manifest["spec"]
    spec["dataset"]["sources"] = [
        {"name": "sums", "uri": {"location": "s3://material/sums.jsonl"}, "weight": "1.5"},
        {"name": "capitals", "uri": {"location": "s3://material/capitals.jsonl"}, "weight": "0.5"},
    ]
    spec["lora"]["dropout"] = "0.1"
    # 2 ranks x 2 rows x 2 micro batches; about 30 rows, so that epochs end between the steps.
    spec["training"] = {
        "maxSteps": LONG_STEPS,
        "globalBatchSize": 8,
        "microBatchSize": 2,
        "learningRate": "2e-3",
        "scheduler": "Cosine",
        "warmupSteps": 4,
        "precision": "BF16Mixed",
    }
    spec["checkpoint"] = {"everySteps": 10, "keep": 2, "mode": "Async"}
    spec["lifecycle"]["maxRestarts"] = 6
    spec["outputs"] = [{"name": "adapter", "type": "PEFT"}]
    return manifest
