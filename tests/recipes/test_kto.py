"""KTO: it learns, its numbers depend on the rows of a step alone, and pairs are two answers each."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kubetune_trainer.data.store import DataStore, DataWriter, Row
from recipes.kto import others_answers
from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_answers, write_config, write_model

STEPS = 8
RELATIVE = 1e-4
"""Sums are taken in another order on another number of ranks."""
GOLDEN = (0.25, 0.2376)
"""Loss of the first and the last step with LoRA; a change of them is a change of the method."""


def run(zygote: Zygote, place: Path, name: str, *overrides: str, ranks: int = 1, **blocks: Any) -> Gang:
    write_answers(place / "answers.jsonl", pairs=place / "preferences.jsonl")
    sources = [{"name": "answers", "uri": {"location": f"file://{place}/answers.jsonl"}}]
    training = {
        "max_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 1, "learning_rate": 1e-2, "precision": "FP32",
    }  # fmt: skip
    given: dict[str, Any] = {
        "recipe": "KTO",
        "dataset": {"sources": sources, "max_sequence_length": 64, "validation": {"fraction": 0.2}},
        "training": training,
    }
    config = write_config(place / f"{name}.yaml", **given | blocks)
    return Gang.start(zygote, place / name, config, *overrides, ranks=ranks, recipe="kto")


def curve(gang: Gang) -> dict[int, list[float]]:
    told = ("loss", "gradNorm", "rewardsChosen", "rewardsRejected", "rewardsMargin", "divergence")
    return {event["step"]: [event.get(name, 0.0) for name in told] for event in gang.succeed().events("step")}


@pytest.mark.parametrize("tuning", ["LoRA", "Full"])
def test_it_learns_the_same_however_a_step_is_divided(zygote: Zygote, tiny: Path, tuning: str) -> None:
    # With small weights of bad answers the model moves towards all answers, so that there is a divergence to compare.
    blocks: dict[str, Any] = {"tuning": tuning, "kto": {"undesirable_weight": 0.2}}
    blocks |= {"lora": None} if tuning == "Full" else {}
    whole = run(zygote, tiny, f"kto-{tuning}".lower(), "training.micro_batch_size=8", **blocks)
    alone = curve(whole)
    divided_gang = run(zygote, tiny, f"kto-{tuning}-2".lower(), ranks=2, **blocks)
    divided = curve(divided_gang)
    assert list(alone) == list(range(1, STEPS + 1))
    if tuning == "LoRA":
        assert (alone[1][0], alone[STEPS][0]) == pytest.approx(GOLDEN, abs=2e-4)
    assert alone[STEPS][4] > alone[1][4], "the margin grows"
    assert max(values[5] for values in alone.values()) > 0, "the model has left the reference"
    for step, values in alone.items():
        assert divided[step] == pytest.approx(values, rel=RELATIVE, abs=2e-6), f"step {step}"
    [held], [divided_held] = whole.events("validation"), divided_gang.events("validation")
    assert divided_held["validationLoss"] == pytest.approx(held["validationLoss"], rel=RELATIVE)


def test_a_stopped_run_goes_on_with_the_numbers_that_it_would_have_had(zygote: Zygote, tiny: Path) -> None:
    blocks: dict[str, Any] = {"lora": {"rank": 4, "dropout": 0.1}}
    whole = run(zygote, tiny, "kto-whole", **blocks).succeed().losses()
    first = run(zygote, tiny, "kto-stopped", "run.name=kto-stopped", **blocks)
    first.wait_for(lambda event: event["event"] == "step" and event["step"] >= 3)
    first.kill(0, signal.SIGTERM)
    assert first.wait() == [75], first.stderr()
    second = run(zygote, tiny, "kto-again", "run.name=kto-stopped", **blocks).succeed()
    assert {**first.losses(), **second.losses()} == whole


def test_pairs_are_a_good_answer_and_a_bad_one_each(zygote: Zygote, tiny: Path) -> None:
    answers = run(zygote, tiny, "kto-answers", "training.max_steps=2", "dataset.validation=null")
    sources = [{"name": "answers", "uri": {"location": f"file://{tiny}/preferences.jsonl"}}]
    dataset = {"sources": sources, "max_sequence_length": 64}
    pairs = run(zygote, tiny, "kto-pairs", "training.max_steps=2", dataset=dataset)
    assert curve(pairs) == curve(answers)


def test_data_of_one_answer_is_refused(zygote: Zygote, tiny: Path) -> None:
    write_answers(tiny / "kto-few.jsonl", pairs=tiny / "preferences.jsonl")
    lines = (tiny / "kto-few.jsonl").read_text().splitlines(keepends=True)
    prompt = json.loads(lines[0])["prompt"]
    of_one = [line for line in lines if json.loads(line)["prompt"] == prompt]
    assert len(of_one) == 2, "both answers of a pair"
    (tiny / "kto-one.jsonl").write_text("".join(of_one))
    one = [{"name": "one", "uri": {"location": f"file://{tiny}/kto-one.jsonl"}}]
    few = [{"name": "few", "uri": {"location": f"file://{tiny}/kto-few.jsonl"}}]
    for name, sources, held_out in (("sources", one, None), ("validation", few, {"sources": one})):
        dataset = {"sources": sources, "validation": held_out, "max_sequence_length": 64}
        gang = run(zygote, tiny, f"kto-one-{name}", dataset=dataset)
        assert gang.wait() == [65], gang.stderr()
        assert f"dataset.{name} must give recipe KTO answers to at least 2 prompts, got 1" in gang.message()["message"]


@pytest.mark.parametrize(
    ("prompts", "rows", "given"),
    [
        (range(10), [4, 0, 7], {4: 7, 0: 4, 7: 0}),
        (range(10), [1, 0, 0, 1], {1: 0, 0: 1}),  # where a pass ends and the next one begins
        (range(10), [4, 4], {4: 5}),
        (range(10), [9, 9], {9: 0}),
        ([0, 0, 1, 1, 2, 2], range(6), {0: 5, 1: 5, 2: 1, 3: 1, 4: 3, 5: 3}),  # both answers of pairs, as held out
        ([0, 0, 1, 1, 2, 2], [4, 5], {4: 0, 5: 0}),
        ([0, 0, 1, 1, 2, 2], [3, 2, 3], {3: 4, 2: 4}),
    ],
)
def test_no_answer_is_paired_with_its_own_prompt(
    prompts: Sequence[int], rows: Sequence[int], given: dict[int, int], tmp_path: Path
) -> None:
    with DataWriter(tmp_path / "rows") as writer:
        for number, prompt in enumerate(prompts):
            writer.append([Row.of([1, 2 + prompt, 50 + number], [False, False, True])])
    assert others_answers(rows, DataStore.open(tmp_path / "rows")) == given


def test_answers_are_measured_against_the_model_that_the_reference_names(zygote: Zygote, tiny: Path) -> None:
    write_model(tiny / "kto-other", num_hidden_layers=1)
    named = {"reference": {"uri": {"location": f"file://{tiny}/kto-other"}}}
    default = curve(run(zygote, tiny, "kto-default", "training.max_steps=1"))[1]
    first = curve(run(zygote, tiny, "kto-named", "training.max_steps=1", kto=named))[1]
    assert default[2:4] == [0, 0], "the model itself finds every answer worth nothing"
    assert abs(first[2]) > 1e-5
    assert abs(first[3]) > 1e-5
