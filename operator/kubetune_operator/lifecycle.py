"""The life of a FineTuneJob as one pure function: what is there goes in, what to write and do comes out.

`decide` walks through `STEPS`; the first step that has to wait for the cluster ends the pass. Nothing is remembered
outside the status: an operator that starts anew in the middle of anything decides the same. A status is written before
its actions are taken, so an action that gets lost is taken by the next pass, and none is taken twice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, Literal, TypeVar

from pydantic import ValidationError

from kubetune_operator import estimate as estimates
from kubetune_operator import progress as progresses
from kubetune_operator.api import finetunejob as api
from kubetune_operator.api.finetunejob import (
    AttemptPod,
    DataStatistics,
    FineTuneJob,
    FineTuneJobStatus,
    FinishedOutput,
    LastFailure,
    Parent,
    Progress,
    ResolvedSource,
    State,
    batch_problem,
)
from kubetune_operator.api.model import StatusModel
from kubetune_operator.names import KIND_FINETUNEJOB, config_name, prepare_name, train_name
from kubetune_operator.progress import timestamp
from kubetune_operator.render.config import Resolved, ResolvedModel, render_config, run_directory
from kubetune_operator.render.job import (
    backoff_limit,
    compute_of,
    lifecycle_of,
    processes_per_node,
    render_configmap,
    render_prepare_job,
    render_service,
    render_train_job,
)
from kubetune_operator.settings import Settings
from kubetune_operator.status import (
    Ending,
    attempt_of,
    created_at,
    ending_of,
    find_condition,
    first_cause,
    index_of,
    is_deleting,
    is_live,
    is_true,
    job_condition,
    parse_time,
    pending_reason,
    phase_of,
    pods_of,
    report_of,
    vanished,
    with_condition,
)

Json = dict[str, Any]
M = TypeVar("M", bound=StatusModel)

CULPRIT_SECONDS: Final = 3.0
"""How long to wait for the pod that failed first, when only its peers have told so far."""
UPSTREAM_SECONDS: Final = 30.0
"""How often to look for another job that does not exist; one that exists wakes us up itself."""


# ------------------------------------------------------------------------------------------------- in and out


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Everything that one pass knows.

    Attributes:
        job: The custom resource.
        now: The time of the pass, in UTC.
        jobs: Its batch Jobs.
        pods: Their pods.
        strangers: Names of children of an older job of the same name that are not gone yet.
        config: The rendered config as it stands in the ConfigMap, None if there is no ConfigMap.
        parents: The jobs that it refers to, by name; those that exist.
        events: Events about pods that do not start and their Job; read only for these.
        log: The tail of rank 0's log; read only when it is due.
        poll_seconds: When the log is due again.
        nodes: The cluster's nodes; read only when a capacity is needed, None where that is not allowed.
        refused: Why the API server refused what the last pass wanted to create, empty if it did not.
    """

    job: FineTuneJob
    now: datetime
    jobs: Sequence[Json] = ()
    pods: Sequence[Json] = ()
    strangers: Sequence[str] = ()
    config: Json | None = None
    parents: Mapping[str, FineTuneJob] = field(default_factory=dict)
    events: Sequence[Json] = ()
    log: str = ""
    poll_seconds: float = 10.0
    refused: str = ""
    nodes: Sequence[Json] | None = None

    @property
    def prepare(self) -> Json | None:
        """The prepare Job."""
        return self._named(prepare_name(self.job.metadata.name))

    def train(self, attempt: int) -> Json | None:
        """The training Job of an attempt."""
        return self._named(train_name(self.job.metadata.name, attempt=attempt))

    def _named(self, name: str) -> Json | None:
        return next((job for job in self.jobs if job["metadata"]["name"] == name), None)


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Why something cannot be resolved yet."""

    reason: str
    message: str


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


Action = Create | Delete | PatchJob


@dataclass(frozen=True, kw_only=True)
class Note:
    """An Event for people who describe the object."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a pass leads to: the status is written first, then the actions are taken, then the Events are sent."""

    status: FineTuneJobStatus
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
        """Say that training does not run, and why."""
        self.set(state=state)
        self.condition("Running", status="False", reason=reason, message=message)

    @property
    def counted(self) -> int:
        """Restarts that count against maxRestarts."""
        return (self.status.restarts or 0) - (self.status.preemptions or 0)

    def decision(self) -> Decision:
        """Close the draft."""
        return Decision(
            status=self.status, actions=tuple(self.actions), notes=tuple(self.notes), requeue_after=self.requeue_after
        )


