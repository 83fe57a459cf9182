"""FineTuneJob: adapt a language model to data."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Final, Literal

from pydantic import Field, computed_field

from kubetune_operator.api.common import (
    ATOMIC,
    ConfigMapKeyRef,
    DnsLabel,
    Lifecycle,
    ModelSource,
    Number,
    PositiveNumber,
    Probability,
    RunRef,
    SecretKeyRef,
    Time,
    Uri,
    matches,
)
from kubetune_operator.api.dataset import JUDGED, Dataset, Source
from kubetune_operator.api.jobs import (
    Count,
    Digest,
    Job,
    JobSpec,
    JobStatus,
    duration,
    frozen,
    parse_as,
    root_rules,
)
from kubetune_operator.api.model import ApiModel, Rule, StatusModel, Unique, exactly_one_of
from kubetune_operator.api.outputs import GROUP_SIZE, OUTPUT_RULES, FinishedOutput, OutputBase
from kubetune_operator.api.tracking import Tracking

Steps = Annotated[int, Field(ge=1, le=1_000_000_000)]

# -------------------------------------------------------------------------------------------------------- spec


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
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA), so that higher ranks do not learn more slowly."""
    learning_rate_ratio: PositiveNumber = "1.0"
    """What training.learningRate is multiplied with for the second matrix of each adapter, B (LoRA+)."""
    merge_base: Literal["Quantized", "Original"] | None = None
    """What complete outputs of tuning: QLoRA merge the adapters into. Quantized: the weights in NF4, as training saw
    them. Original: the weights of the model's files. Unset: Quantized. Refused with other tunings."""
    adapter: ModelSource | None = None
    """Adapters to begin with, in a folder of peft: they are trained on, while model.jobRef to an output of type PEFT
    merges them. All settings but dropout and learningRateRatio must be theirs. Unset: new ones."""
    train_tokens: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=1, max_length=256), Unique()
        ]
        | None
    ) = None
    """Tokens whose rows of the embedding are trained beside the adapters, and those of an output head that is not the
    embedding. Tokens that the model does not have are added to its tokenizer, each read as one wherever it stands.
    Unset: the embedding is frozen."""


class Dpo(ApiModel):
    """Direct preference optimization."""

    rules = (
        Rule(
            cel="self.loss == 'Sigmoid' || double(self.labelSmoothing) == 0.0",
            message="labelSmoothing must be 0 with loss: IPO or Hinge",
            check=lambda value: value.loss == "Sigmoid" or float(value.label_smoothing) == 0,
        ),
    )

    loss: Literal["Sigmoid", "IPO", "Hinge"] = "Sigmoid"
    """Form of the loss."""
    beta: PositiveNumber = "0.1"
    """How much it costs to leave the reference."""
    label_smoothing: Annotated[
        str,
        Field(max_length=24),
        matches(r"0(\.[0-4][0-9]*)?", message='must be a number in quotes, from 0 to below 0.5, for example "0.1"'),
    ] = "0.0"
    """How often a pair is taken to be the wrong way round. Above 0 only with loss: Sigmoid."""
    reference: ModelSource | None = None
    """The model that answers are measured against. Its tokenizer must be the model's. Unset: the model before
    training, with lora.adapter where that is set."""


class Orpo(ApiModel):
    """Odds ratio preference optimization: cross entropy of the chosen conversation and an odds ratio, no reference."""

    beta: PositiveNumber = "0.1"
    """Weight of the odds ratio."""


class Qat(ApiModel):
    """Quantization-aware training: the loss is that of SFT, and layers compute with weights as they will be.

    With adapters the weights that are rounded are those with the adapters merged into them.
    """

    scheme: Literal["Int8DynamicActivationInt4Weight", "Int4WeightOnly"]
    """How the outputs will be quantized: the first for ExecuTorch, the second for CompressedTensors."""
    group_size: Annotated[
        int,
        Field(ge=1, le=1024),
        Rule(cel="self in [32, 64, 128]", message="must be 32, 64 or 128", check=lambda value: value in {32, 64, 128}),
    ] = 32
    """Weights of a row that share a scale."""


class Simpo(ApiModel):
    """Simple preference optimization: log-probabilities per token and a margin, no reference."""

    beta: PositiveNumber = "2.0"
    """Scale of the rewards."""
    gamma: Number = "1.0"
    """By how much the reward of the better answer has to be greater."""


