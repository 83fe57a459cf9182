"""The config of a FineTuneJob."""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from kubetune_trainer.config.blocks import (
    JUDGED,
    Block,
    Dataset,
    HubModel,
    JobConfig,
    Model,
    ResourceName,
    SecretKey,
    Uri,
    UriSource,
    check_one_of,
    check_unique_names,
)
from kubetune_trainer.config.outputs import GROUP_SIZE, OutputBase
from kubetune_trainer.config.recipes import BLOCKS, Custom, Distillation, Dpo, Kto, Orpo, Qat, Recipe, Simpo
from kubetune_trainer.config.tracking import Tracking
from kubetune_trainer.errors import ConfigError
from kubetune_trainer.fingerprint import fingerprint

EXAMPLES: Final = ("Auto", "Alpaca", "ShareGPT", "Messages", "PromptCompletion", "Text")
PAIRS: Final = ("Auto", "Preference")
ANSWERS: Final = ("Auto", *JUDGED)
FORMATS: Final[dict[str, tuple[str, ...]]] = {
    "SFT": EXAMPLES,
    "DPO": PAIRS,
    "ORPO": PAIRS,
    "SimPO": PAIRS,
    "KTO": ANSWERS,
    "Distillation": EXAMPLES,
    "QAT": EXAMPLES,
}
"""The formats that each recipe can learn from; for Custom, those of its own sources say it."""
WHOLE: Final = ("Truncate", "Drop", "Fail")
"""What may become of an answer that is too long: it is not made into several."""


def _formats(recipe: str, given: Sequence[str]) -> tuple[str, ...]:
    """The formats that a recipe can learn from, given those of its sources."""
    if recipe == "Custom":
        if "UnpairedPreference" in given:
            return ANSWERS
        return PAIRS if "Preference" in given else EXAMPLES
    return FORMATS[recipe]


def _given_formats(dataset: dict[str, Any]) -> list[str]:
    """The formats of a dataset that is not checked yet."""
    sources = dataset.get("sources")
    return [str(source.get("format")) for source in sources or () if isinstance(source, dict)]


Token = Annotated[str, Field(min_length=1, max_length=128)]


class FirstAdapters(Block):
    """A PEFT folder whose adapters are trained on: exactly one of hub, uri."""

    hub: HubModel | None = None
    """A repository of the Hugging Face Hub."""
    uri: UriSource | None = None
    """A folder."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        check_one_of(self, "hub", "uri")
        return self


class Lora(Block):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: int = Field(default=16, ge=1)
    """Inner dimension of an adapter."""
    alpha: float = Field(default=32, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapter."""
    target_modules: tuple[str, ...] = Field(default=("all-linear",), min_length=1)
    """Names of linear modules, or all-linear for every one but the output head."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    learning_rate_ratio: float = Field(default=1.0, gt=0)
    """What training.learning_rate is multiplied with for the adapters' second matrix, B (LoRA+)."""
    merge_base: Literal["Quantized", "Original"] | None = None
    """What complete outputs of tuning QLoRA merge the adapters into: the weights in NF4, as training saw them, or those
    of the model's files; unset means Quantized, refused with other tunings."""
    adapter: FirstAdapters | None = None
    """Adapters to begin with; unset begins with new ones."""
    train_tokens: tuple[Token, ...] = ()
    """Tokens whose rows of the embedding, and of an output head of its own, are trained; those that the model does not
    have are added to its tokenizer."""

    @model_validator(mode="after")
    def _each_token_once(self) -> Self:
        if twice := [token for token in self.train_tokens if self.train_tokens.count(token) > 1]:
            raise ValueError(f"must have train_tokens once each, got {twice[0]!r} {len(twice)} times")
        return self


class Parallelism(Block):
    """How the ranks share the model beside FSDP, which shards it over all that are left."""

    replicate: int = Field(default=1, ge=1)
    """Copies of the model, each sharded over its part of the ranks (HSDP)."""
    tensor: int = Field(default=1, ge=1)
    """Ranks over which the layers of a block are split; they see the same rows."""