def decide(seen: Observed, *, settings: Settings) -> Decision:
    """Decide what a pass writes and does. Pure."""
    draft = Draft(seen, settings=settings)
    for step in STEPS:
        if step(draft):
            break
    if draft.status.observed_generation != seen.job.metadata.generation:
        draft.set(observed_generation=seen.job.metadata.generation)
    return draft.decision()


# ------------------------------------------------------------------------------------------------ begin and end


def stay_finished(draft: Draft) -> bool:
    """A finished job stays as it is until its time to live is over."""
    status, seen = draft.status, draft.seen
    if status.state not in {"Complete", "Failed"}:
        return False
    draft.do(*_stop_live_jobs(seen))
    ttl = lifecycle_of(draft.job).ttl_seconds_after_finished
    finished = parse_time(status.completion_time)
    if ttl is not None and finished is not None:
        left = (finished + timedelta(seconds=ttl) - seen.now).total_seconds()
        if left <= 0:
            draft.do(Delete(kind=KIND_FINETUNEJOB, name=draft.job.metadata.name, uid=draft.job.metadata.uid))
        else:
            draft.look_again(seconds=left)
    return True


def accept(draft: Draft) -> bool:
    """Check what the schema cannot, once."""
    if find_condition(draft.status.conditions, "Accepted") is not None:
        return False
    job, settings = draft.job, draft.settings
    ranks = compute_of(job).nodes * processes_per_node(job, cpu_processes=settings.cpu_processes)
    if problems := spec_problems(job, ranks=ranks):
        message = "; ".join(problems)
        draft.condition("Accepted", status="False", reason="InvalidSpec", message=message)
        return fail(draft, reason="InvalidSpec", message=message)
    message = _accepted_message(job, settings=settings)
    draft.condition("Accepted", status="True", reason="Accepted", message=message)
    draft.note("Accepted", message)
    draft.set(start_time=timestamp(draft.seen.now))
    draft.waiting("Pending", reason="Pending", message="nothing is started yet")
    return False


def spec_problems(job: FineTuneJob, *, ranks: int) -> list[str]:
    """What makes a job impossible on a cluster, though its schema is right."""
    problems = [
        f"{path}: Invalid value: {uri!r}: file:// is only for `kubetune run`; a pod has no such folder, use s3:// or pvc://"
        for path, uri in _uris(job.spec.to_manifest(), path="spec")
        if uri.startswith("file://")
    ]
    if problem := batch_problem(job.spec, ranks=ranks):
        problems.append(problem)
    return problems


def _uris(node: Any, *, path: str) -> list[tuple[str, str]]:
    """Every URI of a manifest with its path."""
    if isinstance(node, dict):
        return [found for key, value in node.items() for found in _uris(value, path=f"{path}.{key}")]
    if isinstance(node, list):
        return [found for number, value in enumerate(node) for found in _uris(value, path=f"{path}[{number}]")]
    return [(path, node)] if isinstance(node, str) and path.endswith((".uri", ".location")) else []


def _accepted_message(job: FineTuneJob, *, settings: Settings) -> str:
    accelerator = compute_of(job).accelerator
    if accelerator is None or not settings.cpu_processes:
        return "the job can run"
    processes = processes_per_node(job, cpu_processes=settings.cpu_processes)
    return (
        f"{accelerator.resource} x {accelerator.per_node} per node is mapped to {processes} CPU "
        f"process{'es' if processes > 1 else ''} per node: this installation has no accelerators"
    )