class Parallelism(ApiModel):
    """How the processes share the model beside FSDP, which shards it over all that are left."""

    replicate: Annotated[int, Field(ge=1, le=4096)] = 1
    """Copies of the model, each sharded over its part of the processes. With the number of nodes, weights travel within
    a node alone."""
    tensor: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes over which the layers of a block are split (tensor parallelism); they see the same rows. Not above
    accelerator.perNode, since they talk to each other in every layer."""


class Distillation(ApiModel):
    """Knowledge distillation: at each trained token, the next-token distribution is drawn to that of a teacher."""

    teacher: ModelSource
    """The model to learn from. It is frozen, and its tokenizer must be the model's."""
    divergence: Literal["Forward", "Reverse", "Symmetric"] = "Forward"
    """How far the distributions are apart. Forward: KL(teacher || student). Reverse: KL(student || teacher).
    Symmetric: the mean of both."""
    temperature: PositiveNumber = "1.0"
    """What the logits of both are divided by for the divergence, which is then scaled by its square."""
    weight: Annotated[
        str,
        Field(max_length=24),
        matches(
            r"0\.[0-9]*[1-9][0-9]*|1(\.0+)?",
            message='must be a number in quotes, above 0 and at most 1, for example "0.5"',
        ),
    ] = "0.5"
    """Part of the divergence in the loss. The rest is the cross entropy of the data."""


class Script(ApiModel):
    """A recipe of one's own, in Python: exactly one of configMap, path."""

    rules = (
        exactly_one_of("configMap", "path"),
        Rule(
            cel="!has(self.configMap) || self.configMap.key.endsWith('.py')",
            message="configMap.key must end in .py",
            check=lambda value: value.config_map is None or value.config_map.key.endswith(".py"),
        ),
    )

    config_map: ConfigMapKeyRef | None = None
    """A key of a ConfigMap, which is mounted into the pods."""
    path: (
        Annotated[
            str,
            Field(max_length=1024),
            matches(r"/([^/]+/)*[^/]+\.py", message="must be an absolute path that ends in .py"),
        ]
        | None
    ) = None
    """A file of the trainer's image, or of a volume that compute mounts."""


class Custom(ApiModel):
    """A script that trains in place of a recipe that comes with kubetune, on the same data, model and checkpoints."""

    script: Script
    """Where the script is."""
    args: (
        Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=64, json_schema_extra=ATOMIC)] | None
    ) = None
    """What the script is given after --config FILE."""


class Profile(ApiModel):
    """Steps to look into. What is found lies under profile/ in the run's folder of the workspace."""

    start_step: Steps = 3
    """The first of these steps. Those before it are slower than others."""
    num_steps: Annotated[int, Field(ge=1, le=20)] = 2
    """How many."""
    memory: bool = False
    """Record allocations as well: on NVIDIA GPUs as a snapshot of the device's memory, otherwise in the trace."""


class Kto(ApiModel):
    """Kahneman-Tversky optimization: answers that are good or bad, each by itself, and no pairs."""

    beta: PositiveNumber = "0.1"
    """How much it costs to leave the reference."""
    desirable_weight: PositiveNumber = "1.0"
    """What the losses of good answers are multiplied with."""
    undesirable_weight: PositiveNumber = "1.0"
    """What the losses of bad answers are multiplied with."""
    reference: ModelSource | None = None
    """The model that answers are measured against. Its tokenizer must be the model's. Unset: the model before
    training, with lora.adapter where that is set."""


class EarlyStopping(ApiModel):
    """When training ends before its last step."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Validations in a row that may be no better than the best before them."""
    min_delta: Number = "0.0"
    """By how much a validation loss must be below the lowest before it to be better."""


