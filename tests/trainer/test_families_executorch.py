"""ExecuTorch programs of every family: executorch's runtime computes what the decoder does, prompt at once or not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kubetune_trainer import load_model
from kubetune_trainer.errors import ConfigError
from kubetune_trainer.export.executorch import QUANTIZED, ExecuTorchModel, _CachedDecoder, _quantize, save_executorch
from tests.recipes.tiny import write_tokenizer
from tests.trainer.conftest import Held
from tests.trainer.families import FAMILIES, make_folder

TOLERANCE = 1e-4
"""Of logits, whose spread is about 1 to 9: XNNPACK sums in another order than torch."""
GELU = 5e-3
"""The same of the Gemma families, since XNNPACK computes GELU in a way of its own; measured were 1e-3."""
LENGTH, PROMPT = 24, 11
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
NARROW, WINDOW = {"head_dim": 16}, {"sliding_window": 5}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0} | parameters}


CASES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True} | UNTIED
    | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    "mistral": NARROW | WINDOW | TIED,
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2} | WINDOW,
    "qwen2": NARROW | WINDOW | {"use_sliding_window": True, "max_window_layers": 0}
    | rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "qwen3": TIED | rope("linear", factor=2.5),
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": False,
                  "attention_bias": True},
    "gemma": TIED,
    "gemma2": TIED | WINDOW | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
                               "final_logit_softcapping": 3.0},
    "gemma3_text": WINDOW | UNTIED | {
        "query_pre_attn_scalar": 9, "layer_types": ["sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
        },
    },
    "phi3": NARROW | WINDOW | rope(
        "longrope", partial_rotary_factor=0.75, short_factor=[1.0 + 0.1 * pair for pair in range(6)],
        long_factor=[1.5 + 0.3 * pair for pair in range(6)],
    ) | {"original_max_position_embeddings": 32},
    "smollm3": {"num_hidden_layers": 2, "no_rope_layers": [1, 0], "use_sliding_window": True} | WINDOW
    | rope("dynamic", factor=2.0),
    "olmo2": NARROW | UNTIED,
}  # fmt: skip
"""By family, a config that asks for what is particular to it; together they have every kind of rope."""


def write_folder(folder: Path, family: str, **changes: Any) -> Any:
    reference = make_folder(folder, family, SIZES | CASES[family] | changes)
    write_tokenizer(folder)
    return reference


def random_tokens(length: int) -> list[int]:
    return torch.randint(5, 300, (length,), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_runtime_computes_what_the_decoder_of_a_family_does(tmp_path: Path, family: str, held: Held) -> None:
    write_folder(tmp_path / "source", family)
    tokens = random_tokens(LENGTH)
    wanted = load_model(tmp_path / "source", dtype=torch.float32)(torch.tensor([tokens]))[0]
    save_executorch(tmp_path / "source", tmp_path / "target", max_sequence_length=32)
    program = ExecuTorchModel(tmp_path / "target")
    found = [program.step(tokens[:PROMPT], start=0)]
    found += [program.step([token], start=PROMPT + place) for place, token in enumerate(tokens[PROMPT:])]
    tolerance = GELU if family.startswith("gemma") else TOLERANCE
    torch.testing.assert_close(torch.stack(found), wanted[PROMPT - 1 :], atol=tolerance, rtol=tolerance)
    held(family, "ExecuTorch")


def test_every_family_is_held_against_the_runtime() -> None:
    assert set(CASES) == set(FAMILIES)


@torch.no_grad()
def test_experts_are_quantized_as_other_layers(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_folder(source, "qwen3_moe", moe_intermediate_size=96)
    model = load_model(source, dtype=torch.float32)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    save_executorch(source, tmp_path / "target", max_sequence_length=32, scheme=QUANTIZED, group_size=32)
    program = ExecuTorchModel(tmp_path / "target")
    assert (tmp_path / "target" / "model.pte").stat().st_size < 0.45 * weights
    module = _CachedDecoder(model, max_length=32)
    _quantize(module, group_size=32)
    tokens = random_tokens(LENGTH)
    in_torch = module(torch.tensor([tokens]), torch.tensor([0]))[0]
    found = program.step(tokens, start=0)
    assert ((found - in_torch).norm() / in_torch.norm()).item() < 0.05, "only rounding of activations differs"


def test_groups_must_divide_the_experts_too(tmp_path: Path) -> None:
    write_folder(tmp_path / "source", "qwen3_moe", moe_intermediate_size=48)
    with pytest.raises(ConfigError, match=r"group_size must divide .* \(48, 64, 128\), got 32"):
        save_executorch(tmp_path / "source", tmp_path / "target", scheme=QUANTIZED, max_sequence_length=32)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(("family", "longest"), [("phi3", 32), ("smollm3", 64)])
def test_a_program_ends_where_the_length_of_a_text_would_decide_about_its_angles(
    tmp_path: Path, family: str, longest: int
) -> None:
    write_folder(tmp_path / "source", family)
    with pytest.raises(ConfigError, match=f"max_sequence_length must be at most the model's {longest}, got 65"):
        save_executorch(tmp_path / "source", tmp_path / "target", max_sequence_length=65)