def fail(draft: Draft, *, reason: str, message: str, failure: LastFailure | None = None) -> bool:
    """End the job for good."""
    if failure is not None:
        draft.set(last_failure=failure)
    draft.condition("Running", status="False", reason=reason, message=message)
    draft.condition("Failed", status="True", reason=reason, message=message)
    draft.set(state="Failed", completion_time=timestamp(draft.seen.now), pods=None)
    draft.do(*_stop_live_jobs(draft.seen))
    draft.note(reason, message, warning=True)
    ttl = lifecycle_of(draft.job).ttl_seconds_after_finished
    if ttl is not None:
        draft.look_again(seconds=ttl)
    return True


def _stop_live_jobs(seen: Observed) -> list[Action]:
    """Suspend what still runs: its pods get their grace, and those that failed stay for diagnosis."""
    return [
        PatchJob(name=job["metadata"]["name"], spec={"suspend": True})
        for job in seen.jobs
        if not job_condition(job, "Complete", "Failed", "FailureTarget", "SuccessCriteriaMet")
        and not job["spec"].get("suspend")
        and not is_deleting(job)
    ]


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
        _read_log(draft)
        _count_endings(draft, endings=_new_endings(draft, pods=pods))
        failure = _last(endings) or draft.status.last_failure
        if condition.get("reason") != "BackoffLimitExceeded":
            return fail(
                draft, reason=str(condition.get("reason")), message=str(condition.get("message", "")), failure=failure
            )
        return fail(draft, reason="MaxRestartsExceeded", message=_failed_again(draft, failure), failure=failure)
    return False


def _last(endings: Sequence[Ending]) -> LastFailure | None:
    told = [ending for ending in endings if not ending.peer_lost] or list(endings)
    return max(told, key=lambda ending: ending.failure.time or "").failure if told else None


def _fail_for(draft: Draft, cause: Ending) -> bool:
    _read_log(draft)
    failure = cause.failure
    return fail(draft, reason=failure.reason or "Failed", message=failure.message or "", failure=failure)


def _failed_again(draft: Draft, failure: LastFailure | None) -> str:
    allowed = lifecycle_of(draft.job).max_restarts
    said = (
        f"failed again after {allowed} restart{'s' if allowed != 1 else ''}, all that spec.lifecycle.maxRestarts allows"
    )
    return f"{said}; the last failure was {failure.reason}: {failure.message}" if failure is not None else said


def _complete(draft: Draft, *, train: Json) -> bool:
    """Take over the results of rank 0."""
    _read_log(draft)
    pods = pods_of(draft.seen.pods, job=train["metadata"]["name"])
    _count_endings(draft, endings=_new_endings(draft, pods=pods))
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
    taken = [_taken(draft, FinishedOutput, item) for item in report.get("outputs") or []]
    reported = [output for output in taken if output is not None]
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


# -------------------------------------------------------------------------------------------- suspend and resume


def suspend(draft: Draft) -> bool:
    """Stop what runs, with its grace period, as long as the spec says so; afterwards go on with a new attempt."""
    if draft.job.spec.suspend:
        return _suspend(draft)
    if not is_true(draft.status.conditions, "Suspended"):
        return False
    if [job for job in draft.seen.jobs if not job_condition(job, "Complete", "Failed")]:
        return True  # the pods are still writing their checkpoint
    draft.condition("Suspended", status="False", reason="Resumed", message="spec.suspend is false again")
    draft.waiting("Pending", reason="Resumed", message="the job goes on")
    draft.set(start_time=timestamp(draft.seen.now), pods=None)
    if draft.status.attempt:
        draft.set(attempt=draft.status.attempt + 1)
    draft.note("Resumed", "spec.suspend is false again")
    return False


def _suspend(draft: Draft) -> bool:
    live = [job for job in draft.seen.jobs if not job_condition(job, "Complete", "Failed")]
    if not is_true(draft.status.conditions, "Suspended"):
        _read_log(draft)
        draft.condition("Suspended", status="True", reason="Suspended", message="spec.suspend is true")
        draft.waiting("Suspended", reason="Suspended", message="spec.suspend is true")
        draft.note(
            "Suspended", "spec.suspend is true; pods are stopped with a checkpoint" if live else "spec.suspend is true"
        )
    draft.do(*(action for job in live for action in _delete_attempt(job)))
    return True


