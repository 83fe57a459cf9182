"""Every key of a `config.json` is read, refused by its name and value, or changes nothing, as transformers has it."""

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from kubetune_trainer.errors import DataError
from kubetune_trainer.model import ModelConfig, load_model
from kubetune_trainer.model.families import ELSEWHERE
from kubetune_trainer.model.families import FAMILIES as OURS
from tests.trainer.families import FAMILIES, close, make_folder
from tests.trainer.tiny import random_tokens

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "pad_token_id": 0,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}
DRAWN_ELSEWHERE = {*SIZES, "rope_parameters", "layer_types", "original_max_position_embeddings"} - {"pad_token_id"}
"""Sizes, and what tests/trainer/families.py draws as a whole; a random number would be another model, or none."""
FEW: dict[str, Any] = {
    "derandomize": True, "database": None, "deadline": None, "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}  # fmt: skip


def written(family: str, **changes: Any) -> dict[str, Any]:
    return SIZES | OWN.get(family, {}) | {"model_type": family} | changes


def class_of(family: str) -> Any:
    return getattr(transformers, f"{FAMILIES[family][0]}{'Text' if family == 'gemma3_text' else ''}Config")


def keys_of(family: str) -> list[str]:
    own = class_of(family)
    plain = {key for key in own.__annotations__ if isinstance(own.__dict__.get(key), int | float | str | None)}
    return sorted(plain - DRAWN_ELSEWHERE - {"model_type"})


def refusal(config: dict[str, Any]) -> str:
    """Why a config is refused; empty if it is not."""
    try:
        ModelConfig.from_hf(config)
    except DataError as error:
        return str(error)
    return ""


def other_value(draw: Any, value: Any) -> Any:
    """Something that the key was not."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return draw(st.sampled_from(["gelu", "relu", "gelu_pytorch_tanh"]).filter(lambda each: each != value))
    return draw(st.sampled_from([1, 3, 5, 0.25, 2.0, True]).filter(lambda each: each != value))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_of_transformers_is_read_or_refused_or_changes_nothing(family: str) -> None:
    @settings(max_examples=8, **FEW)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(keys_of(family)))
        value = other_value(data.draw, class_of(family).__dict__.get(key))
        config = written(family, **{key: value})
        if told := refusal(config):
            assert key in told
            assert repr(value) in told
            return
        sizes = {name: given for name, given in config.items() if name != "model_type"}
        try:
            class_of(family)(**sizes)
        except Exception:  # noqa: BLE001 (whatever transformers says of a value that it does not know)
            assume(False)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            reference = make_folder(Path(folder), family, sizes)
            tokens = random_tokens(1, 12)
            close(load_model(folder, dtype=torch.float32)(tokens), reference(tokens).logits, what=f"{key} {value}")

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_by_which_another_family_computes_something_else_is_refused(family: str) -> None:
    plain = ModelConfig.from_hf(written(family))

    @settings(max_examples=40, **FEW)
    @given(key=st.sampled_from(sorted(ELSEWHERE.keys() - OURS[family].reads)), value=st.sampled_from([2, 0.5, 7, True]))
    def check(key: str, value: Any) -> None:
        for neutral in ELSEWHERE[key]:
            assert ModelConfig.from_hf(written(family, **{key: neutral})) == plain
        assume(value not in ELSEWHERE[key])
        rule = re.escape(f"config.json: {key} must be {ELSEWHERE[key][0]!r}, got {value!r}")
        with pytest.raises(DataError, match=rule):
            ModelConfig.from_hf(written(family, **{key: value}))

    check()


@settings(max_examples=60, **FEW)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    key=st.from_regex(r"[a-z]{3,9}_(version|fixed|config|loss|id|note)", fullmatch=True),
    value=st.sampled_from([1, 0.5, True, "4.56", None, [1], {"a": 1}]),
)
def test_a_key_that_no_family_knows_changes_nothing(family: str, key: str, value: Any) -> None:
    assume(key not in class_of(family).__annotations__)
    assert ModelConfig.from_hf(written(family, **{key: value})) == ModelConfig.from_hf(written(family))


@settings(max_examples=30, **FEW)
@given(
    family=st.sampled_from(sorted(FAMILIES.keys() - {"phi3", "gemma3_text"})),
    key=st.sampled_from(["mrope_section", "short_mscale", "alpha", "full_attention", "scale"]),
    value=st.sampled_from([2, [16, 24, 24], {"rope_type": "linear"}]),
    spelling=st.sampled_from(["rope_scaling", "rope_parameters"]),
)
def test_a_rope_parameter_that_is_not_known_is_refused(family: str, key: str, value: Any, spelling: str) -> None:
    rope = {"rope_type": "linear", "factor": 2.0}
    plain = ModelConfig.from_hf(written(family, **{spelling: rope}))
    assert ModelConfig.from_hf(written(family, **{spelling: rope | {key: None}})) == plain
    with pytest.raises(
        DataError, match=re.escape(f"config.json: rope parameter {key} is not supported, got {value!r}")
    ):
        ModelConfig.from_hf(written(family, **{spelling: rope | {key: value}}))
