"""The attempts: starting them, answering the ends of their pods, following their progress."""

from datetime import timedelta
from typing import Any, Final

from kubetune_operator.api.jobs import AttemptPod, State
from kubetune_operator.lifecycle.draft import Create, Draft, PatchJob, reduced_micro_batch
from kubetune_operator.lifecycle.moves import blocked_by, delete_attempt, given_up, read_log
from kubetune_operator.lifecycle.queueing import admitted_attempt
from kubetune_operator.lifecycle.restarts import count_endings, new_endings, next_attempt
from kubetune_operator.names import KINDS, ExitCode
from kubetune_operator.render.job import backoff_limit, compute_of, lifecycle_of, render_service, render_work_job
from kubetune_operator.status import (
    Ending,
    attempt_of,
    ending_of,
    ends_by,
    first_cause,
    image_of,
    index_of,
    is_deleting,
    is_live,
    parse_time,
    phase_of,
    pods_of,
    vanished,
)

Json = dict[str, Any]

CULPRIT_SECONDS: Final = 15.0
"""How long to wait for the pod that failed first, when only its peers have told so far: its launcher gives the ranks
beside the one that failed ten seconds to end by themselves."""

LINGERING_SECONDS: Final = 30.0
"""How long pods may stay after their grace period before the status says so."""


def work(draft: Draft) -> bool:
    """Run the current attempt, and answer what becomes of its pods."""
    if not draft.status.attempt:
        draft.set(attempt=1, restarts=0)
    attempt = draft.status.attempt or 1
    current = draft.seen.work(attempt)
    if current is None:
        return _start_attempt(draft, attempt=attempt)
    if is_deleting(current):
        draft.waiting(
            _waiting_state(draft), reason="Restarting", message="the Job of this attempt was deleted; another follows"
        )
        draft.set(attempt=attempt + 1, restarts=(draft.status.restarts or 0) + 1, pods=None)
        draft.set(preemptions=(draft.status.preemptions or 0) + 1)
        return True
    pods = pods_of(draft.seen.pods, job=current["metadata"]["name"])
    endings = new_endings(draft, pods=pods)
    nodes = compute_of(draft.job).nodes
    together = nodes > 1 or any(draft.seen.lost_with(pod) for pod in pods)
    if endings and together and not _whole_again(pods, endings=endings, nodes=nodes):
        return _restart(draft, current=current, pods=pods, endings=endings)
    count_endings(draft, endings=endings)
    _remember(draft, pods=pods)
    _follow_max_restarts(draft, current=current)
    return _watch(draft, current=current, pods=pods)


def _waiting_state(draft: Draft) -> State:
    """What a job is while its pods do not run: after it did run, it is restarting."""
    return "Restarting" if draft.status.state in {"Running", "Restarting"} else "Pending"


def _start_attempt(draft: Draft, *, attempt: int) -> bool:
    """Create the Job of an attempt, as soon as nothing of the ones before is left that may still work."""
    before = [job for job in draft.seen.jobs if 0 < attempt_of(job) < attempt]
    older = [job for job in before if not given_up(draft, job=job)]
    if older:
        draft.do(*(action for job in older for action in delete_attempt(job)))
        _say_what_lingers(draft, attempt=attempt)
        return True
    _blame_lost_node(draft, jobs=before)
    if draft.status.pods:  # the Job was deleted behind our back, and its pods with it
        endings = [vanished(name=pod.name, uid=pod.uid, index=pod.index) for pod in draft.status.pods if not pod.ended]
        if endings:
            next_attempt(draft, cause=first_cause(endings))
            return True
        draft.set(pods=None)
    assert draft.seen.config is not None  # noqa: S101 (write_config ends the pass otherwise)
    message = draft.seen.refused or f"attempt {attempt} is about to start"
    draft.waiting(_waiting_state(draft), reason="CreateRefused" if draft.seen.refused else "Starting", message=message)
    if compute_of(draft.job).nodes > 1:
        draft.do(Create(manifest=render_service(draft.job, attempt=attempt)))
    limit = backoff_limit(draft.job, counted=draft.counted)
    manifest = render_work_job(
        draft.job,
        config=draft.seen.config,
        attempt=attempt,
        backoff_limit=limit,
        settings=draft.settings,
        micro_batch_size=reduced_micro_batch(draft.status),
    )
    draft.do(Create(manifest=admitted_attempt(draft, manifest)))
    return True


def _blame_lost_node(draft: Draft, *, jobs: list[Json]) -> None:
    """Name the node that is lost where only its peers could tell, and knew no more than that they lost one."""
    failure = draft.status.last_failure
    lost = [
        pod
        for job in jobs
        for pod in pods_of(draft.seen.pods, job=job["metadata"]["name"])
        if draft.seen.lost_with(pod)
    ]
    if lost and failure is not None and failure.exit_code == ExitCode.PEER_LOST:
        draft.set(last_failure=ending_of(lost[-1], lost=draft.seen.lost_with(lost[-1])).failure)


