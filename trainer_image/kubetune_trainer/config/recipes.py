"""The blocks of the recipes: what each method can be told beside how it trains."""

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from kubetune_trainer.config.blocks import Block, ConfigMapKey, Model, check_one_of

Recipe = Literal["SFT", "DPO", "ORPO", "SimPO", "KTO", "Distillation", "QAT", "Custom"]

BLOCKS: dict[str, str] = {recipe: recipe.lower() for recipe in get_args(Recipe) if recipe != "SFT"}
"""The block that goes with a recipe."""


class Dpo(Block):
    """Direct preference optimization (arXiv 2305.18290)."""

    loss: Literal["Sigmoid", "IPO", "Hinge"] = "Sigmoid"
    """Sigmoid is that of the paper, Hinge that of SLiC (arXiv 2309.06657), IPO that of arXiv 2310.12036."""
    beta: float = Field(default=0.1, gt=0)
    """How much it costs to leave the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """How often a pair is taken to be the wrong way round; above 0 only with loss Sigmoid."""
    reference: Model | None = None
    """The model that answers are measured against; unset means the model before training, with lora.adapter if set."""

    @model_validator(mode="after")
    def _smooths_what_has_labels(self) -> Self:
        if self.label_smoothing and self.loss != "Sigmoid":
            raise ValueError(f"label_smoothing must be 0 with loss {self.loss}, got {self.label_smoothing}")
        return self


class Kto(Block):
    """Kahneman-Tversky optimization (arXiv 2402.01306)."""

    beta: float = Field(default=0.1, gt=0)
    """How much it costs to leave the reference."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """What the losses of good answers are multiplied with."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """What the losses of bad answers are multiplied with."""
    reference: Model | None = None
    """The model that answers are measured against; unset means the model before training, with lora.adapter if set."""


class Qat(Block):
    """Quantization-aware training: the loss is that of SFT, and layers compute with weights as they will be."""

    scheme: Literal["Int8DynamicActivationInt4Weight", "Int4WeightOnly"]
    """How the outputs will be quantized."""
    group_size: Literal[32, 64, 128] = 32
    """Weights of a row that share a scale."""


class Orpo(Block):
    """Odds ratio preference optimization (arXiv 2403.07691)."""

    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio beside the cross entropy."""


class Simpo(Block):
    """Simple preference optimization (arXiv 2405.14734)."""

    beta: float = Field(default=2.0, gt=0)
    """Scale of the rewards."""
    gamma: float = Field(default=1.0, ge=0)
    """By how much the reward of the better answer has to be greater."""


class Distillation(Block):
    """Knowledge distillation (arXiv 1503.02531)."""

    teacher: Model
    """The model to learn from."""
    divergence: Literal["Forward", "Reverse", "Symmetric"] = "Forward"
    """Forward is KL(teacher || student), Reverse KL(student || teacher), Symmetric the mean of both."""
    temperature: float = Field(default=1.0, gt=0)
    """What the logits of both are divided by for the divergence, which is then scaled by its square."""
    weight: float = Field(default=0.5, gt=0, le=1)
    """Part of the divergence in the loss; the rest is the cross entropy."""


class Script(Block):
    """A recipe of one's own, in Python: exactly one of config_map, path."""

    config_map: ConfigMapKey | None = None
    """A key of a ConfigMap."""
    path: str | None = Field(default=None, pattern=r"^/.*\.py$")
    """A file of the trainer's image, or of a volume."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        check_one_of(self, "config_map", "path")
        return self


class Custom(Block):
    """A script that trains in place of a recipe that comes with kubetune."""

    script: Script
    """Where the launcher found it."""
    args: tuple[str, ...] = ()
    """What it is given after --config FILE."""
