"""QuantizeJob: make a model smaller, in formats that engines load, and say what it costs."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from kubetune_operator.api.common import DnsLabel, ModelSource, Number
from kubetune_operator.api.dataset import JUDGED, Samples
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
from kubetune_operator.api.model import ApiModel, Rule, StatusModel, Unique
from kubetune_operator.api.outputs import OUTPUT_RULES, PROGRAM_LENGTH, FinishedOutput, OutputBase

# -------------------------------------------------------------------------------------------------------- spec


CALIBRATED: Final = ("CompressedTensors",)
"""Types of outputs whose weights can be rounded by data."""


class QuantizedOutput(OutputBase):
    """One form that the model is written in."""

    rules = OUTPUT_RULES

    type: Literal["CompressedTensors", "TorchAO", "GGUF", "ExecuTorch"]
    """Its format. CompressedTensors for vLLM and transformers, TorchAO for PyTorch, GGUF for llama.cpp,
    ExecuTorch for devices."""


class Calibration(ApiModel):
    """Data by which weights are rounded with less harm."""

    dataset: Samples
    """Where the rows come from."""
    samples: Annotated[int, Field(ge=1, le=100_000)] = 128
    """Rows that are used, the first ones."""
    method: Literal["GPTQ", "None"] = "GPTQ"
    """How. GPTQ rounds column by column and passes the error on; None rounds to the nearest value, as without
    calibration. It is used for outputs of type CompressedTensors."""


class Verification(ApiModel):
    """Data on which each output is compared with the model that it was made from."""

    dataset: Samples
    """Where the rows come from."""
    samples: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Rows that are used, the first ones."""


class QuantizeGate(ApiModel):
    """What an output must hold."""

    name: DnsLabel
    """Name of the gate, unique among the gates."""
    output: DnsLabel | None = None
    """The output that is judged. Unset: each of them."""
    max_perplexity_increase_percent: Number
    """How much higher, in percent, its perplexity may be than that of the model that it was made from."""


def _programs_take_the_rows(spec: Any) -> bool:
    return spec.verify is None or all(
        spec.verify.dataset.max_sequence_length
        <= (output.execu_torch.max_sequence_length if output.execu_torch else PROGRAM_LENGTH)
        for output in spec.outputs
        if output.type == "ExecuTorch"
    )


def _has_no_pairs(spec: Any, *, block: str) -> bool:
    rows = getattr(spec, block)
    return rows is None or not {source.format for source in rows.dataset.sources} & {*JUDGED}


def _gates_name_outputs(spec: Any) -> bool:
    names = {output.name for output in spec.outputs}
    return all(gate.output is None or gate.output in names for gate in spec.gates or [])


class QuantizeJobSpec(JobSpec):
    """What to quantize, how and where. Only suspend and lifecycle may change after creation."""

    rules = (
        Rule(
            cel=(
                "!has(self.compute) || (self.compute.nodes == 1 && "
                "(!has(self.compute.accelerator) || self.compute.accelerator.perNode == 1))"
            ),
            message="spec.compute must have one node and at most one device: a QuantizeJob is one process",
            check=lambda spec: spec.ranks == 1,
        ),
        Rule(
            cel="!has(self.gates) || has(self.verify)",
            message="spec.gates needs spec.verify",
            check=lambda spec: spec.gates is None or spec.verify is not None,
        ),
        Rule(
            cel="!has(self.gates) || self.gates.all(g, !has(g.output) || self.outputs.exists(o, o.name == g.output))",
            message="the output of each of spec.gates must be one of spec.outputs",
            check=_gates_name_outputs,
        ),
        Rule(
            cel=(
                "!has(self.verify) || self.outputs.all(o, o.type != 'ExecuTorch' || "
                "self.verify.dataset.maxSequenceLength <= "
                f"(has(o.execuTorch) ? o.execuTorch.maxSequenceLength : {PROGRAM_LENGTH}))"
            ),
            message=(
                "spec.verify.dataset.maxSequenceLength must be at most execuTorch.maxSequenceLength "
                f"({PROGRAM_LENGTH} if unset) of each of spec.outputs of type ExecuTorch"
            ),
            check=_programs_take_the_rows,
        ),
        *(
            Rule(
                cel=f"!has(self.{block}) || self.{block}.dataset.sources.all(s, !(s.format in {list(JUDGED)}))",
                message=f"spec.{block}.dataset.sources must not have format {' or '.join(JUDGED)}",
                check=partial(_has_no_pairs, block=block),
            )
            for block in ("calibration", "verify")
        ),
        *frozen("outputs", optional=("calibration", "verify", "gates")),
    )

    model: ModelSource
    """The model to quantize."""
    outputs: Annotated[list[QuantizedOutput], Field(min_length=1, max_length=16), Unique(("name",))]
    """The forms that it is written in."""
    calibration: Calibration | None = None
    """Data by which weights are rounded with less harm. Unset: they are rounded to the nearest value."""
    verify: Verification | None = None
    """Data on which outputs are compared with the model. Unset: they are loaded, and not compared."""
    gates: Annotated[list[QuantizeGate], Field(max_length=16), Unique(("name",))] | None = None
    """What the outputs must hold. A job whose gate fails is complete; jobs that need it to pass do not begin."""