class Profile(Block):
    """Steps to look into."""

    start_step: int = Field(default=3, ge=1)
    """The first of them; those before it are slower than others."""
    num_steps: int = Field(default=2, ge=1, le=20)
    """How many."""
    memory: bool = False
    """Whether allocations are recorded as well."""


class EarlyStopping(Block):
    """When training ends before its last step: once validations find the loss no lower."""

    patience: int = Field(default=3, ge=1)
    """Validations in a row that may be no better than the best before."""
    min_delta: float = Field(default=0.0, ge=0)
    """By how much a loss must be below the lowest before it to be better."""


class Training(Block):
    """How long and how the optimizer steps: exactly one of epochs, max_steps."""

    epochs: int | None = Field(default=None, ge=1)
    """Passes over the data."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(default=16, ge=1)
    """Rows per optimizer step, over all ranks; divisible by ranks x micro_batch_size."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Rows per forward pass of one rank."""
    optimizer: Literal["AdamW", "AdamW8bit", "AdamW4bit"] = "AdamW"
    """AdamW8bit and AdamW4bit keep the moments of large matrices in 8 and 4 bits."""
    optimizer_in_backward: bool = False
    """Take each weight's step as soon as backward has its gradient, which is freed then; nothing is accumulated or
    clipped."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """The highest learning rate of the schedule."""
    scheduler: Literal["Cosine", "Linear", "Constant"] = "Cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Gradients are scaled down to this global norm; unset means 1, and none with optimizer_in_backward."""
    precision: Literal["BF16Mixed", "BF16", "FP32"] = "BF16Mixed"
    """BF16Mixed keeps trained weights and optimizer in fp32 and computes in bf16."""
    stochastic_rounding: bool = False
    """Round trained weights up or down by chance, so that the mean is right; for precision BF16."""
    activation_checkpointing: Literal["None", "Selective", "Full"] = "None"
    """Full recomputes every block in the backward pass, Selective all but products of matrices and attention."""
    activation_offload: bool = False
    """Keep activations in host memory until the backward pass needs them; on a CPU they are there anyway."""
    cpu_offload: bool = False
    """Keep weights, gradients and the optimizer's state in host memory, where its steps are computed."""
    compile: Literal["None", "Blocks"] = "None"
    """Blocks compiles every block with torch.compile; needs a compiler where it trains."""
    parallelism: Parallelism = Parallelism()
    """How the ranks share the model."""
    seed: int = Field(default=42, ge=0)
    """Decides data order, adapters' first values and dropout."""
    validate_every_steps: int | None = Field(default=None, ge=1)
    """Steps between validation passes; unset means one, after the last step."""
    early_stopping: EarlyStopping | None = None
    """End once validations find the loss no lower, and make outputs of the best weights; needs validate_every_steps."""
    profile: Profile | None = None
    """Steps of which a trace is written into the run's folder; unset means none."""

    @model_validator(mode="before")
    @classmethod
    def _with_max_grad_norm(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("optimizer_in_backward") and values.get("max_grad_norm") is None:
            return {**values, "max_grad_norm": 1.0}
        return values

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        check_one_of(self, "epochs", "max_steps")
        return self

    @model_validator(mode="after")
    def _switches_fit_together(self) -> Self:
        if self.optimizer_in_backward and self.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm must not be set with optimizer_in_backward, which cannot clip, got {self.max_grad_norm}"
            )
        if self.stochastic_rounding and self.precision != "BF16":
            raise ValueError(f"precision must be BF16 with stochastic_rounding, got {self.precision}")
        if self.early_stopping is not None and self.validate_every_steps is None:
            raise ValueError("early_stopping needs validate_every_steps, which is not set")
        if self.activation_offload and self.compile != "None":
            raise ValueError(f"compile must be None with activation_offload, got {self.compile}")
        switched = [
            name
            for name, on in (
                ("compile Blocks", self.compile != "None"),
                (f"optimizer {self.optimizer}", self.optimizer != "AdamW"),
                ("optimizer_in_backward", self.optimizer_in_backward),
                ("stochastic_rounding", self.stochastic_rounding),
                ("activation_offload", self.activation_offload),
                ("cpu_offload", self.cpu_offload),
            )
            if on
        ]
        if switched and self.parallelism.tensor > 1:
            raise ValueError(f"parallelism.tensor must be 1 with {switched[0]}, got {self.parallelism.tensor}")
        return self


