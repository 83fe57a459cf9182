"""Kueue: where a job waits for quota, keeps it through all of its attempts, and gives it back when its pods are gone.

In the Job that stands in the queue (`render.kueue`) both sides say what is. Kueue un-suspends it when there is quota,
and suspends it to take the quota back; we say in its status how many pods are active. While any is, the quota is ours.
"""

from typing import Any, Final

from kubetune_operator.api.jobs import JobStatus
from kubetune_operator.lifecycle.draft import Create, Delete, Draft, PatchWorkload, TellQueue, reduced_micro_batch
from kubetune_operator.lifecycle.moves import delete_attempt, fail, read_log
from kubetune_operator.names import QUEUE_JOB_MANAGER
from kubetune_operator.progress import timestamp
from kubetune_operator.render.job import backoff_limit, compute_of, render_work_job
from kubetune_operator.render.kueue import as_admitted, render_queue_job
from kubetune_operator.status import (
    attempt_of,
    find_condition,
    index_of,
    is_deleting,
    is_true,
    job_condition,
    phase_of,
    pods_of,
)

Json = dict[str, Any]

PAUSED: Final = "Suspended"
"""Reason of the Admitted condition while the Workload is inactive for `spec.suspend`."""
WORKLOAD_SECONDS: Final = 1.0
"""How soon to look for the Workload that Kueue is about to make."""
MESSAGE_SECONDS: Final = 30.0
"""How often to read the Workload for what the job waits for. Admission wakes us up itself."""


def wait_for_quota(draft: Draft) -> bool:
    """Let an attempt start, or go on, only while Kueue admits the job."""
    if draft.job.spec.queue is None:
        return False
    queue_job = draft.seen.queue_job
    if queue_job is None or is_deleting(queue_job):
        return _join(draft)
    if queue_job["spec"].get("managedBy") != QUEUE_JOB_MANAGER:
        return _refuse(draft)
    if _resume(draft):
        return True
    if queue_job["spec"].get("suspend"):
        return _wait(draft)
    return _go(draft, queue_job=queue_job)


def queue_problem(draft: Draft) -> str | None:
    """Why the queue of a job cannot be used here."""
    if draft.job.spec.queue is None or draft.settings.kueue:
        return None
    return (
        f"spec.queue.name: Invalid value: {draft.job.spec.queue.name!r}: this installation does not use Kueue; "
        "leave spec.queue out, or have the chart's value kueue.enabled set to true"
    )


def pause(draft: Draft) -> None:
    """Make the Workload inactive while `spec.suspend` is true, and give its quota back when the pods are gone."""
    if draft.seen.queue_job is None:
        return
    workload = draft.seen.workload
    if workload is not None and workload["spec"].get("active", True):
        draft.do(PatchWorkload(name=workload["metadata"]["name"], spec={"active": False}))
    draft.condition("Admitted", status="False", reason=PAUSED, message="spec.suspend is true")
    _give_back(draft)


def was_paused(status: JobStatus) -> bool:
    """Whether it was us who made the Workload inactive; whoever else did may undo it."""
    admitted = find_condition(status.conditions, "Admitted")
    return admitted is not None and admitted.reason == PAUSED


def _resume(draft: Draft) -> bool:
    """Make a Workload active again that we made inactive."""
    workload = draft.seen.workload
    if not was_paused(draft.status) or workload is None or workload["spec"].get("active", True):
        return False
    draft.do(PatchWorkload(name=workload["metadata"]["name"], spec={"active": True}))
    draft.waiting("Queued", reason="Queued", message="the job stands in its queue again")
    draft.look_again(seconds=WORKLOAD_SECONDS)
    return True


def leave(draft: Draft) -> None:
    """Leave the queue for good: the job has ended, and so have its pods."""
    queue_job = draft.seen.queue_job
    if queue_job is None or is_deleting(queue_job) or not all(_is_quiet(job) for job in draft.seen.jobs):
        return
    draft.do(Delete(kind="Job", name=queue_job["metadata"]["name"], uid=queue_job["metadata"]["uid"]))


def _is_quiet(job: Json) -> bool:
    """Whether a batch Job has no pods that run, or end."""
    status = job.get("status") or {}
    stopped = job_condition(job, "Complete", "Failed", "Suspended") is not None
    return stopped and not status.get("active") and not status.get("terminating")


def _join(draft: Draft) -> bool:
    """Stand in the queue. Pods that are still there have no quota any more."""
    if live := _unfinished(draft):
        draft.do(*(action for job in live for action in delete_attempt(job)))
        _count_preemption(draft, message="the Job that held the quota was deleted")
    assert draft.job.spec.queue is not None  # noqa: S101 (whoever calls has looked)
    message = draft.seen.refused or f"the job is about to stand in queue {draft.job.spec.queue.name}"
    _queued(draft, reason="CreateRefused" if draft.seen.refused else "Joining", message=message)
    if draft.seen.queue_job is None and not live:
        draft.do(Create(manifest=render_queue_job(draft.job, attempt=_attempt(draft))))
    return True


def _attempt(draft: Draft) -> Json:
    assert draft.seen.config is not None  # noqa: S101 (write_config ends the pass otherwise)
    return render_work_job(
        draft.job,
        config=draft.seen.config,
        attempt=draft.status.attempt or 1,
        backoff_limit=backoff_limit(draft.job, counted=draft.counted),
        settings=draft.settings,
        micro_batch_size=reduced_micro_batch(draft.status),
    )


