"""The end: results, failures, the deadline and the time to live. What has ended stays as it is."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from kubetune_operator import progress as progresses
from kubetune_operator.api.finetunejob import FinishedOutput, LastFailure, Progress
from kubetune_operator.lifecycle.draft import Delete, Draft
from kubetune_operator.lifecycle.moves import fail, read_log, stop_live_jobs, taken
from kubetune_operator.lifecycle.restarts import count_endings, failed_again, new_endings
from kubetune_operator.names import KIND_FINETUNEJOB
from kubetune_operator.progress import timestamp
from kubetune_operator.render.config import run_directory
from kubetune_operator.render.job import lifecycle_of
from kubetune_operator.status import (
    Ending,
    ending_of,
    first_cause,
    index_of,
    job_condition,
    parse_time,
    phase_of,
    pods_of,
    report_of,
)

Json = dict[str, Any]


def stay_finished(draft: Draft) -> bool:
    """A finished job stays as it is until its time to live is over."""
    status, seen = draft.status, draft.seen
    if status.state not in {"Complete", "Failed"}:
        return False
    draft.do(*stop_live_jobs(seen))
    ttl = lifecycle_of(draft.job).ttl_seconds_after_finished
    finished = parse_time(status.completion_time)
    if ttl is not None and finished is not None:
        left = (finished + timedelta(seconds=ttl) - seen.now).total_seconds()
        if left <= 0:
            draft.do(Delete(kind=KIND_FINETUNEJOB, name=draft.job.metadata.name, uid=draft.job.metadata.uid))
        else:
            draft.look_again(seconds=left)
    return True


def finish_training(draft: Draft) -> bool:
    """End the job when its current attempt has, one way or the other."""
    attempt = draft.status.attempt
    train = draft.seen.train(attempt) if attempt else None
    if train is None:
        return False
    if job_condition(train, "Complete"):
        return _complete(draft, train=train)
    pods = pods_of(draft.seen.pods, job=train["metadata"]["name"])
    endings = [ending_of(pod) for pod in pods if phase_of(pod) == "Failed"]
    permanent = [ending for ending in endings if ending.permanent]
    if permanent:
        return _fail_for(draft, first_cause(permanent))
    if condition := job_condition(train, "Failed", "FailureTarget"):
        read_log(draft)
        count_endings(draft, endings=new_endings(draft, pods=pods))
        failure = _last(endings) or draft.status.last_failure
        if condition.get("reason") != "BackoffLimitExceeded":
            return fail(
                draft, reason=str(condition.get("reason")), message=str(condition.get("message", "")), failure=failure
            )
        return fail(draft, reason="MaxRestartsExceeded", message=failed_again(draft, failure), failure=failure)
    return False


def _last(endings: Sequence[Ending]) -> LastFailure | None:
    told = [ending for ending in endings if not ending.peer_lost] or list(endings)
    return max(told, key=lambda ending: ending.failure.time or "").failure if told else None


def _fail_for(draft: Draft, cause: Ending) -> bool:
    read_log(draft)
    failure = cause.failure
    return fail(draft, reason=failure.reason or "Failed", message=failure.message or "", failure=failure)


def _complete(draft: Draft, *, train: Json) -> bool:
    """Take over the results of rank 0."""
    read_log(draft)
    pods = pods_of(draft.seen.pods, job=train["metadata"]["name"])
    count_endings(draft, endings=new_endings(draft, pods=pods))
    leader = next((pod for pod in pods if index_of(pod) == 0 and phase_of(pod) == "Succeeded"), None)
    report = report_of(leader) if leader is not None else {}
    if isinstance(report.get("progress"), dict):
        fields = progresses.step_fields(report["progress"]) | {
            "eta_seconds": 0,
            "updated_at": timestamp(draft.seen.now),
        }
        draft.set(progress=(draft.status.progress or Progress()).model_copy(update=fields))
    outputs = _outputs(draft, report=report)
    message = "; ".join(f"{output.name}: {output.uri}" for output in outputs)
    draft.set(outputs=outputs, state="Complete", completion_time=timestamp(draft.seen.now), pods=None)
    draft.condition("Running", status="False", reason="Complete", message="training is done")
    draft.condition("Complete", status="True", reason="Complete", message=message or "training is done")
    draft.note("Complete", message or "training is done")
    ttl = lifecycle_of(draft.job).ttl_seconds_after_finished
    if ttl is not None:
        draft.look_again(seconds=ttl)
    return True


def _outputs(draft: Draft, *, report: Json) -> list[FinishedOutput]:
    """The outputs as rank 0 reported them; if its pod is gone, where they must be."""
    job = draft.job
    told = [taken(draft, FinishedOutput, item) for item in report.get("outputs") or []]
    reported = [output for output in told if output is not None]
    return reported or [
        FinishedOutput(
            name=output.name, type=output.type, uri=output.uri or f"{run_directory(job)}/outputs/{output.name}"
        )
        for output in job.spec.outputs
    ]


def stop_at_deadline(draft: Draft) -> bool:
    """Fail a job that is active for too long."""
    deadline = lifecycle_of(draft.job).active_deadline_seconds
    started = parse_time(draft.status.start_time)
    if deadline is None or started is None or draft.job.spec.suspend:
        return False
    left = (started + timedelta(seconds=deadline) - draft.seen.now).total_seconds()
    if left > 0:
        draft.look_again(seconds=left)
        return False
    message = f"the job was active for longer than spec.lifecycle.activeDeadlineSeconds allows ({deadline} s)"
    return fail(draft, reason="DeadlineExceeded", message=message)
