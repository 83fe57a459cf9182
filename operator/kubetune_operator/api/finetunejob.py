"""FineTuneJob: adapt a language model to data.

The models are the API. `kubetune_operator.api.crd` writes the CRD and its reference from them: the docstring under a
field is its description. `parse_finetunejob` gives the API server's verdict on a manifest without one.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, computed_field

from kubetune_operator.api.common import (
    NAME_RULE,
    S3,
    ApiVersion,
    Compute,
    Condition,
    ConfigMapKeyRef,
    DnsLabel,
    Fraction,
    Lifecycle,
    Metadata,
    ModelSource,
    Number,
    PositiveNumber,
    Probability,
    Queue,
    RunRef,
    SecretKeyRef,
    Storage,
    Time,
    Uri,
    Workspace,
    matches,
)
from kubetune_operator.api.model import ApiModel, Rule, StatusModel, Unique, exactly_one_of
from kubetune_operator.api.problems import problems_of
from kubetune_operator.errors import SpecError

Steps = Annotated[int, Field(ge=1, le=1_000_000_000)]
Count = Annotated[int, Field(ge=0)]
ColumnName = Annotated[str, Field(min_length=1, max_length=128)]
Text = Annotated[str, Field(max_length=1024)]
Digest = Annotated[str, Field(max_length=128)]

# ---------------------------------------------------------------------------------------------------- dataset


class HubDataset(ApiModel):
    """A dataset on the Hugging Face Hub."""

    repo: Annotated[
        str,
        Field(min_length=1, max_length=193),
        matches(
            r"([-_.a-zA-Z0-9]+/)?[-_.a-zA-Z0-9]+",
            message="must be a repository of the Hub, for example tatsu-lab/alpaca",
        ),
    ]
    """Repository, for example tatsu-lab/alpaca."""
    config: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Configuration (subset) of the dataset. Unset: its default."""
    split: Annotated[str, Field(min_length=1, max_length=128)] = "train"
    """Split, or part of one as in train[:95%]."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] = "main"
    """Branch, tag or commit. It is resolved to a commit once, when the job starts."""
    token_secret: SecretKeyRef | None = None
    """Access token for private or gated datasets. Unset: anonymous."""


class UriDataset(ApiModel):
    """Data files (json, jsonl or parquet) in storage."""

    location: Uri
    """A file, or a folder of files: s3://bucket/path, pvc://claim/path or, for local runs, file:///path."""
    s3: S3 | None = None
    """Access to this location where it differs from spec.storage.s3."""


class Columns(ApiModel):
    """Which column of the data holds which field of its format, where the names differ."""

    instruction: ColumnName | None = None
    """Column of an Alpaca sample's instruction."""
    input: ColumnName | None = None
    """Column of an Alpaca sample's input."""
    output: ColumnName | None = None
    """Column of an Alpaca sample's output."""
    system: ColumnName | None = None
    """Column of the system message."""
    messages: ColumnName | None = None
    """Column of the list of messages."""
    prompt: ColumnName | None = None
    """Column of the prompt."""
    completion: ColumnName | None = None
    """Column of the completion."""
    text: ColumnName | None = None
    """Column of the running text."""


class Source(ApiModel):
    """One source of samples: exactly one of hub, uri, configMap."""

    rules = (exactly_one_of("hub", "uri", "configMap"),)

    name: DnsLabel
    """Name of the source, unique among the sources."""
    hub: HubDataset | None = None
    """A dataset on the Hugging Face Hub."""
    uri: UriDataset | None = None
    """Data files in storage."""
    config_map: ConfigMapKeyRef | None = None
    """A jsonl file in a ConfigMap, for small data."""
    format: Literal["Auto", "Alpaca", "Messages", "PromptCompletion", "Text"] = "Auto"
    """What a record looks like. Auto: told from its columns."""
    columns: Columns | None = None
    """Names of the columns where they differ from the format's own."""
    weight: PositiveNumber = "1.0"
    """How often the source appears per epoch: 2.0 is twice, 0.5 is half of it."""