class Training(ApiModel):
    """How the weights are trained: exactly one of epochs, maxSteps says for how long."""

    rules = (
        exactly_one_of("epochs", "maxSteps"),
        Rule(
            cel="!self.optimizerInBackward || !has(self.maxGradNorm)",
            message="maxGradNorm is not allowed with optimizerInBackward, which cannot clip",
            check=lambda value: not value.optimizer_in_backward or value.max_grad_norm is None,
        ),
        Rule(
            cel="!has(self.earlyStopping) || has(self.validateEverySteps)",
            message="earlyStopping needs validateEverySteps",
            check=lambda value: value.early_stopping is None or value.validate_every_steps is not None,
        ),
        Rule(
            cel="!self.stochasticRounding || self.precision == 'BF16'",
            message="stochasticRounding needs precision: BF16",
            check=lambda value: not value.stochastic_rounding or value.precision == "BF16",
        ),
        Rule(
            cel="!self.activationOffload || self.compile == 'None'",
            message="compile must be None with activationOffload",
            check=lambda value: not value.activation_offload or value.compile == "None",
        ),
        Rule(
            cel=(
                "!has(self.parallelism) || self.parallelism.tensor == 1 || (self.compile == 'None' "
                "&& self.optimizer == 'AdamW' && !self.optimizerInBackward && !self.stochasticRounding "
                "&& !self.activationOffload && !self.cpuOffload)"
            ),
            message=(
                "parallelism.tensor must be 1 with compile, optimizerInBackward, stochasticRounding, "
                "activationOffload, cpuOffload and optimizers other than AdamW"
            ),
            check=lambda value: (
                value.parallelism is None
                or value.parallelism.tensor == 1
                or (
                    (value.compile, value.optimizer) == ("None", "AdamW")
                    and not (value.optimizer_in_backward or value.stochastic_rounding)
                    and not (value.activation_offload or value.cpu_offload)
                )
            ),
        ),
    )

    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Passes over the data."""
    max_steps: Steps | None = None
    """Optimizer steps."""
    global_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    """Rows per optimizer step, over all processes. A row is a pack when packing, otherwise a sample.
    Must be divisible by processes x microBatchSize."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Rows that one process computes at a time; the rest of its share is accumulated."""
    optimizer: Literal["AdamW", "AdamW8bit", "AdamW4bit"] = "AdamW"
    """The optimizer. AdamW8bit and AdamW4bit keep its state in 8 and 4 bits, a quarter and an eighth of the memory."""
    optimizer_in_backward: bool = False
    """Take each weight's step as soon as its gradient is there, and free the gradient. Nothing is accumulated or
    clipped: globalBatchSize has to be processes x microBatchSize, and maxGradNorm unset."""
    learning_rate: PositiveNumber = "2e-4"
    """Highest learning rate, after the warm-up."""
    scheduler: Literal["Cosine", "Linear", "Constant"] = "Cosine"
    """How the learning rate falls after the warm-up; Cosine and Linear fall towards 0."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: Number = "0.0"
    """Decoupled weight decay."""
    max_grad_norm: PositiveNumber | None = None
    """Gradients are scaled down to this norm. Unset: 1.0; with optimizerInBackward they stay as they are."""
    precision: Literal["BF16Mixed", "BF16", "FP32"] = "BF16Mixed"
    """BF16Mixed: trained weights and optimizer in fp32, computation in bf16. BF16: all in bf16. FP32: all in fp32."""
    stochastic_rounding: bool = False
    """Round trained weights up or down by chance, so that small steps are not lost; needs precision: BF16."""
    activation_checkpointing: Literal["None", "Selective", "Full"] = "None"
    """Full computes activations again in the backward pass, which saves memory and costs time. Selective keeps those
    that cost most time to compute, of matrix products and attention: less memory than None, faster than Full."""
    activation_offload: bool = False
    """Keep activations in the host's memory until the backward pass needs them; they travel while the device computes.
    Needs an accelerator."""
    cpu_offload: bool = False
    """Keep weights, gradients and the optimizer's state in the host's memory, and compute its steps there: a device has
    the weights of few layers at a time. Slow. Needs an accelerator, and no tuning: QLoRA."""
    compile: Literal["None", "Blocks"] = "None"
    """Blocks compiles each layer of the model, which takes a minute at the start and saves time in every step.
    The trainer's image needs a compiler."""
    parallelism: Parallelism | None = None
    """How the processes share the model. Unset: FSDP shards it over all of them."""
    seed: Annotated[int, Field(ge=0, le=4_294_967_295)] = 42
    """Seed of the order of samples, of which samples a fractional weight takes, of dropout, new weights and stochastic
    rounding."""
    validate_every_steps: Steps | None = None
    """Steps between validations. Unset: only at the end."""
    early_stopping: EarlyStopping | None = None
    """End training once validations find the loss no lower, and make the outputs of the weights with the lowest; needs
    validateEverySteps. Unset: all steps are done, and the outputs have the weights of the last."""
    profile: Profile | None = None
    """Steps of which a trace is written. Unset: none."""


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
    """A checkpoint of another run to begin with. Its steps count: training goes on at the step after it, which has to
    be one of the job's."""


