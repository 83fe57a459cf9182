"""The main job on a real node: two pods train, the result comes back, and it is the model that was trained."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cluster import local
from tests.cluster.local import Cluster
from tests.e2e.jobs import Recording, apply, wait_for
from tests.e2e.manifests import small_job

pytestmark = pytest.mark.cluster


def test_a_job_trains_on_two_pods_and_its_outputs_come_back(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    job = apply(cluster, small_job("roundtrip"), namespace=namespace)
    with Recording(job, tmp_path) as recording:
        job.wait_state("Running")
        assert len(job.pods("train")) == 2
        status = job.wait_state("Complete")
    told = kubetune(cluster, "logs", job.name, "--namespace", namespace).splitlines()
    assert [line.split()[1] for line in told if line.startswith("step ")] == [f"{step}/8" for step in range(1, 9)]

    progress = status["progress"]
    assert progress["step"] == progress["totalSteps"] == 8
    assert float(progress["validationLoss"]) > 0
    assert (status["restarts"], status["attempt"]) == (0, 1)
    assert status["data"]["samples"] == 160
    assert status["data"]["droppedSamples"] == 0
    assert status["estimate"]["memoryPerDeviceBytes"] > 0
    assert status["estimate"]["fits"] is True
    assert status["checkpoint"]["step"] == 8
    outputs = {output["name"]: output for output in status["outputs"]}
    assert {name: output["type"] for name, output in outputs.items()} == {"merged": "HuggingFace", "adapter": "PEFT"}
    assert all(output["bytes"] > 0 and output["digest"] for output in outputs.values())

    (losses,) = recording.losses().values()
    assert sorted(losses) == list(range(1, 9))
    assert losses[8] < losses[1]

    cluster.download(outputs["merged"]["uri"], tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def kubetune(cluster: Cluster, *arguments: str) -> str:
    """What the command line prints."""
    command = [sys.executable, "-m", "kubetune_operator.cli", *arguments]
    environment = os.environ | {"KUBECONFIG": str(cluster.kubeconfig)}
    ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60)
    return ran.stdout


def test_a_job_may_start_from_what_another_one_made(cluster: Cluster, namespace: str) -> None:
    model = {"jobRef": {"kind": "FineTuneJob", "name": "first", "output": "merged"}}
    second = apply(cluster, small_job("second", model=model), namespace=namespace)
    second.wait_condition("Running", says="FineTuneJob first does not exist")
    first = apply(cluster, small_job("first"), namespace=namespace)
    merged = next(output for output in first.wait_state("Complete")["outputs"] if output["name"] == "merged")
    status = second.wait_state("Complete")
    assert status["resolved"]["model"]["location"].rstrip("/") == merged["uri"].rstrip("/")


def test_a_suspended_job_gives_its_pods_back_and_goes_on_later(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    training = small_job("")["spec"]["training"] | {"maxSteps": 40}
    job = apply(cluster, small_job("paused", training=training), namespace=namespace)
    with Recording(job, tmp_path) as recording:
        recording.wait_step(5, attempt=1)
        job.kubectl("patch", "finetunejob", job.name, "--type=merge", "--patch", '{"spec":{"suspend":true}}')
        job.wait_state("Suspended")
        wait_for(lambda: not job.pods("train") or None, "the pods to go", timeout_seconds=60)
        job.kubectl("patch", "finetunejob", job.name, "--type=merge", "--patch", '{"spec":{"suspend":false}}')
        status = job.wait_state("Complete")
    losses = recording.losses()
    assert min(losses[2]) == max(losses[1]) + 1
    assert status["restarts"] == 0


def test_the_chart_passes_its_own_test(cluster: Cluster) -> None:
    told = cluster.helm("test", local.RELEASE, "--namespace", local.OPERATOR_NAMESPACE, "--timeout=2m").stdout
    assert "Succeeded" in told
