"""What one pass knows, and the decision that it drafts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from kubetune_operator.api.finetunejob import FineTuneJob, FineTuneJobStatus, smaller_micro_batch
from kubetune_operator.api.jobs import Job, JobStatus, State
from kubetune_operator.api.references import JobKey
from kubetune_operator.names import prepare_name, work_name
from kubetune_operator.settings import Settings
from kubetune_operator.status import is_deleting, with_condition

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Everything that one pass knows.

    Attributes:
        job: The custom resource.
        now: The time of the pass, in UTC.
        jobs: Its batch Jobs, without the one that stands in a queue.
        queue_job: The Job that stands in a queue of Kueue for it.
        workload: Kueue's Workload for that Job; read only while Kueue may hold the job back.
        pods: Their pods.
        strangers: Names of children of an older job of the same name that are not gone yet.
        config: The rendered config as it stands in the ConfigMap, None if there is no ConfigMap.
        upstream: The jobs that it refers to, and those that they wait for; those that exist.
        configs: The rendered configs of those that only adapters can be taken from.
        events: Events about pods that do not start and their Job; read only for these.
        log: The tail of rank 0's log; read only when it is due.
        poll_seconds: When the log is due again.
        lost: Nodes that will say nothing any more of pods that were told to go, and what is known of them.
        nodes: The cluster's nodes; read only when a capacity is needed, None where that is not allowed.
        refused: Why the API server refused what the last pass wanted to create, empty if it did not.
    """

    job: Job
    now: datetime
    jobs: Sequence[Json] = ()
    queue_job: Json | None = None
    workload: Json | None = None
    pods: Sequence[Json] = ()
    strangers: Sequence[str] = ()
    config: Json | None = None
    upstream: Mapping[JobKey, Job] = field(default_factory=dict)
    configs: Mapping[JobKey, Json] = field(default_factory=dict)
    events: Sequence[Json] = ()
    log: str = ""
    poll_seconds: float = 10.0
    refused: str = ""
    lost: Mapping[str, str] = field(default_factory=dict)
    nodes: Sequence[Json] | None = None

    @property
    def prepare(self) -> Json | None:
        """The prepare Job."""
        return self._named(prepare_name(self.job.kind, self.job.metadata.name))

    def work(self, attempt: int) -> Json | None:
        """The Job of an attempt."""
        return self._named(work_name(self.job.kind, self.job.metadata.name, attempt=attempt))

    def lost_with(self, pod: Json) -> str:
        """What is known of the node of a pod that it will not see end, empty if it may."""
        return self.lost.get(pod["spec"].get("nodeName") or "", "") if is_deleting(pod) else ""

    def _named(self, name: str) -> Json | None:
        return next((job for job in self.jobs if job["metadata"]["name"] == name), None)


@dataclass(frozen=True, kw_only=True)
class Create:
    """Create an object; that it exists already is success."""

    manifest: Json


@dataclass(frozen=True, kw_only=True)
class Delete:
    """Delete an object and what it owns."""

    kind: str
    name: str
    uid: str = ""


@dataclass(frozen=True, kw_only=True)
class PatchJob:
    """Change single fields of a batch Job's spec."""

    name: str
    spec: Json


@dataclass(frozen=True, kw_only=True)
class TellQueue:
    """Say in the status of the Job that stands in a queue how many pods there are, unless it changed meanwhile."""

    name: str
    version: str
    active: int
    ready: int


@dataclass(frozen=True, kw_only=True)
class PatchWorkload:
    """Change single fields of the spec of Kueue's Workload."""

    name: str
    spec: Json


Action = Create | Delete | PatchJob | TellQueue | PatchWorkload


@dataclass(frozen=True, kw_only=True)
class Note:
    """An Event for people who describe the object."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a pass leads to: the status is written first, then the actions are taken, then the Events are sent."""

    status: JobStatus
    actions: tuple[Action, ...] = ()
    notes: tuple[Note, ...] = ()
    requeue_after: float | None = None


class Draft:
    """A decision in the making."""

    def __init__(self, seen: Observed, *, settings: Settings) -> None:
        self.seen = seen
        self.settings = settings
        self.job = seen.job
        self.status = seen.job.status
        self.actions: list[Action] = []
        self.notes: list[Note] = []
        self.requeue_after: float | None = None

    def set(self, **fields: Any) -> None:
        """Change fields of the status."""
        self.status = self.status.model_copy(update=fields)

    def condition(self, condition_type: str, *, status: Literal["True", "False"], reason: str, message: str) -> None:
        """Set a condition of the status."""
        conditions = with_condition(
            self.status.conditions,
            condition_type,
            status=status,
            reason=reason,
            message=message,
            now=self.seen.now,
            generation=self.job.metadata.generation,
        )
        self.set(conditions=conditions)

    def do(self, *actions: Action) -> None:
        """Take actions after the status is written."""
        self.actions += actions

    def note(self, reason: str, message: str, *, warning: bool = False) -> None:
        """Send an Event."""
        self.notes.append(Note(type="Warning" if warning else "Normal", reason=reason, message=message[:1000]))

    def look_again(self, *, seconds: float) -> None:
        """Come back at the latest after this time."""
        self.requeue_after = seconds if self.requeue_after is None else min(self.requeue_after, seconds)

    def waiting(self, state: State, *, reason: str, message: str) -> None:
        """Say that the work does not go on, and why. Nobody knows then when it will be done."""
        self.set(state=state)
        progress = getattr(self.status, "progress", None)
        if progress is not None and progress.eta_seconds is not None:
            self.set(progress=progress.model_copy(update={"eta_seconds": None}))
        self.condition("Running", status="False", reason=reason, message=message)

    @property
    def counted(self) -> int:
        """Restarts that count against maxRestarts: not preemptions, nor those for less memory, which end at 1 row."""
        return (self.status.restarts or 0) - (self.status.preemptions or 0) - reductions(self.job, self.status)

    def decision(self) -> Decision:
        """Close the draft."""
        return Decision(
            status=self.status, actions=tuple(self.actions), notes=tuple(self.notes), requeue_after=self.requeue_after
        )


def reduced_micro_batch(status: JobStatus) -> int | None:
    """Rows that one process computes at a time since an attempt ran out of memory; None if none did."""
    return status.micro_batch_size if isinstance(status, FineTuneJobStatus) else None


def micro_batch_size(job: Job, status: JobStatus) -> int:
    """Rows that one process of the current attempt computes at a time; 1 for kinds that do not train."""
    planned = job.spec.training.micro_batch_size if isinstance(job, FineTuneJob) else 1
    return reduced_micro_batch(status) or planned


def reductions(job: Job, status: JobStatus) -> int:
    """How often the micro batch became smaller since the job began."""
    size = job.spec.training.micro_batch_size if isinstance(job, FineTuneJob) else 1
    current, number = micro_batch_size(job, status), 0
    while size > current:
        size, number = smaller_micro_batch(size) or 1, number + 1
    return number