class Output(OutputBase):
    """One result of the job."""

    rules = (
        *OUTPUT_RULES,
        Rule(
            cel="!has(self.dtype) || self.type == 'HuggingFace'",
            message="dtype is allowed only with type: HuggingFace",
            check=lambda value: value.dtype is None or value.type == "HuggingFace",
        ),
    )

    type: Literal["HuggingFace", "PEFT", "GGUF", "ExecuTorch", "CompressedTensors"]
    """HuggingFace: a complete model, adapters merged. PEFT: the adapters alone. The others are complete models too, in
    the format of another program: GGUF for llama.cpp, ExecuTorch for devices, CompressedTensors for vLLM."""
    dtype: Literal["Source", "BF16", "FP32"] | None = None
    """Type of a HuggingFace output's weights. Unset or Source: that of the model which was trained."""


BLOCKS: Final = {
    "DPO": "dpo",
    "ORPO": "orpo",
    "SimPO": "simpo",
    "KTO": "kto",
    "Distillation": "distillation",
    "QAT": "qat",
}
"""The block that goes with a recipe."""
OTHER_MODELS: Final = (("dpo", "reference"), ("kto", "reference"), ("lora", "adapter"), ("distillation", "teacher"))
"""Blocks and their fields that name a model which is used beside the one that is trained."""

_EXAMPLES: Final = (
    "(self.recipe in ['SFT', 'Distillation', 'QAT'] || (self.recipe == 'Custom' && "
    "self.dataset.sources.all(s, !(s.format in ['Preference', 'UnpairedPreference']))))"
)


_FORMATS: Final = (
    "must have format Preference with recipe: DPO, ORPO or SimPO, this or UnpairedPreference with KTO, neither with "
    "SFT, QAT or Distillation, and all or none of them with Custom"
)


def _formats_rule(sources: str) -> str:
    return (
        f"{_EXAMPLES} ? {sources}.all(s, !(s.format in ['Preference', 'UnpairedPreference'])) : "
        f"{sources}.all(s, s.format in ['Auto', 'Preference'] || "
        "(s.format == 'UnpairedPreference' && (self.recipe == 'KTO' || (self.recipe == 'Custom' && "
        "self.dataset.sources.exists(t, t.format == 'UnpairedPreference')))))"
    )


def learns_from_examples(spec: "FineTuneJobSpec") -> bool:
    """Whether rows are examples, not judged answers; for a script of one's own, the format of its data says it."""
    if spec.recipe == "Custom":
        return all(source.format not in JUDGED for source in spec.dataset.sources)
    return spec.recipe in {"SFT", "Distillation", "QAT"}


def _rounds_as_trained(spec: "FineTuneJobSpec") -> bool:
    """Whether what is quantized is quantized as it was trained for."""
    return spec.qat is None or all(
        output.scheme is None
        or (output.scheme == spec.qat.scheme and (output.group_size or GROUP_SIZE) == spec.qat.group_size)
        for output in spec.outputs
    )


def _formats_fit(spec: "FineTuneJobSpec", sources: Sequence[Source]) -> bool:
    formats = {source.format for source in sources}
    if learns_from_examples(spec):
        return not formats & {*JUDGED}
    has_unpaired = any(source.format == "UnpairedPreference" for source in spec.dataset.sources)
    takes_unpaired = spec.recipe == "KTO" or (spec.recipe == "Custom" and has_unpaired)
    return formats <= {"Auto", *(JUDGED if takes_unpaired else JUDGED[:1])}


class PushToHub(ApiModel):
    """An output that also becomes a commit of a repository of the Hugging Face Hub, after all outputs are stored."""

    repo: Annotated[
        str,
        Field(min_length=1, max_length=193),
        matches(r"[-_.a-zA-Z0-9]+/[-_.a-zA-Z0-9]+", message="must be owner and name, for example my-team/support-bot"),
    ]
    """Repository, for example my-team/support-bot. It is made if it is not there."""
    output: DnsLabel
    """Name of the output."""
    private: bool = True
    """Whether the repository is private, if it is made."""
    token_secret: SecretKeyRef | None = None
    """Token that may write to the repository. Unset: HF_TOKEN of the environment."""


class TrainingLifecycle(Lifecycle):
    """How long a job may live, how often it may start again, and how long it may stand still."""

    hang_timeout_seconds: Annotated[int, Field(ge=10, le=604_800)] = 600
    """A process that is in training for this long without finishing a micro batch hangs: its stacks go to the log, and
    the job starts again from its last checkpoint. The first step of an attempt has an hour at least, and no micro batch
    has less than three times what the longest before it took."""


