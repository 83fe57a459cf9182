"""The shape of a model, read from a Hugging Face `config.json`.

Sizes come from the file, so there are no tables of sizes. What differs between families is a field of `ModelConfig`;
a family is one function in `families` that turns the file into those fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kubetune_trainer.model.rope import Rope
from kubetune_trainer.model_json import CONFIG_FILE, read_json

QUANTIZATION_METHODS = ("compressed-tensors", "torchao")
"""Formats of quantized weights that `load_model` reads."""

Activation = Literal["silu", "gelu_tanh"]
NormStyle = Literal["Llama", "Gemma", "OLMo"]
NormPlaces = Literal["Before", "Around", "After"]
QueryKeyNorm = Literal["None", "Head", "Whole"]
ExpertNames = Literal["Qwen", "Mixtral"]


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The feed-forward block of a mixture of experts."""

    num_experts: int
    """Experts in each such block."""
    num_chosen: int
    """Experts that each token passes."""
    intermediate_size: int
    """Width inside one expert."""
    normalized: bool
    """Whether the weights of the chosen experts are scaled to the sum 1."""
    names: ExpertNames
    """Qwen: `mlp.experts.N.gate_proj`; Mixtral: `block_sparse_moe.experts.N.w1`."""
    layers: tuple[bool, ...]
    """For each layer, whether it has experts; the others have one plain feed-forward block."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that `Decoder` needs to know about a model."""

    family: str
    """`model_type` of the file."""
    vocab_size: int
    """Rows of the embedding and of the output head."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width inside the feed-forward block."""
    num_layers: int
    """Decoder blocks."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; divides num_heads."""
    head_dim: int
    """Width of one head; need not be hidden_size / num_heads."""
    max_positions: int
    """Longest context that the model was made for, in tokens."""
    norm_eps: float
    """Added to the mean square in RMSNorm."""
    tied_embeddings: bool
    """Whether the output head is the embedding."""
    qkv_bias: bool
    """Whether the query, key and value projections have a bias."""
    output_bias: bool
    """Whether the attention's output projection has a bias."""
    mlp_bias: bool
    """Whether the feed-forward projections have a bias."""
    ropes: tuple[Rope | None, ...]
    """Rotary position embedding of each layer; None: the layer does not look at positions."""
    windows: tuple[int | None, ...]
    """How many tokens, itself included, a token of each layer sees; None: all before it in its document."""
    activation: Activation = "silu"
    """What the gate of the feed-forward block passes; gelu_tanh is GELU's approximation by tanh."""
    norm_style: NormStyle = "Llama"
    """Llama: w times what is rounded to the type of the input. Gemma: times (1 + w) in fp32. OLMo: times w in fp32."""
    norm_places: NormPlaces = "Before"
    """Whether attention and feed-forward block have a norm before them, one before and one after, or one after."""
    query_key_norm: QueryKeyNorm = "None"
    """Whether queries and keys are normalised before they are turned: each head for itself, or all heads as a whole."""
    fused_projections: bool = False
    """Whether query, key and value are one projection, and gate and up are one."""
    embedding_scale: float = 1.0
    """Multiplies the embeddings."""
    attention_scale: float | None = None
    """Multiplies the products of queries and keys; unset means 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Bound of those products, approached as tanh does; unset: none."""
    logit_softcap: float | None = None
    """Bound of the logits, approached as tanh does; unset: none."""
    experts: Experts | None = None
    """The mixture of experts in place of the feed-forward block; unset: none."""

    @property
    def rope(self) -> Rope:
        """The rotary position embedding of the layers that see farthest."""
        found = zip(self.ropes, self.windows, strict=True)
        turned = [(window is None, rope) for rope, window in found if rope is not None]
        return max(turned, key=lambda each: each[0])[1] if turned else Rope()

    @property
    def token_width(self) -> int:
        """Width of all that one token passes inside the feed-forward block of the widest layer."""
        if self.experts is None:
            return self.intermediate_size
        chosen = self.experts.num_chosen * self.experts.intermediate_size
        return chosen if all(self.experts.layers) else max(chosen, self.intermediate_size)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a parsed `config.json`, in the spelling of transformers 4 or 5.

        Raises:
            DataError: A key is missing, has an impossible value, or asks for something that is not supported.
        """
        from kubetune_trainer.model.families import read_family  # noqa: PLC0415 - it needs this module first

        return read_family(config)


def read_config(folder: Path, *, allow_quantized: bool = False) -> ModelConfig:
    """Read `config.json` of a model folder.

    Args:
        folder: Folder in Hugging Face format.
        allow_quantized: Whether the weights may be quantized in one of the formats that `load_model` reads.

    Raises:
        DataError: The file is missing, is not JSON, or describes a model that is not supported.
    """
    config = read_json(folder / CONFIG_FILE)
    if allow_quantized and quantization_method(folder) in QUANTIZATION_METHODS:
        del config["quantization_config"]
    return ModelConfig.from_hf(config)


def quantization_method(folder: Path) -> str | None:
    """Return how a model folder's weights are quantized, by the name that transformers gives it; None: not at all."""
    quantization = read_json(folder / CONFIG_FILE).get("quantization_config")
    return quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else None
