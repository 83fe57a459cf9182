"""The configs that come with the recipes are complete, one at least for each family and method, and run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kubetune_trainer.config import load_config
from kubetune_trainer.model.families import FAMILIES
from tests.cluster.paths import ROOT
from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import WORDS, write_answers, write_messages, write_model, write_preferences

CONFIGS = ROOT / "recipes" / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if "\ntraining:" in path.read_text())
LORA = [preset for preset in PRESETS if preset.endswith("_lora")]
GELU = {"hidden_act": "gelu_pytorch_tanh", "head_dim": 16}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILY: dict[str, dict[str, Any]] = {
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 8, "head_dim": 16},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_5": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "qwen3_30b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "gemma": {"architectures": ["GemmaForCausalLM"], **GELU},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": 16, **GELU, **WINDOWS},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 16,
        **GELU,
        **WINDOWS,
    },
    "phi4": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0},
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layer_interval": 2},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
}
"""What tells a family's config.json from Llama's, by how the names of its presets begin."""


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_complete_config(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = load_config(CONFIGS / f"{preset}.yaml")
    if preset.rpartition("_")[2] in {"lora", "qlora", "dora"}:
        assert config.tuning.lower() == preset.rpartition("_")[2]
    assert config.training.validate_every_steps


def test_every_recipe_and_tuning_has_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    configs = [load_config(CONFIGS / f"{preset}.yaml") for preset in PRESETS]
    recipes = {"SFT", "DPO", "ORPO", "SimPO", "KTO", "Distillation", "QAT"}
    assert {config.recipe for config in configs} == recipes
    assert {config.tuning for config in configs} == {"LoRA", "DoRA", "QLoRA", "Full"}


def test_the_page_about_models_names_every_family_and_its_preset() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs" / "models.md").read_text().splitlines() if "_lora |" in line]
    assert [row[0].removeprefix("| ") for row in rows] == list(FAMILIES)
    named = [preset for row in rows for preset in row[3].removesuffix(" |").split(", ")]
    assert sorted(named) == LORA


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_a_tiny_model_of_its_family(zygote: Zygote, tmp_path: Path, preset: str) -> None:
    text = (CONFIGS / f"{preset}.yaml").read_text()
    launched = re.search(rf"recipes/(\w+)\.py --config recipes/configs/{preset}\.yaml", text)
    assert launched, "the preset says how"
    values = yaml.safe_load(text)
    write_tiny(tmp_path / "model", preset)
    values["model"] = {"uri": {"location": f"file://{tmp_path}/model"}}
    if "distillation" in values:
        values["distillation"]["teacher"] = values["model"]
    [source] = values["dataset"]["sources"]
    source["uri"] = {"location": f"file://{write_data(tmp_path, source.get('format'))}"}
    del source["hub"]
    values["dataset"] |= {"max_sequence_length": 64, "validation": {"fraction": 0.2}}
    values["training"] |= {"epochs": None, "max_steps": 2, "global_batch_size": 2}
    values["workspace"] = {"uri": f"file://{tmp_path}/runs"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    gang = Gang.start(zygote, tmp_path / "ranks", tmp_path / "run.yaml", recipe=launched[1]).succeed()
    assert [event["step"] for event in gang.events("step")] == [1, 2]
    told = gang.events("validation")[-1]
    if "distillation" in values:
        mixed = 0.5 * told["divergence"] + 0.5 * told["crossEntropy"]
        assert told["validationLoss"] == pytest.approx(mixed, rel=1e-6)
    assert [output["name"] for output in gang.message()["outputs"]] == [each["name"] for each in values["outputs"]]


def write_tiny(folder: Path, preset: str) -> None:
    """Write a model of the preset's family that trains in a second."""
    family = max((name for name in FAMILY if preset.startswith(f"{name}_")), key=len, default="llama")
    changes = {"model_type": family, **FAMILY.get(family, {})}
    write_model(folder, intermediate_size=128, **changes)


def write_data(folder: Path, form: str | None) -> Path:
    """Write forty records of a format."""
    path = folder / "data.jsonl"
    if form == "Text":
        path.write_text("".join(json.dumps({"text": " ".join(WORDS[n % 7 :])}) + "\n" for n in range(40)))
    elif form == "Preference":
        write_preferences(path, samples=40, seed=1)
    elif form == "UnpairedPreference":
        write_answers(path, pairs=write_preferences(folder / "pairs.jsonl", samples=20, seed=1))
    else:
        write_messages(path, samples=40, seed=1)
    return path