def _has_its_recipe(value: Any, *, recipe: str, block: str) -> bool:
    return value.recipe in {recipe, "Custom"} or getattr(value, block) is None


_HANG_TIMEOUT = "(has({0}.lifecycle) ? {0}.lifecycle.hangTimeoutSeconds : 600)"
_SAME_HANG_TIMEOUT = Rule(
    cel=f"{_HANG_TIMEOUT.format('self')} == {_HANG_TIMEOUT.format('oldSelf')}",
    message="spec.lifecycle.hangTimeoutSeconds is immutable; make a new job to change it",
)


class FineTuneJobSpec(JobSpec):
    """What to train, on what, how and where. Only suspend and lifecycle may change after creation."""

    rules = (
        Rule(
            cel="self.tuning != 'Full' || !has(self.lora)",
            message="spec.lora is not allowed with tuning: Full",
            check=lambda value: value.tuning != "Full" or value.lora is None,
        ),
        Rule(
            cel="self.tuning != 'Full' || !self.outputs.exists(o, o.type == 'PEFT')",
            message="an output of type PEFT is not allowed with tuning: Full",
            check=lambda value: value.tuning != "Full" or all(output.type != "PEFT" for output in value.outputs),
        ),
        Rule(
            cel="!has(self.pushToHub) || self.outputs.exists(o, o.name == self.pushToHub.output)",
            message="spec.pushToHub.output must be the name of one of spec.outputs",
            check=lambda value: (
                value.push_to_hub is None or value.push_to_hub.output in {output.name for output in value.outputs}
            ),
        ),
        Rule(
            cel="self.tuning == 'QLoRA' || !has(self.lora) || !has(self.lora.mergeBase)",
            message="spec.lora.mergeBase is allowed only with tuning: QLoRA",
            check=lambda value: value.tuning == "QLoRA" or value.lora is None or value.lora.merge_base is None,
        ),
        Rule(
            cel="self.tuning != 'QLoRA' || self.training.compile == 'None'",
            message="spec.training.compile must be None with tuning: QLoRA",
            check=lambda value: value.tuning != "QLoRA" or value.training.compile == "None",
        ),
        Rule(
            cel="self.tuning != 'QLoRA' || !self.training.cpuOffload",
            message="spec.training.cpuOffload must be false with tuning: QLoRA",
            check=lambda value: value.tuning != "QLoRA" or not value.training.cpu_offload,
        ),
        Rule(
            cel="!self.training.cpuOffload || (has(self.compute) && has(self.compute.accelerator))",
            message=(
                "spec.training.cpuOffload must be false without spec.compute.accelerator: "
                "on a CPU weights are in the host's memory anyway"
            ),
            check=lambda value: (
                not value.training.cpu_offload or (value.compute is not None and value.compute.accelerator is not None)
            ),
        ),
        Rule(
            cel="!self.training.activationOffload || (has(self.compute) && has(self.compute.accelerator))",
            message=(
                "spec.training.activationOffload must be false without spec.compute.accelerator: "
                "on a CPU activations are in the host's memory anyway"
            ),
            check=lambda value: (
                not value.training.activation_offload
                or (value.compute is not None and value.compute.accelerator is not None)
            ),
        ),
        Rule(
            cel="!has(self.training.validateEverySteps) || has(self.dataset.validation)",
            message="spec.training.validateEverySteps needs spec.dataset.validation",
            check=lambda value: value.training.validate_every_steps is None or value.dataset.validation is not None,
        ),
        Rule(
            cel=(
                "!has(self.training.parallelism) || self.training.parallelism.tensor == 1 || "
                "(self.tuning in ['LoRA', 'Full'] && (!has(self.lora) || double(self.lora.dropout) == 0.0))"
            ),
            message=(
                "spec.training.parallelism.tensor must be 1 with tuning: DoRA or QLoRA and with a spec.lora.dropout"
            ),
            check=lambda value: (
                value.training.parallelism is None
                or value.training.parallelism.tensor == 1
                or (value.tuning in {"LoRA", "Full"} and (value.lora is None or float(value.lora.dropout) == 0))
            ),
        ),
        *(
            Rule(
                cel=f"self.recipe in ['{recipe}', 'Custom'] || !has(self.{block})",
                message=f"spec.{block} is allowed only with recipe: {recipe} or Custom",
                check=partial(_has_its_recipe, recipe=recipe, block=block),
            )
            for recipe, block in BLOCKS.items()
        ),
        Rule(
            cel="self.recipe != 'Distillation' || has(self.distillation)",
            message="spec.distillation is required with recipe: Distillation",
            check=lambda value: value.recipe != "Distillation" or value.distillation is not None,
        ),
        Rule(
            cel="self.recipe != 'QAT' || has(self.qat)",
            message="spec.qat is required with recipe: QAT",
            check=lambda value: value.recipe != "QAT" or value.qat is not None,
        ),
        Rule(
            cel="(self.recipe != 'KTO' && !has(self.kto)) || self.training.globalBatchSize > 1",
            message="spec.training.globalBatchSize must be at least 2 with recipe: KTO and with spec.kto",
            check=lambda value: (value.recipe != "KTO" and value.kto is None) or value.training.global_batch_size > 1,
        ),
        Rule(
            cel="!has(self.qat) || self.training.compile == 'None'",
            message="spec.training.compile must be None with spec.qat",
            check=lambda value: value.qat is None or value.training.compile == "None",
        ),
        Rule(
            cel="!has(self.qat) || self.tuning in ['Full', 'LoRA']",
            message="spec.tuning must be Full or LoRA with spec.qat",
            check=lambda value: value.qat is None or value.tuning in {"Full", "LoRA"},
        ),
        Rule(
            cel="!has(self.qat) || !has(self.lora) || double(self.lora.dropout) == 0.0",
            message="spec.lora.dropout must be 0 with spec.qat: what is rounded is the merged weight",
            check=lambda value: value.qat is None or value.lora is None or float(value.lora.dropout) == 0,
        ),
        Rule(
            cel="!has(self.qat) || !has(self.training.parallelism) || self.training.parallelism.tensor == 1",
            message="spec.training.parallelism.tensor must be 1 with spec.qat",
            check=lambda value: (
                value.qat is None or value.training.parallelism is None or value.training.parallelism.tensor == 1
            ),
        ),
        Rule(
            cel=(
                "!has(self.qat) || self.outputs.all(o, !has(o.scheme) || (o.scheme == self.qat.scheme && "
                f"(has(o.groupSize) ? o.groupSize : {GROUP_SIZE}) == self.qat.groupSize))"
            ),
            message="spec.outputs that have a scheme must have that of spec.qat, and its groupSize",
            check=_rounds_as_trained,
        ),
        Rule(
            cel="(self.recipe == 'Custom') == has(self.custom)",
            message="spec.custom is required with recipe: Custom, and allowed only with it",
            check=lambda value: (value.recipe == "Custom") == (value.custom is not None),
        ),
        Rule(
            cel=_formats_rule("self.dataset.sources"),
            message=f"spec.dataset.sources {_FORMATS}",
            check=lambda value: _formats_fit(value, value.dataset.sources),
        ),
        Rule(
            cel=(
                "!has(self.dataset.validation) || !has(self.dataset.validation.sources) || "
                f"({_formats_rule('self.dataset.validation.sources')})"
            ),
            message=f"spec.dataset.validation.sources {_FORMATS}",
            check=lambda value: (
                value.dataset.validation is None or _formats_fit(value, value.dataset.validation.sources or [])
            ),
        ),
        Rule(
            cel=f"{_EXAMPLES} || !has(self.dataset.packing) || self.dataset.packing == 'None'",
            message=(
                "spec.dataset.packing must be None with formats of preferences, "
                "and so with recipe: DPO, ORPO, SimPO or KTO"
            ),
            check=lambda value: learns_from_examples(value) or value.dataset.packing in {None, "None"},
        ),
        Rule(
            cel=f"{_EXAMPLES} || (self.dataset.trainOn == 'Assistant' && self.dataset.overlong != 'Split')",
            message=(
                "spec.dataset must have trainOn Assistant and not overlong Split with formats of preferences, "
                "and so with recipe: DPO, ORPO, SimPO or KTO"
            ),
            check=lambda value: (
                learns_from_examples(value)
                or (value.dataset.train_on == "Assistant" and value.dataset.overlong != "Split")
            ),
        ),
        _SAME_HANG_TIMEOUT,
        *frozen(
            "dataset",
            "recipe",
            "tuning",
            "training",
            "outputs",
            optional=(
                "dpo",
                "orpo",
                "simpo",
                "kto",
                "distillation",
                "qat",
                "custom",
                "lora",
                "checkpoint",
                "tracking",
                "pushToHub",
            ),
        ),
    )

    model: ModelSource
    """The model to train."""
    dataset: Dataset
    """The data to train on."""
    recipe: Literal["SFT", "DPO", "ORPO", "SimPO", "KTO", "Distillation", "QAT", "Custom"] = "SFT"
    """What the loss is. SFT: supervised fine-tuning. DPO, ORPO, SimPO: of two answers, the better one is learned.
    KTO: good answers are learned and bad ones unlearned.
    Distillation: what another model, the teacher, would say is learned.
    QAT: that of SFT, computed with rounded weights, so that the quantized model loses less.
    Custom: what a script of your own makes it."""
    dpo: Dpo | None = None
    """Settings of recipe: DPO. Unset: their defaults. Refused with other recipes, except Custom."""
    orpo: Orpo | None = None
    """Settings of recipe: ORPO. Unset: their defaults. Refused with other recipes, except Custom."""
    simpo: Simpo | None = None
    """Settings of recipe: SimPO. Unset: their defaults. Refused with other recipes, except Custom."""
    kto: Kto | None = None
    """Settings of recipe: KTO. Unset: their defaults. Refused with other recipes, except Custom."""
    distillation: Distillation | None = None
    """The teacher of recipe: Distillation, and how its pupil is compared to it, required with it. Refused with other
    recipes, except Custom."""
    qat: Qat | None = None
    """Settings of recipe: QAT, required with it. Refused with other recipes, except Custom."""
    custom: Custom | None = None
    """The script of recipe: Custom. Refused with other recipes."""
    tuning: Literal["LoRA", "DoRA", "QLoRA", "Full"] = "LoRA"
    """LoRA trains adapters beside frozen weights. DoRA trains adapters that also have a magnitude for each output.
    QLoRA trains those of LoRA beside weights of 4 bits (NF4). Full trains all weights."""
    lora: Lora | None = None
    """Settings of the adapters. Unset: their defaults. Refused with tuning: Full."""
    training: Training
    """How the weights are trained."""
    checkpoint: Checkpoint | None = None
    """When checkpoints are written. Unset: only when the job is told to stop, and at the end."""
    outputs: Annotated[list[Output], Field(min_length=1, max_length=8), Unique(("name",))]
    """The results of the job."""
    tracking: Tracking | None = None
    """Trackers of the run. Unset: none."""
    push_to_hub: PushToHub | None = None
    """Output that is pushed to the Hugging Face Hub. Unset: none."""
    lifecycle: TrainingLifecycle | None = None
    """How long the job may live, how often it may start again, and how long it may stand still. Unset: the defaults of
    its fields."""


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
    best_validation_loss: Annotated[str, Field(max_length=32)] | None = None
    """With training.earlyStopping, the lowest validation loss."""
    best_validation_step: Count | None = None
    """The step that it was found after. The outputs have the weights of that step."""
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


