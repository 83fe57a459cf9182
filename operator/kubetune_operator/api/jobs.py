"""What every kind of job has: the shared part of spec and status, and rules on both.

The models are the API. `kubetune_operator.api.crd` writes the CRDs and their reference from them: the docstring under a
field is its description. `kubetune_operator.api.kinds.parse_job` gives the API server's verdict without one.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, computed_field

from kubetune_operator.api.common import (
    NAME_RULE,
    ApiVersion,
    Compute,
    Condition,
    DnsLabel,
    Lifecycle,
    Metadata,
    ModelSource,
    Queue,
    Storage,
    Time,
    Workspace,
)
from kubetune_operator.api.model import ApiModel, Rule, StatusModel, Unique
from kubetune_operator.api.problems import problems_of
from kubetune_operator.errors import SpecError

Count = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(max_length=1024)]
Digest = Annotated[str, Field(max_length=128)]


def figure(value: Any) -> Any:
    """A number as it stands in a status, where floats have no place; what is none stays as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return f"{value:.6g}" if math.isfinite(value) else str(value)


Figure = Annotated[str, Field(max_length=32), BeforeValidator(figure)]
"""A number of the trainer's, as text."""


# -------------------------------------------------------------------------------------------------------- spec


class Prerequisite(ApiModel):
    """Another job of the same namespace that this one waits for, without using its result."""

    rules = (
        Rule(
            cel="self.condition != 'GatePassed' || self.kind != 'FineTuneJob'",
            message="condition: GatePassed is allowed only with kind: EvalJob or QuantizeJob, which have gates",
            check=lambda value: value.condition != "GatePassed" or value.kind != "FineTuneJob",
        ),
    )

    kind: Literal["FineTuneJob", "EvalJob", "QuantizeJob"]
    """Kind of the other job."""
    name: DnsLabel
    """Name of the other job."""
    condition: Literal["Complete", "GatePassed"] = "Complete"
    """Complete: it is done, whatever its gates say. GatePassed: it is done and all its gates passed."""


class JobSpec(ApiModel):
    """The part of a spec that every kind has."""

    suspend: bool = False
    """Stop the job and free its nodes until this is false again; it then goes on from where it was.
    May be changed at any time."""
    model: ModelSource
    """The model that the job uses."""
    compute: Compute | None = None
    """Where and with what the job runs. Unset: one process on the CPU of one node."""
    storage: Storage | None = None
    """Access to object storage."""
    workspace: Workspace
    """The durable place of the run."""
    lifecycle: Lifecycle | None = None
    """How long the job may live and how often it may start again. Unset: the defaults of its fields."""
    after: Annotated[list[Prerequisite], Field(max_length=16), Unique(("kind", "name"))] | None = None
    """Other jobs that this one waits for before it begins."""
    queue: Queue | None = None
    """Where the job waits for quota, on a cluster with Kueue. Unset: it starts as soon as its pods find nodes."""

    @property
    def ranks(self) -> int:
        """Number of processes that work together."""
        return self.compute.ranks if self.compute else 1


_GRACE = "(has({0}.lifecycle) ? {0}.lifecycle.gracePeriodSeconds : 120)"


def frozen(*required: str, optional: tuple[str, ...] = ()) -> tuple[Rule, ...]:
    """The rules that the fields of a spec keep their values, those of `JobSpec` and these.

    They stand on the parent: a transition rule on the field itself passes over a field that appears or vanishes.
    """
    grace = Rule(
        cel=f"{_GRACE.format('self')} == {_GRACE.format('oldSelf')}",
        message="spec.lifecycle.gracePeriodSeconds is immutable; make a new job to change it",
    )
    always = [_frozen(name, same=f"self.{name} == oldSelf.{name}") for name in ("model", "workspace", *required)]
    sometimes = [
        _frozen(
            name,
            same=f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})",
        )
        for name in ("compute", "storage", "after", "queue", *optional)
    ]
    return (*always, *sometimes, grace)


def _frozen(name: str, *, same: str) -> Rule:
    return Rule(cel=same, message=f"spec.{name} is immutable; make a new job to change it")


# ------------------------------------------------------------------------------------------------------ status


class WorkProgress(StatusModel):
    """How far the work is, as of the last report."""

    done: Count = 0
    """Units of work that are done."""
    total: Count | None = None
    """Units of work in all."""
    eta_seconds: Count | None = None
    """Seconds until all is done at this speed."""
    updated_at: Time | None = None
    """When the operator last read the progress."""

    @computed_field(json_schema_extra={"maxLength": 32})  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def of_total(self) -> str:
        """Done and total in one, as kubectl prints them."""
        return f"{self.done}/{self.total}" if self.total is not None else str(self.done)

    @computed_field(json_schema_extra={"maxLength": 32})  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def eta(self) -> str | None:
        """EtaSeconds as kubectl prints it."""
        return None if self.eta_seconds is None else duration(self.eta_seconds)