class ResumeFrom(Block):
    """Another run's state to begin with."""

    uri: Uri
    """A checkpoint (…/checkpoints/step-100) or a folder of them, whose newest complete one is taken."""


class Checkpoint(Block):
    """When the state is saved and how much of it is kept."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints."""
    every_seconds: int | None = Field(default=None, ge=1)
    """Seconds between checkpoints; with every_steps, whichever comes first."""
    keep: int = Field(default=3, ge=1)
    """How many complete checkpoints stay."""
    mode: Literal["Async", "Sync"] = "Async"
    """Async copies the state and goes on training while it is written and uploaded."""
    resume_from: ResumeFrom | None = None
    """Where to begin when this run has no checkpoint of its own."""


class Output(OutputBase):
    """One thing that the run leaves behind."""

    type: Literal["HuggingFace", "PEFT", "GGUF", "ExecuTorch", "CompressedTensors"]
    """HuggingFace is a complete model with adapters merged, PEFT the adapter alone; the others are complete models too,
    in the format of another program: GGUF for llama.cpp, ExecuTorch for devices, CompressedTensors for vLLM."""
    dtype: Literal["Source", "BF16", "FP32"] = "Source"
    """Type of a HuggingFace output's weights; Source keeps the base model's."""

    @model_validator(mode="after")
    def _dtype_fits(self) -> Self:
        if self.dtype != "Source" and self.type != "HuggingFace":
            raise ValueError(f"may have a dtype only with type HuggingFace, got {self.type}")
        return self


class PushToHub(Block):
    """An output that also becomes a commit of a repository of the Hugging Face Hub."""

    repo: str = Field(min_length=1)
    """Owner and name; made if it is not there."""
    output: ResourceName
    """Which of the outputs."""
    private: bool = True
    """Whether a repository that is made is private."""
    token_secret: SecretKey | None = None
    """Token that may write there; unset uses HF_TOKEN if there is one."""