class TunedOutput(FinishedOutput):
    """One result that is written, and how well adapters were merged into it."""

    merge_difference: Annotated[str, Field(max_length=32)] | None = None
    """Of a HuggingFace output with adapters merged: the size of the difference of its logits from those of the adapters
    beside the base, divided by the logits' size."""


class DataArtifacts(StatusModel):
    """Files that the job wrote beside its outputs."""

    report: Annotated[str, Field(max_length=2048)] | None = None
    """A page with the data's statistics, how long samples are, and two of them with what is trained marked."""


class PushedToHub(StatusModel):
    """The commit that an output has become."""

    repo: Annotated[str, Field(max_length=193)]
    """Repository of the Hub."""
    commit: Digest
    """The commit."""


class FineTuneJobStatus(JobStatus):
    """What the operator saw. Users read it; only the operator writes it."""

    progress: Progress | None = None
    """How far training is."""
    checkpoint: LastCheckpoint | None = None
    """The last complete checkpoint."""
    micro_batch_size: Count | None = None
    """Rows that one process computes at a time since an attempt ran out of memory; the global batch is the same.
    Unset: training.microBatchSize."""
    data: DataStatistics | None = None
    """What the data turned out to be."""
    outputs: Annotated[list[TunedOutput], Field(max_length=8), Unique(("name",))] | None = None
    """Results that are written."""
    pushed_to_hub: PushedToHub | None = None
    """What pushToHub has pushed."""
    artifacts: DataArtifacts | None = None
    """Files that the job wrote beside its outputs."""


