"""Every family computes what transformers computes: forward and backward, packed, cached, and beyond its context.

The configs are random and odd; Hypothesis draws the same ones every time.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from kubetune_trainer.errors import DataError
from kubetune_trainer.model import Decoder, KVCache, ModelConfig, families, load_model
from kubetune_trainer.model.decoding import decoding
from kubetune_trainer.model.rope import Rope
from tests.trainer.conftest import Held
from tests.trainer.families import FAMILIES, close, configs, make_folder
from tests.trainer.tiny import random_tokens

LENGTH = 40

CHECKS = ("forward", "gradient", "packed", "cached", "beyond")


def check_forward(model: Decoder, reference: Any) -> None:
    tokens = random_tokens(2, LENGTH)
    with torch.no_grad():
        close(model(tokens), reference(tokens).logits)


def check_gradient(model: Decoder, reference: Any) -> None:
    tokens = random_tokens(2, LENGTH)
    labels = tokens.roll(-1, dims=1)
    labels[:, :5] = labels[:, -1] = -100
    for parameter in model.parameters():
        parameter.grad = None
    (model(tokens, labels_BT=labels) / (labels != -100).sum()).backward()
    logits = reference(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    wanted = dict(_gradients(reference))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        close(parameter.grad, wanted[name], what=name)


def _gradients(reference: Any) -> Iterator[tuple[str, Tensor]]:
    """The gradients under the names that the weights have in files, where experts are apart."""
    for name, parameter in reference.named_parameters():
        if ".experts." not in name:
            yield name.replace(".mlp.gate.", ".block_sparse_moe.gate."), parameter.grad
            yield name, parameter.grad
            continue
        experts, _, kind = name.rpartition(".")
        for number, gradient in enumerate(parameter.grad):
            if kind == "down_proj":
                parts = {"down_proj": gradient, "w2": gradient}
            else:
                gate, up = gradient.chunk(2)
                parts = {"gate_proj": gate, "w1": gate, "up_proj": up, "w3": up}
            for part, value in parts.items():
                owner = experts.replace(".mlp.", ".block_sparse_moe.") if part.startswith("w") else experts
                yield f"{owner}.{number}.{part}.weight", value


def check_packed(model: Decoder, reference: Any) -> None:
    _check_packed(model, reference, lengths=(7, 20, 9))
    if _changes_beyond(model, 20):
        _check_packed(model, reference, lengths=(7, _context(model), 9))


def _check_packed(model: Decoder, reference: Any, *, lengths: tuple[int, ...]) -> None:
    samples = [random_tokens(1, n, seed=n) for n in lengths]
    with torch.no_grad():
        packed = model(
            torch.cat(samples, dim=1),
            documents_BT=torch.cat([torch.full_like(sample, i) for i, sample in enumerate(samples)], dim=1),
            positions_BT=torch.cat([torch.arange(sample.shape[1])[None] for sample in samples], dim=1),
        )
        for part, sample in zip(packed.split(lengths, dim=1), samples, strict=True):
            if _changes_beyond(model, max(lengths)) and sample.shape[1] <= _context(model):
                continue  # the longest document of a batch decides for all, as in transformers
            close(part, reference(sample).logits)


def check_cached(model: Decoder, reference: Any) -> None:
    length = min(LENGTH, _context(model)) if _changes_beyond(model, LENGTH) else LENGTH  # a call by itself decides
    tokens = random_tokens(2, length)
    with torch.no_grad(), decoding(model):
        parts = _in_calls(model, tokens, sizes=[9, 1, 1, length - 11])
        close(torch.cat(parts, dim=1), reference(tokens).logits)


def check_beyond(model: Decoder, reference: Any) -> None:
    """Call by call as transformers with a cache, from within the original context to beyond it."""
    tokens, sizes = random_tokens(2, LENGTH), [9, 3, 1, 5, 1, LENGTH - 19]
    cache = transformers.DynamicCache(config=reference.config)
    with torch.no_grad():
        for part, found in zip(tokens.split(sizes, dim=1), _in_calls(model, tokens, sizes=sizes), strict=True):
            close(found, reference(part, cache=cache, use_cache=True).logits)


def _in_calls(model: Decoder, tokens: Tensor, *, sizes: list[int]) -> list[Tensor]:
    length = tokens.shape[1]
    cache = KVCache(model.config, batch_size=2, max_length=length, dtype=torch.float32, device=torch.device("cpu"))
    return [model(part, cache=cache) for part in tokens.split(sizes, dim=1)]


def _context(model: Decoder) -> int:
    return model.config.rope.original_max_positions


def _changes_beyond(model: Decoder, length: int) -> bool:
    """Whether the frequencies of a call depend on how long its longest sequence is."""
    return model.config.rope.kind in {"dynamic", "longrope"} and length > _context(model)


def test_every_family_is_held_against_transformers() -> None:
    assert set(FAMILIES) == set(families.FAMILIES)
    for family, (name, _) in FAMILIES.items():
        assert families.FAMILIES[family].architecture == f"{name}ForCausalLM"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_transformers_computes(family: str, held: Held) -> None:
    @settings(
        max_examples=4,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(config=configs(family))
    def check(config: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            reference = make_folder(Path(folder), family, config)
            model = load_model(folder, dtype=torch.float32)
        checks = (check_forward, check_gradient, check_packed, check_cached, check_beyond)
        for name, each in zip(CHECKS, checks, strict=True):
            each(model, reference)
            held(family, name)

    check()


SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
REFUSED: dict[str, dict[str, Any]] = {
    "model_type must be one of llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma, gemma2, gemma3_text, phi3, "
    "smollm3, olmo2, got 'gemma3'": {"model_type": "gemma3", "text_config": {}},
    "model_type must be one of llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma, gemma2, gemma3_text, phi3, "
    "smollm3, olmo2, got None": {"model_type": None},
    "architectures must be ['Qwen2ForCausalLM'] with model_type 'qwen2', got ['Qwen2ForSequenceClassification']": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForSequenceClassification"],
    },
    "attention_bias must be False, got True": {"model_type": "mistral", "attention_bias": True},
    "layer_types must be None, got ['full_attention', 'sliding_attention']": {
        "model_type": "mistral",
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "layer_types must be sliding_attention or full_attention for each of 4 layers, got ['chunked_attention']": {
        "model_type": "qwen2",
        "layer_types": ["chunked_attention"],
    },
    "sliding_window must be a positive integer, got 0": {"model_type": "gemma2", "sliding_window": 0},
    "sliding_window is missing": {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 4},
    "num_experts_per_tok must be at most num_local_experts, got 3 and 2": {
        "model_type": "mixtral",
        "num_local_experts": 2,
        "num_experts_per_tok": 3,
    },
    "router_jitter_noise must be 0, got 0.1": {"model_type": "mixtral", "router_jitter_noise": 0.1},
    "hidden_act must be 'gelu_pytorch_tanh', got 'silu'": {"model_type": "gemma", "hidden_act": "silu"},
    "hidden_activation must be 'gelu_pytorch_tanh', got 'gelu'": {"model_type": "gemma2", "hidden_activation": "gelu"},
    "use_bidirectional_attention must be False, got True": {
        "model_type": "gemma3_text",
        "use_bidirectional_attention": True,
    },
    "attn_logit_softcapping must be None, got 5.0": {"model_type": "gemma3_text", "attn_logit_softcapping": 5.0},
    "attn_logit_softcapping must be a positive number, got -1": {"model_type": "gemma2", "attn_logit_softcapping": -1},
    "resid_pdrop must be 0, got 0.1": {"model_type": "phi3", "resid_pdrop": 0.1},
    "rope_type must be default or longrope for phi3, got 'linear'": {
        "model_type": "phi3",
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "partial_rotary_factor must give an even part of head_dim, got 0.4 of 8": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.4,
    },
    "rope parameter short_factor must be a list of 4 positive numbers, one for each pair of rotated dimensions, "
    "got [1.0]": {
        "model_type": "phi3",
        "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 4},
    },
    "no_rope_layers must be a 0 or 1 for each of 4 layers, got [1, 0]": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 0],
    },
}


@pytest.mark.parametrize(("message", "config"), REFUSED.items(), ids=REFUSED.keys())
def test_a_config_that_is_not_supported_is_refused_by_key_and_value(message: str, config: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        ModelConfig.from_hf(SIZES | config)
    assert message in str(caught.value)


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, (name, _) in FAMILIES.items()])
def test_a_file_that_leaves_keys_out_means_what_it_means_to_transformers(family: str, name: str) -> None:
    sizes = SIZES | {
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    }.get(family, {})
    short = sizes | {"model_type": family}
    whole = getattr(transformers, f"{name}{'Text' if family == 'gemma3_text' else ''}Config")(**sizes)
    assert ModelConfig.from_hf(short) == ModelConfig.from_hf(whole.to_dict())


def test_the_spellings_of_transformers_4_and_5_mean_the_same() -> None:
    factors = {"short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 2.1, 2.2]}
    phi = SIZES | {"model_type": "phi3", "max_position_embeddings": 64, "original_max_position_embeddings": 16}
    old = phi | {
        "rope_theta": 7.0,
        "partial_rotary_factor": 0.75,
        "rope_scaling": factors | {"type": "su"},
    }
    new = phi | {
        "rope_parameters": factors | {"rope_type": "longrope", "rope_theta": 7.0, "partial_rotary_factor": 0.75}
    }
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    gemma = SIZES | {"model_type": "gemma3_text"}
    old = gemma | {
        "rope_theta": 9.0,
        "rope_local_base_freq": 7.0,
        "rope_scaling": {"type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
    }
    new = gemma | {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 9.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
        },
    }
    found = ModelConfig.from_hf(old)
    assert found == ModelConfig.from_hf(new)
    assert found.ropes[:2] == (
        Rope(theta=7.0),
        Rope(kind="linear", factor=8.0, theta=9.0, original_max_positions=131072),
    )
