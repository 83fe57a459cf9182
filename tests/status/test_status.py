"""What pods and Events say, in the words of the status."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kubetune_operator.status import (
    ending_of,
    first_cause,
    image_of,
    lost_node,
    may_be_lost,
    must_be_lost,
    pending_reason,
    with_condition,
)

Json = dict[str, Any]
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def pod(
    *,
    name: str = "p",
    index: int = 0,
    code: int | None = None,
    time: str = "2026-01-01T00:00:00Z",
    said: str = "",
    container_reason: str = "Error",
    deleting: bool = False,
    conditions: list[Json] | None = None,
    waiting: Json | None = None,
    **status: Any,
) -> Json:
    state: Json = {}
    if code is not None:
        state = {"terminated": {"exitCode": code, "reason": container_reason, "finishedAt": time, "message": said}}
    elif waiting:
        state = {"waiting": waiting}
    metadata: Json = {
        "name": name,
        "uid": f"uid-{name}",
        "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
        "creationTimestamp": time,
    }
    if deleting:
        metadata["deletionTimestamp"] = time
    containers = [{"name": "trainer", "state": state}] if state else []
    return {
        "metadata": metadata,
        "spec": {"nodeName": "n1"},
        "status": {
            "phase": "Failed" if code else "Pending",
            "containerStatuses": containers,
            "conditions": conditions or [],
        }
        | status,
    }


DISRUPTED = [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "preempted"}]


@pytest.mark.parametrize(
    ("ended", "reason", "message", "preempted", "permanent"),
    [
        (pod(code=137), "Killed", "ended by SIGKILL (exit code 137)", False, False),
        (pod(code=139), "Killed", "ended by SIGSEGV", False, False),
        (pod(code=137, container_reason="OOMKilled"), "OOMKilled", "more memory than its limit", False, False),
        (pod(code=1), "Crashed", "exit code 1", False, False),
        (pod(code=1, said="exec format error"), "Crashed", "exec format error", False, False),
        (pod(code=65, said='{"reason":"DataInvalid","message":"line 3"}'), "DataInvalid", "line 3", False, True),
        (pod(code=69, said='{"reason":"StorageUnavailable"}'), "StorageUnavailable", "", False, False),
        (pod(code=75, said='{"reason":"Preempted","message":"step 9"}'), "Preempted", "step 9", True, False),
        (pod(code=143, conditions=DISRUPTED), "PreemptionByScheduler", "preempted", True, False),
        (pod(deleting=True, phase="Running"), "PodDeleted", "pod p was deleted", True, False),
        (
            pod(phase="Failed", reason="UnexpectedAdmissionError", message="no devices"),
            "UnexpectedAdmissionError",
            "no devices",
            False,
            False,
        ),
        (pod(code=1, said='["not an object"]'), "Crashed", "not an object", False, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_end_of_a_pod(ended: Json, reason: str, message: str, preempted: bool, permanent: bool) -> None:
    ending = ending_of(ended)
    assert ending.failure.reason == reason
    assert message in (ending.failure.message or "")
    assert ending.preempted is preempted
    assert ending.permanent is permanent


@pytest.mark.parametrize(
    ("image_id", "image"),
    [
        ("registry.example/trainer@sha256:9", "registry.example/trainer@sha256:9"),
        ("docker-pullable://registry.example/trainer@sha256:9", "registry.example/trainer@sha256:9"),
        ("sha256:9", "sha256:9"),
        ("", None),
    ],
    ids=["containerd", "docker", "brought to the node without a registry", "not started"],
)
def test_the_image_is_the_one_that_the_kubelet_names(image_id: str, image: str | None) -> None:
    waits, runs = pod(waiting={}), pod(code=0)
    runs["status"]["containerStatuses"][0]["imageID"] = image_id
    sidecar = {"name": "sidecar", "imageID": "other@sha256:1"}
    runs["status"]["containerStatuses"].insert(0, sidecar)
    assert image_of([waits, runs]) == image


@pytest.mark.parametrize(
    ("pods", "cause"),
    [
        ([pod(name="a", code=78), pod(name="b", code=137, time="2026-01-01T00:00:05Z")], "b"),
        ([pod(name="a", code=137, time="2026-01-01T00:00:05Z"), pod(name="b", code=1)], "b"),
        ([pod(name="a", code=1), pod(name="b", code=65, time="2026-01-01T00:00:05Z")], "b"),
        ([pod(name="a", code=75), pod(name="b", code=137, time="2026-01-01T00:00:05Z")], "b"),
        ([pod(name="a", code=78), pod(name="b", code=78, time="2025-01-01T00:00:05Z")], "b"),
    ],
    ids=["a peer explains nothing", "the first", "permanent", "preemption explains least", "only peers"],
)
def test_the_failure_that_explains_the_others(pods: list[Json], cause: str) -> None:
    assert first_cause([ending_of(item) for item in pods]).failure.pod == cause


def _event(reason: str, message: str) -> Json:
    return {"type": "Warning", "reason": reason, "message": message}


UNSCHEDULABLE = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}]


@pytest.mark.parametrize(
    ("pods", "events", "reason", "message"),
    [
        ([pod(conditions=UNSCHEDULABLE)], [], "Unschedulable", "pod p: 0/3 nodes"),
        ([pod(waiting={"reason": "ErrImagePull", "message": "not there"})], [], "ImagePullFailed", "not there"),
        (
            [pod(waiting={"reason": "CreateContainerConfigError", "message": "x"})],
            [],
            "CreateContainerConfigError",
            "x",
        ),
        ([pod()], [_event("FailedMount", 'secret "s3" not found')], "SecretMissing", 'secret "s3"'),
        ([pod()], [_event("FailedMount", "references non-existent secret key: K")], "SecretMissing", "key: K"),
        ([pod()], [_event("FailedMount", 'configmap "ca" not found')], "ConfigMapMissing", '"ca"'),
        ([pod()], [_event("FailedAttachVolume", "timed out")], "FailedMount", "timed out"),
        ([], [_event("FailedCreate", "exceeded quota: q")], "QuotaExceeded", "quota: q"),
        ([], [_event("FailedCreate", "forbidden")], "FailedCreate", "forbidden"),
    ],
)
def test_why_a_pod_waits(pods: list[Json], events: list[Json], reason: str, message: str) -> None:
    found = pending_reason(pods, events=events)
    assert found is not None
    assert found[0] == reason
    assert message in found[1]


@pytest.mark.parametrize(
    ("pods", "events"),
    [
        ([pod(waiting={"reason": "ContainerCreating"})], []),
        ([pod()], [{"type": "Normal", "reason": "Scheduled", "message": "assigned"}]),
        ([pod()], [_event("FailedCreate", "from before it had pods")]),
    ],
)
def test_a_pod_that_is_only_slow_is_not_accused(pods: list[Json], events: list[Json]) -> None:
    assert pending_reason(pods, events=events) is None


def test_the_time_of_a_condition_moves_only_when_its_status_changes() -> None:
    first = with_condition([], "Running", status="False", reason="A", message="a", now=NOW, generation=1)
    later = NOW.replace(hour=13)
    second = with_condition(first, "Running", status="False", reason="B", message="b", now=later, generation=1)
    assert second[0].last_transition_time == first[0].last_transition_time == "2026-01-01T12:00:00Z"
    assert second[0].reason == "B"
    third = with_condition(second, "Running", status="True", reason="C", message="c", now=later, generation=1)
    assert third[0].last_transition_time == "2026-01-01T13:00:00Z"
    same = with_condition(third, "Running", status="True", reason="C", message="c", now=later, generation=2)
    assert same == third


def ready(status: str) -> Json:
    conditions = [{"type": "Ready", "status": status, "lastTransitionTime": "2026-01-01T00:00:00Z"}]
    return {"metadata": {"name": "n"}, "status": {"conditions": conditions}}


@pytest.mark.parametrize(
    ("node", "seconds", "what"),
    [
        (None, 0, "node n is gone"),
        (ready("Unknown"), 59, ""),
        (ready("Unknown"), 60, "node n is out of touch since 2026-01-01T00:00:00Z"),
        (ready("False"), 600, ""),
        (ready("True"), 600, ""),
        ({"metadata": {"name": "n"}}, 600, ""),
    ],
)
def test_a_node_is_lost_when_it_is_gone_or_silent_for_long(node: Json | None, seconds: int, what: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    assert lost_node("n", node, now=now, patience=timedelta(seconds=60)) == what


@pytest.mark.parametrize(
    ("reason", "seconds", "may", "must"),
    [
        ("DeletionByTaintManager", 0, True, False),
        ("DeletionByTaintManager", 149, True, False),
        ("DeletionByTaintManager", 150, True, True),
        ("EvictionByEvictionAPI", 29, False, False),
        ("EvictionByEvictionAPI", 150, True, False),
    ],
)
def test_a_pod_that_does_not_end_is_worth_a_look_at_its_node(reason: str, seconds: int, may: bool, must: bool) -> None:
    told = datetime(2026, 1, 1, tzinfo=UTC)
    going = pod(conditions=[{"type": "DisruptionTarget", "status": "True", "reason": reason}], phase="Running")
    going["spec"] = {"nodeName": "n"}
    going["metadata"] |= {"deletionTimestamp": "2026-01-01T00:02:00Z", "deletionGracePeriodSeconds": 120}
    now = told + timedelta(seconds=seconds)
    assert (may_be_lost(going, now=now), bool(must_be_lost(going, now=now))) == (may, must)
    going["status"]["phase"] = "Failed"
    assert not may_be_lost(going, now=now)
