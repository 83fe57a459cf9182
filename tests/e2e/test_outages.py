"""Training does not notice that the operator restarts, and outlives a minute without object storage."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster import local
from tests.cluster.local import Cluster
from tests.e2e.jobs import Recording, apply, wait_for
from tests.e2e.manifests import long_job

pytestmark = pytest.mark.cluster
OUTAGE_SECONDS = 60


def test_training_does_not_notice_that_the_operator_restarts(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    job = apply(cluster, long_job("steady"), namespace=namespace)
    with Recording(job, tmp_path) as recording:
        recording.wait_step(5, attempt=1)
        jobs = _batch_jobs(cluster, namespace)
        cluster.kubectl(
            "delete", "pod", "--all", "--namespace", local.OPERATOR_NAMESPACE, "--grace-period=0", "--force"
        )
        status = job.wait_state("Complete")
    assert _batch_jobs(cluster, namespace) == jobs
    assert (status["restarts"], status["attempt"]) == (0, 1)
    assert list(recording.losses()) == [1]


def test_a_minute_without_storage_delays_a_checkpoint_and_stops_nothing(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    manifest = long_job("offline")
    manifest["spec"]["training"]["maxSteps"] = 400
    job = apply(cluster, manifest, namespace=namespace)
    with Recording(job, tmp_path) as recording:
        recording.wait_step(12, attempt=1)
        _serve(cluster, no=True)
        try:
            cut_at = recording.wait_step(1, attempt=1)
            time.sleep(OUTAGE_SECONDS)
            moved_to = recording.wait_step(1, attempt=1)
        finally:
            _serve(cluster, no=False)
        lines = recording.attempts()[1]
        complete = [line["step"] for line in lines if line["event"] == "checkpoint"]

        def next_checkpoint() -> int | None:
            found = [line["step"] for line in recording.attempts()[1] if line["event"] == "checkpoint"]
            return found[-1] if len(found) > len(complete) else None

        saved = wait_for(next_checkpoint, "a checkpoint after the outage", timeout_seconds=120)
    assert moved_to > cut_at + 5
    assert saved > max(complete, default=0)
    assert any(line["event"] in {"warning", "checkpointFailed"} for line in lines), "the outage was not felt"
    status = job.status()
    assert (status.get("restarts", 0), status["attempt"]) == (0, 1)
    job.remove()


def _serve(cluster: Cluster, *, no: bool) -> None:
    """Take the Service's endpoints away, so that connections to it are refused, or give them back."""
    patch = json.dumps({"spec": {"selector": {"app": "nobody" if no else "s3"}}})
    cluster.kubectl("patch", "service", "s3", "--namespace", local.S3_NAMESPACE, "--type=merge", "--patch", patch)
    if no:
        # Connections that exist would live on. The container comes back with its data; nobody is led to it.
        subprocess.run(["pkill", "-KILL", "--full", "^/rclone serve s3"], check=True)


def _batch_jobs(cluster: Cluster, namespace: str) -> dict[str, str]:
    shown = cluster.kubectl("get", "jobs", "--namespace", namespace, "--output", "json").stdout
    return {job["metadata"]["name"]: job["metadata"]["uid"] for job in json.loads(shown)["items"]}