def _say_what_lingers(draft: Draft, *, attempt: int) -> None:
    """Name the pods of an attempt before that are still there after their grace period, as on a node that is dead."""
    draft.look_again(seconds=LINGERING_SECONDS)
    patience = draft.seen.now - timedelta(seconds=LINGERING_SECONDS)
    lingering = [
        f"{pod['metadata']['name']} on node {pod['spec'].get('nodeName')}"
        for pod in draft.seen.pods
        if 0 < attempt_of(pod) < attempt and is_deleting(pod) and ends_by(pod) < patience
    ]
    if lingering:
        message = f"attempt {attempt} waits for pods that do not end: {', '.join(lingering)}; are their nodes alive?"
        draft.waiting(_waiting_state(draft), reason="WaitingForPods", message=message)


def _whole_again(pods: list[Json], *, endings: list[Ending], nodes: int) -> bool:
    """Whether every pod of a gang was replaced since: the Job controller did it while no operator was there."""
    last = max((ending.failure.time or "" for ending in endings), default="")  # RFC 3339 in UTC sorts as text
    replaced = {index_of(pod) for pod in pods if is_live(pod) and pod["metadata"]["creationTimestamp"] >= last}
    return len(replaced) == nodes


def _restart(draft: Draft, *, current: Json, pods: list[Json], endings: list[Ending]) -> bool:
    """Answer the end of a pod by a new attempt: its peers cannot go on, or nobody will ever see it end."""
    cause = first_cause(endings)
    ended = parse_time(cause.failure.time)
    if cause.peer_lost and any(is_live(pod) for pod in pods) and ended is not None:
        left = CULPRIT_SECONDS - (draft.seen.now - ended).total_seconds()
        if left > 0:  # the one that failed first has not told yet
            draft.look_again(seconds=left)
            return True
    next_attempt(draft, cause=cause)
    if draft.status.state != "Failed":
        draft.do(*delete_attempt(current))
    return True


def _remember(draft: Draft, *, pods: list[Json]) -> None:
    """Write down the pods of the attempt; forget those that are gone and counted. A good end is no news later."""
    counted = {pod.uid for pod in draft.status.pods or [] if pod.ended}
    kept = []
    for pod in pods:
        metadata = pod["metadata"]
        ended = metadata["uid"] in counted or phase_of(pod) == "Succeeded"
        kept.append(AttemptPod(name=metadata["name"], uid=metadata["uid"], index=index_of(pod), ended=ended))
    if kept != (draft.status.pods or []):
        draft.set(pods=kept)
    if image := image_of(pods):
        draft.set(image=image)


def _follow_max_restarts(draft: Draft, *, current: Json) -> None:
    """Let the Job controller know when maxRestarts was changed. Its own count begins with the attempt."""
    if compute_of(draft.job).nodes > 1:
        return
    pods = pods_of(draft.seen.pods, job=current["metadata"]["name"])
    seen = sum(1 for pod in pods if phase_of(pod) == "Failed" and not ending_of(pod).preempted)
    failed_here = max(seen, current.get("status", {}).get("failed") or 0)
    limit = backoff_limit(draft.job, counted=max(0, draft.counted - failed_here))
    if draft.counted >= lifecycle_of(draft.job).max_restarts:
        # Nothing is counted beyond that, so that the count says nothing of the last failures here.
        limit = min(limit, current["spec"].get("backoffLimit", limit))
    if current["spec"].get("backoffLimit") != limit:
        draft.do(PatchJob(name=current["metadata"]["name"], spec={"backoffLimit": limit}))


def _watch(draft: Draft, *, current: Json, pods: list[Json]) -> bool:
    """Say what an attempt is doing."""
    nodes = compute_of(draft.job).nodes
    running = [pod for pod in pods if phase_of(pod) in {"Running", "Succeeded"} and not is_deleting(pod)]
    if len({index_of(pod) for pod in running}) < nodes:
        blocked = blocked_by(draft, job=current, pods=pods)
        attempt = draft.status.attempt
        reason, message = blocked or ("Starting", f"{len(running)} of {nodes} pods of attempt {attempt} are running")
        draft.waiting("Pending" if blocked else _waiting_state(draft), reason=reason, message=message)
        return True
    if draft.status.state != "Running":
        message = f"attempt {draft.status.attempt} runs on {nodes} node{'s' if nodes > 1 else ''}"
        if size := reduced_micro_batch(draft.status):
            message += f", with microBatchSize {size} because an attempt before it ran out of memory"
        draft.set(state="Running")
        draft.condition("Running", status="True", reason=KINDS[draft.job.kind].doing, message=message)
        draft.note("Running", message)
    read_log(draft)
    draft.look_again(seconds=draft.seen.poll_seconds)
    return True
