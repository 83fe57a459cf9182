"""Which models tensor parallelism can split, and that it changes no number of any; test_parallel.py has its cases."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from kubetune_trainer.errors import ConfigError
from kubetune_trainer.lora import apply_lora, init_lora
from kubetune_trainer.model import load_model
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.weights import build_model
from kubetune_trainer.tensor_parallel import BY_INPUTS, BY_OUTPUTS, PLACES, check_divides, shape_of_rank
from tests.recipes.tiny import SHAPE
from tests.trainer.families import FAMILIES, make_folder
from tests.trainer.parallel_ranks import NUM_ROWS, run_families, train
from tests.trainer.tiny import TINY

MIXTURE = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "head_dim": 16,
}  # fmt: skip
REFUSED = {"mixtral", "qwen3_moe", "phi3", "olmo2"}
SPLIT: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"attention_bias": True},
    "gemma": {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 5, "query_pre_attn_scalar": 9},
    "gemma3_text": {
        "tie_word_embeddings": True, "sliding_window": 5, "query_pre_attn_scalar": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
}  # fmt: skip
"""What each family has that ranks might share wrongly, beside the sizes."""
TUNINGS: dict[str, dict[str, Any]] = {
    "Full": {"lora": False, "checkpointing": "None"},
    "LoRA": {"lora": True, "checkpointing": "None", "trained_ids": (96, 5, 40)},
    "Full, recomputed": {"lora": False, "checkpointing": "Full"},
    "Full, partly recomputed": {"lora": False, "checkpointing": "Selective"},
}
ON_2_RANKS = [f"{family} {tuning}" for family in SPLIT for tuning in ("Full", "LoRA")]
ON_4_RANKS = ["qwen3 Full, recomputed", "gemma3_text Full, partly recomputed"]


def shape(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**SHAPE, "vocab_size": 320, **changes})


def test_a_group_that_divides_heads_and_inner_width_splits_a_model() -> None:
    check_divides(shape(), 2)
    check_divides(shape(num_key_value_heads=4), 4)


@pytest.mark.parametrize(
    ("changes", "size", "says"),
    [
        ({}, 4, "must divide the model's 2 key and value heads, got 4"),
        ({}, 3, "must divide the model's 4 attention heads, got 3"),
        ({"intermediate_size": 97}, 2, "must divide the model's 97 units of the feed-forward block, got 2"),
        ({**MIXTURE, **EXPERTS}, 2, "must be 1 for a model with experts, got 2"),
        (QWEN_MIXTURE, 2, "must be 1 for a model with experts, got 2"),
        ({"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}, 2, "a model with fused projections, got 2"),
        ({"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}, 2, "norms over all queries and keys, got 2"),
    ],
)
def test_another_model_is_refused_with_its_numbers(changes: dict[str, Any], size: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        check_divides(shape(**changes), size)
    assert str(caught.value).startswith("training.parallelism.tensor must ")


def test_the_shape_of_a_rank_has_the_layers_that_the_plan_leaves_it() -> None:
    whole, part = build_model(shape(attention_bias=True)), build_model(shape_of_rank(shape(attention_bias=True), 2))
    for model in (whole, part):
        apply_lora(model, rank=4, alpha=8)
    parts, num_split = dict(part.named_parameters()), 0
    for name, weight in whole.named_parameters():
        layer = next((layer for layer in (*BY_OUTPUTS, *BY_INPUTS) if f".{layer}." in name), None)
        expected = list(weight.shape)
        if layer is not None:
            place = PLACES[layer in BY_OUTPUTS][name.partition(f".{layer}.")[2]]
            if place.is_shard():
                expected[place.dim] //= 2
                num_split += 1
        assert list(parts[name].shape) == expected, name
    assert num_split == 2 * (7 + 3 + 7), "of each block 7 weights, 3 biases, and one matrix of each adapter"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of all families that can be split, and what ranks made of them."""
    folder = tmp_path_factory.mktemp("families")
    for family, changes in SPLIT.items():
        make_folder(folder / family, family, TINY | {"num_hidden_layers": 2, "head_dim": 8} | changes)
    multiprocessing.set_forkserver_preload(["torch._dynamo", "tests.trainer.parallel_ranks"])
    for ranks, names in ((2, ON_2_RANKS), (4, ON_4_RANKS)):
        cases = {name: {"precision": "FP32", **TUNINGS[name.partition(" ")[2]]} for name in names}
        mesh = {"num_ranks": ranks, "tensor": 2}
        multiprocessing.start_processes(
            run_families, args=(mesh, folder, cases), nprocs=ranks, start_method="forkserver"
        )
    return folder


def test_every_family_is_split_or_refused() -> None:
    assert SPLIT.keys() | REFUSED == FAMILIES.keys()


@pytest.mark.parametrize(("ranks", "name"), [(2, name) for name in ON_2_RANKS] + [(4, name) for name in ON_4_RANKS])
def test_split_layers_train_as_whole_ones_do(folder: Path, ranks: int, name: str) -> None:
    family, _, tuning = name.partition(" ")
    model = load_model(folder / family, dtype=torch.float32)
    if TUNINGS[tuning]["lora"]:
        apply_lora(model, rank=2, alpha=4, trained_ids=TUNINGS[tuning]["trained_ids"])
        init_lora(model, seed=5)
    begun = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    losses, norms = train(model, rows=slice(0, NUM_ROWS))
    results = [torch.load(folder / f"{ranks}-{rank}.pt")[name] for rank in range(ranks)]
    for result in results:
        # After a step Adam has made much of gradients that are all but 0, whose sums are rounded otherwise.
        assert (result["losses"][0], result["norms"][0]) == pytest.approx((losses[0], norms[0]), rel=1e-6)
        assert result["losses"] == pytest.approx(losses, rel=1e-4)
        assert result["norms"] == pytest.approx(norms, rel=1e-4)
        assert result["trained"].keys() == begun.keys()
        for weight, before in begun.items():
            found, wanted = result["trained"][weight], model.get_parameter(weight).detach()
            assert torch.equal(found, results[0]["trained"][weight]), f"{weight} is another one on each rank"
            assert (found - wanted).norm() < 5e-3 * (wanted - before).norm(), weight