Sources = Annotated[list[Source], Field(min_length=1, max_length=32), Unique(("name",))]


class Validation(ApiModel):
    """Data for the validation loss: exactly one of fraction, sources."""

    rules = (exactly_one_of("fraction", "sources"),)

    fraction: Fraction | None = None
    """Part of the samples that is held out of training, for example "0.05"."""
    sources: Sources | None = None
    """Sources of their own."""


class Dataset(ApiModel):
    """The data to train on and how it becomes rows of tokens."""

    sources: Sources
    """Where the samples come from."""
    validation: Validation | None = None
    """Data for the validation loss. Unset: none is computed."""
    chat_template: Annotated[str, Field(min_length=1, max_length=65_536)] | None = None
    """Chat template (Jinja). Unset: the model's own."""
    max_sequence_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Most tokens in a row."""
    overlong: Literal["Truncate", "Split", "Drop", "Fail"] = "Truncate"
    """What happens to a sample that is longer than that."""
    packing: Literal["BestFit", "None"] = "BestFit"
    """BestFit fills each row with several samples that do not see each other; None keeps one sample in a row."""
    train_on: Literal["Assistant", "LastAssistant", "All"] = "Assistant"
    """Which part of a conversation the loss counts."""


# --------------------------------------------------------------------------------------------------- training


class Lora(ApiModel):
    """Low-rank adapters."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of each adapter."""
    alpha: Annotated[int, Field(ge=1, le=65_536)] = 32
    """The adapters' output is scaled by alpha / rank."""
    dropout: Probability = "0.0"
    """Dropout before each adapter."""
    target_modules: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=1, max_length=64), Unique()
    ] = ["all-linear"]  # noqa: RUF012 (pydantic copies it)
    """Modules that get an adapter, by the end of their name, for example q_proj.
    all-linear: every linear layer but the output head."""


class Training(ApiModel):
    """How the weights are trained: exactly one of epochs, maxSteps says for how long."""

    rules = (exactly_one_of("epochs", "maxSteps"),)

    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Passes over the data."""
    max_steps: Steps | None = None
    """Optimizer steps."""
    global_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    """Rows per optimizer step, over all processes. A row is a pack when packing, otherwise a sample.
    Must be divisible by processes x microBatchSize."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Rows that one process computes at a time; the rest of its share is accumulated."""
    optimizer: Literal["AdamW"] = "AdamW"
    """The optimizer."""
    learning_rate: PositiveNumber = "2e-4"
    """Highest learning rate, after the warm-up."""
    scheduler: Literal["Cosine", "Linear", "Constant"] = "Cosine"
    """How the learning rate falls after the warm-up; Cosine and Linear end at 0."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: Number = "0.0"
    """Decoupled weight decay."""
    max_grad_norm: PositiveNumber = "1.0"
    """Gradients are scaled down to this norm."""
    precision: Literal["BF16Mixed", "BF16", "FP32"] = "BF16Mixed"
    """BF16Mixed: trained weights and optimizer in fp32, computation in bf16. BF16: all in bf16. FP32: all in fp32."""
    activation_checkpointing: Literal["None", "Full"] = "None"
    """Full computes activations again in the backward pass, which saves memory and costs time."""
    seed: Annotated[int, Field(ge=0, le=4_294_967_295)] = 42
    """Seed of the order of samples, the validation split, dropout and new weights."""
    validate_every_steps: Steps | None = None
    """Steps between validations. Unset: only at the end."""


class ResumeFrom(ApiModel):
    """Where training continues from: exactly one of uri, jobRef."""

    rules = (exactly_one_of("uri", "jobRef"),)

    uri: Uri | None = None
    """A checkpoint (…/step-N), or a folder of checkpoints, of which the last complete one is taken."""
    job_ref: RunRef | None = None
    """The last complete checkpoint of another job, once that one has finished."""


class Checkpoint(ApiModel):
    """When checkpoints are written and how many are kept. One is always written when the job is told to stop."""

    every_steps: Steps | None = None
    """Steps between checkpoints.
    Unset together with everySeconds: only when the job is told to stop, and at the end."""
    every_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """Seconds between checkpoints."""
    keep: Annotated[int, Field(ge=1, le=1000)] = 3
    """Checkpoints that are kept; older ones are deleted."""
    mode: Literal["Async", "Sync"] = "Async"
    """Async uploads while training goes on."""
    resume_from: ResumeFrom | None = None
    """A checkpoint of another run to begin with."""


class Output(ApiModel):
    """One result of the job."""

    rules = (
        Rule(
            cel="!has(self.dtype) || self.type == 'HuggingFace'",
            message="dtype is allowed only with type: HuggingFace",
            check=lambda value: value.dtype is None or value.type == "HuggingFace",
        ),
    )

    name: DnsLabel
    """Name of the output, unique among the outputs."""
    type: Literal["HuggingFace", "PEFT"]
    """HuggingFace: a complete model, adapters merged. PEFT: the adapters alone."""
    uri: Uri | None = None
    """Folder to write to. Unset: the run's folder in the workspace."""
    dtype: Literal["Source", "BF16", "FP32"] | None = None
    """Type of a HuggingFace output's weights. Unset or Source: that of the model which was trained."""