def _delete_attempt(job: Json) -> list[Action]:
    """Delete a batch Job and, if it trains, the Service of the same name."""
    if is_deleting(job):
        return []
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    actions: list[Action] = [Delete(kind="Job", name=name, uid=uid)]
    if attempt_of(job) and job["spec"].get("completions", 1) > 1:
        actions.append(Delete(kind="Service", name=name))
    return actions


# --------------------------------------------------------------------------------------------- before the training


def wait_for_strangers(draft: Draft) -> bool:
    """Let the children of an older job of the same name go first."""
    if not draft.seen.strangers:
        return False
    names = ", ".join(draft.seen.strangers)
    draft.waiting(
        "Pending", reason="WaitingForCleanup", message=f"objects of an older job of this name are still there: {names}"
    )
    draft.look_again(seconds=2.0)
    return True


def write_config(draft: Draft) -> bool:
    """Resolve what the spec refers to and fix it in the ConfigMap."""
    if draft.seen.config is not None or (draft.status.attempt and draft.seen.train(draft.status.attempt) is not None):
        return False
    found = _resolve(draft)
    if isinstance(found, Waiting):
        draft.waiting("Pending", reason=found.reason, message=found.message)
        draft.look_again(seconds=UPSTREAM_SECONDS)
        return True
    parents = [
        Parent(kind=KIND_FINETUNEJOB, name=name, uid=parent.metadata.uid)
        for name, parent in sorted(draft.seen.parents.items())
    ]
    resolved = (draft.status.resolved or api.Resolved()).model_copy(
        update={"config": config_name(draft.job.metadata.name), "parents": parents or None}
    )
    draft.set(resolved=resolved)
    draft.waiting("Pending", reason="Preparing", message="the model and the data are about to be prepared")
    draft.do(Create(manifest=render_configmap(draft.job, config=render_config(draft.job, resolved=found))))
    draft.look_again(seconds=0)
    return True


def _resolve(draft: Draft) -> Resolved | Waiting:
    """What the references stand for, or why they stand for nothing yet."""
    job = draft.job
    model: ResolvedModel | None = None
    resume_from: str | None = None
    if reference := job.spec.model.job_ref:
        found = _upstream_output(draft, name=reference.name, output=reference.output)
        if isinstance(found, Waiting):
            return found
        model = found
    resume = job.spec.checkpoint.resume_from if job.spec.checkpoint else None
    if resume is not None and resume.job_ref is not None:
        parent = draft.seen.parents.get(resume.job_ref.name)
        if parent is None:
            return _missing(resume.job_ref.name)
        if parent.status.state not in {"Complete", "Failed", "Suspended"}:
            return _unfinished(parent)
        if parent.status.checkpoint is None:
            return Waiting(reason="UpstreamNotUsable", message=f"{_called(parent)} has no checkpoint to resume from")
        resume_from = parent.status.checkpoint.uri
    processes = processes_per_node(job, cpu_processes=draft.settings.cpu_processes)
    return Resolved(processes_per_node=processes, model=model, resume_from=resume_from)


def _upstream_output(draft: Draft, *, name: str, output: str | None) -> ResolvedModel | Waiting:
    """The folder of another job's output, or why there is none yet."""
    parent = draft.seen.parents.get(name)
    if parent is None:
        return _missing(name)
    if parent.status.state == "Failed":
        message = f"{_called(parent)} has failed; delete it and make it anew, or delete this job"
        return Waiting(reason="UpstreamFailed", message=message)
    if parent.status.state != "Complete":
        return _unfinished(parent)
    written = parent.status.outputs or []
    fitting = [item for item in written if (item.name == output if output else item.type == "HuggingFace")]
    if not fitting:
        wanted = f"output {output!r}" if output else "output of type HuggingFace"
        message = f"{_called(parent)} has no {wanted}; it has {', '.join(item.name for item in written) or 'none'}"
        return Waiting(reason="UpstreamNotUsable", message=message)
    theirs = parent.spec.storage.s3 if parent.spec.storage else None
    ours = draft.job.spec.storage.s3 if draft.job.spec.storage else None
    return ResolvedModel(location=fitting[0].uri, s3=theirs if theirs != ours else None)


