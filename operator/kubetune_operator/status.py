"""What pods, Jobs and Events say, in the words of `status`. Pure: it reads objects that were fetched before."""

import json
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from kubetune_operator.api.common import Condition
from kubetune_operator.api.jobs import LastFailure
from kubetune_operator.names import (
    ANNOTATION_COMPLETION_INDEX,
    KIND_FINETUNEJOB,
    KINDS,
    LABEL_ATTEMPT,
    LABEL_BATCH_JOB_NAME,
    LABEL_JOB_KIND,
    PERMANENT_EXIT_CODES,
    TRAINER_CONTAINER,
    ExitCode,
)

Json = dict[str, Any]

MESSAGE_LENGTH: Final = 2048
NODE_LOST: Final = "NodeLost"
OOM_KILLED: Final = "OOMKilled"
"""What the kubelet says of a container that the kernel killed for its memory."""
SLOW_END: Final = timedelta(seconds=30)
"""How long a pod may take to end before its node is looked at; most checkpoints take less."""

IMAGE_REASONS: Final = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "RegistryUnavailable",
}
START_REASONS: Final = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
MOUNT_REASONS: Final = {"FailedMount", "FailedAttachVolume", "FailedMapVolume"}

HINT_KILLED: Final = (
    "The process was killed from outside. If nobody did it, look for memory pressure or a restart of the node."
)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a trainer pod ended.

    Attributes:
        uid: Identity of the pod.
        failure: What the status says about it.
        peer_lost: It ended because another rank did, so it explains nothing.
        preempted: It was asked to go and is not to blame.
        permanent: Another attempt would only repeat it.
        out_of_memory: It needed more memory than it had.
        report: The termination message, empty if there was none.
    """

    uid: str
    failure: LastFailure
    peer_lost: bool = False
    preempted: bool = False
    permanent: bool = False
    out_of_memory: bool = False
    report: Json


# -------------------------------------------------------------------------------------------------- conditions


def with_condition(
    conditions: Sequence[Condition],
    condition_type: str,
    *,
    status: Literal["True", "False", "Unknown"],
    reason: str,
    message: str,
    now: datetime,
    generation: int,
) -> list[Condition]:
    """Set one condition; the time of its last transition moves only when its status changes."""
    before = find_condition(conditions, condition_type)
    unchanged = before is not None and before.status == status
    condition = Condition(
        type=condition_type,
        status=status,
        observed_generation=generation,
        last_transition_time=before.last_transition_time if before is not None and unchanged else _timestamp(now),
        reason=reason,
        message=message[:MESSAGE_LENGTH],
    )
    if before is None:
        return [*conditions, condition]
    if (before.status, before.reason, before.message) == (condition.status, condition.reason, condition.message):
        return list(conditions)
    return [condition if item.type == condition_type else item for item in conditions]


def find_condition(conditions: Sequence[Condition], condition_type: str) -> Condition | None:
    """The condition of a type, None if it was never set."""
    return next((item for item in conditions if item.type == condition_type), None)


def is_true(conditions: Sequence[Condition], condition_type: str) -> bool:
    """Whether a condition holds."""
    found = find_condition(conditions, condition_type)
    return found is not None and found.status == "True"


# --------------------------------------------------------------------------------------------- Jobs and their pods


def job_condition(job: Json, *types: str) -> Json | None:
    """The first of these conditions that is true on a batch Job."""
    for item in job.get("status", {}).get("conditions") or []:
        if item["type"] in types and item["status"] == "True":
            return dict(item)
    return None


def is_deleting(item: Json) -> bool:
    """Whether an object is on its way out."""
    return bool(item["metadata"].get("deletionTimestamp"))


def attempt_of(item: Json) -> int:
    """The attempt that a Job or pod belongs to, 0 if to none."""
    return int(item["metadata"].get("labels", {}).get(LABEL_ATTEMPT, 0))


def pods_of(pods: Iterable[Json], *, job: str) -> list[Json]:
    """The pods of a batch Job, oldest first."""
    mine = [pod for pod in pods if pod["metadata"].get("labels", {}).get(LABEL_BATCH_JOB_NAME) == job]
    return sorted(mine, key=lambda pod: (pod["metadata"].get("creationTimestamp") or "", pod["metadata"]["name"]))


def index_of(pod: Json) -> int:
    """Completion index of a pod of an Indexed Job, 0 elsewhere."""
    annotations = pod["metadata"].get("annotations") or {}
    return int(annotations.get(ANNOTATION_COMPLETION_INDEX, 0))


def phase_of(pod: Json) -> str:
    """Phase of a pod."""
    return str(pod.get("status", {}).get("phase", "Pending"))


def image_of(pods: Iterable[Json]) -> str | None:
    """The image that the first of these pods runs, with its hash; None as long as no kubelet has said it."""
    for pod in pods:
        for container in pod.get("status", {}).get("containerStatuses") or []:
            if container["name"] == TRAINER_CONTAINER and container.get("imageID"):
                return str(container["imageID"]).removeprefix("docker-pullable://")[:512]
    return None


def is_live(pod: Json) -> bool:
    """Whether a pod runs or will run."""
    return not is_deleting(pod) and phase_of(pod) in {"Pending", "Running"}


def created_at(item: Json) -> datetime:
    """When an object was created."""
    return parse_time(item["metadata"].get("creationTimestamp")) or datetime.fromtimestamp(0, tz=UTC)


def parse_time(text: str | None) -> datetime | None:
    """Read a time as Kubernetes writes it."""
    return datetime.fromisoformat(text) if text else None


# ------------------------------------------------------------------------------------------------------ endings


def report_of(pod: Json) -> Json:
    """The trainer's termination message, empty if there is none that can be read."""
    try:
        report = json.loads(_terminated(pod).get("message") or "")
    except json.JSONDecodeError:
        return {}
    return report if isinstance(report, dict) else {}