# ------------------------------------------------------------------------------------------------ spec and rules

FROZEN = (
    "model", "dataset", "recipe", "tuning", "lora", "training", "compute", "storage", "workspace", "checkpoint",
    "outputs", "queue",
)  # fmt: skip
OPTIONAL = {"lora", "compute", "storage", "checkpoint", "queue"}


def _frozen(name: str) -> Rule:
    """The rule that a field keeps its value.

    It stands on the parent: a transition rule on the field itself passes over a field that appears or vanishes.
    """
    same = f"self.{name} == oldSelf.{name}"
    if name in OPTIONAL:
        same = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || {same})"
    return Rule(cel=same, message=f"spec.{name} is immutable; make a new job to change it")


_GRACE = "(has({0}.lifecycle) ? {0}.lifecycle.gracePeriodSeconds : 120)"
_FROZEN_GRACE = Rule(
    cel=f"{_GRACE.format('self')} == {_GRACE.format('oldSelf')}",
    message="spec.lifecycle.gracePeriodSeconds is immutable; make a new job to change it",
)


class FineTuneJobSpec(ApiModel):
    """What to train, on what, how and where. Only suspend and lifecycle may change after creation."""

    rules = (
        Rule(
            cel="self.tuning == 'LoRA' || !has(self.lora)",
            message="spec.lora is allowed only with tuning: LoRA",
            check=lambda value: value.tuning == "LoRA" or value.lora is None,
        ),
        Rule(
            cel="self.tuning == 'LoRA' || !self.outputs.exists(o, o.type == 'PEFT')",
            message="an output of type PEFT is allowed only with tuning: LoRA",
            check=lambda value: value.tuning == "LoRA" or all(output.type != "PEFT" for output in value.outputs),
        ),
        Rule(
            cel="!has(self.training.validateEverySteps) || has(self.dataset.validation)",
            message="spec.training.validateEverySteps needs spec.dataset.validation",
            check=lambda value: value.training.validate_every_steps is None or value.dataset.validation is not None,
        ),
        *(_frozen(name) for name in FROZEN),
        _FROZEN_GRACE,
    )

    suspend: bool = False
    """Stop the job, with a checkpoint, and free its nodes until this is false again. May be changed at any time."""
    model: ModelSource
    """The model to train."""
    dataset: Dataset
    """The data to train on."""
    recipe: Literal["SFT"] = "SFT"
    """What the loss is. SFT: supervised fine-tuning."""
    tuning: Literal["LoRA", "Full"] = "LoRA"
    """LoRA trains adapters beside frozen weights; Full trains all weights."""
    lora: Lora | None = None
    """Settings of LoRA. Unset: their defaults. Refused with tuning: Full."""
    training: Training
    """How the weights are trained."""
    compute: Compute | None = None
    """Where and with what the job runs. Unset: one process on the CPU of one node."""
    storage: Storage | None = None
    """Access to object storage."""
    workspace: Workspace
    """The durable place of the run."""
    checkpoint: Checkpoint | None = None
    """When checkpoints are written. Unset: only when the job is told to stop, and at the end."""
    outputs: Annotated[list[Output], Field(min_length=1, max_length=8), Unique(("name",))]
    """The results of the job."""
    lifecycle: Lifecycle | None = None
    """How long the job may live and how often it may start again. Unset: the defaults of its fields."""
    queue: Queue | None = None
    """Where the job waits for quota, on a cluster with Kueue. Unset: it starts as soon as its pods find nodes."""

    @property
    def ranks(self) -> int:
        """Number of processes that train together."""
        return self.compute.ranks if self.compute else 1


