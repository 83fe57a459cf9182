"""Suspend and resume."""

from typing import Any

from kubetune_operator.lifecycle.draft import Draft
from kubetune_operator.lifecycle.moves import delete_attempt, given_up, read_log
from kubetune_operator.lifecycle.queueing import pause
from kubetune_operator.progress import timestamp
from kubetune_operator.status import is_true, job_condition

Json = dict[str, Any]


def suspend(draft: Draft) -> bool:
    """Stop what runs, with its grace period, as long as the spec says so; afterwards go on with a new attempt."""
    if draft.job.spec.suspend:
        return _suspend(draft)
    if not is_true(draft.status.conditions, "Suspended"):
        return False
    live = [job for job in draft.seen.jobs if not job_condition(job, "Complete", "Failed")]
    if [job for job in live if not given_up(draft, job=job)]:  # the pods are still writing their checkpoint
        draft.do(*(action for job in live for action in delete_attempt(job)))  # once more, where that was lost
        return True
    draft.condition("Suspended", status="False", reason="Resumed", message="spec.suspend is false again")
    draft.waiting("Pending", reason="Resumed", message="the job goes on")
    draft.set(start_time=timestamp(draft.seen.now), pods=None)
    if draft.status.attempt:
        draft.set(attempt=draft.status.attempt + 1)
    draft.note("Resumed", "spec.suspend is false again")
    return False


def _suspend(draft: Draft) -> bool:
    live = [job for job in draft.seen.jobs if not job_condition(job, "Complete", "Failed")]
    read_log(draft)  # in every pass: the last checkpoint comes after the first
    if not is_true(draft.status.conditions, "Suspended"):
        draft.condition("Suspended", status="True", reason="Suspended", message="spec.suspend is true")
        draft.note(
            "Suspended",
            "spec.suspend is true; pods are told to stop and save what they have" if live else "spec.suspend is true",
        )
    draft.waiting("Suspended", reason="Suspended", message="spec.suspend is true")
    draft.do(*(action for job in live for action in delete_attempt(job)))
    pause(draft)
    return True
