"""The shape of a model, read from a Hugging Face `config.json`.

Sizes come from the file, so there are no tables of sizes. What differs between families is a field of `ModelConfig`;
a family is one function that turns the file into those fields.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubetune_trainer.errors import DataError
from kubetune_trainer.model.rope import Rope

CONFIG_FILE = "config.json"
QUANTIZATION_METHODS = ("compressed-tensors", "torchao")
"""Formats of quantized weights that `load_model` reads."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that `Decoder` needs to know about a model."""

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
    rope: Rope
    """Rotary position embedding."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a parsed `config.json`, in the spelling of transformers 4 or 5.

        Raises:
            DataError: A key is missing, has an impossible value, or asks for something that is not supported.
        """
        architectures = config.get("architectures") or []
        if config.get("model_type") != "llama" or architectures not in ([], ["LlamaForCausalLM"]):
            raise DataError(
                f"{CONFIG_FILE}: architectures must be ['LlamaForCausalLM'] with model_type 'llama', "
                f"got {architectures!r} with {config.get('model_type')!r}",
                hint="Models of the Llama architecture are supported: Llama 2 and 3, SmolLM2, TinyLlama and their kin.",
            )
        return _llama(config)


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


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder.

    Raises:
        DataError: The file is missing or is not a JSON object.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"Model folder {file.parent}: {file.name} is missing",
            hint="The model must be a folder in Hugging Face format: config.json, tokenizer.json and *.safetensors.",
        ) from error
    except ValueError as error:
        raise DataError(f"Model folder {file.parent}: {file.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"Model folder {file.parent}: {file.name} must hold an object, got {type(content).__name__}")
    return content


def _llama(config: Mapping[str, Any]) -> ModelConfig:
    for key, supported in {
        "hidden_act": ("silu",),
        "attention_dropout": (0, None),
        "rope_interleaved": (False, None),
        "quantization_config": (None,),
    }.items():
        if config.get(key, supported[0]) not in supported:
            raise DataError(f"{CONFIG_FILE}: {key} must be {supported[0]!r}, got {config[key]!r}")
    num_heads = _positive(config, "num_attention_heads")
    hidden_size = _positive(config, "hidden_size")
    num_kv_heads = _positive(config, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise DataError(
            f"{CONFIG_FILE}: num_attention_heads must be a multiple of num_key_value_heads, "
            f"got {num_heads} and {num_kv_heads}"
        )
    max_positions = _positive(config, "max_position_embeddings", default=2048)
    attention_bias = bool(config.get("attention_bias"))
    return ModelConfig(
        vocab_size=_positive(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(config, "intermediate_size"),
        num_layers=_positive(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(config, hidden_size=hidden_size, num_heads=num_heads),
        max_positions=max_positions,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias")),
        rope=Rope.from_hf(config, max_positions=max_positions),
    )


def _head_dim(config: Mapping[str, Any], *, hidden_size: int, num_heads: int) -> int:
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise DataError(
            f"{CONFIG_FILE}: hidden_size must be a multiple of num_attention_heads where head_dim is not given, "
            f"got {hidden_size} and {num_heads}"
        )
    head_dim = _positive(config, "head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        raise DataError(f"{CONFIG_FILE}: head_dim must be even, got {head_dim}")
    return head_dim


def _positive(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise DataError(f"{CONFIG_FILE}: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"{CONFIG_FILE}: {key} must be a positive integer, got {value!r}")
    return value