def _missing(name: str) -> Waiting:
    return Waiting(reason="UpstreamMissing", message=f"{KIND_FINETUNEJOB} {name} does not exist")


def _unfinished(parent: FineTuneJob) -> Waiting:
    state = (parent.status.state or "Pending").lower()
    return Waiting(reason="WaitingForUpstream", message=f"{_called(parent)} is {state}")


def _called(job: FineTuneJob) -> str:
    return f"{KIND_FINETUNEJOB} {job.metadata.name}"


def prepare(draft: Draft) -> bool:
    """Have the model and the data prepared, and refuse what cannot fit before an accelerator is used."""
    if is_true(draft.status.conditions, "DataReady"):
        return False
    seen = draft.seen
    assert seen.config is not None  # noqa: S101 (write_config ends the pass otherwise)
    job = seen.prepare
    if job is None or is_deleting(job):
        message = seen.refused or "the prepare Job is not started yet"
        reason = "CreateRefused" if seen.refused else "Preparing"
        draft.condition("DataReady", status="False", reason=reason, message=message)
        draft.waiting("Pending", reason=reason, message=message)
        if job is None:
            draft.do(Create(manifest=render_prepare_job(draft.job, config=seen.config, settings=draft.settings)))
        return True
    pods = pods_of(seen.pods, job=job["metadata"]["name"])
    endings = [ending_of(pod) for pod in pods if phase_of(pod) == "Failed"]
    condition = job_condition(job, "Failed")
    if condition or any(ending.permanent for ending in endings):
        return _fail_prepare(draft, endings=endings, message=str((condition or {}).get("message", "")))
    if job_condition(job, "Complete"):
        return _prepared(draft, job=job, pods=pods)
    return _preparing(draft, job=job, pods=pods, endings=endings)


def _fail_prepare(draft: Draft, *, endings: list[Ending], message: str) -> bool:
    """Fail for the pod that cannot be helped, otherwise for the last one."""
    last = max(endings, key=lambda ending: (ending.permanent, ending.failure.time or ""), default=None)
    failure = last.failure if last is not None else LastFailure(reason="PrepareFailed", message=message)
    reason, message = failure.reason or "PrepareFailed", failure.message or message
    draft.condition("DataReady", status="False", reason=reason, message=message)
    return fail(draft, reason=reason, message=message, failure=failure)


def _preparing(draft: Draft, *, job: Json, pods: list[Json], endings: list[Ending]) -> bool:
    """Say how far the prepare Job is, or what holds it up."""
    if any(phase_of(pod) == "Running" for pod in pods):
        reason, message, state = "Preparing", "the model is fetched and the data is tokenized", "Preparing"
    else:
        blocked = _blocked(draft, job=job, pods=pods)
        reason, message = blocked or ("Pending", "the prepare pod is about to start")
        state = "Pending"
    if endings:
        last = max(endings, key=lambda ending: ending.failure.time or "").failure
        draft.set(last_failure=last)
        message += f"; an attempt before failed with {last.reason}: {last.message}"
    draft.condition("DataReady", status="False", reason=reason, message=message)
    draft.waiting("Preparing" if state == "Preparing" else "Pending", reason=reason, message=message)
    return True


