"""Training that ends once validations find the loss no lower: when, with which weights, and through interruptions."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kubetune_trainer.config import Training
from kubetune_trainer.names import COMPLETE_MARKER
from kubetune_trainer.report import last_step, set_last_step
from kubetune_trainer.training.step import ends_early, report_validation, save_due
from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import RECIPES, config_of

VALIDATION = "dataset.validation.fraction=0.25"
STOPPING: dict[str, Any] = {
    "max_steps": 20, "validate_every_steps": 2, "scheduler": "Constant",
    "early_stopping": {"patience": 2, "min_delta": 50.0},
}  # fmt: skip
"""By so much no validation is better than the first, after step 2: training ends after step 6."""


def model_of(place: Path, run: str = "run") -> bytes:
    return (place / "runs" / run / "outputs" / "merged" / "model.safetensors").read_bytes()


def checkpoints(place: Path) -> list[str]:
    folder = place / "runs" / "run" / "checkpoints"
    return sorted(path.parent.name for path in folder.glob(f"*/{COMPLETE_MARKER}"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_ends_early_and_leaves_the_weights_of_the_best_validation(
    zygote: Zygote, place: Path, recipe: str
) -> None:
    config = config_of(place, recipe, **STOPPING)
    ended = Gang.start(zygote, place / "ended", config, VALIDATION, "checkpoint.keep=1", ranks=2, recipe=recipe)
    ended.succeed()
    assert list(ended.losses()) == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in ended.events("validation")] == [2, 4, 6]
    [told] = ended.events("earlyStop")
    assert (told["step"], told["bestValidationStep"]) == (6, 2)
    assert checkpoints(place) == ["step-2", "step-6"]
    progress, first = ended.message()["progress"], ended.events("validation")[0]
    assert (progress["step"], progress["bestValidationStep"]) == (6, 2)
    assert progress["bestValidationLoss"] == first["validationLoss"]

    shorter = config_of(place, recipe, run="shorter", **{**STOPPING, "max_steps": 2})
    Gang.start(zygote, place / "shorter", shorter, VALIDATION, ranks=2, recipe=recipe).succeed()
    assert model_of(place) == model_of(place, "shorter")


@pytest.mark.parametrize("stop_at", [2, 5, 6])
def test_a_stop_changes_neither_the_end_nor_the_weights(zygote: Zygote, place: Path, stop_at: int) -> None:
    config = config_of(place, "finetune", **STOPPING)
    whole = config_of(place, "finetune", run="whole", **STOPPING)
    Gang.start(zygote, place / "whole", whole, VALIDATION).succeed()
    first = Gang.start(
        zygote, place / "first", config, VALIDATION, before="tests.recipes.stopped_in_a_step",
        environment={"TEST_STOP_AT": str(stop_at), "TEST_VALIDATION_SECONDS": "0"},
    )  # fmt: skip
    assert first.wait() == [75], first.stderr()
    again = Gang.start(zygote, place / "again", config, VALIDATION).succeed()
    told = [event["step"] for gang in (first, again) for event in gang.events("validation")]
    assert told == [2, 4, 6]
    assert max(again.losses(), default=6) == 6
    assert model_of(place) == model_of(place, "whole")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_validation_that_was_begun_is_left_to_the_next_attempt(zygote: Zygote, place: Path, recipe: str) -> None:
    config = config_of(place, recipe, max_steps=2, validate_every_steps=1)
    first = Gang.start(
        zygote, place / "first", config, VALIDATION, "training.micro_batch_size=1", ranks=2, recipe=recipe,
        before="tests.recipes.stopped_in_a_validation",
    )  # fmt: skip
    assert first.wait() == [75, 75], first.stderr()
    assert first.events("validation") == []
    assert checkpoints(place) == ["step-1"]
    again = Gang.start(zygote, place / "again", config, VALIDATION, ranks=2, recipe=recipe).succeed()
    assert [event["step"] for event in again.events("validation")] == [1, 2]


@pytest.mark.parametrize("file", [COMPLETE_MARKER, "__0_0.distcp"])
def test_the_last_weights_are_exported_where_the_best_are_gone(zygote: Zygote, place: Path, file: str) -> None:
    config = config_of(place, "finetune", **STOPPING)
    Gang.start(zygote, place / "first", config, VALIDATION).succeed()
    best = model_of(place)
    (place / "runs" / "run" / "checkpoints" / "step-2" / file).unlink()
    again = Gang.start(zygote, place / "again", config, VALIDATION).succeed()
    assert "the checkpoint of step 2, the best by validation, is damaged or not complete" in str(
        again.events("warning")
    )
    assert model_of(place) != best
    assert "bestValidationStep" not in again.message()["progress"]


def test_a_run_that_goes_on_without_stopping_early_exports_its_last_weights(zygote: Zygote, place: Path) -> None:
    config = config_of(place, "finetune", **STOPPING)
    Gang.start(zygote, place / "first", config, VALIDATION).succeed()
    best = model_of(place)
    longer = config_of(place, "finetune", max_steps=8, validate_every_steps=2, scheduler="Constant")
    again = Gang.start(zygote, place / "again", longer, VALIDATION).succeed()
    assert list(again.losses()) == [7, 8]
    assert "bestValidationStep" not in again.message()["progress"]
    assert model_of(place) != best


def test_a_run_that_begins_with_another_keeps_validations_of_its_own(zygote: Zygote, place: Path) -> None:
    other = config_of(place, "finetune", run="other", max_steps=2, validate_every_steps=1)
    Gang.start(zygote, place / "other", other, VALIDATION).succeed()
    config = config_of(place, "finetune", **STOPPING)
    taken = f"checkpoint.resume_from.uri=file://{place}/runs/other/checkpoints"
    ended = Gang.start(zygote, place / "ended", config, VALIDATION, taken).succeed()
    assert [event["step"] for event in ended.events("validation")] == [4, 6, 8]
    assert ended.message()["progress"]["bestValidationStep"] == 4


@pytest.mark.parametrize(
    ("min_delta", "best", "ends"),
    [
        (0.0, [1, 2, 3, 3, 5, 5, 5], [False, False, False, False, False, False, True]),
        (0.1, [1, 1, 3, 3, 3, 3, 3], [False, False, False, False, True, True, True]),
    ],
)
def test_patience_counts_validations_that_are_no_better_than_the_best(
    min_delta: float, best: list[int], ends: list[bool]
) -> None:
    stopping = {"patience": 2, "min_delta": min_delta}
    training = Training(max_steps=70, validate_every_steps=10, early_stopping=stopping)
    job: Any = SimpleNamespace(config=SimpleNamespace(training=training, title="run"), total_steps=70)
    set_last_step({})
    try:
        for number, loss in enumerate([1.0, 0.95, 0.85, 0.86, 0.84, 0.84, 0.9], start=1):
            report_validation(job, 10 * number, loss=loss)
            assert last_step()["bestValidationStep"] == 10 * best[number - 1]
            assert ends_early(job) == ends[number - 1]
            assert save_due(job, 10 * number) == (best[number - 1] == number or ends[number - 1])
    finally:
        set_last_step({})
