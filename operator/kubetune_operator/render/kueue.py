"""The Job that stands in Kueue's queue, and what an attempt takes over from it. Pure.

Kueue manages whole Jobs, and an attempt is a Job that comes and goes. So one more Job stands in the queue from the
first attempt to the last: suspended until Kueue admits it, with the pods of an attempt as its template, and without
pods of its own, because `managedBy` (Kubernetes 1.32) keeps the Job controller away from it. Its status is the
operator's to write: as long as it says that pods are active, Kueue gives their quota to nobody else.
"""

from collections.abc import Mapping
from typing import Any, Final

from kubetune_operator.api.jobs import Job
from kubetune_operator.names import (
    API_GROUP,
    COMPONENT_QUEUE,
    LABEL_ATTEMPT,
    LABEL_COMPONENT,
    LABEL_MANAGED_BY,
    LABEL_QUEUE_NAME,
    QUEUE_JOB_MANAGER,
    queue_job_name,
)

Json = dict[str, Any]

GIVEN: Final = ("nodeSelector", "tolerations", "schedulingGates")
"""What Kueue adds to a pod's spec when it admits a Job: where the quota that it gave is."""
PREFIXES_OF_JOBS: Final = ("batch.kubernetes.io/", f"{API_GROUP}/")
OF_JOBS: Final = frozenset({"job-name", "controller-uid", LABEL_MANAGED_BY})
"""Marks of a pod template that the API server and we write, and no admission."""


def render_queue_job(job: Job, *, attempt: Json) -> Json:
    """The Job that stands in the queue.

    Args:
        job: The custom resource.
        attempt: The rendered Job of an attempt: what quota is asked for.
    """
    assert job.spec.queue is not None  # noqa: S101 (whoever calls has looked)
    metadata = attempt["metadata"] | {
        "name": queue_job_name(job.kind, job.metadata.name),
        "labels": _labels(attempt["metadata"]["labels"]) | {LABEL_QUEUE_NAME: job.spec.queue.name},
    }
    template = attempt["spec"]["template"]
    return attempt | {
        "metadata": metadata,
        "spec": attempt["spec"]
        | {
            "suspend": True,
            "managedBy": QUEUE_JOB_MANAGER,
            "template": template | {"metadata": {"labels": _labels(template["metadata"]["labels"])}},
        },
    }


def _labels(labels: Mapping[str, str]) -> dict[str, str]:
    kept = {key: value for key, value in labels.items() if key != LABEL_ATTEMPT}
    return kept | {LABEL_COMPONENT: COMPONENT_QUEUE}


def as_admitted(attempt: Json, *, queue_job: Json) -> Json:
    """The Job of an attempt as Kueue admitted it: its pods go where the quota is.

    Args:
        attempt: The rendered Job of an attempt.
        queue_job: The Job in the queue as it is in the cluster. It becomes the attempt's controller, so that Kueue does
            not take the attempt for another Job that wants quota.
    """
    template, admitted = attempt["spec"]["template"], queue_job["spec"]["template"]
    given = {name: admitted["spec"][name] for name in GIVEN if name in admitted["spec"]}
    metadata: Json = {
        key: _of_admission(admitted["metadata"].get(key) or {}) | (template["metadata"].get(key) or {})
        for key in ("labels", "annotations")
    }
    owners = [owner | {"controller": False} for owner in attempt["metadata"]["ownerReferences"]]
    controller = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "name": queue_job["metadata"]["name"],
        "uid": queue_job["metadata"]["uid"],
        "controller": True,
    }
    return attempt | {
        "metadata": attempt["metadata"] | {"ownerReferences": [*owners, controller]},
        "spec": attempt["spec"] | {"template": {"metadata": metadata, "spec": template["spec"] | given}},
    }


def _of_admission(marks: Mapping[str, str]) -> dict[str, str]:
    """The labels or annotations of an admission: Kueue's, and those of its checks, whatever they are called.

    Ours, and the API server's own, such as the Job's name, stay behind.
    """
    return {key: value for key, value in marks.items() if not key.startswith(PREFIXES_OF_JOBS) and key not in OF_JOBS}
