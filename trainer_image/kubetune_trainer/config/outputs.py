"""What a job leaves behind: the formats that a model is written in, and the schemes that each can be quantized with."""

from collections.abc import Mapping
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from kubetune_trainer.config.blocks import Block, ResourceName, Uri

Scheme = Literal[
    "Int8WeightOnly", "Int8DynamicActivation", "Int4WeightOnly", "Int8DynamicActivationInt4Weight",
    "Float8WeightOnly", "Float8DynamicActivation", "NF4",
]  # fmt: skip

SCHEMES: Final[Mapping[str, tuple[str, ...]]] = {
    "CompressedTensors": ("Int8WeightOnly", "Int8DynamicActivation", "Int4WeightOnly"),
    "TorchAO": (
        "Int8WeightOnly", "Int8DynamicActivation", "Int4WeightOnly", "Int8DynamicActivationInt4Weight",
        "Float8WeightOnly", "Float8DynamicActivation", "NF4",
    ),
    "ExecuTorch": ("Int8DynamicActivationInt4Weight",),
}  # fmt: skip
"""Which schemes each type of output takes; the other types take none."""
UNQUANTIZED: Final = ("ExecuTorch",)
"""Types with schemes that can do without one."""
GROUPED: Final = ("Int4WeightOnly", "Int8DynamicActivationInt4Weight")
"""Schemes with a scale for each group of weights."""
GROUP_SIZE: Final = 32
"""Weights that share a scale where the output does not say."""


class Gguf(Block):
    """Options of a GGUF file."""

    type: Literal["F16", "Q8_0", "Q4_0", "Q4_1"]
    """How its weights are stored. F16: not quantized. Q8_0: 8 bits. Q4_0, Q4_1: 4 bits."""


class ExecuTorch(Block):
    """Options of an ExecuTorch program."""

    max_sequence_length: int = Field(default=512, ge=16, le=131_072)
    """Tokens that its cache holds, prompt and answer together."""


class OutputBase(Block):
    """What every result that is a model has."""

    name: ResourceName
    """Its name in the status and its folder in the workspace."""
    type: str
    """Its format."""
    scheme: Scheme | None = None
    """How its weights, and its activations, are quantized; unset means not at all, or as gguf.type says."""
    group_size: Literal[32, 64, 128] | None = None
    """Weights that share a scale, for schemes with 4-bit weights; unset means 32."""
    gguf: Gguf | None = None
    """Options of a GGUF output; required for it, refused for others."""
    execu_torch: ExecuTorch | None = None
    """Options of an ExecuTorch output; unset means their defaults, refused for others."""
    uri: Uri | None = None
    """Where it goes; unset means outputs/<name> in the run's directory."""

    @model_validator(mode="after")
    def _format_and_options_fit(self) -> Self:
        schemes = SCHEMES.get(self.type, ())
        if self.scheme is not None and not schemes:
            raise ValueError(f"may have a scheme only with type {' or '.join(SCHEMES)}, got {self.type}")
        if schemes and self.scheme not in (*schemes, *((None,) if self.type in UNQUANTIZED else ())):
            none = ", or none" if self.type in UNQUANTIZED else ""
            raise ValueError(
                f"of type {self.type} must have the scheme {' or '.join(schemes)}{none}, got {self.scheme or 'none'}"
            )
        if self.group_size is not None and self.scheme not in GROUPED:
            raise ValueError(f"may have a group_size only with scheme {' or '.join(GROUPED)}, got {self.scheme}")
        if (self.gguf is not None) != (self.type == "GGUF"):
            raise ValueError(f"must have gguf with type GGUF, and only with it, got type {self.type}")
        if self.execu_torch is not None and self.type != "ExecuTorch":
            raise ValueError(f"may have execu_torch only with type ExecuTorch, got {self.type}")
        return self
