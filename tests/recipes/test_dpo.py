"""DPO, ORPO and SimPO: they learn, and their numbers depend on the rows of a step alone."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_config, write_model

STEPS = 8
RELATIVE = 1e-4
"""Sums are taken in another order on another number of ranks."""


def run(zygote: Zygote, place: Path, name: str, *overrides: str, ranks: int = 1, **blocks: Any) -> Gang:
    sources = [{"name": "pairs", "uri": {"location": f"file://{place}/preferences.jsonl"}}]
    training = {
        "max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-2, "precision": "FP32",
    }  # fmt: skip
    given: dict[str, Any] = {
        "recipe": "DPO",
        "dataset": {"sources": sources, "max_sequence_length": 64, "validation": {"fraction": 0.2}},
        "training": training,
    }
    config = write_config(place / f"{name}.yaml", **given | blocks)
    return Gang.start(zygote, place / name, config, *overrides, ranks=ranks, recipe="dpo")


def curve(gang: Gang) -> dict[int, list[float]]:
    told = ("loss", "gradNorm", "rewardsChosen", "rewardsRejected", "rewardsMargin", "rewardsAccuracy")
    return {event["step"]: [event[name] for name in told] for event in gang.succeed().events("step")}


GOLDEN = {
    "DPO": (0.69315, 0.60531),
    "ORPO": (15.72516, 15.18183),
    "SimPO": (0.75557, 0.81501),
}
"""Loss of the first and the last step with LoRA; a change of them is a change of the method."""


@pytest.mark.parametrize("recipe", ["DPO", "ORPO", "SimPO"])
@pytest.mark.parametrize("tuning", ["LoRA", "Full"])
def test_it_learns_the_same_however_a_step_is_divided(zygote: Zygote, tiny: Path, recipe: str, tuning: str) -> None:
    blocks: dict[str, Any] = {"recipe": recipe, "tuning": tuning} | ({"lora": None} if tuning == "Full" else {})
    name = f"{recipe}-{tuning}".lower()
    alone = curve(run(zygote, tiny, name, "training.micro_batch_size=4", **blocks))
    divided = curve(run(zygote, tiny, f"{name}-2", ranks=2, **blocks))
    assert list(alone) == list(range(1, STEPS + 1))
    if tuning == "LoRA":
        assert (alone[1][0], alone[STEPS][0]) == pytest.approx(GOLDEN[recipe], abs=2e-4)
    first_epoch, second_epoch = (sum(alone[step][4] for step in steps) for steps in (range(1, 5), range(5, 9)))
    assert second_epoch > first_epoch, "over the same pairs the margin grows"
    for step, values in alone.items():
        assert divided[step] == pytest.approx(values, rel=RELATIVE, abs=1e-6), f"step {step}"


@pytest.mark.parametrize("tuning", ["DoRA", "Full"])
def test_a_stopped_run_goes_on_with_the_numbers_that_it_would_have_had(zygote: Zygote, tiny: Path, tuning: str) -> None:
    blocks: dict[str, Any] = {"tuning": tuning, "lora": {"rank": 4, "dropout": 0.1} if tuning == "DoRA" else None}
    name = f"stopped-{tuning}".lower()
    whole = run(zygote, tiny, f"{name}-whole", **blocks).succeed().losses()
    first = run(zygote, tiny, name, "run.name=" + name, **blocks)
    first.wait_for(lambda event: event["event"] == "step" and event["step"] >= 3)
    first.kill(0, signal.SIGTERM)
    assert first.wait() == [75], first.stderr()
    second = run(zygote, tiny, f"{name}-again", "run.name=" + name, **blocks).succeed()
    assert second.events("resume")[0]["step"] == max(first.losses())
    assert {**first.losses(), **second.losses()} == whole


def test_the_script_refuses_a_config_for_another(zygote: Zygote, tiny: Path) -> None:
    gang = Gang.start(zygote, tiny / "wrong", write_config(tiny / "wrong.yaml"), recipe="dpo")
    assert gang.wait() == [64], gang.stderr()
    assert "recipe must be DPO or ORPO or SimPO for this script, got SFT" in gang.message()["message"]


def test_every_step_and_validation_tells_the_rewards(zygote: Zygote, tiny: Path) -> None:
    gang = run(zygote, tiny, "told", "training.max_steps=2").succeed()
    step, validation = gang.events("step")[-1], gang.events("validation")[-1]
    for event in (step, validation):
        assert event["rewardsMargin"] == pytest.approx(event["rewardsChosen"] - event["rewardsRejected"], abs=1e-9)
        assert 0 <= event["rewardsAccuracy"] <= 1
    assert validation["validationLoss"] > 0


def test_answers_are_measured_against_the_model_that_the_reference_names(zygote: Zygote, tiny: Path) -> None:
    other = tiny / "other"
    write_model(other, num_hidden_layers=1)
    default = curve(run(zygote, tiny, "measured", "training.max_steps=3"))
    named = {"uri": {"location": f"file://{tiny}/model"}}
    assert curve(run(zygote, tiny, "measured-1", "training.max_steps=3", dpo={"reference": named})) == default
    named = {"uri": {"location": f"file://{other}"}}
    run_blocks: dict[str, Any] = {"dpo": {"reference": named}, "outputs": [{"name": "merged", "type": "HuggingFace"}]}
    gang = run(zygote, tiny, "measured-2", "training.max_steps=3", **run_blocks)
    assert curve(gang)[1][0] != pytest.approx(default[1][0], abs=1e-3), "another reference, another margin"
    [told] = json.loads((tiny / "runs/measured-2/lineage.json").read_text())["otherModels"]
    assert (told["field"], told["location"]) == ("dpo.reference", f"file://{other}")


def test_a_reference_with_another_tokenizer_is_refused(zygote: Zygote, tiny: Path) -> None:
    strange = tiny / "strange"
    write_model(strange)
    tokenizer = json.loads((strange / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["\u0120zebra"] = tokenizer["model"]["vocab"].pop("\u0120cat")
    tokenizer["model"]["merges"] = []
    (strange / "tokenizer.json").write_text(json.dumps(tokenizer))
    gang = run(zygote, tiny, "strange-run", dpo={"reference": {"uri": {"location": f"file://{strange}"}}})
    assert gang.wait() == [64], gang.stderr()
    said = gang.message()["message"]
    assert "dpo.reference must have the tokenizer of the model, got '\u0120cat' as id None in place of" in said
