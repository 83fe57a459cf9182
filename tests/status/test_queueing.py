"""What is said about a job that waits for Kueue, and where it cannot stand in a queue at all."""

from typing import Any

import pytest

from kubetune_operator.lifecycle import decide
from kubetune_operator.lifecycle.draft import Delete, Observed
from kubetune_operator.lifecycle.queueing import waiting_reason
from kubetune_operator.settings import Settings
from tests.render.manifests import SMALL, finetunejob
from tests.status.test_lifecycle import NOW, TRAINING

Json = dict[str, Any]

WAITS = {"type": "QuotaReserved", "status": "False", "message": "1 more needed"}
RESERVED = {"type": "QuotaReserved", "status": "True", "message": "in queue"}
EVICTED = {"type": "Evicted", "status": "True", "reason": "Preempted", "message": "for another"}
CHECKS = [{"name": "budget", "state": "Pending", "message": "not yet"}, {"name": "other", "state": "Ready"}]


def workload(*conditions: Json, active: bool = True, **status: Any) -> Json:
    return {
        "metadata": {"name": "w"}, "spec": {"active": active}, "status": {"conditions": list(conditions), **status},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "reason", "message"),
    [
        (None, "Joining", "Kueue has not taken the job into queue q yet; does Kueue run?"),
        (workload(), "Joining", "Workload w waits for Kueue's decision"),
        (workload(WAITS), "WaitingForQuota", "Workload w: 1 more needed"),
        (workload(RESERVED, EVICTED), "Preempted", "Workload w: for another"),
        (workload(WAITS, EVICTED), "WaitingForQuota", "Workload w: 1 more needed"),
        (workload(RESERVED, admissionChecks=CHECKS), "AdmissionChecks", "Workload w: budget: not yet"),
        (workload(WAITS, active=False), "Inactive", "Workload w is not active"),
        (workload(WAITS, EVICTED, active=False), "Preempted", "Workload w: for another"),
    ],
)
def test_the_reason_is_kueues_own(found: Json | None, reason: str, message: str) -> None:
    assert waiting_reason(found, queue="q") == (reason, message)


def test_a_queue_where_kueue_is_not_used_fails_the_job_and_names_the_value_to_set() -> None:
    job = finetunejob(SMALL, queue={"name": "q"})
    decision = decide(Observed(job=job, now=NOW), settings=Settings(identity="test"))
    [accepted] = [each for each in decision.status.conditions if each.type == "Accepted"]
    assert (decision.status.state, accepted.status, accepted.reason) == ("Failed", "False", "InvalidSpec")
    assert "kueue.enabled" in accepted.message


def test_where_managed_by_is_unknown_the_job_fails_before_a_pod_starts() -> None:
    """Kubernetes before 1.32 drops the field, and its Job controller would run the Job in the queue."""
    job = finetunejob(SMALL, queue={"name": "q"})
    before = type(job).model_validate(job.to_manifest() | {"status": TRAINING | {"state": "Queued"}})
    standing = {"metadata": {"name": "small-queue", "uid": "u"}, "spec": {"suspend": True}}
    seen = Observed(job=before, now=NOW, config={}, queue_job=standing)
    decision = decide(seen, settings=Settings(identity="test", kueue=True))
    assert (decision.status.state, decision.actions) == ("Failed", (Delete(kind="Job", name="small-queue", uid="u"),))
