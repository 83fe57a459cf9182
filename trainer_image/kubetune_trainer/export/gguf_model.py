"""What llama.cpp calls a family: the architecture, what a GGUF file says of it, its tensors, and what it cannot be.

llama.cpp turns the heads of some architectures by neighbouring dimensions, where Hugging Face turns a dimension of the
first half with its like in the second; it adds no 1 to norms, and has all experts of a layer in one tensor. A config
that an architecture has no word for is refused by key and value. Windows that an architecture does not know end the
file's context where they would begin to hide tokens: up to there both compute the same.

Source: the GGUF specification (ggml/docs/gguf.md) and what llama.cpp's graphs read.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from kubetune_trainer.errors import DataError
from kubetune_trainer.model.config import CONFIG_FILE, Experts, ModelConfig
from kubetune_trainer.model.rope import Rope, RopeKind, yarn_attention_scaling
from kubetune_trainer.model.weights import build_model

Metadata = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What llama.cpp's graph of one architecture can do beside what all can."""

    name: str
    """By which a file names it."""
    turns_neighbours: bool = False
    """Whether rows of queries and keys are kept in its own order."""
    has_windows: bool = False
    """Whether it knows sliding windows."""
    has_biases: bool = False
    """Whether the output projection and the feed-forward block may have biases; queries, keys and values always may."""
    has_wide_heads: bool = True
    """Whether all heads together may be wider or narrower than the residual stream."""
    ropes: frozenset[RopeKind] = frozenset({"default", "linear", "yarn"})
    """Scalings of the rotary position embedding that it can have."""
    tied: frozenset[bool] = frozenset({True, False})
    """Whether the output head may be the embedding, or must be."""
    layers_scaled_by_width: int | None = None
    """With how many layers products of queries and keys are scaled by hidden_size / heads instead of head_dim."""