def ending_of(pod: Json, *, lost: str = "") -> Ending:
    """Read how a pod ended, or why it is about to.

    Args:
        pod: A pod.
        lost: What is known of its node, if that will never say how the pod ended.
    """
    terminated = _terminated(pod)
    report = report_of(pod)
    code = terminated.get("exitCode")
    disrupted = _pod_condition(pod, "DisruptionTarget")
    deleted = is_deleting(pod) and code is None
    preempted = code == ExitCode.PREEMPTED or disrupted is not None or deleted
    reason, message, hint = _explain(pod, terminated=terminated, report=report, disrupted=disrupted)
    if lost and code is None:
        reason, message, hint = NODE_LOST, f"{lost}; pod {pod['metadata']['name']} is given up", ""
    failure = LastFailure(
        pod=pod["metadata"]["name"],
        index=index_of(pod),
        node=pod.get("spec", {}).get("nodeName"),
        exit_code=code,
        reason=reason[:128],
        message=message[:MESSAGE_LENGTH],
        hint=hint[:1024] or None,
        log_tail=str(report.get("logTail") or "")[-8192:] or None,
        time=terminated.get("finishedAt") or pod["metadata"].get("deletionTimestamp"),
    )
    return Ending(
        uid=pod["metadata"]["uid"],
        failure=failure,
        peer_lost=code == ExitCode.PEER_LOST,
        preempted=preempted,
        permanent=code in PERMANENT_EXIT_CODES,
        out_of_memory=code == ExitCode.OUT_OF_MEMORY or terminated.get("reason") == OOM_KILLED,
        report=report,
    )


def lost_node(node: str, found: Json | None, *, now: datetime, patience: timedelta) -> str:
    """What is wrong with a node that will say nothing any more of its pods, empty if it may.

    A node whose kubelet says that it is not ready is not lost: it stops its pods by itself.

    Args:
        node: Its name.
        found: The Node, None if there is none of that name.
        now: The time.
        patience: How long a node may be out of touch.
    """
    if found is None:
        return f"node {node} is gone"
    for item in found.get("status", {}).get("conditions") or []:
        since = parse_time(item.get("lastTransitionTime"))
        if (item["type"], item["status"]) == ("Ready", "Unknown") and since is not None and now - since >= patience:
            return f"node {node} is out of touch since {item['lastTransitionTime']}"
    return ""


def may_be_lost(pod: Json, *, now: datetime) -> bool:
    """Whether a pod that was told to go ends so late that its node is worth a look."""
    if not is_deleting(pod) or not pod["spec"].get("nodeName") or phase_of(pod) in {"Succeeded", "Failed"}:
        return False
    told = ends_by(pod) - timedelta(seconds=pod["metadata"].get("deletionGracePeriodSeconds") or 0)
    return _is_evicted_by_taint(pod) or now - told >= SLOW_END


def must_be_lost(pod: Json, *, now: datetime) -> str:
    """What is wrong with a node that nobody may look at: it told a pod to go, and did not see it end."""
    if may_be_lost(pod, now=now) and _is_evicted_by_taint(pod) and now - ends_by(pod) >= SLOW_END:
        return f"node {pod['spec']['nodeName']} has a taint and does not end its pods"
    return ""


def ends_by(pod: Json) -> datetime:
    """When the grace period of a pod that is being deleted is over."""
    return datetime.fromisoformat(pod["metadata"]["deletionTimestamp"])


def _is_evicted_by_taint(pod: Json) -> bool:
    return (_pod_condition(pod, "DisruptionTarget") or {}).get("reason") == "DeletionByTaintManager"


