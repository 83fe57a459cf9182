"""One pass over one job: observe, decide, apply."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import yaml

from kubetune_operator import metrics
from kubetune_operator.api.jobs import Job
from kubetune_operator.api.kinds import parse_job
from kubetune_operator.api.references import JobKey, references_of, still_waits
from kubetune_operator.cluster import Cluster
from kubetune_operator.errors import ClusterError, ConflictError, NotFoundError, RefusedError
from kubetune_operator.lifecycle import decide
from kubetune_operator.lifecycle.draft import (
    Action,
    Create,
    Decision,
    Delete,
    Note,
    Observed,
    PatchJob,
    PatchWorkload,
    TellQueue,
)
from kubetune_operator.lifecycle.queueing import was_paused
from kubetune_operator.lifecycle.upstream import adapters_bases
from kubetune_operator.names import (
    COMPONENT_QUEUE,
    CONFIG_FILE,
    GROUP_VERSION,
    LABEL_COMPONENT,
    LABEL_WORKLOAD_JOB_UID,
    TRAINER_CONTAINER,
    config_name,
    work_name,
)
from kubetune_operator.progress import timestamp
from kubetune_operator.render.job import job_labels
from kubetune_operator.settings import Settings
from kubetune_operator.status import (
    created_at,
    index_of,
    is_deleting,
    is_true,
    job_condition,
    lost_node,
    may_be_lost,
    must_be_lost,
    phase_of,
    pods_of,
    report_of,
)

Json = dict[str, Any]

logger = logging.getLogger(__name__)

LOG_LINES: Final = 400
"""Lines of rank 0's log that one poll reads: the steps of an interval, with the events among them."""
RESULT_LINES: Final = 4000
"""Lines that are read when the termination message says that its results stand in the log."""
POLL_REQUESTS: Final = 5
"""Requests of a pass that reads a log: the job, its Jobs, its pods, the log, and the status that is written."""
SLOWEST_POLL: Final = 6.0
"""How many times the progress interval a poll may be put off while the log says nothing new."""
EVENTS_ABOUT: Final = 3
"""Pending pods whose Events are read; the others wait for the same."""


class JobRef(NamedTuple):
    """Which job is meant."""

    kind: str
    namespace: str
    name: str


@dataclass
class _Poll:
    """When a log was last read and what was new in it; lost without harm when the operator starts anew."""

    last: float = 0.0
    patience: float = 1.0