_LLAMA = Architecture(
    name="llama",
    turns_neighbours=True,
    has_biases=True,
    ropes=frozenset({"default", "linear", "yarn", "llama3", "longrope"}),
)
ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": Architecture(name="qwen2", has_wide_heads=False),
    "qwen3": Architecture(name="qwen3"),
    "qwen3_moe": Architecture(name="qwen3moe"),
    "gemma": Architecture(name="gemma", tied=frozenset({True})),
    "gemma2": Architecture(name="gemma2", has_windows=True, tied=frozenset({True}), layers_scaled_by_width=46),
    "gemma3_text": Architecture(
        name="gemma3", has_windows=True, ropes=frozenset({"default", "linear"}), layers_scaled_by_width=62
    ),
    "phi3": Architecture(name="phi3", has_wide_heads=False, ropes=frozenset({"default", "longrope"})),
    "smollm3": Architecture(name="smollm3", turns_neighbours=True),
    "olmo2": Architecture(name="olmo2", has_wide_heads=False, tied=frozenset({False})),
}
"""By family."""
LAYERS_BETWEEN_UNTURNED: Final = 4
"""Every such layer of llama.cpp's SmolLM3 does not look at positions."""

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_NORMS = {
    "Before": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "Around": {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "After": {
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
_IN_EXPERT = {
    "gate_proj": "ffn_gate_exps",
    "w1": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "w3": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w2": "ffn_down_exps",
}
_EXPERT = re.compile(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.\d+\.(\w+)\.weight")
_ROUTER = "ffn_gate_inp.weight"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a file, and the parameters that are in it."""

    name: str
    """As llama.cpp calls it."""
    shape: tuple[int, ...]
    """Of each of its parameters."""
    parameters: list[str] = field(default_factory=list)
    """One, or one for each expert, which are stacked in this order."""
    is_reordered: bool = False
    """Whether its rows are in llama.cpp's order of a head's dimensions."""
    added: float = 0.0
    """What is added to its values."""

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """With the experts as the first dimension."""
        return self.shape if not self.is_stacked else (len(self.parameters), *self.shape)

    @property
    def is_stacked(self) -> bool:
        """Whether its parameters are experts'."""
        return "_exps." in self.name

    @property
    def stays_precise(self) -> bool:
        """Whether llama.cpp wants it in fp32: norms, biases, and the routers that choose experts."""
        return len(self.shape) == 1 or self.name.endswith(_ROUTER)


def stored_tensors(config: ModelConfig) -> list[StoredTensor]:
    """Return the tensors of a model's file, in the order of the model's parameters."""
    architecture = ARCHITECTURES[config.family]
    found: dict[str, StoredTensor] = {}
    for parameter, weight in build_model(config).named_parameters():
        name = gguf_name(parameter, config=config)
        is_norm = name.endswith("norm.weight")
        tensor = StoredTensor(
            name=name,
            shape=tuple(weight.shape),
            is_reordered=architecture.turns_neighbours and (".q_proj." in parameter or ".k_proj." in parameter),
            added=1.0 if is_norm and config.norm_style == "Gemma" else 0.0,
        )
        found.setdefault(name, tensor).parameters.append(parameter)
    return list(found.values())


def gguf_name(name: str, *, config: ModelConfig) -> str:
    """The name in a GGUF file of a parameter with a name of Hugging Face's."""
    if match := _EXPERT.fullmatch(name):
        return f"blk.{match[1]}.{_IN_EXPERT[match[2]]}.weight"
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"blk.{match[1]}.{(_IN_BLOCK | _NORMS[config.norm_places])[match[2]]}.{kind}"
    return f"{_TOP[module]}.{kind}"


def rope_factors(config: ModelConfig) -> dict[str, Tensor]:
    """By what llama.cpp divides each frequency, beside what the metadata says: llama3's scaling, or both of longrope's.

    Of the two llama.cpp takes the second for all texts, if the context that it is given is longer than the original.
    """
    rope = config.rope
    if rope.kind == "llama3":
        given = {"head_dim": config.head_dim, "length": 0, "device": torch.device("cpu")}
        return {
            "rope_freqs.weight": Rope(theta=rope.theta).inverse_frequencies(**given) / rope.inverse_frequencies(**given)
        }
    if rope.kind == "longrope":
        return {
            "rope_factors_short.weight": torch.tensor(rope.short_factors),
            "rope_factors_long.weight": torch.tensor(rope.long_factors),
        }
    return {}


def model_metadata(config: ModelConfig, *, source: Path) -> Metadata:
    """Return what llama.cpp must know of a model beside its weights.

    Raises:
        DataError: The family's architecture has no word for something in the config.
    """
    architecture = ARCHITECTURES[config.family]
    for key, wanted, value in _problems(config, architecture):
        raise DataError(
            f"Model folder {source}: {key} in {CONFIG_FILE} must be {wanted} in a GGUF file, whose architecture "
            f"{architecture.name} has no word for anything else, got {value!r}"
        )
    hiding = [] if architecture.has_windows else [window for window in config.windows if window is not None]
    told = {
        "vocab_size": config.vocab_size,
        "context_length": min(config.max_positions, *hiding) if hiding else config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": int(config.head_dim * config.rope.rotated_part),
        "rope.freq_base": config.rope.theta,
        **_rope_metadata(config.rope),
        **_window_metadata(config, architecture),
        **_expert_metadata(config),
        **{
            f"{name}_logit_softcapping": bound
            for name, bound in (("attn", config.attention_softcap), ("final", config.logit_softcap))
            if bound is not None
        },
    }
    return {f"{architecture.name}.{key}": value for key, value in told.items()}


def _rope_metadata(rope: Rope) -> Metadata:
    if rope.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    if rope.kind == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope.factor,
            "rope.scaling.original_context_length": rope.original_max_positions,
            "rope.scaling.yarn_beta_fast": rope.beta_fast,
            "rope.scaling.yarn_beta_slow": rope.beta_slow,
            "rope.scaling.attn_factor": rope.attention_scaling / yarn_attention_scaling(rope.factor),
        }
    if rope.kind == "longrope":
        return {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": rope.original_max_positions,
            "rope.scaling.attn_factor": rope.attention_scaling,
        }
    return {}


def _window_metadata(config: ModelConfig, architecture: Architecture) -> Metadata:
    windows = [window for window in config.windows if window is not None]
    if not architecture.has_windows or not windows:
        return {"attention.sliding_window_pattern": [False] * config.num_layers} if architecture.has_windows else {}
    near = next(rope for rope, window in zip(config.ropes, config.windows, strict=True) if window is not None)
    assert near is not None, "every layer of these families is turned"
    return {
        "attention.sliding_window": windows[0],
        "attention.sliding_window_pattern": [window is not None for window in config.windows],
        "rope.freq_base_swa": near.theta,
    }


def _expert_metadata(config: ModelConfig) -> Metadata:
    if config.experts is None:
        return {}
    return {
        "expert_count": config.experts.num_experts,
        "expert_used_count": config.experts.num_chosen,
        "expert_feed_forward_length": config.experts.intermediate_size,
    }


def _problems(config: ModelConfig, architecture: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """Yield key, rule and value of what the architecture has no word for."""
    rope, per_head = config.rope, config.hidden_size // config.num_heads
    is_wide = config.num_heads * config.head_dim != config.hidden_size
    for key, is_right, wanted, value in (
        ("rope_type", rope.kind in architecture.ropes, " or ".join(sorted(architecture.ropes)), rope.kind),
        ("truncate of yarn", rope.kind != "yarn" or rope.truncate, True, rope.truncate),
        ("attention_bias", architecture.has_biases or not config.output_bias, False, config.output_bias),
        ("mlp_bias", architecture.has_biases or not config.mlp_bias, False, config.mlp_bias),
        (
            "tie_word_embeddings",
            config.tied_embeddings in architecture.tied,
            not config.tied_embeddings,
            config.tied_embeddings,
        ),
        ("head_dim", architecture.has_wide_heads or not is_wide, per_head, config.head_dim),
    ):
        if not is_right:
            yield key, wanted, value
    if config.family in {"gemma2", "gemma3_text"}:
        yield from _gemma_problems(config, architecture)
    if config.family == "smollm3":
        turned = [int(rope is not None) for rope in config.ropes]
        known = [int((layer + 1) % LAYERS_BETWEEN_UNTURNED != 0) for layer in range(config.num_layers)]
        if turned != known:
            yield "no_rope_layers", known, turned
    if config.experts is not None:
        yield from _expert_problems(config.experts)


def _expert_problems(experts: Experts) -> Iterator[tuple[str, Any, Any]]:
    if not experts.normalized:
        yield "norm_topk_prob", True, False
    if not all(experts.layers):
        dense = [layer for layer, has_experts in enumerate(experts.layers) if not has_experts]
        yield "mlp_only_layers", "[] with decoder_sparse_step 1", dense


def _gemma_problems(config: ModelConfig, architecture: Architecture) -> Iterator[tuple[str, Any, Any]]:
    by_width = config.num_layers == architecture.layers_scaled_by_width
    wanted = config.hidden_size // config.num_heads if by_width else config.head_dim
    assert config.attention_scale is not None, "these families always say it"
    if not np.isclose(config.attention_scale, wanted**-0.5):
        yield "query_pre_attn_scalar", wanted, round(config.attention_scale**-2, 6)
    if config.family == "gemma2":
        for key, bound in (
            ("attn_logit_softcapping", config.attention_softcap),
            ("final_logit_softcapping", config.logit_softcap),
        ):
            if bound is None:
                yield key, "a number", None
    if config.family == "gemma3_text":
        for rope, window in zip(config.ropes, config.windows, strict=True):
            if window is not None and rope is not None and rope.kind != "default":
                yield "rope_type of sliding_attention", "default", rope.kind
