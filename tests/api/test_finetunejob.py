"""One table of manifests, judged twice: by pydantic, and by the real API server."""

import copy
import json
from typing import Any

import pytest

from kubetune_operator.api.finetunejob import FineTuneJob, batch_problem, parse_finetunejob
from kubetune_operator.api.kinds import parse_job
from kubetune_operator.api.manifest import dump_manifests, load_manifests
from kubetune_operator.errors import SpecError
from tests.cluster.controlplane import ControlPlane

MINIMAL = """
apiVersion: kubetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: run7}
spec:
  model: {uri: {location: "s3://models/smollm2"}}
  dataset: {sources: [{name: tickets, uri: {location: "s3://data/tickets.jsonl"}}]}
  training: {epochs: 3}
  workspace: {uri: "s3://team/runs"}
  outputs: [{name: merged, type: HuggingFace}]
"""
ABSENT = object()


def manifest(**changes: Any) -> dict[str, Any]:
    """The minimal manifest with fields changed."""
    return changed(load_manifests(MINIMAL, source="MINIMAL")[0], **changes)


def changed(job: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A manifest with fields changed by path; `__` stands for a dot, a number for a place in a list."""
    job = copy.deepcopy(job)
    for path, value in changes.items():
        *parents, last = path.split("__")
        target: Any = job
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        if value is ABSENT:
            target.pop(last, None)
        else:
            target[last] = copy.deepcopy(value)
    return job


VOLUMES = {"volumes": [{"name": "cache", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}]}

GOOD: dict[str, dict[str, Any]] = {
    "the minimal manifest": {},
    "a recipe for preferences with its block": {
        "spec__recipe": "DPO",
        "spec__dpo": {"loss": "IPO", "beta": "0.2", "labelSmoothing": "0.00"},
        "spec__dataset__sources__0__format": "Preference",
        "spec__dataset__packing": "None",
    },
    "a recipe for preferences without one": {"spec__recipe": "SimPO"},
    "a teacher": {
        "spec__recipe": "Distillation",
        "spec__distillation": {
            "teacher": {"jobRef": {"name": "large"}},
            "divergence": "Reverse",
            "temperature": "2",
            "weight": "0.05",
        },
        "spec__dataset__packing": "BestFit",
    },
    "nothing but the teacher's word": {
        "spec__recipe": "Distillation",
        "spec__distillation": {"teacher": {"hub": {"repo": "a/b"}}, "weight": "1.0"},
        "spec__tuning": "Full",
    },
    "a script of one's own": {
        "spec__recipe": "Custom",
        "spec__custom": {"script": {"configMap": {"name": "focal", "key": "focal.py"}}, "args": ["--gamma", "2.0"]},
    },
    "a script of the image": {"spec__recipe": "Custom", "spec__custom": {"script": {"path": "/opt/recipes/my.py"}}},
    "a script that learns from pairs, with another recipe's settings": {
        "spec__recipe": "Custom",
        "spec__custom": {"script": {"path": "/my.py"}},
        "spec__dpo": {"loss": "Hinge"},
        "spec__dataset__sources__0__format": "Preference",
    },
    "a model of the Hub": {"spec__model": {"hub": {"repo": "HuggingFaceTB/SmolLM2-135M"}}},
    "a model of the Hub without an owner": {"spec__model": {"hub": {"repo": "gpt2", "revision": "v1"}}},
    "a gated model": {"spec__model": {"hub": {"repo": "a/b", "tokenSecret": {"name": "hf", "key": "token"}}}},
    "another job's output": {"spec__model": {"jobRef": {"kind": "FineTuneJob", "name": "stage-1", "output": "merged"}}},
    "a FineTuneJob's output, its kind left out": {"spec__model": {"jobRef": {"name": "stage-1"}}},
    "a quantized model of the same name": {"spec__model": {"jobRef": {"kind": "QuantizeJob", "name": "run7"}}},
    "answers that are good or bad": {
        "spec__recipe": "KTO",
        "spec__kto": {"beta": "0.2", "desirableWeight": "1.5", "undesirableWeight": "0.5"},
        "spec__dataset__sources__0__format": "UnpairedPreference",
    },
    "pairs for KTO": {"spec__recipe": "KTO", "spec__dataset__sources__0__format": "Preference"},
    "adapters to go on with": {"spec__lora": {"adapter": {"jobRef": {"name": "a", "output": "adapter"}}}},
    "a reference of the Hub": {"spec__recipe": "DPO", "spec__dpo": {"reference": {"hub": {"repo": "a/b"}}}},
    "another job's output as reference": {"spec__recipe": "DPO", "spec__dpo": {"reference": {"jobRef": {"name": "a"}}}},
    "jobs to wait for": {
        "spec__after": [
            {"kind": "EvalJob", "name": "run7", "condition": "GatePassed"},
            {"kind": "FineTuneJob", "name": "a"},
        ]
    },
    "every format": {
        "spec__outputs": [
            {"name": "merged", "type": "HuggingFace", "dtype": "BF16"},
            {"name": "adapter", "type": "PEFT"},
            {"name": "gguf", "type": "GGUF", "gguf": {"type": "Q8_0"}},
            {"name": "phone", "type": "ExecuTorch"},
            {"name": "phone4", "type": "ExecuTorch", "scheme": "Int8DynamicActivationInt4Weight", "execuTorch": {}},
            {"name": "vllm", "type": "CompressedTensors", "scheme": "Int4WeightOnly", "groupSize": 64},
        ]
    },
    "a model with credentials of its own": {
        "spec__model__uri__s3": {
            "endpoint": "http://s3:9000",
            "caBundle": {"configMap": {"name": "ca", "key": "ca.crt"}},
        }
    },
    "all trackers": {
        "spec__tracking": {
            "wandb": {
                "project": "support bot",
                "entity": "team",
                "group": "night",
                "tags": ["a", "b"],
                "mode": "Online",
                "apiKeySecret": {"name": "wandb", "key": "key"},
                "baseUrl": "https://wandb.example",
            },
            "mlflow": {
                "trackingUri": "https://mlflow.example/base",
                "experiment": "tickets",
                "tokenSecret": {"name": "mlflow", "key": "token"},
            },
            "tensorboard": {},
        }
    },
    "an offline tracker": {"spec__tracking": {"wandb": {"project": "p", "mode": "Offline"}}},
    "an output for the Hub": {
        "spec__pushToHub": {
            "repo": "team/bot",
            "output": "merged",
            "private": False,
            "tokenSecret": {"name": "hf", "key": "token"},
        },
        "spec__outputs": [{"name": "merged", "type": "HuggingFace"}],
    },
    "a look into some steps": {"spec__training__profile": {"startStep": 10, "numSteps": 3, "memory": True}},
    "a local path": {"spec__workspace__uri": "file:///tmp/runs"},
    "a volume claim": {"spec__workspace__uri": "pvc://claim-1/runs"},
    "three sources": {
        "spec__dataset__sources": [
            {"name": "a", "hub": {"repo": "tatsu-lab/alpaca", "split": "train[:95%]"}, "weight": "2"},
            {
                "name": "b",
                "configMap": {"name": "data", "key": "b.jsonl"},
                "format": "Text",
                "columns": {"text": "body"},
            },
            {
                "name": "c",
                "uri": {"location": "pvc://claim"},
                "weight": "0.5",
                "format": "ShareGPT",
                "columns": {"conversations": "chat", "tools": "functions"},
            },
        ]
    },
    "a held-out fraction": {"spec__dataset__validation": {"fraction": "0.05"}, "spec__training__validateEverySteps": 5},
    "validation sources": {
        "spec__dataset__validation": {"sources": [{"name": "v", "uri": {"location": "s3://data/v.jsonl"}}]}
    },
    "steps instead of epochs": {"spec__training": {"maxSteps": 10}},
    "full tuning": {"spec__tuning": "Full"},
    "an optimizer with less state, in backward": {
        "spec__training__optimizer": "AdamW8bit",
        "spec__training__optimizerInBackward": True,
        "spec__training__globalBatchSize": 1,
        "spec__training__precision": "BF16",
        "spec__training__stochasticRounding": True,
    },
    "activations in the host's memory": {
        "spec__training__activationOffload": True,
        "spec__training__activationCheckpointing": "Full",
        "spec__training__optimizerInBackward": True,
        "spec__training__globalBatchSize": 1,
        "spec__compute__accelerator": {"resource": "nvidia.com/gpu", "perNode": 1},
    },
    "weights in the host's memory": {
        "spec__training__cpuOffload": True,
        "spec__training__activationOffload": True,
        "spec__training__optimizer": "AdamW8bit",
        "spec__training__parallelism": {"replicate": 2},
        "spec__tuning": "Full",
        "spec__compute__accelerator": {"resource": "nvidia.com/gpu", "perNode": 2},
    },
    "compiled blocks that recompute some activations": {
        "spec__training__compile": "Blocks",
        "spec__training__activationCheckpointing": "Selective",
    },
    "adapters with magnitudes": {
        "spec__tuning": "DoRA",
        "spec__lora": {"rankStabilized": True, "learningRateRatio": "16"},
        "spec__outputs": [{"name": "adapter", "type": "PEFT"}],
    },
    "adapters beside weights of 4 bits": {"spec__tuning": "QLoRA"},
    "adapters for weights of 4 bits": {
        "spec__recipe": "QAT",
        "spec__qat": {"scheme": "Int4WeightOnly"},
        "spec__lora": {"rank": 8, "dropout": "0"},
    },
    "training for weights of 4 bits": {
        "spec__recipe": "QAT",
        "spec__tuning": "Full",
        "spec__qat": {"scheme": "Int4WeightOnly", "groupSize": 64},
        "spec__outputs": [
            {"name": "model", "type": "HuggingFace"},
            {"name": "vllm", "type": "CompressedTensors", "scheme": "Int4WeightOnly", "groupSize": 64},
        ],
    },
    "adapters merged into the original weights": {
        "spec__tuning": "QLoRA",
        "spec__lora": {"mergeBase": "Original"},
        "spec__outputs": [{"name": "adapter", "type": "PEFT"}],
    },
    "tokens that are added and trained": {"spec__lora": {"trainTokens": ["<|tool|>", "<|answer|>"]}},
    "tokens that are trained beside packed weights": {
        "spec__tuning": "QLoRA",
        "spec__lora": {"trainTokens": ["<think>"]},
    },
    "an adapter of one's own": {"spec__lora": {"rank": 8, "dropout": "0.1", "targetModules": ["q_proj", "v_proj"]}},
    "a learning rate in exponent form": {"spec__training__learningRate": "1.5e-05"},
    "quantities as numbers and strings": {
        "spec__compute__resources": {"requests": {"cpu": 4, "memory": "8Gi"}, "limits": {"cpu": "500m"}}
    },
    "volumes and mounts": {"spec__compute": VOLUMES | {"volumeMounts": [{"name": "cache", "mountPath": "/cache"}]}},
    "scheduling": {
        "spec__compute": {
            "nodes": 2,
            "accelerator": {"perNode": 8},
            "nodeSelector": {"pool": "gpu"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "affinity": {"requiredNodeLabels": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]},
            "env": [{"name": "A", "value": ""}, {"name": "B", "secretKeyRef": {"name": "s", "key": "k"}}],
        }
    },
    "resuming from another run": {"spec__checkpoint": {"resumeFrom": {"jobRef": {"kind": "FineTuneJob", "name": "a"}}}},
    "checkpoints by time": {"spec__checkpoint": {"everySeconds": 900, "keep": 1, "mode": "Sync"}},
    "a lifecycle": {"spec__lifecycle": {"maxRestarts": 0, "ttlSecondsAfterFinished": 0, "activeDeadlineSeconds": 60}},
    "a queue": {"spec__queue": {"name": "team-a"}},
    "an empty optional block": {"spec__checkpoint": {}},
    "a null where a default is": {"spec__suspend": None},
    "a null where nothing is": {"spec__lora": None},
    "a null in a block": {"spec__lora": {"rank": None, "targetModules": None}},
    "a null on a map": {"spec__compute__nodeSelector": None},
    "the longest name": {"metadata__name": "a" * 40},
    "labels and annotations": {"metadata__labels": {"team": "a"}, "metadata__annotations": {"note": "x"}},
}

BAD: dict[str, tuple[dict[str, Any], str]] = {
    # Fields
    "an unknown field": ({"spec__modle": {}}, 'unknown field "spec.modle"'),
    "an unknown field deep down": (
        {"spec__dataset__sources__0__wieght": "2"},
        'unknown field "spec.dataset.sources[0].wieght"',
    ),
    "an unknown field that is null": ({"spec__modle": None}, 'unknown field "spec.modle"'),
    "a field in snake case": (
        {"spec__training__global_batch_size": 4},
        'unknown field "spec.training.global_batch_size"',
    ),
    "an unknown column": (
        {"spec__dataset__sources__0__columns": {"question": "q"}},
        'unknown field "spec.dataset.sources[0].columns.question"',
    ),
    "a slice without an end": (
        {"spec__dataset__sources": [{"name": "a", "hub": {"repo": "a/b", "split": "train[:9"}}]},
        "must be a name with an optional slice, for example train[:95%]",
    ),
    "a limit of hangs that every step would exceed": (
        {"spec__lifecycle": {"hangTimeoutSeconds": 9}},
        "spec.lifecycle.hangTimeoutSeconds",
    ),
    "an early end without validations": (
        {"spec__training__earlyStopping": {"patience": 2}},
        "earlyStopping needs validateEverySteps",
    ),
    "a block of another recipe": (
        {"spec__recipe": "ORPO", "spec__dpo": {}},
        "spec.dpo is allowed only with recipe: DPO or Custom",
    ),
    "pairs for supervised fine-tuning": (
        {"spec__dataset__sources__0__format": "Preference"},
        "spec.dataset.sources must have format Preference with recipe: DPO, ORPO or SimPO, this or",
    ),
    "held-out pairs for supervised fine-tuning": (
        {
            "spec__dataset__validation": {
                "sources": [
                    {"name": "held", "uri": {"location": "s3://data/held"}, "format": "Preference"},
                ]
            }
        },
        "spec.dataset.validation.sources must have format Preference with recipe: DPO, ORPO or SimPO, this or",
    ),
    "held-out texts for preferences": (
        {
            "spec__recipe": "DPO",
            "spec__dataset__validation": {
                "sources": [
                    {"name": "held", "uri": {"location": "s3://data/held"}, "format": "Text"},
                ]
            },
        },
        "spec.dataset.validation.sources must have format Preference with recipe: DPO, ORPO or SimPO, this or",
    ),
    "texts for preferences": (
        {"spec__recipe": "DPO", "spec__dataset__sources__0__format": "Text"},
        "spec.dataset.sources must have format Preference with recipe: DPO, ORPO or SimPO, this or",
    ),
    "packed pairs": (
        {"spec__recipe": "DPO", "spec__dataset__packing": "BestFit"},
        "spec.dataset.packing must be None with formats of preferences, and so with recipe: DPO, ORPO, SimPO or KTO",
    ),
    "split answers": (
        {"spec__recipe": "DPO", "spec__dataset__overlong": "Split"},
        "spec.dataset must have trainOn Assistant and not overlong Split with formats of preferences",
    ),
    "a pupil without a teacher": (
        {"spec__recipe": "Distillation"},
        "spec.distillation is required with recipe: Distillation",
    ),
    "a teacher from two places": (
        {
            "spec__recipe": "Distillation",
            "spec__distillation": {"teacher": {"jobRef": {"name": "a"}, "hub": {"repo": "a/b"}}},
        },
        "exactly one of hub, uri, jobRef must be set",
    ),
    "a teacher for another recipe": (
        {"spec__distillation": {"teacher": {"hub": {"repo": "a/b"}}}},
        "spec.distillation is allowed only with recipe: Distillation or Custom",
    ),
    "a pupil that is its own teacher": (
        {"spec__recipe": "Distillation", "spec__distillation": {"teacher": {"jobRef": {"name": "run7"}}}},
        "spec.distillation.teacher.jobRef must name another job",
    ),
    "a teacher that is not listened to": (
        {
            "spec__recipe": "Distillation",
            "spec__distillation": {"teacher": {"hub": {"repo": "a/b"}}, "weight": "0.0"},
        },
        'must be a number in quotes, above 0 and at most 1, for example "0.5"',
    ),
    "pairs for a pupil": (
        {
            "spec__recipe": "Distillation",
            "spec__distillation": {"teacher": {"hub": {"repo": "a/b"}}},
            "spec__dataset__sources__0__format": "Preference",
        },
        "spec.dataset.sources must have format Preference with recipe: DPO, ORPO or SimPO, this or",
    ),
    "a script without its recipe": (
        {"spec__custom": {"script": {"path": "/my.py"}}},
        "spec.custom is required with recipe: Custom, and allowed only with it",
    ),
    "a recipe of one's own without a script": (
        {"spec__recipe": "Custom"},
        "spec.custom is required with recipe: Custom, and allowed only with it",
    ),
    "a script in two places": (
        {
            "spec__recipe": "Custom",
            "spec__custom": {"script": {"path": "/my.py", "configMap": {"name": "a", "key": "my.py"}}},
        },
        "exactly one of configMap, path must be set",
    ),
    "a script that is no Python": (
        {"spec__recipe": "Custom", "spec__custom": {"script": {"configMap": {"name": "a", "key": "my.sh"}}}},
        "configMap.key must end in .py",
    ),
    "a script somewhere": (
        {"spec__recipe": "Custom", "spec__custom": {"script": {"path": "my.py"}}},
        "must be an absolute path that ends in .py",
    ),
    "a script for examples and pairs": (
        {
            "spec__recipe": "Custom",
            "spec__custom": {"script": {"path": "/my.py"}},
            "spec__dataset__sources": [
                {"name": "a", "uri": {"location": "s3://data/a"}, "format": "Preference"},
                {"name": "b", "uri": {"location": "s3://data/b"}, "format": "Text"},
            ],
        },
        "neither with SFT, QAT or Distillation, and all or none of them with Custom",
    ),
    "labels that are as often wrong as right": (
        {"spec__recipe": "DPO", "spec__dpo": {"labelSmoothing": "0.5"}},
        'must be a number in quotes, from 0 to below 0.5, for example "0.1"',
    ),
    "smoothing of a loss that has no labels": (
        {"spec__recipe": "DPO", "spec__dpo": {"loss": "Hinge", "labelSmoothing": "0.1"}},
        "labelSmoothing must be 0 with loss: IPO or Hinge",
    ),
    "single answers in a step of KTO": (
        {"spec__recipe": "KTO", "spec__training__globalBatchSize": 1},
        "spec.training.globalBatchSize must be at least 2 with recipe: KTO and with spec.kto",
    ),
    "single answers in a step of a script for KTO": (
        {
            "spec__recipe": "Custom",
            "spec__custom": {"script": {"path": "/my.py"}},
            "spec__kto": {},
            "spec__training__globalBatchSize": 1,
        },
        "spec.training.globalBatchSize must be at least 2 with recipe: KTO and with spec.kto",
    ),
    "too many steps to look into": (
        {"spec__training__profile": {"numSteps": 21}},
        "spec.training.profile.numSteps in body should be less than or equal to 20",
    ),
    "a push of no output": (
        {"spec__pushToHub": {"repo": "team/bot", "output": "other"}},
        "spec.pushToHub.output must be the name of one of spec.outputs",
    ),
    "a push to nobody": (
        {"spec__pushToHub": {"repo": "bot", "output": "merged"}},
        "must be owner and name, for example my-team/support-bot",
    ),
    "tracking by nobody": ({"spec__tracking": {}}, "at least one of wandb, mlflow, tensorboard must be set"),
    "an online tracker without a key": (
        {"spec__tracking": {"wandb": {"project": "p"}}},
        "apiKeySecret is required with mode: Online",
    ),
    "a project with a slash": (
        {"spec__tracking": {"wandb": {"project": "team/p", "mode": "Offline"}}},
        "must consist of letters, digits, '-', '_', '.' and spaces",
    ),
    "a tracking server of another protocol": (
        {"spec__tracking": {"mlflow": {"trackingUri": "databricks", "experiment": "e"}}},
        "must be a URL that starts with http:// or https:// or, for local runs, file:///path",
    ),
    "no spec": ({"spec": ABSENT}, "spec: Required value"),
    "no model": ({"spec__model": ABSENT}, "spec.model: Required value"),
    "no workspace": ({"spec__workspace": ABSENT}, "spec.workspace: Required value"),
    "a required field that is null": ({"spec__training": None}, "spec.training: Required value"),
    "no outputs": (
        {"spec__outputs": []},
        "spec.outputs: Invalid value: 0: spec.outputs in body should have at least 1 items",
    ),
    "a queue without a name": ({"spec__queue": {}}, "spec.queue.name: Required value"),
    "a queue in another namespace": (
        {"spec__queue": {"name": "team/a"}},
        "must consist of lower-case letters, digits and '-', and start and end with a letter or digit",
    ),
    "another kind of job": (
        {"spec__model": {"jobRef": {"kind": "Job", "name": "a"}}},
        'spec.model.jobRef.kind: Unsupported value: "Job": supported values: "FineTuneJob", "QuantizeJob"',
    ),
    # Types
    "a number for a string": (
        {"spec__training__learningRate": 2e-4},
        "spec.training.learningRate in body must be of type string",
    ),
    "a string for a number": (
        {"spec__training__epochs": "3"},
        "spec.training.epochs in body must be of type integer",
    ),
    "a fraction for an integer": (
        {"spec__training__epochs": 1.5},
        "spec.training.epochs in body must be of type integer",
    ),
    "a string for a boolean": ({"spec__suspend": "yes"}, "spec.suspend in body must be of type boolean"),
    "a number for an object": ({"spec__lora": 3}, "spec.lora in body must be of type object"),
    "an object for a list": ({"spec__outputs": {}}, "spec.outputs in body must be of type array"),
    "a boolean for an integer": ({"spec__training__seed": True}, "spec.training.seed in body must be of type integer"),
    "a null in a list": ({"spec__lora": {"targetModules": [None]}}, "spec.lora.targetModules[0]"),
    "a map's key that is a type's name": (
        {"spec__compute__nodeSelector": {"int": 5}},
        "spec.compute.nodeSelector.int in body must be of type string",
    ),
    "a fraction for a quantity": (
        {"spec__compute__resources": {"limits": {"cpu": 0.5}}},
        "spec.compute.resources.limits.cpu in body must be of type integer,string",
    ),
    # Values
    "an unknown choice": (
        {"spec__tuning": "IA3"},
        'spec.tuning: Unsupported value: "IA3": supported values: "LoRA", "DoRA", "QLoRA", "Full"',
    ),
    "three choices": (
        {"spec__training__precision": "FP16"},
        'spec.training.precision: Unsupported value: "FP16": supported values: "BF16Mixed", "BF16", "FP32"',
    ),
    "clipping of gradients that are gone": (
        {"spec__training__optimizerInBackward": True, "spec__training__maxGradNorm": "1.0"},
        "maxGradNorm is not allowed with optimizerInBackward, which cannot clip",
    ),
    "rounding of weights that keep all": (
        {"spec__training__stochasticRounding": True},
        "stochasticRounding needs precision: BF16",
    ),
    "an optimizer with less state and split layers": (
        {"spec__training__optimizer": "AdamW4bit", "spec__training__parallelism": {"tensor": 2}},
        "parallelism.tensor must be 1 with compile, optimizerInBackward, stochasticRounding, activationOffload",
    ),
    "offloading from split layers": (
        {
            "spec__training__activationOffload": True,
            "spec__training__parallelism": {"tensor": 2},
            "spec__compute__accelerator": {"resource": "nvidia.com/gpu", "perNode": 2},
        },
        "parallelism.tensor must be 1 with compile, optimizerInBackward, stochasticRounding, activationOffload",
    ),
    "offloading from compiled blocks": (
        {
            "spec__training__activationOffload": True,
            "spec__training__compile": "Blocks",
            "spec__compute__accelerator": {"resource": "nvidia.com/gpu", "perNode": 1},
        },
        "compile must be None with activationOffload",
    ),
    "offloading without an accelerator": (
        {"spec__training__activationOffload": True, "spec__compute": {"nodes": 2}},
        "spec.training.activationOffload must be false without spec.compute.accelerator",
    ),
    "offloaded weights of split layers": (
        {
            "spec__training__cpuOffload": True,
            "spec__training__parallelism": {"tensor": 2},
            "spec__compute__accelerator": {"resource": "nvidia.com/gpu", "perNode": 2},
        },
        "stochasticRounding, activationOffload, cpuOffload and optimizers other than AdamW",
    ),
    "offloaded weights in NF4": (
        {
            "spec__training__cpuOffload": True,
            "spec__tuning": "QLoRA",
            "spec__compute__accelerator": {"resource": "nvidia.com/gpu", "perNode": 1},
        },
        "spec.training.cpuOffload must be false with tuning: QLoRA",
    ),
    "offloaded weights without an accelerator": (
        {"spec__training__cpuOffload": True, "spec__compute": {"nodes": 2}},
        "spec.training.cpuOffload must be false without spec.compute.accelerator",
    ),
    "offloading without compute": (
        {"spec__training__activationOffload": True},
        "spec.training.activationOffload must be false without spec.compute.accelerator",
    ),
    "something else to compile": (
        {"spec__training__compile": "Model"},
        'spec.training.compile: Unsupported value: "Model": supported values: "None", "Blocks"',
    ),
    "a number too small": (
        {"spec__lora": {"rank": 0}},
        "spec.lora.rank: Invalid value: 0: spec.lora.rank in body should be greater than or equal to 1",
    ),
    "a number too large": (
        {"spec__lora": {"rank": 5000}},
        "spec.lora.rank: Invalid value: 5000: spec.lora.rank in body should be less than or equal to 4096",
    ),
    "a learning rate of zero": (
        {"spec__training__learningRate": "0.0"},
        'must be a number in quotes, above 0, for example "2e-4"',
    ),
    "a learning rate that is no number": (
        {"spec__training__learningRate": "fast"},
        'must be a number in quotes, above 0, for example "2e-4"',
    ),
    "a negative weight decay": (
        {"spec__training__weightDecay": "-0.1"},
        'must be a number in quotes, 0 or more, for example "0.01"',
    ),
    "a dropout of one": (
        {"spec__lora": {"dropout": "1.0"}},
        'must be a number in quotes, from 0 to below 1, for example "0.1"',
    ),
    "a fraction of zero": (
        {"spec__dataset__validation": {"fraction": "0.0"}},
        'must be a number in quotes between 0 and 1, for example "0.05"',
    ),
    "a fraction of one": (
        {"spec__dataset__validation": {"fraction": "1.0"}},
        'must be a number in quotes between 0 and 1, for example "0.05"',
    ),
    "a number with a line break": (
        {"spec__training__learningRate": "2e-4\n"},
        'must be a number in quotes, above 0, for example "2e-4"',
    ),
    "a URI without a scheme": (
        {"spec__workspace__uri": "/runs"},
        "must be s3://bucket/path, pvc://claim/path or, for local runs, file:///path",
    ),
    "a URI of another scheme": (
        {"spec__model__uri__location": "gs://bucket/model"},
        "must be s3://bucket/path, pvc://claim/path or, for local runs, file:///path",
    ),
    "a URI without a bucket": (
        {"spec__workspace__uri": "s3://"},
        "must be s3://bucket/path, pvc://claim/path or, for local runs, file:///path",
    ),
    "an endpoint without a scheme": (
        {"spec__storage": {"s3": {"endpoint": "s3:9000"}}},
        "must be a URL that starts with http:// or https://",
    ),
    "a repository with a space": ({"spec__model": {"hub": {"repo": "a b"}}}, "must be a repository of the Hub"),
    "an output with a bad name": (
        {"spec__outputs__0__name": "My Model"},
        "must consist of lower-case letters, digits and '-', and start and end with a letter or digit",
    ),
    "a Secret with a bad name": (
        {"spec__storage": {"s3": {"credentialsSecret": {"name": "S3"}}}},
        "must consist of lower-case letters, digits, '-' and '.', and start and end with a letter or digit",
    ),
    "a bad quantity": (
        {"spec__compute__resources": {"limits": {"memory": "8GB"}}},
        "must be a quantity, 0 or more, for example 500m, 2 or 8Gi",
    ),
    "a negative quantity": (
        {"spec__compute__resources": {"limits": {"memory": "-8Gi"}}},
        "must be a quantity, 0 or more, for example 500m, 2 or 8Gi",
    ),
    "a negative number of CPUs": (
        {"spec__compute__resources": {"limits": {"cpu": -1}}},
        "must be a quantity, 0 or more, for example 500m, 2 or 8Gi",
    ),
    "an accelerator that is no extended resource": (
        {"spec__compute__accelerator": {"resource": "gpu"}},
        "must be an extended resource, for example nvidia.com/gpu",
    ),
    # Limits
    "a template too long": (
        {"spec__dataset__chatTemplate": "x" * 65_537},
        "spec.dataset.chatTemplate: Too long: may not be more than 65536 bytes",
    ),
    "an empty template": (
        {"spec__dataset__chatTemplate": ""},
        "spec.dataset.chatTemplate in body should be at least 1 chars long",
    ),
    "too many outputs": (
        {"spec__outputs": [{"name": f"o{n}", "type": "HuggingFace"} for n in range(9)]},
        "spec.outputs: Too many: 9: must have at most 8 items",
    ),
    "too many resources": (
        {"spec__compute__resources": {"limits": {f"r{n}": 1 for n in range(13)}}},
        "spec.compute.resources.limits: Too many: 13: must have at most 12 items",
    ),
    "two outputs of one name": (
        {"spec__outputs": [{"name": "a", "type": "HuggingFace"}, {"name": "a", "type": "PEFT"}]},
        'spec.outputs[1]: Duplicate value: {"name":"a"}',
    ),
    "two sources of one name": (
        {
            "spec__dataset__sources": [
                {"name": "a", "uri": {"location": "s3://data/1"}},
                {"name": "a", "uri": {"location": "s3://data/2"}},
            ]
        },
        'spec.dataset.sources[1]: Duplicate value: {"name":"a"}',
    ),
    "a token twice": (
        {"spec__lora": {"trainTokens": ["<|tool|>", "<|tool|>"]}},
        'spec.lora.trainTokens[1]: Duplicate value: "<|tool|>"',
    ),
    "the empty token": (
        {"spec__lora": {"trainTokens": [""]}},
        "spec.lora.trainTokens[0]",
    ),
    "no token at all": (
        {"spec__lora": {"trainTokens": []}},
        "spec.lora.trainTokens: Invalid value",
    ),
    "trained tokens without adapters": (
        {"spec__tuning": "Full", "spec__lora": {"trainTokens": ["<|tool|>"]}},
        "spec.lora is not allowed with tuning: Full",
    ),
    "a module twice": (
        {"spec__lora": {"targetModules": ["q_proj", "q_proj"]}},
        'spec.lora.targetModules[1]: Duplicate value: "q_proj"',
    ),
    # Exactly one of
    "two model sources": (
        {"spec__model__hub": {"repo": "a/b"}},
        "exactly one of hub, uri, jobRef must be set",
    ),
    "no model source": ({"spec__model": {}}, "exactly one of hub, uri, jobRef must be set"),
    "two data sources in one": (
        {"spec__dataset__sources__0__hub": {"repo": "a/b"}},
        "exactly one of hub, uri, configMap must be set",
    ),
    "no data source": ({"spec__dataset__sources": [{"name": "a"}]}, "exactly one of hub, uri, configMap must be set"),
    "both validations": (
        {
            "spec__dataset__validation": {
                "fraction": "0.1",
                "sources": [{"name": "v", "uri": {"location": "s3://data/v"}}],
            }
        },
        "exactly one of fraction, sources must be set",
    ),
    "epochs and steps": ({"spec__training__maxSteps": 10}, "exactly one of epochs, maxSteps must be set"),
    "neither epochs nor steps": ({"spec__training": {}}, "exactly one of epochs, maxSteps must be set"),
    "two places to resume from": (
        {"spec__checkpoint": {"resumeFrom": {"uri": "s3://runs/1", "jobRef": {"kind": "FineTuneJob", "name": "a"}}}},
        "exactly one of uri, jobRef must be set",
    ),
    "a variable with two values": (
        {"spec__compute__env": [{"name": "A", "value": "1", "secretKeyRef": {"name": "s", "key": "k"}}]},
        "exactly one of value, secretKeyRef must be set",
    ),
    "a volume of two kinds": (
        {"spec__compute__volumes": [{"name": "v", "emptyDir": {}, "configMap": {"name": "c"}}]},
        "exactly one of persistentVolumeClaim, configMap, secret, emptyDir must be set",
    ),
    # Across fields
    "LoRA's settings with full tuning": (
        {"spec__tuning": "Full", "spec__lora": {}},
        "spec.lora is not allowed with tuning: Full",
    ),
    "dropout in layers that are split": (
        {"spec__training__parallelism": {"tensor": 2}, "spec__lora": {"dropout": "0.05"}},
        "spec.training.parallelism.tensor must be 1 with tuning: DoRA or QLoRA and with a spec.lora.dropout",
    ),
    "compiled layers over weights of 4 bits": (
        {"spec__tuning": "QLoRA", "spec__training__compile": "Blocks"},
        "spec.training.compile must be None with tuning: QLoRA",
    ),
    "a base to merge into that was not quantized": (
        {"spec__lora": {"mergeBase": "Original"}},
        "spec.lora.mergeBase is allowed only with tuning: QLoRA",
    ),
    "training for rounded weights without saying which": (
        {"spec__recipe": "QAT", "spec__tuning": "Full"},
        "spec.qat is required with recipe: QAT",
    ),
    "magnitudes of rounded weights": (
        {"spec__recipe": "QAT", "spec__tuning": "DoRA", "spec__qat": {"scheme": "Int4WeightOnly"}},
        "spec.tuning must be Full or LoRA with spec.qat",
    ),
    "rounded weights that are packed": (
        {"spec__recipe": "QAT", "spec__tuning": "QLoRA", "spec__qat": {"scheme": "Int4WeightOnly"}},
        "spec.tuning must be Full or LoRA with spec.qat",
    ),
    "dropout before an adapter that is merged": (
        {"spec__recipe": "QAT", "spec__qat": {"scheme": "Int4WeightOnly"}, "spec__lora": {"dropout": "0.05"}},
        "spec.lora.dropout must be 0 with spec.qat: what is rounded is the merged weight",
    ),
    "compiled layers with rounded weights": (
        {
            "spec__recipe": "QAT",
            "spec__tuning": "Full",
            "spec__qat": {"scheme": "Int4WeightOnly"},
            "spec__training__compile": "Blocks",
        },
        "spec.training.compile must be None with spec.qat",
    ),
    "groups that are no groups": (
        {"spec__recipe": "QAT", "spec__tuning": "Full", "spec__qat": {"scheme": "Int4WeightOnly", "groupSize": 48}},
        "must be 32, 64 or 128",
    ),
    "outputs that are rounded in another way than was trained": (
        {
            "spec__recipe": "QAT",
            "spec__tuning": "Full",
            "spec__qat": {"scheme": "Int4WeightOnly", "groupSize": 64},
            "spec__outputs": [{"name": "vllm", "type": "CompressedTensors", "scheme": "Int4WeightOnly"}],
        },
        "spec.outputs that have a scheme must have that of spec.qat, and its groupSize",
    ),
    "adapters from full tuning": (
        {"spec__tuning": "Full", "spec__outputs": [{"name": "a", "type": "PEFT"}]},
        "an output of type PEFT is not allowed with tuning: Full",
    ),
    "a type for adapters": (
        {"spec__outputs": [{"name": "a", "type": "PEFT", "dtype": "BF16"}]},
        "dtype is allowed only with type: HuggingFace",
    ),
    "validation without data": (
        {"spec__training__validateEverySteps": 5},
        "spec.training.validateEverySteps needs spec.dataset.validation",
    ),
    "a job that waits for itself": (
        {"spec__model": {"jobRef": {"kind": "FineTuneJob", "name": "run7"}}},
        "spec.model.jobRef must name another job",
    ),
    "single answers for DPO": (
        {"spec__recipe": "DPO", "spec__dataset__sources__0__format": "UnpairedPreference"},
        "UnpairedPreference with KTO",
    ),
    "single answers for SFT": (
        {"spec__dataset__sources__0__format": "UnpairedPreference"},
        "neither with SFT",
    ),
    "settings of KTO with DPO": (
        {"spec__recipe": "DPO", "spec__kto": {}},
        "spec.kto is allowed only with recipe: KTO or Custom",
    ),
    "a job that goes on with its own adapters": (
        {"spec__lora": {"adapter": {"jobRef": {"name": "run7"}}}},
        "spec.lora.adapter.jobRef must name another job",
    ),
    "a job that measures against itself": (
        {"spec__recipe": "DPO", "spec__dpo": {"reference": {"jobRef": {"kind": "FineTuneJob", "name": "run7"}}}},
        "spec.dpo.reference.jobRef must name another job",
    ),
    "a reference from nowhere": (
        {"spec__recipe": "DPO", "spec__dpo": {"reference": {}}},
        "exactly one of hub, uri, jobRef must be set",
    ),
    "a job that comes after itself": (
        {"spec__after": [{"kind": "FineTuneJob", "name": "run7"}]},
        "spec.after must name other jobs",
    ),
    "a job that resumes from itself": (
        {"spec__checkpoint": {"resumeFrom": {"jobRef": {"kind": "FineTuneJob", "name": "run7"}}}},
        "spec.checkpoint.resumeFrom.jobRef must name another job",
    ),
    "a job to wait for twice": (
        {
            "spec__after": [
                {"kind": "EvalJob", "name": "a"},
                {"kind": "EvalJob", "name": "a", "condition": "GatePassed"},
            ]
        },
        'spec.after[1]: Duplicate value: {"kind":"EvalJob","name":"a"}',
    ),
    "the gates of a job that has none": (
        {"spec__after": [{"kind": "FineTuneJob", "name": "a", "condition": "GatePassed"}]},
        "condition: GatePassed is allowed only with kind: EvalJob or QuantizeJob, which have gates",
    ),
    "a condition that no job has": (
        {"spec__after": [{"kind": "EvalJob", "name": "a", "condition": "Failed"}]},
        'spec.after[0].condition: Unsupported value: "Failed": supported values: "Complete", "GatePassed"',
    ),
    "a format of QuantizeJobs": (
        {"spec__outputs__0__type": "TorchAO"},
        'spec.outputs[0].type: Unsupported value: "TorchAO"',
    ),
    "a scheme for a whole model": (
        {"spec__outputs__0__scheme": "Int8WeightOnly"},
        "scheme is allowed only with type: CompressedTensors or TorchAO or ExecuTorch",
    ),
    "a format without its scheme": (
        {"spec__outputs": [{"name": "a", "type": "CompressedTensors"}]},
        "type: CompressedTensors takes the scheme Int8WeightOnly or Int8DynamicActivation or Int4WeightOnly",
    ),
    "GGUF without its type": (
        {"spec__outputs": [{"name": "a", "type": "GGUF"}]},
        "gguf must be set with type: GGUF, and only with it",
    ),
    "a mount without a volume": (
        {"spec__compute": {"volumeMounts": [{"name": "cache", "mountPath": "/cache"}]}},
        "each of volumeMounts must name one of volumes",
    ),
    "a mount over the operator's own": (
        {"spec__compute": VOLUMES | {"volumeMounts": [{"name": "cache", "mountPath": "/scratch/x"}]}},
        "the operator mounts these",
    ),
    "a variable of the operator's own": (
        {"spec__compute__env": [{"name": "PET_NNODES", "value": "3"}]},
        "must not start with KUBETUNE_ or PET_: the operator sets these",
    ),
    # Names
    "a name too long": ({"metadata__name": "a" * 41}, "metadata.name must have at most 40 lower-case letters"),
    "a name with a dot": ({"metadata__name": "run.7"}, "metadata.name must have at most 40 lower-case letters"),
    "a name that starts with a digit": (
        {"metadata__name": "7run"},
        "metadata.name must have at most 40 lower-case letters",
    ),
    # Everything at once
    "a schema error hides the rules": (
        {"spec__lora": {"rank": 0}, "spec__tuning": "Full"},
        "spec.lora.rank: Invalid value: 0: spec.lora.rank in body should be greater than or equal to 1",
    ),
}


@pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD)
def test_a_good_manifest_is_accepted(changes: dict[str, Any]) -> None:
    assert parse_finetunejob(manifest(**changes)).kind == "FineTuneJob"


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_a_bad_manifest_is_refused_with_its_message(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_finetunejob(manifest(**changes))
    assert message in str(refused.value)
    assert str(refused.value).startswith("FineTuneJob ")


@pytest.mark.control_plane
@pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD)
def test_the_api_server_accepts_it_and_fills_in_the_same_defaults(
    changes: dict[str, Any], control_plane: ControlPlane
) -> None:
    text = dump_manifests([manifest(**changes)])
    stored = control_plane.kubectl("create", "--dry-run=server", "--output=json", "--filename=-", input=text).stdout
    assert json.loads(stored)["spec"] == parse_finetunejob(manifest(**changes)).to_manifest()["spec"]


@pytest.mark.control_plane
@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_the_api_server_refuses_it_with_the_same_message(
    changes: dict[str, Any], message: str, control_plane: ControlPlane
) -> None:
    text = dump_manifests([manifest(**changes)])
    refused = control_plane.kubectl("create", "--dry-run=server", "--filename=-", input=text, check=False)
    assert refused.returncode
    assert message in refused.stderr
    with pytest.raises(SpecError) as ours:
        parse_finetunejob(manifest(**changes))
    assert all(problem in refused.stderr for problem in ours.value.problems), "both say the whole sentence"


def test_every_problem_is_named_at_once() -> None:
    job = manifest(
        spec__lora={"rank": 0, "alpha": 0}, spec__modle={}, spec__training__epochs="3", metadata__namespace="team-a"
    )
    with pytest.raises(SpecError) as refused:
        parse_finetunejob(job)
    wanted = """
spec.lora.rank: Invalid value: 0: spec.lora.rank in body should be greater than or equal to 1
spec.lora.alpha: Invalid value: 0: spec.lora.alpha in body should be greater than or equal to 1
spec.training.epochs: Invalid value: "string": spec.training.epochs in body must be of type integer: "string"
unknown field "spec.modle"
"""
    assert str(refused.value).splitlines() == [f"FineTuneJob team-a/run7: {line}" for line in wanted.split("\n")[1:-1]]


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "problem"),
    [
        (16, 1, 1, None),
        (16, 4, 4, None),
        (10, 4, 2, "must be divisible by 8 (2 processes x microBatchSize 4); nearest: 8 or 16"),
        (3, 2, 2, "must be divisible by 4 (2 processes x microBatchSize 2); nearest: 4"),
        (64, 1, 6, "must be divisible by 6 (6 processes x microBatchSize 1); nearest: 60 or 66"),
    ],
)
def test_a_batch_that_does_not_divide_is_told_the_nearest_sizes(
    batch: int, micro: int, ranks: int, problem: str | None
) -> None:
    training = {"epochs": 1, "globalBatchSize": batch, "microBatchSize": micro}
    said = batch_problem(parse_finetunejob(manifest(spec__training=training)).spec, ranks=ranks)
    assert said == (problem and f"spec.training.globalBatchSize: Invalid value: {batch}: {problem}")


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        (8, None),
        (6, "spec.training.parallelism: Invalid value: replicate 2 x tensor 2: must divide the number of processes, 6"),
        (
            12,
            (
                "spec.training.globalBatchSize: Invalid value: 16: must be divisible by 6 (6 groups of 2 processes x "
                "microBatchSize 1); nearest: 12 or 18"
            ),
        ),
    ],
)
def test_processes_that_split_layers_see_the_same_rows(ranks: int, problem: str | None) -> None:
    training = {"epochs": 1, "globalBatchSize": 16, "parallelism": {"replicate": 2, "tensor": 2}}
    assert batch_problem(parse_finetunejob(manifest(spec__training=training)).spec, ranks=ranks) == problem


def test_ranks_are_nodes_times_devices() -> None:
    compute = {"nodes": 2, "accelerator": {"perNode": 8}}
    assert parse_finetunejob(manifest(spec__compute=compute)).spec.ranks == 16
    assert parse_finetunejob(manifest(spec__compute={"nodes": 3})).spec.ranks == 3
    assert parse_finetunejob(manifest()).spec.ranks == 1


def test_what_a_cluster_returns_is_read_again() -> None:
    job = manifest(
        metadata__uid="1f0c", metadata__generation=2, metadata__managedFields=[{"manager": "kubectl"}],
        status={"state": "Running", "ofANewerOperator": 1},
    )  # fmt: skip
    parsed = parse_finetunejob(job)
    assert (parsed.metadata.generation, parsed.status.state) == (2, "Running")
    assert parse_finetunejob(parsed.to_manifest()) == parsed


def test_a_field_of_a_newer_crd_is_refused_in_a_file_and_passed_over_in_the_cluster() -> None:
    newer = manifest(spec__training__warmUpRows=8, spec__lifecycle={"hangTimeoutSeconds": 60, "patienceSeconds": 3})
    with pytest.raises(SpecError, match=r'unknown field "spec\.training\.warmUpRows"'):
        parse_job(newer)
    stored = parse_job(newer, is_stored=True)
    assert isinstance(stored, FineTuneJob)
    assert stored.spec.lifecycle is not None
    assert stored.spec.lifecycle.hang_timeout_seconds == 60