class Estimate(StatusModel):
    """What the job is expected to need, computed before any accelerator is used."""

    memory_per_device_bytes: Count | None = None
    """Memory that each process needs."""
    fits: bool | None = None
    """Whether that is less than a device, or the container's memory limit, has. Unset: not known."""
    message: Text | None = None
    """What the estimate is made of."""


class ResolvedModel(StatusModel):
    """The exact model that all attempts use."""

    location: Annotated[str, Field(max_length=2048)] | None = None
    """Where it is read from."""
    commit: Digest | None = None
    """Commit on the Hub."""
    etag: Digest | None = None
    """Digest of its files in storage."""
    adapter: Annotated[str, Field(max_length=2048)] | None = None
    """Folder of the adapters that are merged into it. Unset: none."""


class ResolvedOtherModel(ResolvedModel):
    """The exact model that all attempts use beside the one that is worked on."""

    field: Annotated[str, Field(max_length=63)]
    """Its field in the spec, for example dpo.reference."""


class ResolvedSource(StatusModel):
    """The exact data that all attempts use."""

    name: Annotated[str, Field(max_length=253)]
    """Name of the source, or the repository of a task's dataset."""
    commit: Digest | None = None
    """Commit on the Hub."""
    etag: Digest | None = None
    """ETag in storage."""
    digest: Digest | None = None
    """Digest of its content."""


class Parent(StatusModel):
    """Another job whose result this one uses."""

    kind: Annotated[str, Field(max_length=63)]
    """Kind of the other job."""
    name: Annotated[str, Field(max_length=253)]
    """Name of the other job."""
    uid: Annotated[str, Field(max_length=64)]
    """Identity of the other job."""
    output: Annotated[str, Field(max_length=63)] | None = None
    """Which of its outputs is used. Unset: none, but its results or checkpoints."""
    digest: Digest | None = None
    """Digest of that output."""


class Resolved(StatusModel):
    """What names in the spec stood for when the job began. Fixed once, the same for every attempt."""

    model: ResolvedModel | None = None
    """The model."""
    other_models: Annotated[list[ResolvedOtherModel], Field(max_length=8), Unique(("field",))] | None = None
    """Models that are used beside it."""
    sources: Annotated[list[ResolvedSource], Field(max_length=64), Unique(("name",))] | None = None
    """The data."""
    config: Annotated[str, Field(max_length=253)] | None = None
    """Name of the immutable ConfigMap with the trainer's configuration."""
    parents: Annotated[list[Parent], Field(max_length=64), Unique(("kind", "name"))] | None = None
    """Jobs whose results are used."""


class LastFailure(StatusModel):
    """Why the last attempt that failed did so."""

    pod: Annotated[str, Field(max_length=253)] | None = None
    """Pod that failed first."""
    index: Count | None = None
    """Its index among the nodes."""
    node: Annotated[str, Field(max_length=253)] | None = None
    """Node of the cluster that it ran on."""
    exit_code: Annotated[int, Field(ge=-1, le=255)] | None = None
    """Exit code of the trainer."""
    reason: Annotated[str, Field(max_length=128)] | None = None
    """One word for programs."""
    message: Annotated[str, Field(max_length=4096)] | None = None
    """What happened: the object, the field, the rule, the value."""
    hint: Text | None = None
    """What to do about it."""
    log_tail: Annotated[str, Field(max_length=8192)] | None = None
    """The last lines that it wrote."""
    time: Time | None = None
    """When it ended."""


class FinishedOutput(StatusModel):
    """One result that is written."""

    name: Annotated[str, Field(max_length=63)]
    """Name of the output."""
    type: Annotated[str, Field(max_length=63)]
    """Its type."""
    uri: Annotated[str, Field(max_length=2048)]
    """Folder that holds it."""
    digest: Digest | None = None
    """Digest of its files."""
    bytes: Count | None = None
    """Size of its files."""


class AttemptPod(StatusModel):
    """A pod of the current attempt, as far as the operator has answered what became of it."""

    name: Annotated[str, Field(max_length=253)]
    """Name of the pod."""
    uid: Annotated[str, Field(max_length=64)]
    """Identity of the pod."""
    index: Count = 0
    """Its index among the nodes."""
    ended: bool = False
    """Whether its end is counted in restarts already."""


State = Literal["Pending", "Queued", "Preparing", "Running", "Restarting", "Suspended", "Complete", "Failed"]