def _refuse(draft: Draft) -> bool:
    """Fail where the API server dropped the field that keeps the Job controller away from the Job in the queue."""
    queue_job = draft.seen.queue_job
    assert queue_job is not None  # noqa: S101 (whoever calls has looked)
    draft.do(Delete(kind="Job", name=queue_job["metadata"]["name"], uid=queue_job["metadata"]["uid"]))
    return fail(
        draft, reason="QueueUnsupported", message="spec.queue needs Kubernetes 1.32 or newer (managedBy of a Job)"
    )


def _wait(draft: Draft) -> bool:
    """Wait for Kueue. What runs has lost its quota: it goes with a checkpoint, and comes back with the quota."""
    workload = draft.seen.workload
    reason, message = waiting_reason(workload, queue=draft.job.spec.queue.name if draft.job.spec.queue else "")
    if live := _unfinished(draft):
        _count_preemption(draft, message=message)
        draft.do(*(action for job in live for action in delete_attempt(job)))
    _give_back(draft)
    _queued(draft, reason=reason, message=message)
    draft.look_again(seconds=WORKLOAD_SECONDS if reason == "Joining" else MESSAGE_SECONDS)
    return True


def waiting_reason(workload: Json | None, *, queue: str) -> tuple[str, str]:
    """Why Kueue does not admit a job yet: one word, and Kueue's own message."""
    if workload is None:
        return "Joining", f"Kueue has not taken the job into queue {queue} yet; does Kueue run?"
    name = workload["metadata"]["name"]
    evicted, quota = (_workload_condition(workload, each) for each in ("Evicted", "QuotaReserved"))
    reserved = quota is not None and quota["status"] == "True"
    if evicted is not None and evicted["status"] == "True" and (reserved or not workload["spec"].get("active", True)):
        return str(evicted["reason"]), f"Workload {name}: {evicted.get('message', '')}"
    if not workload["spec"].get("active", True):
        return "Inactive", f"Workload {name} is not active"
    checks = [
        f"{check['name']}: {check.get('message') or check.get('state')}"
        for check in (workload.get("status") or {}).get("admissionChecks") or []
        if check.get("state") != "Ready"
    ]
    if reserved and checks:
        return "AdmissionChecks", f"Workload {name}: {'; '.join(checks)}"
    if quota is None or reserved:
        return "Joining", f"Workload {name} waits for Kueue's decision"
    return "WaitingForQuota", f"Workload {name}: {quota.get('message', '')}"


def _workload_condition(workload: Json, condition_type: str) -> Json | None:
    conditions = (workload.get("status") or {}).get("conditions") or []
    return next((item for item in conditions if item["type"] == condition_type), None)


def _go(draft: Draft, *, queue_job: Json) -> bool:
    """Take the quota before a pod does, and say in the Job in the queue how many pods there are."""
    nodes = compute_of(draft.job).nodes
    if not is_true(draft.status.conditions, "Admitted"):
        assert draft.job.spec.queue is not None  # noqa: S101 (whoever calls has looked)
        message = f"Kueue admits the job from queue {draft.job.spec.queue.name}"
        draft.condition("Admitted", status="True", reason="Admitted", message=message)
        draft.set(start_time=timestamp(draft.seen.now))
        draft.waiting("Pending", reason="Admitted", message=message)
        draft.note("Admitted", message)
    _tell(draft, queue_job=queue_job, active=nodes, ready=min(nodes, _ready(draft)))
    return False


def _ready(draft: Draft) -> int:
    """Pods of the current attempt that run."""
    current = draft.seen.work(draft.status.attempt) if draft.status.attempt else None
    pods = pods_of(draft.seen.pods, job=current["metadata"]["name"]) if current is not None else []
    return len({index_of(pod) for pod in pods if phase_of(pod) in {"Running", "Succeeded"} and not is_deleting(pod)})


def _give_back(draft: Draft) -> None:
    """Tell Kueue that no pods are left, as soon as that is so."""
    if draft.seen.queue_job is not None and not _unfinished(draft):
        _tell(draft, queue_job=draft.seen.queue_job, active=0, ready=0)


def _tell(draft: Draft, *, queue_job: Json, active: int, ready: int) -> None:
    said = queue_job.get("status") or {}
    if (said.get("active") or 0, said.get("ready") or 0) != (active, ready):
        metadata = queue_job["metadata"]
        # Only as long as Kueue has not changed its mind: an attempt that follows must never start without quota.
        draft.do(TellQueue(name=metadata["name"], version=metadata["resourceVersion"], active=active, ready=ready))


def _unfinished(draft: Draft) -> list[Json]:
    return [job for job in draft.seen.jobs if attempt_of(job) and not job_condition(job, "Complete", "Failed")]


def _count_preemption(draft: Draft, *, message: str) -> None:
    """Go to the next attempt, once per attempt that loses its quota; maxRestarts does not count it."""
    attempt = draft.status.attempt
    if not attempt or draft.seen.work(attempt) is None:
        return
    read_log(draft)
    draft.set(
        attempt=attempt + 1,
        restarts=(draft.status.restarts or 0) + 1,
        preemptions=(draft.status.preemptions or 0) + 1,
        pods=None,
    )
    draft.note("Preempted", f"attempt {attempt} lost its quota and stops with a checkpoint: {message}", warning=True)


def _queued(draft: Draft, *, reason: str, message: str) -> None:
    draft.condition("Admitted", status="False", reason=reason, message=message)
    draft.waiting("Queued", reason="Queued", message=message)


def admitted_attempt(draft: Draft, manifest: Json) -> Json:
    """The Job of an attempt as it may start: as rendered, or as Kueue admitted it."""
    return manifest if draft.seen.queue_job is None else as_admitted(manifest, queue_job=draft.seen.queue_job)