def _prepared(draft: Draft, *, job: Json, pods: list[Json]) -> bool:
    """Take over what prepare found out."""
    report = next((report_of(pod) for pod in reversed(pods) if phase_of(pod) == "Succeeded"), {})
    if report.get("result") != "Prepared":
        # The pod is gone or its message was lost. What it made is in the workspace: another run only reports it again.
        draft.do(*_delete_attempt(job))
        return True
    compute = compute_of(draft.job)
    processes = processes_per_node(draft.job, cpu_processes=draft.settings.cpu_processes)
    available = estimates.capacity(
        compute,
        processes_per_node=processes,
        on_cpu=compute.accelerator is None or bool(draft.settings.cpu_processes),
        nodes=draft.seen.nodes,
        memory_per_device_bytes=draft.settings.memory_per_device_bytes,
    )
    said = report.get("estimate") or {}
    estimate = estimates.compare(
        memory_per_device_bytes=said.get("memoryPerDeviceBytes"),
        message=str(said.get("message") or ""),
        available=available,
    )
    draft.set(estimate=estimate, data=_data(draft, report=report), resolved=_resolved(draft, report=report))
    if report.get("totalSteps") is not None:
        draft.set(progress=Progress(step=0, total_steps=report["totalSteps"]))
    if estimate.fits is False:
        hint = "Use more memory per process, or a smaller training.microBatchSize or dataset.maxSequenceLength."
        failure = LastFailure(reason="DoesNotFit", message=estimate.message, hint=hint, time=timestamp(draft.seen.now))
        return fail(draft, reason="DoesNotFit", message=estimate.message or "", failure=failure)
    rows = draft.status.data.rows if draft.status.data else None
    message = f"{rows} rows are ready" if rows is not None else "the data is ready"
    draft.condition("DataReady", status="True", reason="Prepared", message=message)
    draft.waiting("Pending", reason="Prepared", message="training is about to start")
    draft.note("Prepared", message)
    return False


def _data(draft: Draft, *, report: Json) -> DataStatistics | None:
    data = dict(report.get("data") or {})
    percent = data.get("trainableTokenPercent")
    if isinstance(percent, int | float):
        data["trainableTokenPercent"] = f"{percent:.1f}"
    return _taken(draft, DataStatistics, data)