class FineTuneConfig(JobConfig):
    """A whole run."""

    kind: Literal["FineTuneJob"] = "FineTuneJob"
    """Kind of the job."""
    dataset: Dataset
    """What is trained on."""
    recipe: Recipe = "SFT"
    """The training objective: supervised fine-tuning, or a method for preferences."""
    dpo: Dpo | None = None
    """Settings of recipe DPO; defaulted with it, refused without."""
    orpo: Orpo | None = None
    """Settings of recipe ORPO; defaulted with it, refused without."""
    simpo: Simpo | None = None
    """Settings of recipe SimPO; defaulted with it, refused without."""
    kto: Kto | None = None
    """Settings of recipe KTO; defaulted with it, refused without."""
    distillation: Distillation | None = None
    """The teacher of recipe Distillation, and how the model is compared to it; refused without."""
    qat: Qat | None = None
    """Settings of recipe QAT, which needs them; refused without."""
    custom: Custom | None = None
    """The script of recipe Custom; refused without it. The settings of all other recipes may stand beside it."""
    tuning: Literal["LoRA", "DoRA", "QLoRA", "Full"] = "LoRA"
    """Which weights are trained: adapters, adapters that also have a magnitude for each output, adapters of layers
    whose weights are kept in NF4, or all weights."""
    lora: Lora | None = None
    """The adapters; refused with tuning Full, otherwise defaulted."""
    training: Training
    """How long and how the optimizer steps."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved."""
    outputs: tuple[Output, ...] = ()
    """What the run leaves behind."""
    tracking: Tracking | None = None
    """Where its numbers are told to, beside its log; unset means nowhere."""
    push_to_hub: PushToHub | None = None
    """Which output is pushed to the Hub, after all are stored; unset means none."""

    @model_validator(mode="before")
    @classmethod
    def _with_adapters(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("tuning") != "Full" and values.get("lora") is None:
            return {**values, "lora": {}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _with_block_of_recipe(cls, values: Any) -> Any:
        """Fills in the recipe's block, and that answers do not share rows."""
        block = BLOCKS.get(values.get("recipe", "SFT")) if isinstance(values, dict) else None
        if block is None:
            return values
        filled = {**values, block: values.get(block) or {}}
        dataset = values.get("dataset")
        if isinstance(dataset, dict) and _formats(values["recipe"], _given_formats(dataset)) is not EXAMPLES:
            filled["dataset"] = {"packing": "None", **dataset}
        return filled

    @model_validator(mode="after")
    def _fits_the_recipe(self) -> Self:
        for recipe, block in BLOCKS.items():
            if self.recipe not in {recipe, "Custom"} and getattr(self, block) is not None:
                raise ValueError(f"{block} must be set only with recipe {recipe}, got recipe {self.recipe}")
        dataset, formats = self.dataset, self._formats
        for field, sources in (("sources", dataset.sources), ("validation.sources", dataset.held_out)):
            wrong = next((source for source in sources if source.format not in formats), None)
            if wrong is not None:
                raise ValueError(
                    f"dataset.{field} must have the format {' or '.join(formats)} with recipe {self.recipe}, "
                    f"got {wrong.format} for {wrong.name}"
                )
        if formats is EXAMPLES:
            return self
        for field, allowed in (("packing", ("None",)), ("train_on", ("Assistant",)), ("overlong", WHOLE)):
            if getattr(dataset, field) not in allowed:
                raise ValueError(
                    f"dataset.{field} must be {' or '.join(allowed)} with recipe {self.recipe}, "
                    f"got {getattr(dataset, field)}"
                )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.tuning == "Full" and self.lora is not None:
            raise ValueError("lora must not be set with tuning Full")
        tensor = self.training.parallelism.tensor
        if tensor > 1 and self.tuning not in {"LoRA", "Full"}:
            raise ValueError(f"training.parallelism.tensor must be 1 with tuning {self.tuning}, got {tensor}")
        if tensor > 1 and self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout must be 0 with training.parallelism.tensor {tensor}, got {self.lora.dropout}"
            )
        if self.tuning == "QLoRA" and self.training.compile != "None":
            raise ValueError(f"training.compile must be None with tuning QLoRA, got {self.training.compile}")
        if self.tuning == "QLoRA" and self.training.cpu_offload:
            raise ValueError("training.cpu_offload must be false with tuning QLoRA, got true")
        if self.tuning != "QLoRA" and self.lora is not None and self.lora.merge_base is not None:
            raise ValueError(f"lora.merge_base must be set only with tuning QLoRA, got tuning {self.tuning}")
        self._check_kto()
        self._check_qat()
        adapters = [output.name for output in self.outputs if output.type == "PEFT"]
        if self.tuning == "Full" and adapters:
            raise ValueError(f"outputs of type PEFT need adapters, got output {adapters[0]} with tuning Full")
        if adapters and self.model.adapter is not None:
            raise ValueError(
                f"outputs of type PEFT need a model without an adapter, got output {adapters[0]} with model.adapter: "
                "nothing but this run would have the merged model that it belongs to"
            )
        check_unique_names("outputs", self.outputs)
        names = [output.name for output in self.outputs]
        if self.push_to_hub is not None and self.push_to_hub.output not in names:
            raise ValueError(f"push_to_hub.output must be one of {', '.join(names)}, got {self.push_to_hub.output}")
        return self

    def _check_kto(self) -> None:
        if self.kto is not None and self.training.global_batch_size < 2:
            raise ValueError(
                f"training.global_batch_size must be at least 2 with kto, got {self.training.global_batch_size}: "
                "the divergence is estimated from answers to the prompts of others"
            )

    def _check_qat(self) -> None:
        if self.qat is None:
            return
        if self.tuning not in {"Full", "LoRA"}:
            raise ValueError(f"tuning must be Full or LoRA with qat, got {self.tuning}")
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout must be 0 with qat, got {self.lora.dropout}: what is rounded is the merged weight"
            )
        if self.training.parallelism.tensor > 1:
            raise ValueError(f"training.parallelism.tensor must be 1 with qat, got {self.training.parallelism.tensor}")
        if self.training.compile != "None":
            raise ValueError(f"training.compile must be None with qat, got {self.training.compile}")
        wanted = (self.qat.scheme, self.qat.group_size)
        for output in self.outputs:
            if output.scheme is not None and (output.scheme, output.group_size or GROUP_SIZE) != wanted:
                raise ValueError(
                    f"outputs must be quantized as qat says, {self.qat.scheme} in groups of {self.qat.group_size}, "
                    f"got output {output.name}"
                )

    def adapter_settings(self) -> dict[str, Any]:
        """What `apply_lora` takes; there must be adapters."""
        assert self.lora is not None, "tuning Full has no adapters"
        settings = self.lora.model_dump(include={"rank", "alpha", "dropout", "target_modules", "rank_stabilized"})
        return {**settings, "has_magnitude": self.tuning == "DoRA", "packs_base": self.tuning == "QLoRA"}

    @property
    def merges_packed(self) -> bool:
        """Whether adapters are merged into what the base's weights are in NF4."""
        return self.tuning == "QLoRA" and self.lora is not None and self.lora.merge_base != "Original"

    def accumulation_steps(self, world_size: int) -> int:
        """The micro batches of one rank in an optimizer step.

        Raises:
            ConfigError: The ranks cannot be arranged so, or the global batch size cannot be divided; names the nearest
                that can.
        """
        shared = self.training.parallelism
        if world_size % (shared.replicate * shared.tensor):
            raise ConfigError(
                f"{self.title}: training.parallelism.replicate x tensor must divide the number of ranks {world_size}, "
                f"got {shared.replicate} x {shared.tensor}"
            )
        readers = world_size // shared.tensor
        unit = readers * self.training.micro_batch_size
        size = self.training.global_batch_size
        if self.training.optimizer_in_backward and size != unit:
            raise ConfigError(
                f"{self.title}: training.global_batch_size must be ranks x training.micro_batch_size = {unit} with "
                f"training.optimizer_in_backward, which accumulates nothing, got {size}"
            )
        if size % unit == 0:
            return size // unit
        nearest = [str(valid) for valid in (size // unit * unit, (size // unit + 1) * unit) if valid]
        who = "ranks" if shared.tensor == 1 else f"groups of {shared.tensor} ranks"
        raise ConfigError(
            f"{self.title}: training.global_batch_size must be divisible by {who} x training.micro_batch_size"
            f" = {readers} x {self.training.micro_batch_size} = {unit}, got {size}",
            hint=f"Set training.global_batch_size to {' or '.join(nearest)}.",
        )

    @property
    def other_models(self) -> dict[str, Model]:
        """The models that are asked beside the one that is trained, by field."""
        asked = {
            "dpo.reference": self.dpo and self.dpo.reference,
            "kto.reference": self.kto and self.kto.reference,
            "distillation.teacher": self.distillation and self.distillation.teacher,
        }
        return {field: model for field, model in asked.items() if model is not None}

    @property
    def rows(self) -> Literal["Samples", "Pairs", "Answers"]:
        """What a row of its data is."""
        if self._formats is ANSWERS:
            return "Answers"
        return "Samples" if self._formats is EXAMPLES else "Pairs"

    @property
    def _formats(self) -> tuple[str, ...]:
        return _formats(self.recipe, [source.format for source in self.dataset.sources])

    def training_digest(self) -> str:
        """A digest of what decides the numbers of the run; where it lies and what it exports do not.

        Nor does the size of a micro batch: an attempt that ran out of memory is followed by one with a smaller one.
        Nor does it matter to them what lies in which memory.
        """
        decisive = {"model", "dataset", "recipe", "tuning", "lora", "training", *BLOCKS.values()}
        unset = set() if self.lora is not None and self.lora.train_tokens else {"train_tokens"}
        passed_over = {"lora": {"merge_base", *unset}}
        decides = {
            key: value
            for key, value in self.model_dump(mode="json", include=decisive, exclude=passed_over).items()
            if value is not None or key == "lora"
        }
        for name in ("parallelism", "profile", "micro_batch_size", "activation_offload", "cpu_offload"):
            del decides["training"][name]
        if self.training.early_stopping is None:
            del decides["training"]["early_stopping"]
        return fingerprint(decides, length=16)