@dataclass
class Reconciler:
    """Brings jobs on, one pass at a time.

    Attributes:
        cluster: The API server.
        settings: The operator's settings.
        dependents: Which jobs wait for a job, so that its events wake them up.
    """

    cluster: Cluster
    settings: Settings
    dependents: dict[JobRef, set[JobRef]] = field(default_factory=dict)
    _polls: dict[JobRef, _Poll] = field(default_factory=dict)
    _refused: dict[JobRef, str] = field(default_factory=dict)

    async def reconcile(self, ref: JobRef) -> float | None:
        """Make one pass.

        Returns:
            After how many seconds another pass is due without an event, None if it is not.

        Raises:
            ClusterError: Try again.
            SpecError: The stored object does not fit our models; only another version of it can help.
        """
        raw = await self.cluster.get(ref.kind, namespace=ref.namespace, name=ref.name)
        if raw is None or is_deleting(raw):
            self.forget(ref)
            return None
        seen = await self._observe(ref, parse_job(raw, is_stored=True))
        decision = decide(seen, settings=self.settings)
        await self._apply(ref, raw, seen=seen, decision=decision)
        return decision.requeue_after

    def forget(self, ref: JobRef) -> None:
        """Drop what is remembered about a job that is gone."""
        self._polls.pop(ref, None)
        self._refused.pop(ref, None)
        for waiting in self.dependents.values():
            waiting.discard(ref)

    # ------------------------------------------------------------------------------------------------- observe

    async def _observe(self, ref: JobRef, job: Job) -> Observed:
        now = datetime.now(UTC)
        state = job.status.state
        if state in {"Complete", "Failed"}:
            self._polls.pop(ref, None)
            left = state == "Failed" or job.spec.queue is not None
            jobs, _, _ = await self._children(job) if left else ([], [], [])
            jobs, queue_job = _without_queue_job(jobs)
            return Observed(job=job, now=now, jobs=jobs, queue_job=queue_job)
        jobs, pods, strangers = await self._children(job)
        jobs, queue_job = _without_queue_job(jobs)
        work = _current(job, jobs)
        config = None
        upstream: dict[JobKey, Job] = {}
        if work is None:
            config, foreign = await self._config(job)
            strangers += foreign
            upstream = await self._upstream(ref, job) if config is None else {}
        active = work or next((item for item in jobs if not job_condition(item, "Complete", "Failed")), None)
        log = await self._log(ref, job, work=work, pods=pods)
        return Observed(
            job=job,
            now=now,
            jobs=jobs,
            queue_job=queue_job,
            workload=await self._workload(job, queue_job),
            pods=pods,
            strangers=strangers,
            config=config,
            upstream=upstream,
            configs=await self._configs(job, upstream=upstream),
            events=await self._events(active, pods=pods, now=now) if active else (),
            log=log,
            poll_seconds=self._poll_seconds(ref),
            lost=await self._lost(pods, now=now),
            nodes=await self._nodes(job, jobs),
            refused=self._refused.get(ref, ""),
        )

    async def _children(self, job: Job) -> tuple[list[Json], list[Json], list[str]]:
        """The job's own batch Jobs and their pods, and the names of those of an older job of the same name."""
        namespace, labels = job.metadata.namespace, job_labels(job)
        found = await self.cluster.list_all("Job", namespace=namespace, labels=labels)
        jobs = [item for item in found if _owned_by(item, job.metadata.uid)]
        strangers = [f"Job {item['metadata']['name']}" for item in found if not _owned_by(item, job.metadata.uid)]
        if job.status.state in {"Complete", "Failed"}:
            return jobs, [], strangers
        mine = {item["metadata"]["uid"] for item in jobs}
        pods = await self.cluster.list_all("Pod", namespace=namespace, labels=labels)
        return jobs, [pod for pod in pods if any(_owned_by(pod, uid) for uid in mine)], strangers

    async def _config(self, job: Job) -> tuple[Json | None, list[str]]:
        """The rendered config as it was fixed, and the ConfigMap's name if it belongs to an older job."""
        name = config_name(job.kind, job.metadata.name)
        found = await self.cluster.get("ConfigMap", namespace=job.metadata.namespace, name=name)
        if found is None:
            return None, []
        if not _owned_by(found, job.metadata.uid):
            return None, [f"ConfigMap {name}"]
        return yaml.safe_load(found["data"][CONFIG_FILE]), []

    async def _upstream(self, ref: JobRef, job: Job) -> dict[JobKey, Job]:
        """The jobs that this one refers to, and those that they wait for in turn, as far as they exist.

        From now on events of the former wake this one up.
        """
        for key in references_of(job):
            self.dependents.setdefault(JobRef(key.kind, ref.namespace, key.name), set()).add(ref)
        found: dict[JobKey, Job] = {}
        wanted = references_of(job)
        while wanted:
            key = wanted.pop()
            if key in found or key == (ref.kind, ref.name):
                continue
            raw = await self.cluster.get(key.kind, namespace=ref.namespace, name=key.name)
            if raw is None or is_deleting(raw):
                continue
            found[key] = parse_job(raw, is_stored=True)
            wanted += references_of(found[key]) if still_waits(found[key]) else []
        return found

    async def _configs(self, job: Job, *, upstream: dict[JobKey, Job]) -> dict[JobKey, Json]:
        """The configs of the jobs whose adapters this one would use."""
        found = {key: await self._config(upstream[key]) for key in adapters_bases(job, upstream=upstream)}
        return {key: config for key, (config, _) in found.items() if config is not None}

    async def _events(self, active: Json, *, pods: Sequence[Json], now: datetime) -> list[Json]:
        """Events about what does not start; read only after it had the time to."""
        mine = pods_of(pods, job=active["metadata"]["name"])
        pending = [pod for pod in mine if phase_of(pod) == "Pending" and not is_deleting(pod)]
        about = pending or ([] if mine else [active])
        stuck = [item for item in about if (now - created_at(item)).total_seconds() >= self.settings.stuck_seconds]
        uids = [item["metadata"]["uid"] for item in stuck[:EVENTS_ABOUT]]
        return await self.cluster.events_about(namespace=active["metadata"]["namespace"], uids=uids)

    async def _workload(self, job: Job, queue_job: Json | None) -> Json | None:
        """Kueue's Workload for a job, while it is not simply admitted."""
        if queue_job is None or not (queue_job["spec"].get("suspend") or job.spec.suspend or was_paused(job.status)):
            return None
        metadata = queue_job["metadata"]
        labels = {LABEL_WORKLOAD_JOB_UID: metadata["uid"]}
        try:
            found = await self.cluster.list_all("Workload", namespace=metadata["namespace"], labels=labels)
        except NotFoundError:  # Kueue is not there, or speaks another version
            return None
        return next((workload for workload in found if not is_deleting(workload)), None)

    async def _nodes(self, job: Job, jobs: Sequence[Json]) -> list[Json] | None:
        """The nodes, in the one pass that compares the estimate with them."""
        ready = is_true(job.status.conditions, "DataReady")
        if ready or not any(job_condition(item, "Complete") for item in jobs):
            return None
        return await self.cluster.nodes()

    async def _lost(self, pods: Sequence[Json], *, now: datetime) -> dict[str, str]:
        """The nodes that will not see the end of their pods; read only for pods that should have ended."""
        names = {pod["spec"]["nodeName"] for pod in pods if may_be_lost(pod, now=now)}
        found = await self.cluster.nodes(name=next(iter(names)) if len(names) == 1 else "") if names else None
        if found is None:
            told = {pod["spec"].get("nodeName", ""): must_be_lost(pod, now=now) for pod in pods}
            return {name: what for name, what in told.items() if what}
        nodes = {node["metadata"]["name"]: node for node in found}
        patience = timedelta(seconds=self.settings.lost_node_seconds)
        told = {name: lost_node(name, nodes.get(name), now=now, patience=patience) for name in names}
        return {name: what for name, what in told.items() if what}

    async def _log(self, ref: JobRef, job: Job, *, work: Json | None, pods: Sequence[Json]) -> str:
        """The tail of rank 0's log, when a poll is due or the attempt is ending."""
        if work is None:
            self._polls.pop(ref, None)
            return ""
        mine = pods_of(pods, job=work["metadata"]["name"])
        leader = next((pod for pod in reversed(mine) if index_of(pod) == 0 and phase_of(pod) != "Pending"), None)
        if leader is None:
            return ""
        poll = self._polls.setdefault(ref, _Poll())
        answered = {pod.uid for pod in job.status.pods or [] if pod.ended}
        ending = job_condition(work, "Complete", "Failed") or any(
            (phase_of(pod) == "Failed" or is_deleting(pod)) and pod["metadata"]["uid"] not in answered for pod in mine
        )
        due = poll.last + self._poll_seconds(ref) <= time.monotonic() + 0.05
        if not (ending or due):
            return ""
        poll.last = time.monotonic()
        lines = RESULT_LINES if report_of(leader).get("seeLog") else LOG_LINES
        return await self.cluster.log_tail(
            namespace=ref.namespace, pod=leader["metadata"]["name"], container=TRAINER_CONTAINER, lines=lines
        )

    def _poll_seconds(self, ref: JobRef) -> float:
        """The time between two reads of a log: longer when many jobs run, and while nothing new is written."""
        crowd = len(self._polls) * POLL_REQUESTS / (self.settings.api_qps / 2)  # the other half is for everything else
        patience = self._polls[ref].patience if ref in self._polls else 1.0
        return max(self.settings.progress_interval_seconds * patience, crowd)

    # --------------------------------------------------------------------------------------------------- apply

    async def _apply(self, ref: JobRef, raw: Json, *, seen: Observed, decision: Decision) -> None:
        if seen.log and (poll := self._polls.get(ref)) is not None:
            new = decision.status != seen.job.status
            poll.patience = 1.0 if new else min(SLOWEST_POLL, poll.patience * 1.5)
        await self._write_status(raw, decision=decision)
        _count_restarts(seen.job, decision)
        for action in decision.actions:
            await self._act(ref, action)
        self._refused.pop(ref, None)
        for note in decision.notes:
            await self._send(seen.job, note, now=seen.now)

    async def _write_status(self, raw: Json, *, decision: Decision) -> None:
        """Write the status if it changed, and only over the version that was read."""
        patch = merge_patch(raw.get("status") or {}, decision.status.to_manifest())
        if not patch:
            return
        metadata = raw["metadata"]
        await self.cluster.patch(
            raw["kind"],
            namespace=metadata["namespace"],
            name=metadata["name"],
            patch={
                "metadata": {"resourceVersion": metadata["resourceVersion"], "uid": metadata["uid"]},
                "status": patch,
            },
            subresource="status",
        )

    async def _act(self, ref: JobRef, action: Action) -> None:
        match action:
            case Create():
                await self._create(ref, action.manifest)
            case Delete():
                await self.cluster.delete(
                    action.kind,
                    namespace=ref.namespace,
                    name=action.name,
                    uid=action.uid,
                    foreground=action.kind == "Job",
                )
            case TellQueue():
                await self._tell_queue(ref, action)
            case PatchWorkload():
                await self.cluster.patch(
                    "Workload", namespace=ref.namespace, name=action.name, patch={"spec": action.spec}
                )
            case PatchJob():
                try:
                    await self.cluster.patch(
                        "Job", namespace=ref.namespace, name=action.name, patch={"spec": action.spec}
                    )
                except NotFoundError:
                    return

    async def _tell_queue(self, ref: JobRef, told: TellQueue) -> None:
        """Write the status of the Job that stands in a queue. A conflict ends the pass: Kueue changed its mind."""
        patch = {
            "metadata": {"resourceVersion": told.version},
            "status": {"active": told.active, "ready": told.ready},
        }
        await self.cluster.patch("Job", namespace=ref.namespace, name=told.name, patch=patch, subresource="status")

    async def _create(self, ref: JobRef, manifest: Json) -> None:
        """Create an object. That it exists is success; a refusal is shown in the status by the next pass."""
        try:
            await self.cluster.create(manifest)
        except ConflictError:
            logger.debug("%s %s exists already", manifest["kind"], manifest["metadata"]["name"])
        except RefusedError as error:
            self._refused[ref] = str(error)
            raise

    async def _send(self, job: Job, note: Note, *, now: datetime) -> None:
        """Send an Event; one that gets lost is no reason to repeat a pass."""
        manifest = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{job.metadata.name}.", "namespace": job.metadata.namespace},
            "involvedObject": {
                "apiVersion": GROUP_VERSION,
                "kind": job.kind,
                "name": job.metadata.name,
                "namespace": job.metadata.namespace,
                "uid": job.metadata.uid,
                "resourceVersion": job.metadata.resource_version,
            },
            "type": note.type,
            "reason": note.reason,
            "message": note.message,
            "source": {"component": "kubetune-operator"},
            "reportingComponent": "kubetune-operator",
            "reportingInstance": self.settings.identity[:128],
            "firstTimestamp": timestamp(now),
            "lastTimestamp": timestamp(now),
            "count": 1,
        }
        try:
            await self.cluster.create(manifest)
        except ClusterError as error:
            logger.warning("an Event about %s was lost: %s", job.metadata.name, error)


