"""What may change in a FineTuneJob that exists: the real API server's word on fields that change, appear and vanish."""

import json
from typing import Any

import pytest

from kubetune_operator.api.manifest import dump_manifests
from tests.api.test_finetunejob import ABSENT, manifest
from tests.cluster.controlplane import ControlPlane

FULL: dict[str, Any] = {
    "spec__lora": {"rank": 8},
    "spec__compute": {"nodes": 2},
    "spec__storage": {"s3": {"region": "r"}},
    "spec__checkpoint": {"keep": 2},
    "spec__lifecycle": {"maxRestarts": 1, "gracePeriodSeconds": 60},
    "spec__queue": {"name": "team-a"},
    "spec__after": [{"kind": "EvalJob", "name": "base"}],
}
MUTABLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "suspend": ({}, {"spec__suspend": True}),
    "maxRestarts": (FULL, {"spec__lifecycle__maxRestarts": 5}),
    "a deadline that appears": (FULL, {"spec__lifecycle__activeDeadlineSeconds": 60}),
    "a ttl that appears": (FULL, {"spec__lifecycle__ttlSecondsAfterFinished": 60}),
    "a lifecycle that appears": ({}, {"spec__lifecycle": {"maxRestarts": 5}}),
    "a lifecycle that vanishes": ({"spec__lifecycle": {"maxRestarts": 5}}, {"spec__lifecycle": ABSENT}),
    "a default that is written out": ({}, {"spec__training__seed": 42}),
    "labels": ({}, {"metadata__labels": {"team": "a"}}),
}
FROZEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a model that changes": ({}, {"spec__model__uri__location": "s3://models/other"}, "model"),
    "a model of another kind": ({}, {"spec__model": {"hub": {"repo": "a/b"}}}, "model"),
    "a field deep down that appears": ({}, {"spec__dataset__chatTemplate": "x"}, "dataset"),
    "a source that appears": (
        {},
        {"spec__dataset__sources": [*manifest()["spec"]["dataset"]["sources"], {"name": "b", "hub": {"repo": "a/b"}}]},
        "dataset",
    ),
    "a validation that appears": ({}, {"spec__dataset__validation": {"fraction": "0.1"}}, "dataset"),
    "a tuning that changes": ({}, {"spec__tuning": "Full"}, "tuning"),
    "LoRA's settings that change": (FULL, {"spec__lora__rank": 9}, "lora"),
    "LoRA's settings that appear": ({}, {"spec__lora": {"rank": 16}}, "lora"),
    "LoRA's settings that vanish": (FULL, {"spec__lora": ABSENT}, "lora"),
    "training that changes": ({}, {"spec__training__learningRate": "1e-4"}, "training"),
    "steps instead of epochs": ({}, {"spec__training": {"maxSteps": 3}}, "training"),
    "compute that changes": (FULL, {"spec__compute__nodes": 4}, "compute"),
    "compute that appears": ({}, {"spec__compute": {}}, "compute"),
    "compute that vanishes": (FULL, {"spec__compute": ABSENT}, "compute"),
    "storage that changes": (FULL, {"spec__storage__s3__region": "s"}, "storage"),
    "storage that appears": ({}, {"spec__storage": {"s3": {}}}, "storage"),
    "storage that vanishes": (FULL, {"spec__storage": ABSENT}, "storage"),
    "a workspace that changes": ({}, {"spec__workspace__uri": "s3://other"}, "workspace"),
    "checkpoints that change": (FULL, {"spec__checkpoint__keep": 4}, "checkpoint"),
    "checkpoints that appear": ({}, {"spec__checkpoint": {}}, "checkpoint"),
    "checkpoints that vanish": (FULL, {"spec__checkpoint": ABSENT}, "checkpoint"),
    "an output that appears": (
        {},
        {"spec__outputs": [{"name": "merged", "type": "HuggingFace"}, {"name": "a", "type": "PEFT"}]},
        "outputs",
    ),
    "a queue that changes": (FULL, {"spec__queue__name": "team-b"}, "queue"),
    "a queue that appears": ({}, {"spec__queue": {"name": "team-a"}}, "queue"),
    "a queue that vanishes": (FULL, {"spec__queue": ABSENT}, "queue"),
    "jobs to wait for that change": (FULL, {"spec__after__0__condition": "GatePassed"}, "after"),
    "jobs to wait for that appear": ({}, {"spec__after": [{"kind": "EvalJob", "name": "base"}]}, "after"),
    "jobs to wait for that vanish": (FULL, {"spec__after": ABSENT}, "after"),
    "a grace period that changes": (FULL, {"spec__lifecycle__gracePeriodSeconds": 61}, "lifecycle.gracePeriodSeconds"),
    "a grace period that appears": (
        {},
        {"spec__lifecycle": {"gracePeriodSeconds": 60}},
        "lifecycle.gracePeriodSeconds",
    ),
    "a limit of hangs that changes": (
        FULL,
        {"spec__lifecycle__hangTimeoutSeconds": 60},
        "lifecycle.hangTimeoutSeconds",
    ),
    "a limit of hangs that appears": (
        {},
        {"spec__lifecycle": {"hangTimeoutSeconds": 60}},
        "lifecycle.hangTimeoutSeconds",
    ),
    "a grace period that vanishes": (FULL, {"spec__lifecycle": ABSENT}, "lifecycle.gracePeriodSeconds"),
}


def _replace(
    control_plane: ControlPlane, namespace: str, before: dict[str, Any], after: dict[str, Any]
) -> tuple[int, str]:
    create, replace = (dump_manifests([manifest(**changes)]) for changes in (before, before | after))
    control_plane.kubectl("create", f"--namespace={namespace}", "--filename=-", input=create)
    ran = control_plane.kubectl("replace", f"--namespace={namespace}", "--filename=-", input=replace, check=False)
    return ran.returncode, ran.stderr


@pytest.mark.control_plane
@pytest.mark.parametrize(("before", "after"), MUTABLE.values(), ids=MUTABLE)
def test_a_mutable_field_may_change(
    before: dict[str, Any], after: dict[str, Any], control_plane: ControlPlane, namespace: str
) -> None:
    assert _replace(control_plane, namespace, before, after) == (0, "")


@pytest.mark.control_plane
@pytest.mark.parametrize(("before", "after", "field"), FROZEN.values(), ids=FROZEN)
def test_a_frozen_field_may_not_change_appear_or_vanish(
    before: dict[str, Any], after: dict[str, Any], field: str, control_plane: ControlPlane, namespace: str
) -> None:
    code, said = _replace(control_plane, namespace, before, after)
    assert code
    assert f"spec.{field} is immutable; make a new job to change it" in said


@pytest.mark.control_plane
def test_a_user_cannot_write_status_with_the_spec(control_plane: ControlPlane, namespace: str) -> None:
    text = dump_manifests([manifest(status={"state": "Complete"})])
    created = control_plane.kubectl("create", f"--namespace={namespace}", "--output=json", "--filename=-", input=text)
    assert "status" not in json.loads(created.stdout)
