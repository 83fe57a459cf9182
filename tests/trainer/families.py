"""Odd configs of every family, and the random models that transformers makes of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = 1e-5
WINDOWS = st.sampled_from([3, 5, 11])
Draw = Callable[[st.SearchStrategy[Any]], Any]


def _any_rope(draw: Draw, head_dim: int) -> dict[str, Any]:
    """One of the scalings, with an original context that the tests' sequences are longer than."""
    kind = draw(st.sampled_from(["llama3", "yarn", "dynamic", "linear", "longrope", "default"]))
    pairs = head_dim // 2
    return {
        "default": {},
        "linear": {"factor": 2.5},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "longrope": {
            "factor": 4.0,
            "original_max_position_embeddings": draw(st.sampled_from([16, 64])),
            "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
            "long_factor": [1.5 + 0.3 * pair for pair in range(pairs)],
        },
    }[kind] | {"rope_type": kind, "rope_theta": draw(st.sampled_from([500.0, 10000.0]))}


def _llama(draw: Draw, sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "rope_parameters": _any_rope(draw, sizes["head_dim"]),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "max_position_embeddings": draw(st.sampled_from([16, 64])),
    }


def _mistral(draw: Draw, _: dict[str, Any]) -> dict[str, Any]:
    return {"sliding_window": draw(WINDOWS | st.none())}


def _mixtral(draw: Draw, _: dict[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": draw(st.none() | WINDOWS),
        "num_local_experts": draw(st.sampled_from([3, 5])),
        "num_experts_per_tok": draw(st.sampled_from([2, 1])),
    }


def _qwen2(draw: Draw, _: dict[str, Any]) -> dict[str, Any]:
    return {
        "use_sliding_window": draw(st.sampled_from([True, False])),
        "sliding_window": draw(WINDOWS),
        "max_window_layers": draw(st.sampled_from([1, 2])),
    }


def _qwen3(draw: Draw, sizes: dict[str, Any]) -> dict[str, Any]:
    return _qwen2(draw, sizes) | {"attention_bias": draw(st.booleans())}


def _qwen3_moe(draw: Draw, _: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_bias": draw(st.booleans()),
        "num_experts": draw(st.sampled_from([5, 7])),
        "num_experts_per_tok": draw(st.sampled_from([2, 3])),
        "moe_intermediate_size": 10,
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": draw(st.sampled_from([1, 2])),
        "mlp_only_layers": draw(st.sampled_from([[], [1]])),
        "use_sliding_window": draw(st.booleans()),
        "sliding_window": draw(WINDOWS),
    }


def _gemma(draw: Draw, _: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_act": draw(st.sampled_from(["gelu_pytorch_tanh", "gelu"])), "tie_word_embeddings": True}


def _gemma2(draw: Draw, _: dict[str, Any]) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": draw(st.sampled_from([24, 9])),
        "attn_logit_softcapping": draw(st.sampled_from([2.0, None])),
        "final_logit_softcapping": draw(st.sampled_from([3.0, None])),
        "sliding_window": draw(WINDOWS),
        "tie_word_embeddings": True,
    }


def _gemma3(draw: Draw, sizes: dict[str, Any]) -> dict[str, Any]:
    far = draw(st.sampled_from([{"rope_type": "linear", "factor": 8.0}, {"rope_type": "default"}]))
    kinds = draw(
        st.lists(
            st.sampled_from(["full_attention", "sliding_attention"]),
            min_size=sizes["num_hidden_layers"],
            max_size=sizes["num_hidden_layers"],
        )
    )
    return {
        "query_pre_attn_scalar": draw(st.sampled_from([24, 9])),
        "sliding_window": draw(WINDOWS),
        "layer_types": ["sliding_attention", "full_attention", *kinds][: sizes["num_hidden_layers"]],
        "rope_parameters": {
            "full_attention": far | {"rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": draw(st.sampled_from([10000.0, 700.0]))},
        },
        "tie_word_embeddings": True,
    }


def _phi3(draw: Draw, sizes: dict[str, Any]) -> dict[str, Any]:
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    part = draw(st.sampled_from([0.75 if head_dim == 8 else 0.5, 1.0]))
    pairs = int(head_dim * part) // 2
    rope = {
        "rope_type": draw(st.sampled_from(["longrope", "default"])),
        "rope_theta": 10000.0,
        "partial_rotary_factor": part,
        "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
        "long_factor": [1.5 + 0.3 * pair for pair in range(pairs)],
    }
    return {
        "head_dim": head_dim,
        "rope_parameters": rope,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": draw(st.sampled_from([16, 48])),
        "sliding_window": draw(st.none() | WINDOWS),
        "pad_token_id": 0,
        "eos_token_id": 2,
    }


def _smollm3(draw: Draw, _: dict[str, Any]) -> dict[str, Any]:
    return {
        "no_rope_layers": draw(st.none() | st.just([0, 1, 1, 0])),
        "no_rope_layer_interval": 2,
        "use_sliding_window": draw(st.booleans()),
        "sliding_window": draw(WINDOWS),
        "attention_bias": draw(st.booleans()),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _olmo2(draw: Draw, _: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": draw(st.booleans()), "eos_token_id": 2}


FAMILIES: Mapping[str, tuple[str, Callable[[Draw, dict[str, Any]], dict[str, Any]]]] = {
    "llama": ("Llama", _llama),
    "mistral": ("Mistral", _mistral),
    "mixtral": ("Mixtral", _mixtral),
    "qwen2": ("Qwen2", _qwen2),
    "qwen3": ("Qwen3", _qwen3),
    "qwen3_moe": ("Qwen3Moe", _qwen3_moe),
    "gemma": ("Gemma", _gemma),
    "gemma2": ("Gemma2", _gemma2),
    "gemma3_text": ("Gemma3", _gemma3),
    "phi3": ("Phi3", _phi3),
    "smollm3": ("SmolLM3", _smollm3),
    "olmo2": ("Olmo2", _olmo2),
}
MIXTURES = ("mixtral", "qwen3_moe")


@st.composite
def configs(draw: Draw, family: str) -> dict[str, Any]:
    """Odd sizes, and what is particular to a family."""
    num_kv_heads, group = draw(st.sampled_from([(2, 2), (1, 3), (3, 1)]))
    sizes = {
        "vocab_size": 97,
        "num_attention_heads": num_kv_heads * group,
        "num_key_value_heads": num_kv_heads,
        "hidden_size": num_kv_heads * group * draw(st.sampled_from([8, 12])),
        "intermediate_size": draw(st.sampled_from([30, 22])),
        "num_hidden_layers": draw(st.sampled_from([4, 3])),
        "max_position_embeddings": 64,
        "head_dim": draw(st.sampled_from([10, 6, 16])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    return sizes | FAMILIES[family][1](draw, sizes)


def make_folder(folder: Path, family: str, config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> Any:
    """Save a random model of transformers; every weight is random, so that a mix-up of any two shows."""
    name = FAMILIES[family][0]
    text = "Text" if family == "gemma3_text" else ""
    torch.manual_seed(0)
    shape = getattr(transformers, f"{name}{text}Config")(**config)
    kind = getattr(transformers, f"{name}ForCausalLM")
    reference = kind._from_config(shape, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.2)
            parameter.copy_(parameter.to(dtype))
    reference.save_pretrained(folder)
    return reference


def close(found: Tensor, wanted: Tensor, *, what: str = "") -> None:
    """Compare with the tolerance that holds for all families."""
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text: f"{what}: {text}")
