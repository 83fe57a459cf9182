"""Which models tensor parallelism can split; that it changes no number is held by test_parallel.py."""

from typing import Any

import pytest

from kubetune_trainer.errors import ConfigError
from kubetune_trainer.lora import apply_lora
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.weights import build_model
from kubetune_trainer.tensor_parallel import BY_INPUTS, BY_OUTPUTS, PLACES, check_divides, shape_of_rank
from tests.recipes.tiny import SHAPE

MIXTURE = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


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
