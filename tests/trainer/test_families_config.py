"""Every key of a `config.json` is read, refused by its name and value, or changes nothing, as transformers has it."""

import itertools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from kubetune_trainer.errors import DataError
from kubetune_trainer.model import ModelConfig, load_model
from kubetune_trainer.model.families import ELSEWHERE, UNSUPPORTED
from kubetune_trainer.model.families import FAMILIES as OURS
from kubetune_trainer.model.rope import PARAMETERS
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


YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 2.0}
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NOT_PHI3 = sorted(FAMILIES.keys() - {"phi3"})
REFUSED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "rope_scaling must be an object, got 'linear'": (sorted(FAMILIES), {"rope_scaling": "linear"}),
    "rope_parameters must be an object, got [1]": (sorted(FAMILIES), {"rope_parameters": [1]}),
    "original_max_position_embeddings must be an integer of at least 2, got '16'": (
        NOT_PHI3, {"rope_scaling": YARN | {"original_max_position_embeddings": "16"}},
    ),
    "original_max_position_embeddings must be an integer of at least 2, got -4": (
        sorted(FAMILIES),
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}, "original_max_position_embeddings": -4},
    ),
    "high_freq_factor must be more than low_freq_factor 4.0, got 4.0": (
        NOT_PHI3, {"rope_scaling": LLAMA3 | {"low_freq_factor": 4}},
    ),
    "truncate must be true or false, got 'no'": (NOT_PHI3, {"rope_scaling": YARN | {"truncate": "no"}}),
    "rope_theta must be more than 1 with yarn, got 1.0": (NOT_PHI3, {"rope_scaling": YARN | {"rope_theta": 1}}),
    "factor must be a positive number, got nan": (
        NOT_PHI3, {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}},
    ),
    "rope_theta must be a positive number, got inf": (sorted(FAMILIES), {"rope_theta": float("inf")}),
    "rope_local_base_freq must be a positive number, got -1": (["gemma3_text"], {"rope_local_base_freq": -1}),
    "rope_parameters.full_attention must be an object, got 'x'": (
        ["gemma3_text"], {"rope_parameters": {"full_attention": "x"}},
    ),
    "rope_parameters must be of full_attention and sliding_attention, got rope_type 'linear'": (
        ["gemma3_text"], {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
    ),
    "rms_norm_eps must be a positive number, got None": (sorted(FAMILIES), {"rms_norm_eps": None}),
    "rms_norm_eps must be a positive number, got '1e-6'": (sorted(FAMILIES), {"rms_norm_eps": "1e-6"}),
    "rms_norm_eps must be a positive number, got -1": (sorted(FAMILIES), {"rms_norm_eps": -1}),
    "query_pre_attn_scalar must be a positive number, got inf": (
        ["gemma2", "gemma3_text"], {"query_pre_attn_scalar": float("inf")},
    ),
    "tie_word_embeddings must be true or false, got 'false'": (sorted(FAMILIES), {"tie_word_embeddings": "false"}),
    "mlp_bias must be true or false, got 'no'": (["llama", "smollm3"], {"mlp_bias": "no"}),
    "use_sliding_window must be true or false, got 'no'": (
        ["qwen2", "qwen3", "qwen3_moe", "smollm3"], {"use_sliding_window": "no"},
    ),
    "norm_topk_prob must be true or false, got 'no'": (["qwen3_moe"], {"norm_topk_prob": "no"}),
    "max_window_layers must be an integer of at least 0, got None": (
        ["qwen2", "qwen3"], {"use_sliding_window": True, "max_window_layers": None},
    ),
    "layer_types must be sliding_attention or full_attention for each of 2 layers, got [['a'], {}]": (
        ["qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3"], {"layer_types": [["a"], {}]},
    ),
    "mlp_only_layers must be a list of layers, got ['1']": (["qwen3_moe"], {"mlp_only_layers": ["1"]}),
    "no_rope_layers must be a 0 or 1 for each of 2 layers, got ''": (["smollm3"], {"no_rope_layers": ""}),
    "rope_type must be default or longrope for phi3, got ['su']": (["phi3"], {"rope_scaling": {"type": ["su"]}}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "rule"), [(family, rule) for rule, (families, _) in REFUSED.items() for family in families]
)
def test_a_value_that_a_key_cannot_have_is_refused_by_key_and_value(family: str, rule: str) -> None:
    assert rule in refusal(written(family, **REFUSED[rule][1]))


JUNK: list[Any] = [
    None,
    "x",
    "",
    "1",
    True,
    0,
    1,
    -1,
    0.5,
    float("nan"),
    float("inf"),
    10**400,
    [],
    [["a"]],
    {},
    {"a": 1},
]
ROPES: list[dict[str, Any]] = [
    YARN, LLAMA3, {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
]  # fmt: skip


def junk_configs(family: str) -> Iterator[dict[str, Any]]:
    """A family's config with one key made into something that it may not be, at the top and inside its rope."""
    keys = {*written(family), *keys_of(family), *ELSEWHERE, *UNSUPPORTED, "layer_types", "mlp_only_layers"} | {
        "architectures", "rope_scaling", "rope_parameters", "rope_theta", "rope_local_base_freq", "no_rope_layers",
        "original_max_position_embeddings", "partial_rotary_factor", "sliding_window_pattern",
    }  # fmt: skip
    plain = written(family, **({"use_sliding_window": True} if "use_sliding_window" in keys else {}))
    for key, value in itertools.product(sorted(keys - {"num_hidden_layers"}), JUNK):
        yield plain | {key: value}
    for rope, key, value in itertools.product(ROPES, sorted(PARAMETERS), JUNK):
        yield plain | {"rope_scaling": rope | {key: value}}
    for kind, value in itertools.product(["full_attention", "sliding_attention"], JUNK):
        yield plain | {"rope_parameters": {kind: value}}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_of_a_key_crashes_or_turns_heads_by_what_is_no_number(family: str) -> None:
    for config in junk_configs(family):
        try:
            model = ModelConfig.from_hf(config)
        except DataError:
            continue
        for rope in {rope for rope in model.ropes if rope is not None}:
            found = rope.inverse_frequencies(head_dim=model.head_dim, length=8, device=torch.device("cpu"))
            assert found.isfinite().all(), config


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