def _taken(draft: Draft, model: type[M], value: Any) -> M | None:
    """Read a part of a termination message; one that another version of the trainer wrote may not fit the status."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        draft.note("ReportNotUnderstood", f"{model.__name__}: {error}", warning=True)
        return None


def _resolved(draft: Draft, *, report: Json) -> api.Resolved:
    model = _taken(draft, api.ResolvedModel, report.get("model") or {})
    sources = [_taken(draft, ResolvedSource, item) for item in report.get("sources") or []]
    return (draft.status.resolved or api.Resolved()).model_copy(
        update={"model": model, "sources": [source for source in sources if source is not None]}
    )


# ------------------------------------------------------------------------------------------------------ training


def train(draft: Draft) -> bool:
    """Run the current attempt, and answer what becomes of its pods."""
    if not draft.status.attempt:
        draft.set(attempt=1)
    attempt = draft.status.attempt or 1
    current = draft.seen.train(attempt)
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
    endings = _new_endings(draft, pods=pods)
    nodes = compute_of(draft.job).nodes
    if endings and nodes > 1 and not _whole_again(pods, endings=endings, nodes=nodes):
        return _restart_gang(draft, current=current, pods=pods, endings=endings)
    _count_endings(draft, endings=endings)
    _remember(draft, pods=pods)
    _follow_max_restarts(draft, current=current)
    return _watch(draft, current=current, pods=pods)


def _waiting_state(draft: Draft) -> State:
    """What a job is while its pods do not run: after it did run, it is restarting."""
    return "Restarting" if draft.status.state in {"Running", "Restarting"} else "Pending"


def _start_attempt(draft: Draft, *, attempt: int) -> bool:
    """Create the Job of an attempt, as soon as nothing of the ones before is left."""
    older = [job for job in draft.seen.jobs if attempt_of(job) and attempt_of(job) < attempt]
    if older:
        draft.do(*(action for job in older for action in _delete_attempt(job)))
        return True
    if draft.status.pods:  # the Job was deleted behind our back, and its pods with it
        endings = [vanished(name=pod.name, uid=pod.uid, index=pod.index) for pod in draft.status.pods if not pod.ended]
        if endings:
            _next_attempt(draft, cause=first_cause(endings))
            return True
        draft.set(pods=None)
    assert draft.seen.config is not None  # noqa: S101 (write_config ends the pass otherwise)
    message = draft.seen.refused or f"attempt {attempt} is about to start"
    draft.waiting(_waiting_state(draft), reason="CreateRefused" if draft.seen.refused else "Starting", message=message)
    if compute_of(draft.job).nodes > 1:
        draft.do(Create(manifest=render_service(draft.job, attempt=attempt)))
    limit = backoff_limit(draft.job, counted=draft.counted)
    manifest = render_train_job(
        draft.job, config=draft.seen.config, attempt=attempt, backoff_limit=limit, settings=draft.settings
    )
    draft.do(Create(manifest=manifest))
    return True


def _new_endings(draft: Draft, *, pods: list[Json]) -> list[Ending]:
    """The ends of pods that no pass has counted yet."""
    known = {pod.uid: pod for pod in draft.status.pods or []}
    counted = {uid for uid, pod in known.items() if pod.ended}
    gang = compute_of(draft.job).nodes > 1
    endings = [ending_of(pod) for pod in pods if pod["metadata"]["uid"] not in counted and _has_ended(pod, gang=gang)]
    present = {pod["metadata"]["uid"] for pod in pods}
    gone = [pod for uid, pod in known.items() if uid not in present and not pod.ended]
    return endings + [vanished(name=pod.name, uid=pod.uid, index=pod.index) for pod in gone]


def _has_ended(pod: Json, *, gang: bool) -> bool:
    """Whether a pod failed. A pod of a gang counts as soon as it is told to go: its peers cannot go on without it."""
    return phase_of(pod) == "Failed" or (gang and is_deleting(pod) and phase_of(pod) != "Succeeded")


def _whole_again(pods: list[Json], *, endings: list[Ending], nodes: int) -> bool:
    """Whether every pod of a gang was replaced since: the Job controller did it while no operator was there."""
    last = max((ending.failure.time or "" for ending in endings), default="")  # RFC 3339 in UTC sorts as text
    replaced = {index_of(pod) for pod in pods if is_live(pod) and pod["metadata"]["creationTimestamp"] >= last}
    return len(replaced) == nodes


def _restart_gang(draft: Draft, *, current: Json, pods: list[Json], endings: list[Ending]) -> bool:
    """Answer the end of a gang's pod: a new attempt for all of them."""
    cause = first_cause(endings)
    ended = parse_time(cause.failure.time)
    if cause.peer_lost and any(is_live(pod) for pod in pods) and ended is not None:
        left = CULPRIT_SECONDS - (draft.seen.now - ended).total_seconds()
        if left > 0:  # the one that failed first has not told yet
            draft.look_again(seconds=left)
            return True
    _next_attempt(draft, cause=cause)
    if draft.status.state != "Failed":
        draft.do(*_delete_attempt(current))
    return True


def _next_attempt(draft: Draft, *, cause: Ending) -> None:
    """Count a restart and go to the next attempt, or fail where no more are allowed."""
    _read_log(draft)
    if not cause.preempted and draft.counted >= lifecycle_of(draft.job).max_restarts:
        fail(draft, reason="MaxRestartsExceeded", message=_failed_again(draft, cause.failure), failure=cause.failure)
        return
    attempt = draft.status.attempt or 1
    failure = cause.failure
    draft.set(
        attempt=attempt + 1,
        restarts=(draft.status.restarts or 0) + 1,
        preemptions=(draft.status.preemptions or 0) + (1 if cause.preempted else 0) or None,
        last_failure=failure,
        pods=None,
    )
    message = f"attempt {attempt} ended: pod {failure.pod}: {failure.reason}: {failure.message}"
    draft.waiting("Restarting", reason="Restarting", message=message)
    draft.note("Restarting", message, warning=True)


def _count_endings(draft: Draft, *, endings: list[Ending]) -> None:
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