def _resumes_from_another(job: Any) -> bool:
    resume = job.spec.checkpoint.resume_from if job.spec.checkpoint else None
    return resume is None or resume.job_ref is None or resume.job_ref.name != job.metadata.name


def _takes_from_another(job: Any, *, block: str, name: str) -> bool:
    source = getattr(getattr(job.spec, block), name, None)
    reference = source.job_ref if source is not None else None
    return reference is None or (reference.kind, reference.name) != ("FineTuneJob", job.metadata.name)


def _another_job(block: str, name: str) -> Rule:
    """The rule that a model which is used beside the trained one is no output of the job itself."""
    field = f"self.spec.{block}.{name}"
    return Rule(
        cel=(
            f"!has(self.spec.{block}) || !has({field}) || !has({field}.jobRef) || "
            f"{field}.jobRef.kind != 'FineTuneJob' || {field}.jobRef.name != self.metadata.name"
        ),
        message=f"spec.{block}.{name}.jobRef must name another job",
        check=partial(_takes_from_another, block=block, name=name),
    )


class FineTuneJob(Job):
    """Adapts a language model to data on the cluster's accelerators."""

    rules = (
        *root_rules("FineTuneJob"),
        Rule(
            cel=(
                "!has(self.spec.checkpoint) || !has(self.spec.checkpoint.resumeFrom) || "
                "!has(self.spec.checkpoint.resumeFrom.jobRef) || "
                "self.spec.checkpoint.resumeFrom.jobRef.name != self.metadata.name"
            ),
            message="spec.checkpoint.resumeFrom.jobRef must name another job",
            check=_resumes_from_another,
        ),
        *(_another_job(block, name) for block, name in OTHER_MODELS),
    )

    kind: Literal["FineTuneJob"]
    """Kind of the object."""
    spec: FineTuneJobSpec
    """What to train, on what, how and where."""
    status: FineTuneJobStatus = Field(default_factory=FineTuneJobStatus)
    """What the operator saw."""


