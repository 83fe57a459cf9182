"""The configs that come with the recipes are complete, one at least for each family, and run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kubetune_trainer.config import load_config
from kubetune_trainer.model.families import FAMILIES
from tests.cluster.paths import ROOT
from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_messages, write_model

CONFIGS = ROOT / "recipes" / "configs"
LORA = sorted(path.stem for path in CONFIGS.glob("*_lora.yaml"))
CHANGED = {"smollm2_qat": "Full", "smollm2_lora_qat": "LoRA", "smollm2_tokens": "LoRA"}
"""Presets that do something beside what their tuning says, which is another word in their name."""
TINY: dict[str, dict[str, Any]] = {
    "qwen3_30b_a3b_lora": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "smollm2_qlora": {"intermediate_size": 128},
    "smollm2_qat": {},
    "smollm2_lora_qat": {},
    "smollm2_tokens": {},
    "llama3_8b_qlora": {"intermediate_size": 128},
    "gemma3_1b_lora": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
"""A model of a preset's family that runs in seconds."""


@pytest.mark.parametrize("preset", [*LORA, "smollm2_qlora", "llama3_8b_qlora", *CHANGED])
def test_a_preset_is_a_complete_config(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = load_config(CONFIGS / f"{preset}.yaml")
    assert config.tuning == (CHANGED.get(preset) or {"lora": "LoRA", "qlora": "QLoRA"}[preset.rpartition("_")[2]])
    text = (CONFIGS / f"{preset}.yaml").read_text()
    assert f"recipes/finetune.py --config recipes/configs/{preset}.yaml" in text


def test_the_page_about_models_names_every_family_and_its_preset() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs" / "models.md").read_text().splitlines() if "_lora |" in line]
    assert [row[0].removeprefix("| ") for row in rows] == list(FAMILIES)
    named = [preset for row in rows for preset in row[3].removesuffix(" |").split(", ")]
    assert sorted(named) == LORA


@pytest.mark.parametrize("preset", TINY)
def test_a_preset_trains_a_tiny_model_of_its_family(zygote: Zygote, tmp_path: Path, preset: str) -> None:
    write_model(tmp_path / "model", **TINY[preset])
    write_messages(tmp_path / "pairs.jsonl", samples=40, seed=1)
    values = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text())
    values["model"] = {"uri": {"location": f"file://{tmp_path}/model"}}
    values["dataset"] |= {"sources": [{"name": "pairs", "uri": {"location": f"file://{tmp_path}/pairs.jsonl"}}]}
    values["dataset"] |= {"max_sequence_length": 64, "validation": {"fraction": 0.2}}
    values["training"] |= {"epochs": None, "max_steps": 2, "global_batch_size": 2}
    values["workspace"] = {"uri": f"file://{tmp_path}/runs"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    gang = Gang.start(zygote, tmp_path / "ranks", tmp_path / "run.yaml", ranks=1).succeed()
    assert gang.events("step")[-1]["step"] == 2