def ignored_calibration(spec: QuantizeJobSpec) -> list[str]:
    """Say for each output whose type takes no calibration that it gets none, though the job has one."""
    if spec.calibration is None or spec.calibration.method == "None":
        return []
    rule = f"spec.calibration is used for type {' or '.join(CALIBRATED)} only"
    return [
        f"spec.outputs[{number}] ({output.name}): {rule}, got {output.type}: its weights go to the nearest value"
        for number, output in enumerate(spec.outputs)
        if output.type not in CALIBRATED
    ]


# ------------------------------------------------------------------------------------------------------ status


class QuantizeProgress(WorkProgress):
    """How many tensors are done, over all outputs, as of the last report."""

    phase: Annotated[str, Field(max_length=32)] | None = None
    """What the job is at."""


class Divergence(StatusModel):
    """How far the answers of an output are from those of the model that it was made from."""

    mean_kl: Figure | None = None
    """Mean Kullback-Leibler divergence of the next token's distribution, in nats."""
    top_token_agreement_percent: Figure | None = None
    """Part of the positions at which both find the same token most likely."""
    max_logit_difference: Figure | None = None
    """Largest difference between two logits."""


class PeakMemory(StatusModel):
    """The most memory that each part of the work had in use at once: of the device, or of the process on a CPU."""

    calibration_bytes: Count | None = None
    """While the model looked at the data of spec.calibration. Unset: it did not."""
    conversion_bytes: Count | None = None
    """While the output was written."""
    verification_bytes: Count | None = None
    """While it was compared on the data of spec.verify. Unset: it was not."""


class MeasuredOutput(FinishedOutput):
    """One form of the model that is written, loaded again and compared."""

    scheme: Annotated[str, Field(max_length=63)] | None = None
    """How it is quantized."""
    source_bytes: Count | None = None
    """Size of the model that it was made from."""
    perplexity: Figure | None = None
    """Its perplexity on the data of spec.verify."""
    source_perplexity: Figure | None = None
    """That of the model that it was made from."""
    divergence: Divergence | None = None
    """How far its answers are from those of that model."""
    peak_memory: PeakMemory | None = None
    """Memory that it took to make and to measure. Unset: the node does not say."""


class QuantizeGateResult(GateResult):
    """What became of one gate on one output."""

    output: Annotated[str, Field(max_length=63)]
    """The output that was judged."""


class QuantizeJobStatus(JobStatus):
    """What the operator saw. Users read it; only the operator writes it."""

    progress: QuantizeProgress | None = None
    """How far the job is."""
    outputs: Annotated[list[MeasuredOutput], Field(max_length=16), Unique(("name",))] | None = None
    """Outputs that are written."""
    gates: Annotated[list[QuantizeGateResult], Field(max_length=256), Unique(("name", "output"))] | None = None
    """What became of the gates."""


class QuantizeJob(Job):
    """Writes a language model in smaller forms, and measures what they cost."""

    rules = root_rules("QuantizeJob")

    kind: Literal["QuantizeJob"]
    """Kind of the object."""
    spec: QuantizeJobSpec
    """What to quantize, how and where."""
    status: QuantizeJobStatus = Field(default_factory=QuantizeJobStatus)
    """What the operator saw."""


def parse_quantizejob(manifest: Mapping[str, Any]) -> QuantizeJob:
    """Check a manifest as the API server would and return it with defaults filled in.

    Raises:
        SpecError: The manifest breaks rules; all of them are named.
    """
    return parse_as(QuantizeJob, manifest)