# ------------------------------------------------------------------------------------------------------ status


class Progress(StatusModel):
    """How far training is, as of the last step that was reported."""

    step: Count = 0
    """Optimizer steps done."""
    total_steps: Count | None = None
    """Optimizer steps of the whole job."""
    epoch: Annotated[str, Field(max_length=32)] | None = None
    """Passes over the data done, for example 1.13."""
    loss: Annotated[str, Field(max_length=32)] | None = None
    """Mean loss per trained token of the last step."""
    validation_loss: Annotated[str, Field(max_length=32)] | None = None
    """Mean loss per trained token of the last validation."""
    learning_rate: Annotated[str, Field(max_length=32)] | None = None
    """Learning rate of the last step."""
    tokens_per_second: Annotated[str, Field(max_length=32)] | None = None
    """Tokens trained per second, over all processes."""
    peak_memory_bytes: Count | None = None
    """Most memory that one device used."""
    eta_seconds: Count | None = None
    """Seconds until training is done at this speed."""
    updated_at: Time | None = None
    """When the operator last read the progress."""

    @computed_field(json_schema_extra={"maxLength": 32})  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def steps(self) -> str:
        """Step and totalSteps in one, as kubectl prints them."""
        return f"{self.step}/{self.total_steps}" if self.total_steps is not None else str(self.step)

    @computed_field(json_schema_extra={"maxLength": 32})  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def eta(self) -> str | None:
        """EtaSeconds as kubectl prints it."""
        return None if self.eta_seconds is None else duration(self.eta_seconds)


class LastCheckpoint(StatusModel):
    """The last complete checkpoint."""

    step: Count
    """Optimizer steps that it holds."""
    uri: Annotated[str, Field(max_length=2048)]
    """Where it is."""
    time: Time
    """When it was complete."""


class Estimate(StatusModel):
    """What training is expected to need, computed before any accelerator is used."""

    memory_per_device_bytes: Count | None = None
    """Memory that each process needs."""
    fits: bool | None = None
    """Whether that is less than a device, or the container's memory limit, has. Unset: not known."""
    message: Text | None = None
    """What the estimate is made of."""


class DataStatistics(StatusModel):
    """What the data turned out to be."""

    samples: Count | None = None
    """Samples read."""
    rows: Count | None = None
    """Rows of tokens made of them."""
    tokens: Count | None = None
    """Tokens in these rows."""
    trainable_token_percent: Annotated[str, Field(max_length=16)] | None = None
    """Part of the tokens that the loss counts."""
    dropped_samples: Count | None = None
    """Samples that were left out."""
    truncated_samples: Count | None = None
    """Samples that were cut at maxSequenceLength."""


class ResolvedModel(StatusModel):
    """The exact model that all attempts train."""

    location: Annotated[str, Field(max_length=2048)] | None = None
    """Where it is read from."""
    commit: Digest | None = None
    """Commit on the Hub."""
    etag: Digest | None = None
    """Digest of its files in storage."""