def merge_patch(before: Json, after: Json) -> Json:
    """Build the JSON merge patch (RFC 7396) that turns one object into the other; empty if they are equal."""
    patch: Json = {key: None for key in before if key not in after}
    for key, value in after.items():
        if key not in before:
            patch[key] = value
        elif isinstance(value, dict) and isinstance(before[key], dict):
            if inner := merge_patch(before[key], value):
                patch[key] = inner
        elif before[key] != value:
            patch[key] = value
    return patch


def _current(job: Job, jobs: Iterable[Json]) -> Json | None:
    """The Job of the current attempt."""
    if not job.status.attempt:
        return None
    name = work_name(job.kind, job.metadata.name, attempt=job.status.attempt)
    return next((item for item in jobs if item["metadata"]["name"] == name), None)


def _without_queue_job(jobs: Sequence[Json]) -> tuple[list[Json], Json | None]:
    """The batch Jobs that run pods, and the one that stands in a queue."""
    standing = [item for item in jobs if item["metadata"]["labels"].get(LABEL_COMPONENT) == COMPONENT_QUEUE]
    return [item for item in jobs if item not in standing], standing[0] if standing else None


def _owned_by(item: Json, uid: str) -> bool:
    return any(owner["uid"] == uid for owner in item["metadata"].get("ownerReferences") or [])


def _count_restarts(job: Job, decision: Decision) -> None:
    restarts = (decision.status.restarts or 0) - (job.status.restarts or 0)
    if restarts > 0:
        failure = decision.status.last_failure
        metrics.RESTARTS.labels(job.kind, failure.reason if failure and failure.reason else "Unknown").inc(restarts)
