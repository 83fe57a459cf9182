"""GGUF files of every family: llama.cpp computes, and answers, as transformers does, and reads all of the config."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from kubetune_trainer import load_model
from kubetune_trainer.errors import DataError
from kubetune_trainer.export.gguf import check_gguf, save_gguf
from kubetune_trainer.export.gguf_model import ARCHITECTURES, StoredTensor
from tests.recipes.tiny import write_tokenizer
from tests.trainer.conftest import Held
from tests.trainer.families import FAMILIES, MIXTURES, make_folder
from tests.trainer.test_export_gguf import divergence, llama, log_probabilities

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
NARROW = {"head_dim": 16}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16,
        "attention_factor": 1.3,
    },
}  # fmt: skip
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}}
EXPERTS_OF_QWEN = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
        "long_factor": [1.5 + 0.3 * pair for pair in range(8)], "original_max_position_embeddings": 32,
    },
    "max_position_embeddings": 128,
}  # fmt: skip
GEMMA2 = {"query_pre_attn_scalar": 32, "sliding_window": 11, "tie_word_embeddings": True}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
}
CASES: dict[str, list[dict[str, Any]]] = {
    "llama": [{"attention_bias": True, "mlp_bias": True}, NARROW | LONGROPE, {"tie_word_embeddings": True} | YARN],
    "mistral": [{"sliding_window": None}, {"sliding_window": 60} | YARN],
    "mixtral": [EXPERTS | {"sliding_window": None}, EXPERTS | {"num_experts_per_tok": 1, "sliding_window": 60}],
    "qwen2": [NARROW, NARROW | YARN | {"tie_word_embeddings": True}],
    "qwen3": [{}, YARN | {"tie_word_embeddings": True, "num_key_value_heads": 4}],
    "qwen3_moe": [EXPERTS_OF_QWEN],
    "gemma": [{"tie_word_embeddings": True}, {"tie_word_embeddings": True} | LINEAR],
    "gemma2": [GEMMA2, GEMMA2 | YARN | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}],
    "gemma3_text": [
        {"query_pre_attn_scalar": 32, "sliding_window": 11, "rope_parameters": GEMMA3_ROPES,
         "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]},
        {"query_pre_attn_scalar": 32, "sliding_window": 11, "tie_word_embeddings": False, "num_hidden_layers": 6,
         "final_logit_softcapping": 3.0},
    ],
    "phi3": [
        NARROW | {"sliding_window": None},
        NARROW | LONGROPE | {"original_max_position_embeddings": 32, "sliding_window": 100},
    ],
    "smollm3": [{"num_hidden_layers": 5}, YARN | {"tie_word_embeddings": False}],
    "olmo2": [
        NARROW | {"tie_word_embeddings": False},
        NARROW | LINEAR | {"tie_word_embeddings": False, "num_key_value_heads": 4},
    ],
}  # fmt: skip
"""By family, configs that together ask for all that its architecture in llama.cpp has a word for."""


PROMPT = torch.randint(5, 300, (36,), generator=torch.Generator().manual_seed(4)).tolist()
IN_FP32 = 1e-3
"""Of log probabilities, whose spread is 1.7: with weights and cache in fp32 llama.cpp computes the same function."""
GELU = 2e-2
"""The same of the Gemma families, since llama.cpp looks GELU up in a table of fp16 values."""
IN_FP16 = 5e-4
"""The mean KL divergence with an F16 file, where llama.cpp rounds what enters each product, and its cache, to fp16."""
FP32_CACHE = {"type_k": gguf.GGMLQuantizationType.F32, "type_v": gguf.GGMLQuantizationType.F32}


def write_folder(folder: Path, family: str, **changes: Any) -> Any:
    """Weights that fp16 holds exactly, so that the file has the very same."""
    reference = make_folder(folder, family, SIZES | changes, dtype=torch.float16)
    write_tokenizer(folder)
    return reference


def without_context(changes: dict[str, Any]) -> dict[str, Any]:
    rope = {key: value for key, value in changes["rope_parameters"].items() if not key.startswith("original")}
    return {"rope_parameters": rope}


def in_llama_cpp(folder: Path, tokens: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Log probabilities behind each of (T,) tokens."""
    with llama(folder, **settings) as loaded:
        return log_probabilities(loaded, tokens.tolist())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param(family, changes, id=f"{family}-{number}")
        for family, cases in CASES.items()
        for number, changes in enumerate(cases)
    ],
)
@torch.no_grad()
def test_llama_cpp_computes_and_answers_as_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any], held: Held
) -> None:
    reference = write_folder(tmp_path / "source", family, **changes)
    whole = reference.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    wanted = reference(whole).logits[0].log_softmax(dim=-1)
    save_gguf(tmp_path / "source", tmp_path / "F16")
    ours = load_model(tmp_path / "F16", dtype=torch.float32)(whole)[0].log_softmax(dim=-1)
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=0)
    if family not in MIXTURES:  # in fp16 other experts may be chosen where two are nearly even
        assert divergence(wanted, in_llama_cpp(tmp_path / "F16", whole[0])) < IN_FP16
    monkeypatch.setattr(StoredTensor, "stays_precise", True)
    save_gguf(tmp_path / "source", tmp_path / "F32")
    found = in_llama_cpp(tmp_path / "F32", whole[0], **FP32_CACHE)
    tolerance = GELU if family.startswith("gemma") else IN_FP32
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)
    assert found[len(PROMPT) - 1 : -1].argmax(dim=-1).equal(whole[0, len(PROMPT) :]), "greedy answers are equal"
    held(family, "GGUF")


