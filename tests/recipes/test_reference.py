"""DPO and KTO measure against the model before training, of which adapters that a run begins with are a part."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_config

STEPS = 6
TOKENS_TOO = {"tuning": "DoRA", "lora": {"train_tokens": ["<|sort|>", "<|user|>"]}}
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "on one rank": (1, "", {}),
    "whole on each rank": (2, "", TOKENS_TOO),
    "sharded": (2, "tests.recipes.nothing_whole", TOKENS_TOO),
    "in host memory": (2, "", {"training": {"cpu_offload": True}}),
    "split over a tensor group": (2, "", {"training": {"parallelism": {"tensor": 2}}}),
}
"""Ranks, what is changed in them, and blocks of the config."""


def begun_with_adapters(zygote: Zygote, place: Path, **blocks: Any) -> dict[str, Any]:
    """Blocks of a run that begins with the adapters of one of SFT, which is made here."""
    shared = {"tuning": blocks.get("tuning", "LoRA"), "lora": {"rank": 4, "alpha": 8, **blocks.get("lora", {})}}
    config = write_config(place / "sft.yaml", outputs=[{"name": "adapter", "type": "PEFT"}], **shared)
    Gang.start(zygote, place / "sft", config).succeed()
    adapter = {"uri": {"location": f"file://{place}/runs/sft/outputs/adapter"}}
    return {**shared, "lora": {**shared["lora"], "adapter": adapter}}


def run(
    zygote: Zygote, place: Path, name: str, *overrides: str, recipe: str = "DPO", ranks: int = 1, before: str = "",
    training: dict[str, Any] | None = None, **blocks: Any,
) -> Gang:  # fmt: skip
    settings = {
        "max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-2, "precision": "FP32",
    }  # fmt: skip
    config = write_config(
        place / f"{name}.yaml",
        recipe=recipe,
        dataset={
            "sources": [{"name": "pairs", "uri": {"location": f"file://{place}/preferences.jsonl"}}],
            "max_sequence_length": 64,
            "validation": {"fraction": 0.2},
        },
        training=settings | (training or {}),
        checkpoint={"every_steps": 2, "mode": "Sync"},
        **blocks,
    )
    return Gang.start(zygote, place / name, config, *overrides, ranks=ranks, recipe=recipe.lower(), before=before)


@pytest.mark.parametrize("case", CASES)
def test_the_first_adapters_are_the_reference_and_stay_it_after_a_kill(zygote: Zygote, place: Path, case: str) -> None:
    ranks, before, given = CASES[case]
    blocks: dict[str, Any] = given | begun_with_adapters(zygote, place, **given) | {"ranks": ranks, "before": before}
    whole = run(zygote, place, "whole", **blocks).succeed()
    first, last = whole.events("step")[0], whole.events("step")[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewardsMargin"] == pytest.approx(0, abs=1e-6)
    assert last["loss"] < first["loss"] - 0.01, "it learns, so what it learned is not in the reference"

    killed = run(zygote, place, "killed", "run.name=resumed", **blocks)
    killed.wait_for(lambda event: event["event"] == "step" and event["step"] >= 4)
    killed.kill(0)
    killed.wait()
    on = run(zygote, place, "resumed", **blocks).succeed()
    assert on.events("resume")
    assert killed.losses() | on.losses() == whole.losses()
    assert on.events("validation")[-1]["validationLoss"] == whole.events("validation")[-1]["validationLoss"]


def test_kto_begins_with_no_divergence_from_the_first_adapters(zygote: Zygote, place: Path) -> None:
    blocks = begun_with_adapters(zygote, place)
    gang = run(zygote, place, "kto", recipe="KTO", ranks=2, **blocks).succeed()
    first, last = gang.events("step")[0], gang.events("step")[-1]
    assert first["divergence"] == pytest.approx(0, abs=1e-6)
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert last["loss"] < 0.499, "it learns, so what it learned is not in the reference"
    begin = f"checkpoint.resume_from.uri=file://{place}/runs/kto/checkpoints/step-4"
    on = run(zygote, place, "kto-on", begin, recipe="KTO", ranks=2, **blocks).succeed()
    assert on.losses() == {step: gang.losses()[step] for step in (5, 6)}


def test_a_reference_that_is_named_is_asked_whatever_the_run_begins_with(zygote: Zygote, place: Path) -> None:
    blocks = begun_with_adapters(zygote, place)
    base = {"reference": {"uri": {"location": f"file://{place}/model"}}}
    gang = run(zygote, place, "named", "training.max_steps=1", dpo=base, **blocks).succeed()
    assert abs(gang.losses()[1] - math.log(2)) > 1e-3
