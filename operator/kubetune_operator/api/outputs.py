"""Formats that a model is written in, and the schemes that each can hold it quantized with."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from kubetune_operator.api.common import DnsLabel, Uri
from kubetune_operator.api.jobs import Count, Digest
from kubetune_operator.api.model import ApiModel, Rule, StatusModel
from kubetune_operator.names import KIND_EVALJOB, KIND_FINETUNEJOB, KIND_QUANTIZEJOB

SCHEMES: Final = {
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

WHOLE: Final = "HuggingFace"
"""The format that everything can load."""
ADAPTERS: Final = "PEFT"
"""The format that is loaded together with the model that it was trained on."""
LOADABLE: Final = {
    KIND_FINETUNEJOB: (WHOLE,),
    KIND_QUANTIZEJOB: (WHOLE,),
    KIND_EVALJOB: (WHOLE, "CompressedTensors", "TorchAO", "GGUF"),
}
"""Complete formats that each kind of job can load as its model."""

Scheme = Literal[
    "Int8WeightOnly", "Int8DynamicActivation", "Int4WeightOnly", "Int8DynamicActivationInt4Weight",
    "Float8WeightOnly", "Float8DynamicActivation", "NF4",
]  # fmt: skip


class Gguf(ApiModel):
    """Options of a GGUF file."""

    type: Literal["F16", "Q8_0", "Q4_0", "Q4_1"]
    """How its weights are stored. F16: not quantized. Q8_0: 8 bits. Q4_0, Q4_1: 4 bits."""


PROGRAM_LENGTH: Final = 512


class ExecuTorch(ApiModel):
    """Options of an ExecuTorch program."""

    max_sequence_length: Annotated[int, Field(ge=16, le=131_072)] = PROGRAM_LENGTH
    """Tokens that its cache holds, prompt and answer together."""


class OutputBase(ApiModel):
    """What every result that is a model has."""

    name: DnsLabel
    """Name of the output, unique among the outputs."""
    type: str
    """Its format."""
    scheme: Scheme | None = None
    """How its weights, and its activations, are quantized. Unset: not at all, or as gguf.type says."""
    group_size: (
        Annotated[
            int,
            Field(ge=1, le=1024),
            Rule(
                cel="self in [32, 64, 128]", message="must be 32, 64 or 128", check=lambda value: value in {32, 64, 128}
            ),
        ]
        | None
    ) = None
    """Weights that share a scale, for schemes with 4-bit weights. Unset: 32."""
    gguf: Gguf | None = None
    """Options of a GGUF output; required for it, refused for others."""
    execu_torch: ExecuTorch | None = None
    """Options of an ExecuTorch output. Unset: their defaults. Refused for others."""
    uri: Uri | None = None
    """Folder to write to. Unset: the run's folder in the workspace."""


def _scheme_rule(output_type: str) -> Rule:
    """The rule that an output of a type has one of its schemes."""
    schemes, optional = SCHEMES[output_type], output_type in UNQUANTIZED

    def holds(value: Any) -> bool:
        return value.type != output_type or (value.scheme in schemes) or (optional and value.scheme is None)

    chosen = f"self.scheme in {list(schemes)}"
    either = f"!has(self.scheme) || {chosen}" if optional else f"has(self.scheme) && {chosen}"
    return Rule(
        cel=f"self.type != '{output_type}' || ({either})",
        message=f"type: {output_type} takes the scheme {' or '.join(schemes)}{', or none' if optional else ''}",
        check=holds,
    )


OUTPUT_RULES: Final = (
    *(_scheme_rule(output_type) for output_type in SCHEMES),
    Rule(
        cel=f"!has(self.scheme) || self.type in {list(SCHEMES)}",
        message=f"scheme is allowed only with type: {' or '.join(SCHEMES)}",
        check=lambda value: value.scheme is None or value.type in SCHEMES,
    ),
    Rule(
        cel=f"!has(self.groupSize) || (has(self.scheme) && self.scheme in {list(GROUPED)})",
        message=f"groupSize is allowed only with scheme: {' or '.join(GROUPED)}",
        check=lambda value: value.group_size is None or value.scheme in GROUPED,
    ),
    Rule(
        cel="has(self.gguf) == (self.type == 'GGUF')",
        message="gguf must be set with type: GGUF, and only with it",
        check=lambda value: (value.gguf is not None) == (value.type == "GGUF"),
    ),
    Rule(
        cel="!has(self.execuTorch) || self.type == 'ExecuTorch'",
        message="execuTorch is allowed only with type: ExecuTorch",
        check=lambda value: value.execu_torch is None or value.type == "ExecuTorch",
    ),
)
"""What holds for the outputs of every kind."""


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