def test_every_family_is_held_against_llama_cpp() -> None:
    assert set(CASES) == set(FAMILIES) == set(ARCHITECTURES)


@torch.no_grad()
def test_within_the_original_context_longrope_takes_the_short_factors(tmp_path: Path) -> None:
    far = {"original_max_position_embeddings": 256, "max_position_embeddings": 1024, "sliding_window": None}
    reference = write_folder(tmp_path / "source", "phi3", **NARROW, **far, **without_context(LONGROPE))
    save_gguf(tmp_path / "source", tmp_path / "target")
    tokens = torch.tensor(PROMPT)
    wanted = reference(tokens[None]).logits[0].log_softmax(dim=-1)
    found = in_llama_cpp(tmp_path / "target", tokens, context=256)
    assert divergence(wanted, found) < IN_FP16
    beyond = in_llama_cpp(tmp_path / "target", tokens, context=512)
    assert divergence(wanted, beyond) > 100 * IN_FP16, "in a longer context llama.cpp takes the long ones for all"


@pytest.mark.parametrize(
    ("family", "changes", "context"),
    [
        ("mistral", {"sliding_window": 60}, 60),
        ("phi3", NARROW | {"sliding_window": 47}, 47),
        ("qwen2", NARROW | {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 2}, 50),
        ("gemma2", GEMMA2, 128),
    ],
)
def test_a_context_ends_where_a_window_that_llama_cpp_does_not_know_would_hide_tokens(
    tmp_path: Path, family: str, changes: dict[str, Any], context: int
) -> None:
    write_folder(tmp_path / "source", family, **changes)
    metadata, _ = check_gguf(tmp_path / "source", type="F16")
    assert metadata[f"{ARCHITECTURES[family].name}.context_length"] == context


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gemma2", "phi3"])
@torch.no_grad()
def test_stacked_shifted_and_fused_tensors_are_read_back_from_a_quantized_file(tmp_path: Path, family: str) -> None:
    write_folder(tmp_path / "source", family, **CASES[family][0] | {"moe_intermediate_size": 64})
    tokens = torch.tensor(PROMPT)
    wanted = load_model(tmp_path / "source", dtype=torch.float32)(tokens[None])[0].log_softmax(dim=-1)
    save_gguf(tmp_path / "source", tmp_path / "target", type="Q8_0")
    ours = load_model(tmp_path / "target", dtype=torch.float32)(tokens[None])[0].log_softmax(dim=-1)
    assert divergence(wanted, ours) < 0.05


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3", {"attention_bias": True}, "attention_bias in config.json must be False .* qwen3 .*, got True"),
    ("smollm3", {"mlp_bias": True}, "mlp_bias in config.json must be False .* smollm3 .*, got True"),
    ("qwen2", {"head_dim": 32}, "head_dim in config.json must be 16 .* qwen2 .*, got 32"),
    ("olmo2", NARROW | {"tie_word_embeddings": True}, "tie_word_embeddings in config.json must be False .*, got True"),
    ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings in config.json must be True .*, got False"),
    ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar in config.json must be 32 .*, got 24"),
    ("gemma2", GEMMA2 | {"attn_logit_softcapping": None}, "attn_logit_softcapping .* must be a number .*, got None"),
    ("gemma2", GEMMA2 | {"final_logit_softcapping": None}, "final_logit_softcapping .* must be a number .*, got None"),
    (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 32,
            "rope_parameters": GEMMA3_ROPES | {"sliding_attention": GEMMA3_ROPES["full_attention"]},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "rope_type of sliding_attention in config.json must be default .*, got 'linear'",
    ),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, r"no_rope_layers .* must be \[1, 1, 1, 0\] .*, got \[1, 0, 1, 0\]"),
    (
        "qwen3_moe",
        EXPERTS_OF_QWEN | {"norm_topk_prob": False},
        "norm_topk_prob in config.json must be True .*, got False",
    ),
    (
        "qwen3_moe",
        EXPERTS_OF_QWEN | {"mlp_only_layers": [2]},
        r"mlp_only_layers in config.json must be \[\] .*, got \[2\]",
    ),
    (
        "qwen3",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "rope_type in config.json must be default or linear or yarn .*, got 'dynamic'",
    ),
    ("llama", {"rope_parameters": YARN["rope_parameters"] | {"truncate": False}}, "truncate of yarn .* must be True"),
]


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED)
def test_what_an_architecture_has_no_word_for_is_refused_by_key_and_value(
    tmp_path: Path, family: str, changes: dict[str, Any], words: str
) -> None:
    write_folder(tmp_path / "source", family, **changes)
    with pytest.raises(DataError, match=words):
        save_gguf(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()
