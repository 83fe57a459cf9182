"""Which ends of pods are news, and how many restarts they are."""

from dataclasses import replace
from typing import Any, Final

from kubetune_operator.api.finetunejob import accumulates, smaller_micro_batch
from kubetune_operator.api.jobs import AttemptPod, LastFailure
from kubetune_operator.lifecycle.draft import Draft, micro_batch_size
from kubetune_operator.lifecycle.moves import delete_attempt, fail, read_log
from kubetune_operator.render.job import compute_of, lifecycle_of
from kubetune_operator.status import Ending, ending_of, first_cause, is_deleting, phase_of, vanished

Json = dict[str, Any]

NEED_LESS: Final = (
    "Use more memory per process, or need less: a smaller dataset.maxSequenceLength, "
    "training.activationCheckpointing: Full, tuning: LoRA, or more nodes."
)
"""What helps beside smaller micro batches."""


def new_endings(draft: Draft, *, pods: list[Json]) -> list[Ending]:
    """The ends of pods that no pass has counted yet."""
    known = {pod.uid: pod for pod in draft.status.pods or []}
    counted = {uid for uid, pod in known.items() if pod.ended}
    gang = compute_of(draft.job).nodes > 1
    endings = [
        ending_of(pod, lost=lost)
        for pod in pods
        if pod["metadata"]["uid"] not in counted and ((lost := draft.seen.lost_with(pod)) or _has_ended(pod, gang=gang))
    ]
    present = {pod["metadata"]["uid"] for pod in pods}
    gone = [pod for uid, pod in known.items() if uid not in present and not pod.ended]
    return endings + [vanished(name=pod.name, uid=pod.uid, index=pod.index) for pod in gone]


def _has_ended(pod: Json, *, gang: bool) -> bool:
    """Whether a pod failed. A pod of a gang counts as soon as it is told to go: its peers cannot go on without it."""
    return phase_of(pod) == "Failed" or (gang and is_deleting(pod) and phase_of(pod) != "Succeeded")


def count_endings(draft: Draft, *, endings: list[Ending]) -> None:
    """Count the restarts that the Job controller answers by itself. Pods of one index end one after the other.

    The last failure of a job is no restart: nothing is counted beyond maxRestarts.
    """
    if not endings:
        return
    per_index: dict[int, list[Ending]] = {}
    for ending in endings:
        per_index.setdefault(ending.failure.index or 0, []).append(ending)
    rounds = max(per_index.values(), key=len)
    preempted = sum(ending.preempted for ending in rounds)
    allowed = max(0, lifecycle_of(draft.job).max_restarts - draft.counted)
    restarts = preempted + min(len(rounds) - preempted, allowed)
    known = {pod.uid: pod for pod in draft.status.pods or []}
    for ending in endings:
        failure = ending.failure
        known[ending.uid] = AttemptPod(name=failure.pod or "", uid=ending.uid, index=failure.index or 0, ended=True)
    cause = first_cause(endings)
    draft.set(
        restarts=(draft.status.restarts or 0) + restarts,
        preemptions=(draft.status.preemptions or 0) + preempted or None,
        last_failure=cause.failure,
        pods=list(known.values()),
    )
    if restarts:
        draft.note(
            "Restarting", f"pod {cause.failure.pod}: {cause.failure.reason}: {cause.failure.message}", warning=True
        )


def failed_again(draft: Draft, failure: LastFailure | None) -> str:
    """Say that no more restarts are allowed, and what ended the last one."""
    allowed = lifecycle_of(draft.job).max_restarts
    said = (
        f"failed again after {allowed} restart{'s' if allowed != 1 else ''}, all that spec.lifecycle.maxRestarts allows"
    )
    return f"{said}; the last failure was {failure.reason}: {failure.message}" if failure is not None else said


def answer_out_of_memory(draft: Draft, *, work: Json, cause: Ending) -> bool:
    """Go to an attempt that computes fewer rows at a time, or fail where one row is too much."""
    size = micro_batch_size(draft.job, draft.status)
    smaller = smaller_micro_batch(size, accumulates=accumulates(draft.job))
    if smaller is None:
        read_log(draft)
        why = "Even one row at a time needs too much." if size == 1 else "With optimizerInBackward nothing accumulates."
        hint = f"{why} {NEED_LESS}"
        failure = cause.failure.model_copy(update={"hint": hint})
        return fail(draft, reason=failure.reason or "OutOfMemory", message=failure.message or "", failure=failure)
    hint = (
        f"The next attempt has microBatchSize {smaller} in place of {size}, with the same globalBatchSize. "
        f"That takes longer; to avoid it: {NEED_LESS}"
    )
    next_attempt(draft, cause=replace(cause, failure=cause.failure.model_copy(update={"hint": hint})), size=smaller)
    draft.do(*delete_attempt(work))
    return True


def next_attempt(draft: Draft, *, cause: Ending, size: int | None = None) -> None:
    """Count a restart and go to the next attempt, or fail where no more are allowed.

    Args:
        draft: The decision in the making.
        cause: What ended the attempt.
        size: Rows that one process computes at a time from now on, where they become fewer; always allowed.
    """
    read_log(draft)
    if size is None and not cause.preempted and draft.counted >= lifecycle_of(draft.job).max_restarts:
        fail(draft, reason="MaxRestartsExceeded", message=failed_again(draft, cause.failure), failure=cause.failure)
        return
    attempt = draft.status.attempt or 1
    failure = cause.failure
    draft.set(
        attempt=attempt + 1,
        restarts=(draft.status.restarts or 0) + 1,
        preemptions=(draft.status.preemptions or 0) + (1 if cause.preempted and size is None else 0) or None,
        last_failure=failure,
        pods=None,
    )
    message = f"attempt {attempt} ended: pod {failure.pod}: {failure.reason}: {failure.message}"
    if size is not None:
        before = micro_batch_size(draft.job, draft.status)
        message += f"; attempt {attempt + 1} has microBatchSize {size} in place of {before}"
        draft.set(micro_batch_size=size)
    draft.waiting("Restarting", reason="Restarting", message=message)
    draft.note("Restarting", message, warning=True)