def vanished(*, name: str, uid: str, index: int) -> Ending:
    """The ending of a pod that is gone and left nothing behind."""
    message = f"pod {name} was deleted"
    failure = LastFailure(pod=name, index=index, reason="PodDeleted", message=message)
    return Ending(uid=uid, failure=failure, preempted=True, report={})


def first_cause(endings: Sequence[Ending]) -> Ending:
    """The ending that explains the others: the earliest one that was not caused by a peer."""
    culprits = [ending for ending in endings if not ending.peer_lost] or list(endings)
    permanent = [ending for ending in culprits if ending.permanent]
    return min(
        permanent or culprits,
        key=lambda ending: (ending.preempted, ending.failure.time or "9", ending.failure.index or 0),
    )


def _explain(pod: Json, *, terminated: Json, report: Json, disrupted: Json | None) -> tuple[str, str, str]:
    """Reason, message and hint of an ending, from the best witness that there is."""
    code = terminated.get("exitCode")
    status = pod.get("status", {})
    if terminated.get("reason") == OOM_KILLED:
        return OOM_KILLED, "the container needed more memory than its limit and was killed", _hint_memory(pod)
    if report.get("reason"):
        return str(report["reason"]), str(report.get("message") or ""), str(report.get("hint") or "")
    if disrupted is not None:
        return str(disrupted.get("reason") or "Disrupted"), str(disrupted.get("message") or ""), ""
    if code is None:
        reason, what = ("PodDeleted", "was deleted") if is_deleting(pod) else ("PodFailed", "failed before it ran")
        said = status.get("message") or f"pod {pod['metadata']['name']} {what}"
        return str(status.get("reason") or reason), str(said), ""
    if code > 128:
        return "Killed", f"the container was ended by {_signal(code - 128)} (exit code {code})", HINT_KILLED
    said = terminated.get("message") or status.get("message") or ""
    return (
        "Crashed",
        f"the container ended with exit code {code}" + (f": {said}" if said else ""),
        "Read the pod's log.",
    )


def _hint_memory(pod: Json) -> str:
    kind = KINDS.get(pod["metadata"].get("labels", {}).get(LABEL_JOB_KIND, ""), KINDS[KIND_FINETUNEJOB])
    return f"Raise compute.resources.limits.memory, or need less: {kind.less}."


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _terminated(pod: Json) -> Json:
    for container in pod.get("status", {}).get("containerStatuses") or []:
        if container["name"] == TRAINER_CONTAINER:
            return dict((container.get("state") or {}).get("terminated") or {})
    return {}


def _pod_condition(pod: Json, condition_type: str, *, status: str = "True") -> Json | None:
    for item in pod.get("status", {}).get("conditions") or []:
        if item["type"] == condition_type and item["status"] == status:
            return dict(item)
    return None


# -------------------------------------------------------------------------------------------------- why it waits


def pending_reason(pods: Sequence[Json], *, events: Sequence[Json]) -> tuple[str, str] | None:
    """Say why pods do not run: the reason in one word, and the message of whoever holds them up.

    Args:
        pods: The pods that are pending; none if the Job could not create them.
        events: Events about these pods and their Job, oldest first; they alone know of mounts and quotas.
    """
    for pod in pods:
        if found := _blocked(pod):
            return found
    for event in reversed(events):
        if event.get("type") != "Warning":
            continue
        reason, message = str(event.get("reason")), str(event.get("message") or "")
        if reason in MOUNT_REASONS:
            return _mount_reason(message), message
        if reason == "FailedCreate" and not pods:
            return ("QuotaExceeded" if "exceeded quota" in message else "FailedCreate"), message
        if reason == "FailedCreatePodSandBox":
            return reason, message
    return None


def _blocked(pod: Json) -> tuple[str, str] | None:
    """What the pod itself says about why it does not run."""
    name = pod["metadata"]["name"]
    scheduled = _pod_condition(pod, "PodScheduled", status="False")
    if scheduled is not None:
        return str(scheduled.get("reason") or "Unschedulable"), f"pod {name}: {scheduled.get('message', '')}"
    for container in pod.get("status", {}).get("containerStatuses") or []:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason = str(waiting.get("reason") or "")
        message = f"pod {name}: {reason}: {waiting.get('message') or container.get('image', '')}"
        if reason in IMAGE_REASONS:
            return "ImagePullFailed", message
        if reason in START_REASONS:
            return reason, message
    return None


def _mount_reason(message: str) -> str:
    lowered = message.lower()
    if "not found" in lowered or "non-existent" in lowered:
        if "secret" in lowered:
            return "SecretMissing"
        if "configmap" in lowered:
            return "ConfigMapMissing"
    return "FailedMount"


def _timestamp(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
