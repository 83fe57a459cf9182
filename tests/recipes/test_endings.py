"""How every training recipe ends when it is told to stop, and when its numbers are no numbers any more."""

import time
from pathlib import Path

import pytest

from tests.recipes.gang import Gang, Zygote
from tests.recipes.stopped_in_a_step import VALIDATION_SECONDS
from tests.recipes.tiny import RECIPES, config_of

VALIDATION = "dataset.validation.fraction=0.25"
OVERFLOW = "training.learning_rate=1e39"
"""A step of this size is infinite in fp32."""


def remains(place: Path, folder: str) -> list[str]:
    return sorted(path.name for path in (place / "runs" / "run").glob(f"{folder}/*"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stop_is_saved_without_a_validation_that_is_due(zygote: Zygote, place: Path, recipe: str) -> None:
    config = config_of(place, recipe, max_steps=2, validate_every_steps=1)
    first = Gang.start(
        zygote, place / "first", config, VALIDATION, recipe=recipe, before="tests.recipes.stopped_in_a_step",
        environment={"TEST_STOP_AT": "1"},
    )  # fmt: skip
    first.wait_for(lambda event: event["event"] == "step")
    began = time.monotonic()
    assert first.wait() == [75], first.stderr()
    assert time.monotonic() - began < VALIDATION_SECONDS
    assert first.events("validation") == []
    assert remains(place, "checkpoints") == ["step-1"]
    again = Gang.start(zygote, place / "again", config, VALIDATION, recipe=recipe).succeed()
    assert [event["step"] for event in again.events("validation")] == [1, 2]


def test_a_stop_in_the_last_step_leaves_its_validation_to_the_next_attempt(zygote: Zygote, place: Path) -> None:
    config = config_of(place, "finetune", max_steps=2)
    first = Gang.start(
        zygote, place / "first", config, VALIDATION, before="tests.recipes.stopped_in_a_step",
        environment={"TEST_STOP_AT": "2"},
    )  # fmt: skip
    assert first.wait() == [75], first.stderr()
    again = Gang.start(zygote, place / "again", config, VALIDATION).succeed()
    [validation] = again.events("validation")
    assert again.message()["progress"]["validationLoss"] == validation["validationLoss"]


def test_a_finished_run_that_is_started_again_is_not_validated_again(zygote: Zygote, place: Path) -> None:
    config = config_of(place, "finetune", max_steps=1)
    first = Gang.start(zygote, place / "first", config, VALIDATION).succeed()
    again = Gang.start(zygote, place / "again", config, VALIDATION).succeed()
    assert (len(first.events("validation")), again.events("validation")) == (1, [])
    assert again.message()["progress"] == first.message()["progress"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_that_the_last_step_made_infinite_are_not_saved(zygote: Zygote, place: Path, recipe: str) -> None:
    config = config_of(place, recipe, max_steps=1)
    gang = Gang.start(zygote, place / "ranks", config, OVERFLOW, ranks=2, recipe=recipe)
    assert gang.wait() == [77, 77], gang.stderr()
    assert gang.message()["reason"] == "NonFiniteLoss"
    assert "after step 1 trained weights are NaN or infinite" in gang.message()["message"]
    assert remains(place, "checkpoints") == remains(place, "outputs") == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_validation_without_a_number_ends_the_run(zygote: Zygote, place: Path, recipe: str) -> None:
    config = config_of(place, recipe, max_steps=1, learning_rate=1e30)
    gang = Gang.start(zygote, place / "ranks", config, VALIDATION, ranks=2, recipe=recipe)
    assert gang.wait() == [77, 77], gang.stderr()
    assert "validation after step 1 has loss nan" in gang.message()["message"]
    assert remains(place, "checkpoints") == remains(place, "outputs") == []


def test_weights_of_a_checkpoint_that_are_no_numbers_are_not_exported(zygote: Zygote, place: Path) -> None:
    config = config_of(place, "finetune", max_steps=1)
    Gang.start(zygote, place / "first", config, ranks=2).succeed()
    again = Gang.start(zygote, place / "again", config, ranks=2, before="tests.recipes.spoiled_resume")
    assert again.wait() == [77, 77], again.stderr()
    assert again.events("output") == []


@pytest.mark.parametrize("mode", ["Async", "Sync"])
def test_checkpoints_without_room_in_scratch_are_given_up_and_only_the_last_one_ends_the_run(
    zygote: Zygote, place: Path, mode: str
) -> None:
    config = config_of(place, "finetune", max_steps=4)
    settings = ["checkpoint.every_steps=2", f"checkpoint.mode={mode}"]
    gang = Gang.start(zygote, place / "ranks", config, *settings, ranks=2, before="tests.recipes.full_scratch")
    assert gang.wait() == [69, 69], gang.stderr()
    assert gang.message()["reason"] == "StorageUnavailable"
    assert list(gang.losses()) == [1, 2, 3, 4]
    warnings = [event["message"] for event in gang.events("warning")]
    assert [message.split(" was given up")[0] for message in warnings] == [
        "checkpoint of step 2",
        "checkpoint of step 4",
    ]
    assert all("No space left on device" in message and "\n" not in message for message in warnings)