class GateResult(StatusModel):
    """What became of one gate, in the words of every kind that has gates."""

    name: Annotated[str, Field(max_length=63)]
    """Name of the gate."""
    rule: Annotated[str, Field(max_length=256)]
    """What was asked for, for example atLeast 0.40 or maxPerplexityIncreasePercent 2.0."""
    value: Figure | None = None
    """The value that was judged. Unset: there is none, and the gate has failed."""
    passed: bool
    """Whether it holds."""
    message: Text | None = None
    """The verdict in a sentence."""


class JobStatus(StatusModel):
    """What the operator saw. Users read it; only the operator writes it."""

    conditions: Annotated[list[Condition], Field(max_length=16), Unique(("type",))] = Field(default_factory=list)
    """Accepted, DataReady, Admitted, Running, Checkpointed, GatePassed, Complete, Failed, Suspended."""
    observed_generation: Count | None = None
    """Generation of the spec that this status answers."""
    state: State | None = None
    """The conditions in one word, for people and for kubectl's columns."""
    start_time: Time | None = None
    """When the job began."""
    completion_time: Time | None = None
    """When it was complete or had failed."""
    attempt: Count | None = None
    """Number of the current attempt, from 1."""
    restarts: Count | None = None
    """How often the job started again."""
    preemptions: Count | None = None
    """How many of the restarts were preemptions, which maxRestarts does not count."""
    pods: Annotated[list[AttemptPod], Field(max_length=512), Unique(("uid",))] | None = None
    """Pods of the current attempt, so that each failure is answered once."""
    image: Annotated[str, Field(max_length=512)] | None = None
    """Image that they run, with its hash, as the kubelet of the first says it."""
    estimate: Estimate | None = None
    """What the job is expected to need."""
    resolved: Resolved | None = None
    """What names in the spec stood for."""
    last_failure: LastFailure | None = None
    """Why the last attempt that failed did so."""


# --------------------------------------------------------------------------------------------------------- job


class Job(ApiModel):
    """A job of any kind."""

    api_version: ApiVersion
    """Group and version of the API."""
    kind: str
    """Kind of the object."""
    metadata: Metadata
    """Name, namespace and what else Kubernetes keeps of every object."""
    spec: JobSpec
    """What to do, on what, how and where."""
    status: JobStatus = Field(default_factory=JobStatus)
    """What the operator saw."""

    @property
    def title(self) -> str:
        """The job as messages to the jobs beside it name it."""
        return f"{self.kind} {self.metadata.name}"


J = TypeVar("J", bound=Job)


def root_rules(kind: str) -> tuple[Rule, ...]:
    """The rules on the root of a kind, the only place where CEL may read the name."""

    def names_another(job: Any) -> bool:
        reference = job.spec.model.job_ref
        return reference is None or (reference.kind, reference.name) != (kind, job.metadata.name)

    def waits_for_others(job: Any) -> bool:
        return all((item.kind, item.name) != (kind, job.metadata.name) for item in job.spec.after or [])

    reference = "self.spec.model.jobRef"
    return (
        NAME_RULE,
        Rule(
            cel=f"!has({reference}) || {reference}.kind != '{kind}' || {reference}.name != self.metadata.name",
            message="spec.model.jobRef must name another job",
            check=names_another,
        ),
        Rule(
            cel=f"!has(self.spec.after) || self.spec.after.all(a, a.kind != '{kind}' || a.name != self.metadata.name)",
            message="spec.after must name other jobs",
            check=waits_for_others,
        ),
    )


def parse_as(model: type[J], manifest: Mapping[str, Any], *, is_stored: bool = False) -> J:
    """Check a manifest of one kind as the API server would and return it with defaults filled in.

    Args:
        model: The kind's.
        manifest: The object.
        is_stored: Whether unknown fields are passed over.

    Raises:
        SpecError: The manifest breaks rules; all of them are named.
    """
    try:
        extra: Literal["ignore"] | None = "ignore" if is_stored else None
        return model.model_validate(dict(manifest), by_alias=True, by_name=False, extra=extra)
    except ValidationError as error:
        raise SpecError(called(manifest), problems=problems_of(error)) from error


def called(manifest: Mapping[str, Any]) -> str:
    """The object as a person says it, as far as the manifest names it."""
    metadata = manifest.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    name, namespace = metadata.get("name") or "without a name", metadata.get("namespace")
    return f"{manifest.get('kind', 'object')} {f'{namespace}/' if namespace else ''}{name}"


def duration(seconds: int) -> str:
    """Seconds as people write them: 41s, 6m52s, 3h07m, 2d04h."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02}h"
    if hours:
        return f"{hours}h{minute:02}m"
    return f"{minutes}m{second:02}s" if minutes else f"{second}s"
