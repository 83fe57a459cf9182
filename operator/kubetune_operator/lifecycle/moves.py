"""What several steps do: fail, stop and delete Jobs, say what holds pods up, take over logs and reports."""

from typing import Any, TypeVar

from pydantic import ValidationError

from kubetune_operator import progress as progresses
from kubetune_operator.api.evaljob import EvalJobStatus, EvalProgress
from kubetune_operator.api.finetunejob import FineTuneJobStatus
from kubetune_operator.api.jobs import LastFailure
from kubetune_operator.api.model import StatusModel
from kubetune_operator.api.quantizejob import QuantizeJobStatus, QuantizeProgress
from kubetune_operator.lifecycle.draft import Action, Delete, Draft, Observed, PatchJob
from kubetune_operator.progress import timestamp
from kubetune_operator.render.job import lifecycle_of
from kubetune_operator.status import (
    attempt_of,
    created_at,
    find_condition,
    is_deleting,
    is_true,
    job_condition,
    pending_reason,
    phase_of,
    pods_of,
)

Json = dict[str, Any]
M = TypeVar("M", bound=StatusModel)


def fail(draft: Draft, *, reason: str, message: str, failure: LastFailure | None = None) -> bool:
    """End the job for good."""
    if failure is not None:
        draft.set(last_failure=failure)
    draft.condition("Running", status="False", reason=reason, message=message)
    draft.condition("Failed", status="True", reason=reason, message=message)
    draft.set(state="Failed", completion_time=timestamp(draft.seen.now), pods=None)
    draft.do(*stop_live_jobs(draft.seen))
    draft.note(reason, message, warning=True)
    ttl = lifecycle_of(draft.job).ttl_seconds_after_finished
    if ttl is not None:
        draft.look_again(seconds=ttl)
    return True


def stop_live_jobs(seen: Observed) -> list[Action]:
    """Suspend what still runs: its pods get their grace, and those that failed stay for diagnosis."""
    return [
        PatchJob(name=job["metadata"]["name"], spec={"suspend": True})
        for job in seen.jobs
        if not job_condition(job, "Complete", "Failed", "FailureTarget", "SuccessCriteriaMet")
        and not job["spec"].get("suspend")
        and not is_deleting(job)
    ]


def delete_attempt(job: Json) -> list[Action]:
    """Delete a batch Job and, if its pods work together, the Service of the same name."""
    if is_deleting(job):
        return []
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    actions: list[Action] = [Delete(kind="Job", name=name, uid=uid)]
    if attempt_of(job) and job["spec"].get("completions", 1) > 1:
        actions.append(Delete(kind="Service", name=name))
    return actions


def given_up(draft: Draft, *, job: Json) -> bool:
    """Whether all that is left of a deleted Job are pods on nodes that are lost: they may stay for ever."""
    left = [
        pod
        for pod in pods_of(draft.seen.pods, job=job["metadata"]["name"])
        if phase_of(pod) not in {"Succeeded", "Failed"}
    ]
    return is_deleting(job) and bool(left) and all(draft.seen.lost_with(pod) for pod in left)


def blocked_by(draft: Draft, *, job: Json, pods: list[Json]) -> tuple[str, str] | None:
    """What holds the pods of a Job up. Looks again while nothing is known: Events come without waking us."""
    waiting = [pod for pod in pods if phase_of(pod) == "Pending" and not is_deleting(pod)]
    found = pending_reason(waiting, events=draft.seen.events)
    age = (draft.seen.now - created_at(job)).total_seconds()
    stuck = draft.settings.stuck_seconds
    draft.look_again(seconds=max(1.0, stuck - age) if age < stuck else min(60.0, max(stuck, age / 2)))
    return found


def read_log(draft: Draft) -> None:
    """Take over what the tail of the log says."""
    if not draft.seen.log:
        return
    tail = progresses.read_tail(draft.seen.log)
    now, status = draft.seen.now, draft.status
    match status:
        case FineTuneJobStatus():
            _read_training(draft, status=status, tail=tail)
        case EvalJobStatus():
            draft.set(progress=progresses.update_work(status.progress, model=EvalProgress, tail=tail, now=now))
        case QuantizeJobStatus():
            draft.set(progress=progresses.update_work(status.progress, model=QuantizeProgress, tail=tail, now=now))
    if tail.phase and is_true(draft.status.conditions, "Running"):
        running = find_condition(draft.status.conditions, "Running")
        draft.condition("Running", status="True", reason=tail.phase, message=running.message if running else "")


def _read_training(draft: Draft, *, status: FineTuneJobStatus, tail: progresses.Tail) -> None:
    now = draft.seen.now
    checkpoint = progresses.update_checkpoint(status.checkpoint, tail=tail, now=now)
    draft.set(progress=progresses.update_progress(status.progress, tail=tail, now=now), checkpoint=checkpoint)
    if checkpoint is not None:
        message = f"step {checkpoint.step}: {checkpoint.uri}"
        draft.condition("Checkpointed", status="True", reason="CheckpointComplete", message=message)


def taken(draft: Draft, model: type[M], value: Any) -> M | None:
    """Read a part of a termination message; one that another version of the trainer wrote may not fit the status."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        draft.note("ReportNotUnderstood", f"{model.__name__}: {error}", warning=True)
        return None


def taken_all(draft: Draft, model: type[M], values: Any) -> list[M]:
    """Read a list of a termination message, as far as it fits the status."""
    items = [taken(draft, model, value) for value in (values if isinstance(values, list) else [])]
    return [item for item in items if item is not None]
