"""The end: results, failures, the deadline and the time to live. What has ended stays as it is."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

from kubetune_operator.api.jobs import LastFailure
from kubetune_operator.api.references import still_waits
from kubetune_operator.lifecycle.draft import Delete, Draft
from kubetune_operator.lifecycle.moves import fail, read_log, stop_live_jobs
from kubetune_operator.lifecycle.queueing import leave
from kubetune_operator.lifecycle.restarts import (
    answer_out_of_memory,
    count_endings,
    failed_again,
    new_endings,
    next_attempt,
)
from kubetune_operator.lifecycle.results import is_lost, take_results
from kubetune_operator.names import KIND_FINETUNEJOB, KINDS
from kubetune_operator.progress import timestamp
from kubetune_operator.render.job import lifecycle_of
from kubetune_operator.status import (
    Ending,
    ending_of,
    first_cause,
    index_of,
    is_deleting,
    job_condition,
    parse_time,
    phase_of,
    pods_of,
    report_of,
)

Json = dict[str, Any]

LOG_SECONDS: Final = 20.0
"""How long to try to read a log that the termination message refers to."""


def stay_finished(draft: Draft) -> bool:
    """A finished job stays as it is until its time to live is over."""
    status, seen = draft.status, draft.seen
    if status.state not in {"Complete", "Failed"}:
        return False
    draft.do(*stop_live_jobs(seen))
    leave(draft)
    ttl = lifecycle_of(draft.job).ttl_seconds_after_finished
    finished = parse_time(status.completion_time)
    if ttl is not None and finished is not None:
        left = (finished + timedelta(seconds=ttl) - seen.now).total_seconds()
        if left <= 0:
            draft.do(Delete(kind=draft.job.kind, name=draft.job.metadata.name, uid=draft.job.metadata.uid))
        else:
            draft.look_again(seconds=left)
    return True


def finish(draft: Draft) -> bool:
    """End the job when its current attempt has, one way or the other."""
    attempt = draft.status.attempt
    work = draft.seen.work(attempt) if attempt else None
    if work is None:
        return False
    if job_condition(work, "Complete"):
        return _complete(draft, work=work)
    pods = pods_of(draft.seen.pods, job=work["metadata"]["name"])
    endings = [ending_of(pod) for pod in pods if phase_of(pod) == "Failed"]
    short = [ending for ending in endings if ending.out_of_memory and draft.job.kind == KIND_FINETUNEJOB]
    permanent = [ending for ending in endings if ending.permanent and ending not in short]
    if permanent:
        return _fail_for(draft, first_cause(permanent))
    if short:
        # What ran out of memory when it was told to go anyway is answered if the attempt after it does so too.
        return not is_deleting(work) and answer_out_of_memory(draft, work=work, cause=first_cause(short))
    return _give_up(draft, work=work, pods=pods, endings=endings)


def _give_up(draft: Draft, *, work: Json, pods: list[Json], endings: list[Ending]) -> bool:
    """Fail where the Job controller has: the pod failed too often."""
    condition = job_condition(work, "Failed", "FailureTarget")
    if condition is None:
        return False
    read_log(draft)
    count_endings(draft, endings=new_endings(draft, pods=pods))
    failure = _last(endings) or draft.status.last_failure
    if condition.get("reason") != "BackoffLimitExceeded":
        return fail(
            draft, reason=str(condition.get("reason")), message=str(condition.get("message", "")), failure=failure
        )
    return fail(draft, reason="MaxRestartsExceeded", message=failed_again(draft, failure), failure=failure)


def _last(endings: Sequence[Ending]) -> LastFailure | None:
    told = [ending for ending in endings if not ending.peer_lost] or list(endings)
    return max(told, key=lambda ending: ending.failure.time or "").failure if told else None


def _fail_for(draft: Draft, cause: Ending) -> bool:
    read_log(draft)
    failure = cause.failure
    return fail(draft, reason=failure.reason or "Failed", message=failure.message or "", failure=failure)


def _complete(draft: Draft, *, work: Json) -> bool:
    """Take over the results of rank 0."""
    read_log(draft)
    pods = pods_of(draft.seen.pods, job=work["metadata"]["name"])
    count_endings(draft, endings=new_endings(draft, pods=pods))
    leader = next((pod for pod in pods if index_of(pod) == 0 and phase_of(pod) == "Succeeded"), None)
    report = report_of(leader) if leader is not None else {}
    if is_lost(draft, report=report):
        return _work_again(draft, leader=leader, in_log=bool(report.get("seeLog")))
    doing = KINDS[draft.job.kind].doing.lower()
    message = take_results(draft, report=report) or f"{doing} is done"
    draft.set(state="Complete", completion_time=timestamp(draft.seen.now), pods=None)
    draft.condition("Running", status="False", reason="Complete", message=f"{doing} is done")
    draft.condition("Complete", status="True", reason="Complete", message=message)
    draft.note("Complete", message)
    ttl = lifecycle_of(draft.job).ttl_seconds_after_finished
    if ttl is not None:
        draft.look_again(seconds=ttl)
    return True


def _work_again(draft: Draft, *, leader: Json | None, in_log: bool) -> bool:
    """Another attempt where what was found out cannot be read: it takes what is in the workspace and reports anew."""
    ending = ending_of(leader) if leader is not None else None
    ended = parse_time(ending.failure.time) if ending is not None else None
    if in_log and ended is not None and (draft.seen.now - ended).total_seconds() < LOG_SECONDS:
        draft.look_again(seconds=1.0)
        return True
    message = f"the report of attempt {draft.status.attempt} is lost"
    failure = LastFailure(
        pod=ending.failure.pod if ending is not None else None,
        reason="ReportLost",
        message=message,
        time=timestamp(draft.seen.now),
    )
    next_attempt(draft, cause=Ending(uid=ending.uid if ending is not None else "", failure=failure, report={}))
    return True


def stop_at_deadline(draft: Draft) -> bool:
    """Fail a job that is active for too long."""
    deadline = lifecycle_of(draft.job).active_deadline_seconds
    started = parse_time(draft.status.start_time)
    waits = draft.job.spec.suspend or draft.status.state == "Queued" or still_waits(draft.job)
    if deadline is None or started is None or waits:
        return False
    left = (started + timedelta(seconds=deadline) - draft.seen.now).total_seconds()
    if left > 0:
        draft.look_again(seconds=left)
        return False
    message = f"the job was active for longer than spec.lifecycle.activeDeadlineSeconds allows ({deadline} s)"
    return fail(draft, reason="DeadlineExceeded", message=message)
