"""A workspace whose disk is full: the job says so, and what was there before stays whole."""

import json
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.cluster.local import Cluster
from tests.e2e.jobs import apply, wait_for
from tests.e2e.manifests import small_job

pytestmark = pytest.mark.cluster

DISK: Final = "/tmp/kubetune-small-disk"  # noqa: S108 (on the node)
DISK_SIZE: Final = "4m"
"""Room for the rows and the checkpoints, not for a whole model."""


@pytest.fixture
def claim(cluster: Cluster, namespace: str) -> Iterator[str]:
    """A claim on a disk of DISK_SIZE; returns its name."""
    on_the_node(cluster, f"mkdir -p {DISK} && mount -t tmpfs -o size={DISK_SIZE},mode=1777 tmpfs {DISK}")
    name = f"small-{namespace}"
    shared: dict[str, Any] = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {**shared, "capacity": {"storage": "4Mi"}, "hostPath": {"path": DISK}},
    }
    wanted = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "small", "namespace": namespace},
        "spec": {**shared, "volumeName": name, "resources": {"requests": {"storage": "4Mi"}}},
    }
    for manifest in (volume, wanted):
        cluster.kubectl("apply", "--filename", "-", input=json.dumps(manifest))
    yield "small"
    cluster.kubectl("delete", "finetunejobs,jobs,pods", "--all", "--namespace", namespace, "--timeout=60s")
    cluster.kubectl("delete", "persistentvolumeclaim", "small", "--namespace", namespace, "--timeout=60s")
    cluster.kubectl("delete", "persistentvolume", name, "--timeout=60s")
    on_the_node(cluster, f"umount {DISK} && rmdir {DISK}")


def on_the_node(cluster: Cluster, command: str) -> None:
    """Run a shell command as root in the node's own mounts."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "hand", "namespace": "default"},
        "spec": {
            "hostPID": True,
            "restartPolicy": "Never",
            "containers": [
                {
                    "name": "hand",
                    "image": "localhost/kubetune-operator:dev",
                    "imagePullPolicy": "Never",
                    "command": ["nsenter", "--target=1", "--mount", "sh", "-c", command],
                    "securityContext": {"privileged": True, "runAsUser": 0, "runAsNonRoot": False},
                }
            ],
        },
    }
    cluster.kubectl("apply", "--filename", "-", input=json.dumps(pod))
    try:
        assert wait_for(lambda: ended(cluster), f"{command!r} to end", timeout_seconds=60) == "Succeeded"
    finally:
        cluster.kubectl("delete", "pod", "hand", "--namespace", "default", "--timeout=60s")


def ended(cluster: Cluster) -> str | None:
    """The phase of the pod that `on_the_node` made, once it is over."""
    phase = cluster.kubectl("get", "pod", "hand", "--namespace", "default", "--output=jsonpath={.status.phase}").stdout
    return phase if phase in {"Succeeded", "Failed"} else None


def test_a_full_disk_fails_the_job_with_its_name(cluster: Cluster, namespace: str, claim: str) -> None:
    job = apply(cluster, small_job("full", workspace={"uri": f"pvc://{claim}/runs"}), namespace=namespace)
    status = job.wait_state("Failed")
    failed = job.condition("Failed")
    assert failed["reason"] == "DoesNotFit"
    assert f"pvc://{claim}/runs" in failed["message"]
    assert "the disk is full" in failed["message"]
    assert status["lastFailure"]["exitCode"] == 66
    assert status["checkpoint"]["step"] == 8, "training was over and its checkpoint is whole"
    assert "outputs" not in status