class ResolvedSource(StatusModel):
    """The exact data that all attempts train on."""

    name: Annotated[str, Field(max_length=63)]
    """Name of the source."""
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


class Resolved(StatusModel):
    """What names in the spec stood for when the job began. Fixed once, the same for every attempt."""

    model: ResolvedModel | None = None
    """The model."""
    sources: Annotated[list[ResolvedSource], Field(max_length=64), Unique(("name",))] | None = None
    """The data."""
    config: Annotated[str, Field(max_length=253)] | None = None
    """Name of the immutable ConfigMap with the trainer's configuration."""
    parents: (
        Annotated[
            list[Parent],
            Field(max_length=8),
            Unique(
                (
                    "kind",
                    "name",
                )
            ),
        ]
        | None
    ) = None
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


class FineTuneJobStatus(StatusModel):
    """What the operator saw. Users read it; only the operator writes it."""

    conditions: Annotated[list[Condition], Field(max_length=16), Unique(("type",))] = Field(default_factory=list)
    """Accepted, DataReady, Admitted, Running, Checkpointed, Complete, Failed, Suspended."""
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
    progress: Progress | None = None
    """How far training is."""
    checkpoint: LastCheckpoint | None = None
    """The last complete checkpoint."""
    estimate: Estimate | None = None
    """What training is expected to need."""
    data: DataStatistics | None = None
    """What the data turned out to be."""
    resolved: Resolved | None = None
    """What names in the spec stood for."""
    last_failure: LastFailure | None = None
    """Why the last attempt that failed did so."""
    outputs: Annotated[list[FinishedOutput], Field(max_length=8), Unique(("name",))] | None = None
    """Results that are written."""


class FineTuneJob(ApiModel):
    """Adapts a language model to data on the cluster's accelerators."""

    rules = (
        NAME_RULE,
        Rule(
            cel="!has(self.spec.model.jobRef) || self.spec.model.jobRef.name != self.metadata.name",
            message="spec.model.jobRef must name another job",
            check=lambda job: job.spec.model.job_ref is None or job.spec.model.job_ref.name != job.metadata.name,
        ),
    )

    api_version: ApiVersion
    """Group and version of the API."""
    kind: Literal["FineTuneJob"]
    """Kind of the object."""
    metadata: Metadata
    """Name, namespace and what else Kubernetes keeps of every object."""
    spec: FineTuneJobSpec
    """What to train, on what, how and where."""
    status: FineTuneJobStatus = Field(default_factory=FineTuneJobStatus)
    """What the operator saw."""


def parse_finetunejob(manifest: Mapping[str, Any]) -> FineTuneJob:
    """Check a manifest as the API server would and return it with defaults filled in.

    Raises:
        SpecError: The manifest breaks rules; all of them are named.
    """
    try:
        return FineTuneJob.model_validate(dict(manifest), by_alias=True, by_name=False)
    except ValidationError as error:
        raise SpecError(_called(manifest), problems=problems_of(error)) from error


def batch_problem(spec: FineTuneJobSpec, *, ranks: int) -> str | None:
    """Why the global batch cannot be shared out evenly among this many processes; None if it can.

    The answer names the nearest sizes that can.
    """
    training = spec.training
    unit = ranks * training.micro_batch_size
    size = training.global_batch_size
    if size % unit == 0:
        return None
    below, above = size // unit * unit, (size // unit + 1) * unit
    nearest = f"{below} or {above}" if below else str(above)
    return (
        f"spec.training.globalBatchSize: Invalid value: {size}: must be divisible by {unit} "
        f"({ranks} processes x microBatchSize {training.micro_batch_size}); nearest: {nearest}"
    )


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


def _called(manifest: Mapping[str, Any]) -> str:
    """The object as a person says it, as far as the manifest names it."""
    metadata = manifest.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    name, namespace = metadata.get("name") or "without a name", metadata.get("namespace")
    return f"{manifest.get('kind', 'object')} {f'{namespace}/' if namespace else ''}{name}"
