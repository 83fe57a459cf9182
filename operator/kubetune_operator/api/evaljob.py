"""EvalJob: measure a language model on tasks."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from kubetune_operator.api.common import (
    ConfigMapVolume,
    DnsLabel,
    ModelSource,
    Number,
    SignedNumber,
    UriModel,
    matches,
)
from kubetune_operator.api.jobs import (
    Count,
    Figure,
    GateResult,
    Job,
    JobSpec,
    JobStatus,
    WorkProgress,
    frozen,
    parse_as,
    root_rules,
)
from kubetune_operator.api.model import ApiModel, Rule, StatusModel, Unique, exactly_one_of

_NAME = matches(
    r"[-_.@:/+a-zA-Z0-9]+", message="must consist of letters, digits, and '-', '_', '.', '@', ':', '/', '+'"
)
TaskName = Annotated[str, Field(min_length=1, max_length=128), _NAME]
"""A task, a metric or a filter, as lm_eval names them."""

# -------------------------------------------------------------------------------------------------------- spec


class Task(ApiModel):
    """One task that the model is measured on."""

    name: TaskName
    """Name of a task or of a group of tasks, of lm_eval or of taskFiles; for example hellaswag."""
    num_fewshot: Annotated[int, Field(ge=0, le=64)] | None = None
    """Solved examples before each question. Unset: as many as the task says."""
    limit: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Only this many samples, the first ones. Unset: all."""


class TaskFiles(ApiModel):
    """A folder with tasks of one's own (lm_eval's YAML, with json or jsonl): exactly one of configMap, uri."""

    rules = (exactly_one_of("configMap", "uri"),)

    name: DnsLabel
    """Name of the folder, unique among taskFiles."""
    config_map: ConfigMapVolume | None = None
    """A ConfigMap, each key of which is a file."""
    uri: UriModel | None = None
    """A folder in storage."""


class Comparison(ApiModel):
    """A gate against another EvalJob: exactly one of maxDrop, maxIncrease."""

    rules = (exactly_one_of("maxDrop", "maxIncrease"),)

    name: DnsLabel
    """The other EvalJob, of the same namespace. This job waits until that one is complete.
    It must have run the same task with the same samples and settings."""
    max_drop: Number | None = None
    """How far the value may be below the other's, for metrics that should be high."""
    max_increase: Number | None = None
    """How far the value may be above the other's, for metrics that should be low."""


class EvalGate(ApiModel):
    """What a result must hold: exactly one of atLeast, atMost, comparedTo."""

    rules = (exactly_one_of("atLeast", "atMost", "comparedTo"),)

    name: DnsLabel
    """Name of the gate, unique among the gates."""
    task: TaskName
    """Task whose result is judged."""
    metric: TaskName
    """Metric of it, for example acc."""
    filter: TaskName = "none"
    """Filter of the metric, where the task has several."""
    at_least: SignedNumber | None = None
    """Smallest value that passes."""
    at_most: SignedNumber | None = None
    """Largest value that passes."""
    compared_to: Comparison | None = None
    """Another EvalJob whose value is the measure."""


class EvalJobSpec(JobSpec):
    """What to measure, on what, how and where. Only suspend and lifecycle may change after creation."""

    rules = frozen(
        "tasks", "batchSize", "applyChatTemplate", "seed",
        optional=("taskFiles", "maxSequenceLength", "systemInstruction", "gates"),
    )  # fmt: skip

    model: ModelSource
    """The model to measure; quantized ones too."""
    tasks: Annotated[list[Task], Field(min_length=1, max_length=64), Unique(("name",))]
    """What the model is measured on."""
    task_files: Annotated[list[TaskFiles], Field(max_length=16), Unique(("name",))] | None = None
    """Folders with tasks of one's own, which tasks may name beside those of lm_eval."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Requests that one process computes at a time."""
    max_sequence_length: Annotated[int, Field(ge=16, le=1_048_576)] | None = None
    """Most tokens of a request; longer ones lose their beginning. Unset: what the model allows."""
    apply_chat_template: bool = False
    """Whether questions are asked as messages in the model's chat template."""
    system_instruction: Annotated[str, Field(min_length=1, max_length=16_384)] | None = None
    """System message before each question. Unset: none."""
    seed: Annotated[int, Field(ge=0, le=4_294_967_295)] = 1234
    """Seed of the choice of examples, and of sampling where a task samples."""
    gates: Annotated[list[EvalGate], Field(max_length=32), Unique(("name",))] | None = None
    """What the results must hold. A job whose gate fails is complete; jobs that need it to pass do not begin."""


# ------------------------------------------------------------------------------------------------------ status


class EvalProgress(WorkProgress):
    """How many requests to the model are answered, as of the last report."""

    tokens_per_second: Figure | None = None
    """Tokens computed per second, over all processes."""


class EvalResult(StatusModel):
    """One metric of one task."""

    task: Annotated[str, Field(max_length=128)]
    """The task."""
    metric: Annotated[str, Field(max_length=128)]
    """The metric."""
    filter: Annotated[str, Field(max_length=128)]
    """The filter of the metric; none where the task has none."""
    value: Figure
    """Its value."""
    stderr: Figure | None = None
    """Standard error of the value. Unset: the metric has none."""
    samples: Count | None = None
    """Samples that it was computed on."""


class EvalGateResult(GateResult):
    """What became of one gate."""

    task: Annotated[str, Field(max_length=128)]
    """The task."""
    metric: Annotated[str, Field(max_length=128)]
    """The metric."""
    filter: Annotated[str, Field(max_length=128)]
    """The filter of the metric."""
    difference: Figure | None = None
    """Value minus the other job's, paired per sample."""
    stderr: Figure | None = None
    """Standard error of the difference."""


class Artifacts(StatusModel):
    """Files that the job wrote."""

    results: Annotated[str, Field(max_length=2048)] | None = None
    """All results, as lm_eval writes them."""
    samples: Annotated[str, Field(max_length=2048)] | None = None
    """Folder with a log of every sample."""


class EvalJobStatus(JobStatus):
    """What the operator saw. Users read it; only the operator writes it."""

    progress: EvalProgress | None = None
    """How far the evaluation is."""
    results: Annotated[list[EvalResult], Field(max_length=1024), Unique(("task", "metric", "filter"))] | None = None
    """What was measured."""
    gates: Annotated[list[EvalGateResult], Field(max_length=32), Unique(("name",))] | None = None
    """What became of the gates."""
    artifacts: Artifacts | None = None
    """Files that the job wrote."""


class EvalJob(Job):
    """Measures a language model on tasks of lm_eval or of one's own."""

    rules = (
        *root_rules("EvalJob"),
        Rule(
            cel=(
                "!has(self.spec.gates) || "
                "self.spec.gates.all(g, !has(g.comparedTo) || g.comparedTo.name != self.metadata.name)"
            ),
            message="spec.gates.comparedTo must name another job",
            check=lambda job: all(
                gate.compared_to is None or gate.compared_to.name != job.metadata.name for gate in job.spec.gates or []
            ),
        ),
    )

    kind: Literal["EvalJob"]
    """Kind of the object."""
    spec: EvalJobSpec
    """What to measure, on what, how and where."""
    status: EvalJobStatus = Field(default_factory=EvalJobStatus)
    """What the operator saw."""


def parse_evaljob(manifest: Mapping[str, Any]) -> EvalJob:
    """Check a manifest as the API server would and return it with defaults filled in.

    Raises:
        SpecError: The manifest breaks rules; all of them are named.
    """
    return parse_as(EvalJob, manifest)