def _remember(draft: Draft, *, pods: list[Json]) -> None:
    """Write down the pods of the attempt; forget those that are gone and counted."""
    known = {pod.uid: pod for pod in draft.status.pods or []}
    present = {pod["metadata"]["uid"]: pod for pod in pods}
    kept = [
        known.get(uid) or AttemptPod(name=pod["metadata"]["name"], uid=uid, index=index_of(pod))
        for uid, pod in present.items()
    ]
    if kept != (draft.status.pods or []):
        draft.set(pods=kept)


def _follow_max_restarts(draft: Draft, *, current: Json) -> None:
    """Let the Job controller know when maxRestarts was changed. Its own count begins with the attempt."""
    if compute_of(draft.job).nodes > 1:
        return
    pods = pods_of(draft.seen.pods, job=current["metadata"]["name"])
    seen = sum(1 for pod in pods if phase_of(pod) == "Failed" and not ending_of(pod).preempted)
    failed_here = max(seen, current.get("status", {}).get("failed") or 0)
    limit = backoff_limit(draft.job, counted=max(0, draft.counted - failed_here))
    if current["spec"].get("backoffLimit") != limit:
        draft.do(PatchJob(name=current["metadata"]["name"], spec={"backoffLimit": limit}))


def _watch(draft: Draft, *, current: Json, pods: list[Json]) -> bool:
    """Say what an attempt is doing."""
    nodes = compute_of(draft.job).nodes
    running = [pod for pod in pods if phase_of(pod) in {"Running", "Succeeded"} and not is_deleting(pod)]
    if len({index_of(pod) for pod in running}) < nodes:
        blocked = _blocked(draft, job=current, pods=pods)
        attempt = draft.status.attempt
        reason, message = blocked or ("Starting", f"{len(running)} of {nodes} pods of attempt {attempt} are running")
        draft.waiting("Pending" if blocked else _waiting_state(draft), reason=reason, message=message)
        return True
    if draft.status.state != "Running":
        message = f"attempt {draft.status.attempt} runs on {nodes} node{'s' if nodes > 1 else ''}"
        draft.set(state="Running")
        draft.condition("Running", status="True", reason="Training", message=message)
        draft.note("Running", message)
    _read_log(draft)
    draft.look_again(seconds=draft.seen.poll_seconds)
    return True


def _blocked(draft: Draft, *, job: Json, pods: list[Json]) -> tuple[str, str] | None:
    """What holds the pods of a Job up. Looks again while nothing is known: Events come without waking us."""
    waiting = [pod for pod in pods if phase_of(pod) == "Pending" and not is_deleting(pod)]
    found = pending_reason(waiting, events=draft.seen.events)
    age = (draft.seen.now - created_at(job)).total_seconds()
    stuck = draft.settings.stuck_seconds
    draft.look_again(seconds=max(1.0, stuck - age) if age < stuck else min(60.0, max(stuck, age / 2)))
    return found


def _read_log(draft: Draft) -> None:
    """Take over what the tail of the log says."""
    if not draft.seen.log:
        return
    tail = progresses.read_tail(draft.seen.log)
    now = draft.seen.now
    draft.set(
        progress=progresses.update_progress(draft.status.progress, tail=tail, now=now),
        checkpoint=progresses.update_checkpoint(draft.status.checkpoint, tail=tail, now=now),
    )
    if tail.phase and is_true(draft.status.conditions, "Running"):
        running = find_condition(draft.status.conditions, "Running")
        draft.condition("Running", status="True", reason=tail.phase, message=running.message if running else "")
    checkpoint = draft.status.checkpoint
    if checkpoint is not None:
        message = f"step {checkpoint.step}: {checkpoint.uri}"
        draft.condition("Checkpointed", status="True", reason="CheckpointComplete", message=message)


Step = Callable[[Draft], bool]

STEPS: Final[tuple[Step, ...]] = (
    stay_finished,
    accept,
    finish_training,
    stop_at_deadline,
    suspend,
    wait_for_strangers,
    write_config,
    prepare,
    train,
)
"""The steps of a pass, in order. A step that returns True ends it."""