def parse_finetunejob(manifest: Mapping[str, Any]) -> FineTuneJob:
    """Check a manifest as the API server would and return it with defaults filled in.

    Raises:
        SpecError: The manifest breaks rules; all of them are named.
    """
    return parse_as(FineTuneJob, manifest)


def batch_problem(spec: FineTuneJobSpec, *, ranks: int) -> str | None:
    """Why this many processes cannot share the model or the global batch as the spec says; None if they can.

    Of a batch the answer names the nearest sizes that can be shared.
    """
    training = spec.training
    shared = training.parallelism or Parallelism()
    if ranks % (shared.replicate * shared.tensor):
        return (
            f"spec.training.parallelism: Invalid value: replicate {shared.replicate} x tensor {shared.tensor}: "
            f"must divide the number of processes, {ranks}"
        )
    readers = ranks // shared.tensor
    unit = readers * training.micro_batch_size
    size = training.global_batch_size
    if training.optimizer_in_backward and size != unit:
        return (
            f"spec.training.globalBatchSize: Invalid value: {size}: must be {unit} ({readers} processes x "
            f"microBatchSize {training.micro_batch_size}) with optimizerInBackward, which accumulates nothing"
        )
    if size % unit == 0:
        return None
    below, above = size // unit * unit, (size // unit + 1) * unit
    nearest = f"{below} or {above}" if below else str(above)
    who = "processes" if shared.tensor == 1 else f"groups of {shared.tensor} processes"
    return (
        f"spec.training.globalBatchSize: Invalid value: {size}: must be divisible by {unit} "
        f"({readers} {who} x microBatchSize {training.micro_batch_size}); nearest: {nearest}"
    )


def accumulates(job: Job) -> bool:
    """Whether a process may compute its rows of a step one after the other."""
    return not (isinstance(job, FineTuneJob) and job.spec.training.optimizer_in_backward)


def smaller_micro_batch(size: int, *, accumulates: bool = True) -> int | None:
    """The next smaller size of a micro batch for want of memory: half of it, or of odd ones the nearest divisor below.

    What a size divides its divisors divide too, so the ranks can still share the global batch. None for 1, and
    where the rest of a rank's share cannot be accumulated (training.optimizerInBackward).
    """
    if not accumulates:
        return None
    return next((part for part in range(size // 2, 0, -1) if size % part == 0), None)
