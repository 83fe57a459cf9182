"""What an attempt takes over from an admission."""

from typing import Any

import yaml

from kubetune_operator.render.job import render_work_job
from kubetune_operator.render.kueue import as_admitted, render_queue_job
from kubetune_operator.render.objects import render_all
from kubetune_operator.settings import Settings
from tests.render.manifests import SMALL, finetunejob


def test_an_attempt_has_all_marks_of_its_admission_and_none_of_the_job_in_the_queue() -> None:
    job, settings = finetunejob(SMALL, queue={"name": "team-a"}), Settings()
    config = yaml.safe_load(render_all(job, settings)[0]["data"]["config.yaml"])
    attempt = render_work_job(job, config=config, attempt=2, backoff_limit=0, settings=settings)
    attempt["metadata"] |= {"ownerReferences": []}
    queue_job = render_queue_job(job, attempt=attempt)
    queue_job["metadata"] |= {"uid": "queue"}
    marks: dict[str, Any] = queue_job["spec"]["template"]["metadata"]
    marks["labels"] = marks["labels"] | {
        "kueue.x-k8s.io/podset": "main", "cloud/reservation": "r1", "controller-uid": "u", "job-name": "j",
        "batch.kubernetes.io/job-name": "j",
    }  # fmt: skip
    provisioning = {
        "autoscaling.x-k8s.io/consume-provisioning-request": "pr1",
        "autoscaling.x-k8s.io/provisioning-class-name": "queued-provisioning.gke.io",
    }
    marks["annotations"] = (marks.get("annotations") or {}) | provisioning
    admitted = as_admitted(attempt, queue_job=queue_job)["spec"]["template"]["metadata"]
    own = attempt["spec"]["template"]["metadata"]["labels"]
    assert admitted["labels"] == own | {"kueue.x-k8s.io/podset": "main", "cloud/reservation": "r1"}
    assert provisioning.items() <= admitted["annotations"].items()
